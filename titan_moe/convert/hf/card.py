"""The model card of an exported checkpoint: its shape, its training, its losses."""

import json
from pathlib import Path
from typing import Any

from titan_moe.checkpoint.folder import read_manifest
from titan_moe.checkpoint.state import read_common
from titan_moe.config import Config
from titan_moe.config.differences import texts
from titan_moe.dump_folder import changes_on_the_way
from titan_moe.markdown import code, plain


def model_card(step_folder: Path, config: Config, model_type: str) -> str:
    """README.md in Markdown, with the numbers of the checkpoint and, if it is there, of its run's metrics.jsonl."""
    # The configuration may be a stranger's: `plain` and `code` keep its texts from being Markdown or HTML.
    manifest = read_manifest(step_folder)
    extra = read_common(step_folder)["extra"]
    model, moe, training, data = config.model, config.moe, config.training, config.data
    experts = (
        f"{moe.num_experts} experts of width {moe.expert_dim}, {moe.top_k} of them for each token"
        + (f", beside {moe.num_shared_experts} shared ones" if moe.num_shared_experts else "")
        + f"; router {code(config.router.name)}"
        if moe.num_experts
        else f"dense feed-forward networks of width {model.ffn_dim}"
    )
    lr = config.optimizer.arguments.get("lr")

    # One row of the table each. What the run changed on its way stands among them, because all others are of its end.
    facts = {
        "Parameters": f"{manifest['model']['elements']:,}",
        "Shape": f"{model.num_layers} layers of width {model.dim}, {model.num_heads} heads",
        "Experts": experts,
        "Optimizer steps": f"{manifest['step']} of {training.steps} planned",
        "Tokens seen": f"{extra['num_tokens']:,}" if "num_tokens" in extra else "not recorded",
        "Data": " ".join(code(name) for name in (data.dataset, *(Path(path).name for path in data.path))),
        "Sequence length": str(training.seq_len),
        "Optimizer": f"{code(config.optimizer.name)}, learning rate {plain(str(lr))}",
        "Balancing": ", ".join(f"{code(name)} {_plain(arguments)}" for name, arguments in config.balancer.items())
        or "none",
        **_changes(step_folder),
        **_losses(step_folder, manifest["step"]),
    }

    # The head between dashes is YAML for the hub.
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    about = f"\n{plain(config.job.description)}\n" if config.job.description else ""
    tags = "tags: [moe]" if moe.num_experts else "tags: [dense]"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{tags}\n---\n\n"
        f"# {plain(Path(config.job.dump_folder).name)}\n{about}\n"
        f"A language model trained with titan_moe and exported as `{model_type}`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "`titan_moe.toml` is the configuration of the run. The model is as good as its data: it was trained to predict "
        "text, not to follow instructions, and nothing was done about what it may say.\n"
    )


def _plain(arguments: dict[str, Any]) -> str:
    return " ".join(plain(f"{key}={value}") for key, value in arguments.items())


def _changes(step_folder: Path) -> dict[str, str]:
    """What the run changed on its way, as a fact of the table."""
    way = [f"after step {step}: {'; '.join(texts(changes))}" for step, changes in changes_on_the_way(step_folder)]
    return {"Changed on the way": plain(". ".join(way))} if way else {}


def _losses(step_folder: Path, step: int) -> dict[str, str]:
    """The losses of the run at this step or the last before it, where its metrics are in the dump folder."""
    metrics = step_folder.absolute().parent.parent / "metrics.jsonl"
    if not metrics.exists():
        return {"Losses": "not recorded"}

    # Validations are not at every step, and a step may have no finite loss: the last that has one counts.
    last: dict[str, dict[str, Any]] = {}
    with open(metrics, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # a line that a kill or a full disk tore
                continue
            if record["step"] <= step and record.get("loss") is not None:  # null: not finite
                last[record["kind"]] = record
    labels = {
        "train": "Training loss (nats/token)",
        "validation": "Validation loss (nats/token)",
    }
    return {
        label: f"{last[kind]['loss']:.4f} at step {last[kind]['step']}"
        for kind, label in labels.items()
        if kind in last
    } or {"Losses": "not recorded"}
