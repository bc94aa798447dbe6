"""Run a torchtitan job on a CPU, for development: python -m tests.torchtitan.train --module M --config C ...

The arguments are torchtitan's. On GPUs use torchtitan's own entry point, `torchrun -m torchtitan.train`: nothing of
this module is needed there. Attention is causal over whole sequences, because FlexAttention has no backward on a CPU.
"""

import sys

from torchtitan_patches.version import check_version


def main() -> None:
    """Prepare the CPU, read the configuration as torchtitan does, and train."""
    check_version()
    from tests.torchtitan import cpu

    cpu.prepare()
    import torch
    from torchtitan.config import ConfigManager
    from torchtitan.tools.logging import init_logger

    init_logger()
    config = ConfigManager().parse_args()
    config.override.imports.append("tests.torchtitan.cpu_overrides.attention")
    trainer = config.build()
    try:
        trainer.train()
    finally:
        trainer.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith("torchtitan_patches"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
