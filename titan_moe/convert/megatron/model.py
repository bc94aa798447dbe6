"""Megatron-core's own model on a CPU, in a process of its own: `python -m titan_moe.convert.megatron.model GIVEN OUT`.

GIVEN is a file of torch.save: `folder` (torch_dist), `arguments` (of its TransformerConfig), `vocab_size`, `tied`,
`theta`, `tokens` (B, S). OUT gets `logits` (B, S, V) and `experts`, the choices (B, S, K) of each MoE layer. Megatron
asks for a GPU in places that have no need of it. What stands in for one here would mislead every other user of torch,
hence a process of its own.

Shapes: B sequences, S positions, V vocabulary, E experts, K top_k.
"""

import contextlib
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from titan_moe.checkpoint.metadata import METADATA, read_metadata
from titan_moe.convert.megatron.convert import MOE_NORM, write_backend

NOT_WEIGHTS = ("_extra_state", "tokens_per_expert", "checkpoint_version", "iteration")


def prepare(rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
    """Let Megatron run in this process on the CPU, as one of `world_size` ranks."""
    # Where it asks for a GPU it gets the CPU.
    dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=world_size)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as tensor_random
    from megatron.core.transformer.moe import moe_utils

    # The Transformer Engine's product in the router needs a GPU, and so do the forked random states of one: nothing is
    # random in evaluation.
    moe_utils.te_general_gemm = None
    tracker: Any = tensor_random.CudaRNGStatesTracker
    tracker.fork = lambda self, name=None: contextlib.nullcontext()
    parallel_state.initialize_model_parallel()


def build(arguments: dict[str, Any], *, vocab_size: int, tied: bool, theta: Any) -> Any:
    """Build a stock GPTModel of torch's own modules, in evaluation mode."""
    # Where some layers are dense and some have experts each layer has its own spec, else all share one.
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    silu = torch.nn.functional.silu
    config = TransformerConfig(**arguments, activation_func=silu, use_cpu_initialization=True)
    if "moe_layer_freq" in arguments:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        experts, qk_norm = config.num_moe_experts, config.qk_layernorm
        spec = get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, qk_layernorm=qk_norm, normalization="RMSNorm"
        )
    layers: Any = spec  # GPTModel takes a block of specs as well, though its annotation says one
    return GPTModel(
        config,
        layers,
        vocab_size=vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=theta,
        share_embeddings_and_output_weights=tied,
    ).eval()


@contextlib.contextmanager
def tensors_alone(folder: Path, metadata: Metadata) -> Iterator[Path]:
    """A folder with links to the tensors of another and nothing else of it: Megatron's loader would run its pickles."""
    with tempfile.TemporaryDirectory() as name:
        links = Path(name)
        for file in {place.relative_path for place in metadata.storage_data.values()}:
            (links / file).symlink_to((folder / file).absolute())
        (links / METADATA).write_bytes(pickle.dumps(metadata))
        write_backend(links)
        yield links


def load(model: Any, folder: Path) -> None:
    """Load the weights by Megatron's own loader; ValueError where the folder and the model differ."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # The layers here have the names of torch's modules, a folder may have those of the Transformer Engine.
    metadata = read_metadata(folder)
    saved = metadata.state_dict_metadata
    state = {name: value for name, value in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    for value in state.values():
        te_key = value.key.replace(MOE_NORM["local"], MOE_NORM["te"])
        if value.key not in saved and te_key in saved:
            value.key = te_key
    with tensors_alone(folder, metadata) as links:
        loaded = dist_checkpointing.load(state, str(links), strict=StrictHandling.RAISE_UNEXPECTED)

    # Not strict in loading, because states that are no weights may be missing; all others are named.
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    if wrong := [name for name in [*missing, *unexpected] if not name.endswith(NOT_WEIGHTS)]:
        raise ValueError(f"Megatron-core's model and the folder differ in {wrong[0]}")


@torch.no_grad()
def run(model: Any, tokens_BS: Tensor) -> dict[str, Any]:
    """`logits` (B, S, V), and `experts` (B, S, K) that the router of each MoE layer chose."""
    # A router returns a mask of the chosen experts: the largest entries of it tell their numbers.
    batch, length = tokens_BS.shape
    experts: list[Tensor] = []

    def note(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen_SBE = output[1].view(length, batch, -1)  # (S B, E) -> (S, B, E)
        experts.append(chosen_SBE.transpose(0, 1).float().topk(module.topk).indices)

    for name, module in model.named_modules():
        if name.endswith(".mlp.router"):
            module.register_forward_hook(note)

    # torch's attention in Megatron takes a mask of what it must not see.
    future = torch.triu(torch.ones(length, length), 1).bool()[None, None]  # (1, 1, S, S)
    positions = torch.arange(length)[None].expand_as(tokens_BS)
    return {"logits": model(tokens_BS, positions, future), "experts": experts}


def main(given: Path, result: Path) -> None:
    """Load the model that `given` describes, run its tokens, and write the outputs to `result`."""
    warnings.simplefilter("ignore")
    request = torch.load(given, weights_only=True)
    prepare()
    model = build(request["arguments"], vocab_size=request["vocab_size"], tied=request["tied"], theta=request["theta"])
    load(model, Path(request["folder"]))
    torch.save(run(model, request["tokens"]), result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
