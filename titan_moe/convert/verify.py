"""Conversions check themselves: a probe batch through the model of each side.

Shapes: B batch, S sequence, V vocabulary, K top_k, L MoE layers.
"""

import contextlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_moe.checkpoint.store import read_model
from titan_moe.config import Config
from titan_moe.convert.hf.read_config import read_json
from titan_moe.convert.hf.safetensors import weight_files

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of a logit, relative to the largest: fp32 in another order of operations is below 1e-5
NAMES_CODE = ("auto_map", "implementation", "kernel", "transformers_weights")  # parts of keys of a config.json
SAME_ROUTING = 0.9  # share of choices: near-ties may fall otherwise, a wrong conversion changes most

Forward = Callable[
    [Tensor], tuple[Tensor, list[Tensor]]
]  # tokens (B, S) -> logits (B, S, V), experts (B, S, K) by layer


class Comparison(NamedTuple):
    """How far two models are apart on a probe batch."""

    logit_difference: float  # the largest, where all routing up to there is the same
    largest_logit: float
    same_routing: float  # share of identical choices, 1 for dense models


@torch.no_grad()
def compare(ours: Forward, theirs: Forward, vocab_size: int) -> Comparison:
    """Run two sequences of 64 random tokens through both models."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocab_size, (2, 64), generator=generator)
    logits_BSV, experts = ours(tokens_BS)
    their_logits_BSV, their_experts = theirs(tokens_BS)
    same_BS = torch.ones(tokens_BS.shape, dtype=torch.bool)
    shares = []
    for mine, other in zip(experts, their_experts, strict=True):
        same_BSK = mine.sort(-1).values == other.sort(-1).values
        same_BS &= same_BSK.all(-1)
        shares.append(same_BSK.float().mean().item())
    until_BS = same_BS.long().cumprod(1).bool()  # from the first other choice on, everything may differ
    difference_BS = (logits_BSV.float() - their_logits_BSV.float()).abs().amax(-1)
    if not bool(difference_BS.isfinite().all()):
        raise ValueError("the check of the conversion failed: a logit is not finite")
    difference = difference_BS[until_BS].max().item() if bool(until_BS.any()) else float("inf")
    share = sum(shares) / len(shares) if shares else 1.0
    return Comparison(difference, logits_BSV.abs().max().item(), share)


def check_equal(found: Comparison, library: str) -> None:
    """Say what the comparison found; ValueError where the models differ."""
    text = (
        f"largest logit difference to {library} {found.logit_difference:.2e} (largest logit "
        f"{found.largest_logit:.3g}), "
        f"identical routing decisions {100 * found.same_routing:.2f} %"
    )
    if found.logit_difference > TOLERANCE * max(1.0, found.largest_logit) or found.same_routing < SAME_ROUTING:
        raise ValueError(f"the check of the conversion failed: {text}; --no_verify leaves it out")
    logger.info("checked: %s", text)


def our_forward(model: nn.Module) -> Forward:
    """Ours, as `compare` wants it."""

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits_BSV, routings = model(tokens_BS)
        return logits_BSV, [routing.topk_experts.view(*tokens_BS.shape, -1) for routing in routings]

    return forward


def rounded_model(step_folder: Path, config: Config, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint with weights as `dtype` holds them but computing in fp32."""
    model = read_model(step_folder, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@contextlib.contextmanager
def weights_alone(hf_folder: Path) -> Iterator[Path]:
    """A folder with the safetensors of another, as links, and its config.json less what names code.

    transformers would follow an adapter to its base model, and load attention from the hub where config.json says so.
    """
    values = read_json(hf_folder / "config.json")
    plain = {key: value for key, value in values.items() if not any(word in key for word in NAMES_CODE)}
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        for file in weight_files(hf_folder):
            (made / file).symlink_to((hf_folder / file).absolute())
        (made / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        yield made


def check_against_transformers(step_folder: Path, hf_folder: Path, config: Config, dtype: torch.dtype) -> None:
    """Compare the model of a checkpoint with the one that transformers loads; says so where it is not installed."""
    try:
        import transformers
    except ImportError:
        logger.warning("not checked: transformers is not installed (pip install transformers, or --no_verify)")
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with weights_alone(hf_folder) as folder:
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise ValueError(f"the check of the conversion failed: transformers finds {what}: {sorted(found[what])[0]}")
    model = rounded_model(step_folder, config, dtype)
    check_equal(compare(our_forward(model), hf_forward(theirs.eval()), config.model.vocab_size), "transformers")


def check_against_megatron(step_folder: Path, folder: Path, config: Config, arguments: dict[str, Any]) -> None:
    """Compare the model of a checkpoint with the one that Megatron-core makes of `folder`, as `arguments` say.

    Says so where Megatron-core is not installed. It runs in a process of its own.
    """
    if importlib.util.find_spec("megatron") is None:
        logger.warning("not checked: megatron-core is not installed (pip install megatron-core, or --no_verify)")
        return
    model = read_model(step_folder, config)
    sizes = {"tied": config.model.tie_embeddings, "theta": config.model.rope_theta}
    given = {"folder": str(folder), "arguments": arguments, "vocab_size": config.model.vocab_size, **sizes}
    check_equal(compare(our_forward(model), megatron_forward(given), config.model.vocab_size), "Megatron-core")


def megatron_forward(given: dict[str, Any]) -> Forward:
    """Megatron-core's model, as `megatron_model` is told by `given`; ValueError where it cannot load or run it."""

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        with tempfile.TemporaryDirectory() as name:
            want, result = Path(name) / "given", Path(name) / "result"
            torch.save({**given, "tokens": tokens_BS}, want)
            command = [sys.executable, "-m", "titan_moe.convert.megatron.model", str(want), str(result)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
                raise ValueError(
                    f"the check of the conversion failed: Megatron-core: {last}; --no_verify leaves it out"
                )
            found = torch.load(result, weights_only=True)
        return found["logits"], found["experts"]

    return forward


def hf_forward(model: nn.Module) -> Forward:
    """A model of transformers, its routers' choices noted by hooks."""

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        experts: list[Tensor] = []
        gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
        hooks = [
            gate.register_forward_hook(
                lambda module, inputs, output: experts.append(output[2].view(*tokens_BS.shape, -1))
            )
            for gate in gates
        ]
        try:
            return model(tokens_BS).logits, experts
        finally:
            for hook in hooks:
                hook.remove()

    return forward
