"""Megatron-core as a maker of models, in a process of its own: `python -m tests.interop.megatron_side FOLDER ...`.

It makes a model with random weights by FOLDER/transformer_config.json, saves it to FOLDER as torch_dist and writes the
logits of the tokens in FOLDER.pt into that; the same for each folder.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from titan_moe.convert.megatron.model import build, prepare, run


def main(folders: list[Path]) -> None:
    warnings.simplefilter("ignore")
    prepare()
    for folder in folders:
        make(folder, folder.with_suffix(".pt"))
    dist.destroy_process_group()


def make(folder: Path, result: Path) -> None:
    from megatron.core import dist_checkpointing

    given = torch.load(result)
    arguments = json.loads((folder / "transformer_config.json").read_text())
    model = build(arguments, vocab_size=given["vocab_size"], tied=given["tied"], theta=given["theta"])
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
    torch.save(run(model, given["tokens"]), result)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
