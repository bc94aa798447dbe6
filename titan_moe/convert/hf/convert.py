"""To and from Hugging Face: a folder with config.json, safetensors, tokenizer files and a model card.

Tensors are read, changed and written one at a time, so that memory is that of the largest and not of the model.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_moe.build import build_model
from titan_moe.checkpoint import resolve_checkpoint
from titan_moe.checkpoint.lazy import Lazy, LazyTensors, cast, read_lazily, stacked, unstacked
from titan_moe.checkpoint.store import read_config
from titan_moe.config import Config, load_config, load_saved, to_toml
from titan_moe.convert.fold import check_without_factors, fold_tensors, without_factors
from titan_moe.convert.hf.architectures import Architecture, architecture_of, hf_config, shared_width
from titan_moe.convert.hf.card import model_card
from titan_moe.convert.hf.read_config import arguments_of, is_further, read_json
from titan_moe.convert.hf.safetensors import read_folder, write_shards
from titan_moe.convert.hf.tensor_map import FP32, Pair, TensorMap, tensor_map
from titan_moe.convert.hf.tokenizer import exported_files, imported_files
from titan_moe.convert.new_folder import new_checkpoint, new_folder
from titan_moe.convert.verify import check_against_transformers, warn_of_mask
from titan_moe.data.tokenizer_files import to_text
from titan_moe.model.wrappers import is_balancer_state
from titan_moe.runtime.dtypes import DTYPES

logger = logging.getLogger(__name__)
OUR_CONFIG = "titan_moe.toml"  # the run's configuration, which config.json has no place for
IGNORED = (".rotary_emb.inv_freq",)  # old exports have them; they follow from the configuration


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model of `config`, without what balancers keep for training."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not is_balancer_state(name)}


def model_tensors(step_folder: Path) -> LazyTensors:
    """The model's tensors of a checkpoint, by their names in the model, without what balancers keep for training."""
    tensors = {name: tensor for name, tensor in read_lazily(step_folder).items() if not is_balancer_state(name)}
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}


def to_hf(
    checkpoint: Path | str,
    out: Path,
    *,
    dtype: str = "",
    shard_bytes: int = 5 * 10**9,
    verify: bool = True,
    trust_components: Sequence[str] = (),
) -> None:
    """Write the model of a checkpoint as the folder `out` of a Hugging Face model.

    `dtype` of DTYPES, empty: the checkpoint's; files of weights have at most `shard_bytes`; `trust_components` as in
    `load_model`. Raises ValueError for models that no architecture there represents, and when the check finds other
    logits; then nothing is left.
    """
    # What can't be represented is refused before the folder is made.
    step_folder = resolve_checkpoint(checkpoint)
    config = read_config(step_folder, trust_components)
    warn_of_mask(config)
    architecture = architecture_of(config)
    ours = fold_tensors(config, model_tensors(step_folder))
    table = tensor_map(config, architecture, has_bias=any(name.endswith("expert_bias") for name in ours))
    dtype = dtype or str(ours["tok_embeddings.weight"].dtype).removeprefix("torch.")
    theirs = exported(table, ours, DTYPES[dtype], architecture)

    # The check is inside of the block, on the files as written: where it fails the folder never gets its name.
    with new_folder(out) as folder:
        write_shards(folder, theirs, shard_bytes)
        files, special_ids = exported_files(step_folder, config)
        files["config.json"] = to_text(hf_config(config, architecture, dtype=dtype, special_ids=special_ids))
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        (folder / OUR_CONFIG).write_text(to_toml(without_factors(config)), encoding="utf-8")
        (folder / "README.md").write_text(model_card(step_folder, config, architecture.model_type), encoding="utf-8")
        if verify:
            check_against_transformers(step_folder, folder, config, DTYPES[dtype])
    logger.info("wrote %s (%s, %s)", out, architecture.model_type, dtype)


def exported(table: TensorMap, ours: LazyTensors, dtype: torch.dtype, architecture: Architecture) -> LazyTensors:
    """The tensors of the other side in `dtype`, in the order of the map; ValueError for a bias that it can't have."""
    # A bias of 0 may be left out. One that loss_free has moved chooses experts, and without it others would be chosen.
    for name in table.blank:
        if bool(ours[name].load().any()):
            raise ValueError(
                f"{name} is not 0, but {architecture.model_type} has no selection bias: of the routers with loss_free "
                "only 'sigmoid' has a counterpart in Hugging Face"
            )

    # The experts are rows of one tensor here and matrices there; a scale (temperature) moves into the weight.
    theirs: LazyTensors = {}
    for pair in table.pairs:
        parts = unstacked(ours[pair.ours]) if pair.by_row else [ours[pair.ours]]
        theirs |= {name: _scaled(part, pair.scale) for name, part in zip(pair.theirs, parts, strict=True)}
    theirs |= {name: _zero(shape) for name, shape in table.zeros.items()}
    theirs |= {name: ours[source] for name, source in table.copies.items()}
    return {name: t if name.endswith(FP32) else cast(t, dtype, name) for name, t in theirs.items()}


def from_hf(source: Path, out: Path, *, verify: bool = True, trust_components: Sequence[str] = ()) -> None:
    """Write the Hugging Face model in the folder `source` as a checkpoint: `out` is a dump folder, or `.../step-N`.

    Weights become float32. `trust_components` as in `load_model`, for the configuration that `to_hf` leaves in the
    folder. Raises ValueError that says what of the model cannot be represented; then nothing is left.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give one that holds config.json and safetensors")

    # The architecture is derived from our configuration once more, not taken from config.json: so the map is the one
    # that an export of this model would use.
    theirs, values = read_folder(source), read_json(source / "config.json")
    theirs = {name: tensor for name, tensor in theirs.items() if not is_further(name, values)}
    config = _config_of(source, values, theirs, trust_components)
    check_without_factors(config)
    files = {"config.toml": to_toml(config), **imported_files(source)}
    architecture = architecture_of(config)
    shapes = shapes_of(config)
    table = tensor_map(config, architecture, has_bias=any(name.endswith("expert_bias") for name in shapes))
    ours = imported(table, theirs, shapes, source)
    tensors = {f"model.{name}": tensor for name, tensor in ours.items()}

    if (further := values.get("num_nextn_predict_layers") or 0) > 0:
        logger.warning("left out: %d layers after the last, which predict the tokens after the next", further)

    # The check is inside of the block: where it fails the checkpoint never gets its name.
    with new_checkpoint(out, 0, tensors, files=files) as step_folder:
        if verify:
            check_against_transformers(step_folder, source, config, theirs["model.embed_tokens.weight"].dtype)
    logger.info("wrote %s", out)


def _config_of(source: Path, values: dict[str, Any], theirs: LazyTensors, trust_components: Sequence[str]) -> Config:
    """Our configuration: that of the run if the folder holds it, with what config.json says of the model."""
    # An export adds what the architecture demands and ours has not, as zeros: they stand for none.
    arguments = arguments_of(source, values)
    if _all_zero(theirs, ".mlp.shared_expert", "down_proj.weight"):
        arguments |= {"moe.num_shared_experts": 0, "moe.shared_expert_dim": 0, "moe.shared_expert_gate": False}
    if arguments.get("moe.shared_expert_gate") and _all_zero(theirs, ".mlp.shared_expert_gate", ".weight"):
        arguments["moe.shared_expert_gate"] = False
    if arguments["model.attention_bias"] and _all_zero(theirs, ".self_attn.", "_proj.bias"):
        arguments["model.attention_bias"] = False

    # config.json has the last word on the model, since it describes the weights; all else is the run's, or a default
    # with which an imported model can be trained on.
    run_config = source / OUR_CONFIG
    if run_config.exists():
        run = load_saved(run_config, trust_components=trust_components, with_data=False)
        arguments = _like_the_run(arguments, run, values["model_type"])
    else:
        arguments |= {"training.seq_len": min(values.get("max_position_embeddings", 2048), 4096)}
        arguments |= {"training.mixed_precision_param": "float32"}
        if (source / "tokenizer.json").exists():
            arguments["data.tokenizer"] = str(source / "tokenizer.json")
        if values["model_type"] == "glm4_moe":
            arguments["balancer.loss_free"] = True

    # As words of a command line, so that they pass the same checks as a user's.
    words: list[str] = []
    for key, value in arguments.items():
        words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    try:
        if run_config.exists():
            return load_saved(run_config, words, trust_components=trust_components, with_data=False)
        return load_config(words)
    except ValueError as error:
        raise ValueError(f"{source / 'config.json'}: {error}") from error


def _all_zero(theirs: LazyTensors, part: str, end: str) -> bool:
    """Whether there are tensors with such names, and all are 0."""
    names = [name for name in theirs if part in name and name.endswith(end)]
    return bool(names) and not any(bool(theirs[name].load().any()) for name in names)


def _like_the_run(arguments: dict[str, Any], run: Config, model_type: str) -> dict[str, Any]:
    """The arguments without those that say what the run's configuration says in other words.

    So the configuration comes back from an export as it was.
    """
    remaining = dict(arguments)
    if remaining["model.num_kv_heads"] == (run.model.num_kv_heads or run.model.num_heads):
        del remaining["model.num_kv_heads"]
    if model_type in ("mixtral", "olmoe"):  # have no dense width
        del remaining["model.ffn_dim"]
    if run.model.channels == _head_dim(arguments):
        del remaining["model.head_dim"]
    if (width := _shared_width(arguments)) and width == shared_width(run):
        del remaining["moe.num_shared_experts"], remaining["moe.shared_expert_dim"]
    if model_type == "glm4_moe" and run.model.tie_embeddings:
        remaining["model.tie_embeddings"] = True  # is written untied with a copy, which `imported` compares
    if run.router.name == "switch" and remaining.get("router.name") == "softmax_topk":
        del remaining["router.name"]
    return remaining


def _head_dim(arguments: dict[str, Any]) -> int:
    return arguments["model.head_dim"] or arguments["model.dim"] // arguments["model.num_heads"]


def _shared_width(arguments: dict[str, Any]) -> int:
    one = arguments.get("moe.shared_expert_dim") or arguments.get("moe.expert_dim", 0)
    return arguments.get("moe.num_shared_experts", 0) * one


def imported(table: TensorMap, theirs: LazyTensors, shapes: dict[str, tuple[int, ...]], source: Path) -> LazyTensors:
    """Our tensors in fp32; ValueError where theirs are missing, left over, of another shape, or not 0 as is needed."""
    # Every tensor of theirs must have a place: one that was ignored would be a part of the model that ours lacks.
    wanted = [name for pair in table.pairs for name in pair.theirs]
    if missing := [name for name in wanted if name not in theirs]:
        raise ValueError(f"{source} lacks {_listed(missing)}")
    known = {*wanted, *table.zeros, *table.copies}
    if "lm_head.weight" not in known and "tok_embeddings.weight" in shapes:
        table.copies["lm_head.weight"] = "tok_embeddings.weight"  # some write it although it is tied
        known.add("lm_head.weight")
    if unknown := [name for name in theirs if name not in known and not name.endswith(IGNORED)]:
        raise ValueError(f"{source} holds tensors that a model of ours has no place for: {_listed(unknown)}")

    # Those that have no counterpart of ours are compared with what our model does without them: 0, or a copy.
    for name in table.zeros:
        if name in theirs and bool(theirs[name].load().any()):
            raise ValueError(f"{source}: {name} is not 0, which a model of ours cannot represent")
    ours = {pair.ours: _import(pair, theirs) for pair in table.pairs}
    for name, copied in table.copies.items():
        if name in theirs and not torch.equal(theirs[name].load().float(), ours[copied].load()):
            raise ValueError(f"{source}: {name} differs from the embeddings, but the two are tied")
    ours |= {name: _zero(shapes[name]) for name in table.blank}

    # The weights' headers and config.json are two files, and need not agree.
    for name, shape in shapes.items():
        if ours[name].shape != shape:
            raise ValueError(f"{source}: {name} is of shape {ours[name].shape}, config.json makes it {shape}")
    return {name: ours[name] for name in shapes}


def _import(pair: Pair, theirs: LazyTensors) -> Lazy:
    """One tensor of ours from its counterpart, or from those of all experts."""
    parts = [theirs[name] for name in pair.theirs]
    unequal = next((name for name in pair.theirs if theirs[name].shape != parts[0].shape), None)
    if unequal:
        raise ValueError(f"{unequal} is of shape {theirs[unequal].shape}, {pair.theirs[0]} of {parts[0].shape}")
    whole = stacked(parts) if pair.by_row else parts[0]
    return _scaled(cast(whole, torch.float32, pair.ours), 1 / pair.scale)


def _scaled(tensor: Lazy, scale: float) -> Lazy:
    return tensor if scale == 1 else tensor.map(lambda value: value * scale)


def _zero(shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape, torch.float32, lambda: torch.zeros(shape))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
