"""Megatron-core on a CPU, in a process of its own: `python -m tests.interop.megatron_side save|load FOLDER RESULT`.

`save` makes a model with random weights by FOLDER/transformer_config.json and saves it to FOLDER as torch_dist; `load`
loads it from there. Both write the logits of RESULT's tokens into RESULT. Stubs stand in for what asks for a GPU.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def prepare(rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
    """A process without a GPU, as far as Megatron can tell."""
    dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=world_size)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_: None
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random as tensor_random
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    tensor_random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    parallel_state.initialize_model_parallel()


def build(arguments: dict[str, Any], vocab_size: int, tied: bool, theta: int) -> Any:
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
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=theta,
        share_embeddings_and_output_weights=tied,
    ).eval()


def main(verb: str, folder: Path, result: Path) -> None:
    warnings.simplefilter("ignore")
    prepare()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    given = torch.load(result)
    arguments = json.loads((folder / "transformer_config.json").read_text())
    model = build(arguments, given["vocab_size"], given["tied"], given["theta"])
    if verb == "save":
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if not value.is_floating_point() or "_extra_state" in name or "tokens_per_expert" in name:
                    continue
                noise = torch.randn(value.shape, generator=generator)
                is_norm, is_bias = "norm" in name, "expert_bias" in name
                value.copy_(
                    1 + 0.2 * noise if is_norm else 0.2 * noise if is_bias else noise * 1.2 / value.shape[-1] ** 0.5
                )
        dist_checkpointing.save(model.sharded_state_dict(), str(folder))
    else:
        state = {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        missing, unexpected = model.load_state_dict(loaded, strict=False)
        not_weights = ("_extra_state", "tokens_per_expert", "checkpoint_version", "iteration")
        wrong = [name for name in [*missing, *unexpected] if not name.endswith(not_weights)]
        assert not wrong, wrong
    tokens = given["tokens"]
    future = torch.triu(torch.ones(tokens.shape[1], tokens.shape[1]), 1).bool()[None, None]
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    with torch.no_grad():
        torch.save({"logits": model(tokens, positions, future)}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
