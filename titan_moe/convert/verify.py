"""Conversions check themselves: a probe batch goes through the model of each side.

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
from titan_moe.convert.fold import fold_parameters, without_factors
from titan_moe.convert.hf.read_config import is_further, read_json
from titan_moe.convert.hf.safetensors import weight_files

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of a logit, relative to the largest: fp32 in another order of operations is below 1e-5
NAMES_CODE = ("auto_map", "implementation", "kernel", "transformers_weights")  # in keys of a config.json that load code
SAME_ROUTING = 0.9  # share of choices: near-ties may fall otherwise, a wrong conversion changes most

# tokens (B, S) -> logits (B, S, V) and, of each MoE layer, the experts chosen (B, S, K)
Forward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class Comparison(NamedTuple):
    """How far two models are apart on a probe batch."""

    logit_difference: float  # the largest, among positions up to which all routing is the same
    largest_logit: float
    same_routing: float  # share of identical choices, 1 for dense models


@torch.no_grad()
def compare(ours: Forward, theirs: Forward, vocab_size: int) -> Comparison:
    """Run two sequences of 64 random tokens through both models; ValueError for a logit that is not finite."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocab_size, (2, 64), generator=generator)
    logits_BSV, experts = ours(tokens_BS)
    their_logits_BSV, their_experts = theirs(tokens_BS)

    # The same experts in any order: libraries sort a token's choices differently, and their sum is the same.
    same_BS = torch.ones(tokens_BS.shape, dtype=torch.bool)
    shares = []
    for our_choice_BSK, their_choice_BSK in zip(experts, their_experts, strict=True):
        same_BSK = our_choice_BSK.sort(-1).values == their_choice_BSK.sort(-1).values
        same_BS &= same_BSK.all(-1)  # (B, S, K) -> (B, S)
        shares.append(same_BSK.float().mean().item())

    # Where two scores are nearly equal, round-off may choose another expert. Through attention that changes every later
    # position of the sequence, so logits are compared only before the first such choice.
    until_BS = same_BS.long().cumprod(1).bool()
    difference_BS = (logits_BSV.float() - their_logits_BSV.float()).abs().amax(-1)  # (B, S, V) -> (B, S)
    if not bool(difference_BS.isfinite().all()):
        raise ValueError("the check of the conversion failed: a logit is not finite")
    difference = difference_BS[until_BS].max().item() if bool(until_BS.any()) else float("inf")
    share = sum(shares) / len(shares) if shares else 1.0
    return Comparison(difference, logits_BSV.abs().max().item(), share)


def check_equal(comparison: Comparison, library: str) -> None:
    """Log the comparison; ValueError where the models differ."""
    difference, largest, same_routing = comparison
    text = (
        f"largest logit difference to {library} {difference:.2e} (largest logit {largest:.3g}), "
        f"identical routing decisions {100 * same_routing:.2f} %"
    )
    if difference > TOLERANCE * max(1.0, largest) or same_routing < SAME_ROUTING:
        raise ValueError(f"the check of the conversion failed: {text}; --no_verify leaves it out")
    logger.info("checked: %s", text)


def warn_of_mask(config: Config) -> None:
    """Say of a model that was trained inside documents that other libraries' models see all of a sequence."""
    if config.data.document_mask:
        logger.warning(
            "the model was trained with data.document_mask, which the export does not know: whoever runs it on several "
            "documents in one sequence has to keep them apart"
        )


def our_forward(model: nn.Module) -> Forward:
    """A model of ours, as `compare` wants it: without a mask of documents, which other libraries' models have not."""
    setattr(model, "document_mask", False)  # noqa: B010

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        logits_BSV, routings = model(tokens_BS)
        return logits_BSV, [routing.topk_experts.view(*tokens_BS.shape, -1) for routing in routings]

    return forward


def rounded_model(step_folder: Path, config: Config, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint with weights rounded to `dtype`, as an export has them, that computes in fp32."""
    # An export rounds weights that have the parametrization's factors in them. In fp32 nothing is rounded, so that what
    # was folded is compared with the model that multiplies.
    if dtype == torch.float32:
        return read_model(step_folder, config)
    model = read_model(step_folder, without_factors(config))
    fold_parameters(config, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@contextlib.contextmanager
def weights_alone(hf_folder: Path) -> Iterator[Path]:
    """A folder with links to the safetensors of another, and its config.json without the keys that load code.

    Given the folder itself, transformers would follow an adapter's file to its base model, and load an attention from
    the hub if config.json says so.
    """
    values = read_json(hf_folder / "config.json")
    plain = {key: value for key, value in values.items() if not any(word in key for word in NAMES_CODE)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in weight_files(hf_folder):
            (folder / file).symlink_to((hf_folder / file).absolute())
        (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        yield folder


def check_against_transformers(step_folder: Path, hf_folder: Path, config: Config, dtype: torch.dtype) -> None:
    """Compare the model of a checkpoint with the one that transformers loads; a warning where it is not installed."""
    try:
        import transformers
    except ImportError:
        logger.warning("not checked: transformers is not installed (pip install transformers, or --no_verify)")
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    # The folder may be a stranger's: nothing of it may be fetched or run, its weights are read and no more.
    with weights_alone(hf_folder) as folder:
        theirs, differences = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )

    # transformers fills what is missing with random numbers and goes on.
    values = read_json(hf_folder / "config.json")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [name for name in differences[kind] if not is_further(str(name), values)]:
            raise ValueError(f"the check of the conversion failed: transformers finds {kind}: {sorted(names)[0]}")

    # Both compute in fp32 with weights of the export's type: what is left of a difference is the order of operations.
    model = rounded_model(step_folder, config, dtype)
    check_equal(compare(our_forward(model), hf_forward(theirs.eval()), config.model.vocab_size), "transformers")


def check_against_megatron(step_folder: Path, folder: Path, config: Config, arguments: dict[str, Any]) -> None:
    """Compare the model of a checkpoint with the one that Megatron-core makes of `folder`, as `arguments` say.

    A warning where Megatron-core is not installed. It runs in a process of its own.
    """
    if importlib.util.find_spec("megatron") is None:
        logger.warning("not checked: megatron-core is not installed (pip install megatron-core, or --no_verify)")
        return
    model = read_model(step_folder, config)
    sizes = {"tied": config.model.tie_embeddings, "theta": config.model.rope_theta}
    given = {"folder": str(folder), "arguments": arguments, "vocab_size": config.model.vocab_size, **sizes}
    check_equal(compare(our_forward(model), megatron_forward(given), config.model.vocab_size), "Megatron-core")


def megatron_forward(given: dict[str, Any]) -> Forward:
    """Megatron-core's model, which `given` describes (`titan_moe.convert.megatron.model`).

    Its calls raise ValueError where Megatron-core can't load or run it.
    """

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Without a GPU, Megatron needs stand-ins in torch that would mislead every other user of it in this process.
        with tempfile.TemporaryDirectory() as name:
            request, result = Path(name) / "given", Path(name) / "result"
            torch.save({**given, "tokens": tokens_BS}, request)
            command = [sys.executable, "-m", "titan_moe.convert.megatron.model", str(request), str(result)]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)

            # The last line of a traceback is the error, and that is the user's one line.
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
                raise ValueError(
                    f"the check of the conversion failed: Megatron-core: {last}; --no_verify leaves it out"
                )
            outputs = torch.load(result, weights_only=True)
        return outputs["logits"], outputs["experts"]

    return forward


def hf_forward(model: nn.Module) -> Forward:
    """A model of transformers, as `compare` wants it."""

    def forward(tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        # Its models give out no choices of experts, but their gates do: logits, weights, experts (B S, K).
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
