"""The command lines of scripts/convert_*.py."""

from pathlib import Path

from titan_moe.convert.hf.convert import from_hf, to_hf
from titan_moe.convert.megatron.convert import MOE_NORM, from_megatron, to_megatron
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.remote import local_or_url

NO_VERIFY = "leave out the comparison with the other library on a probe batch (it holds both models in memory)"


def convert_to_hf(args: list[str]) -> int:
    """Export a checkpoint to Hugging Face."""
    parser = Parser("convert_to_hf.py", "Write a checkpoint as a Hugging Face model.")
    parser.add_argument("checkpoint", type=local_or_url, help="step folder, dump folder (its latest step), or a URL")
    parser.add_argument("out_dir", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=list(DTYPES), default="", help="type of the weights (the checkpoint's)")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="GB of a file of weights at most (5)")
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    parser.add_trust()
    options = parser.parse_args(args)

    # Not `<= 0`, which would let NaN pass.
    if not options.shard_gb > 0:
        raise ValueError(f"--shard_gb ({options.shard_gb}) must be above 0")
    command.init_logging(world.read_world())
    to_hf(
        options.checkpoint,
        options.out_dir,
        dtype=options.dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        verify=not options.no_verify,
        trust_components=options.trust_components,
    )
    return 0


def convert_from_hf(args: list[str]) -> int:
    """Import a Hugging Face model as a checkpoint."""
    parser = Parser("convert_from_hf.py", "Write a Hugging Face model as a checkpoint of weights.")
    parser.add_argument("hf_dir", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out_checkpoint", type=Path, help="dump folder to make, or a step folder (.../step-N)")
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    parser.add_trust()
    options = parser.parse_args(args)
    command.init_logging(world.read_world())
    trusted = options.trust_components
    from_hf(options.hf_dir, options.out_checkpoint, verify=not options.no_verify, trust_components=trusted)
    return 0


def convert_to_megatron(args: list[str]) -> int:
    """Export a checkpoint to Megatron-core."""
    # The norm before the experts has another name in each layer spec, and loading finds tensors by their names alone:
    # hence --spec.
    parser = Parser("convert_to_megatron.py", "Write a checkpoint as Megatron-core's torch_dist.")
    parser.add_argument("checkpoint", type=local_or_url, help="step folder, dump folder (its latest step), or a URL")
    parser.add_argument("out_dir", type=Path, help="folder to make")
    parser.add_argument("--spec", choices=list(MOE_NORM), default="te", help="layer spec that will load it (te)")
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    parser.add_trust()
    options = parser.parse_args(args)
    command.init_logging(world.read_world())
    to_megatron(
        options.checkpoint,
        options.out_dir,
        spec=options.spec,
        verify=not options.no_verify,
        trust_components=options.trust_components,
    )
    return 0


def convert_from_megatron(args: list[str]) -> int:
    """Import a Megatron-core model as a checkpoint."""
    # Megatron's folders don't say which model they hold, so the user gives its configuration.
    parser = Parser("convert_from_megatron.py", "Write Megatron-core's torch_dist as a checkpoint of weights.")
    parser.add_argument("megatron_dir", type=Path, help="folder with .metadata and *.distcp (iter_...)")
    parser.add_argument("out_checkpoint", type=Path, help="dump folder to make, or a step folder (.../step-N)")
    parser.add_argument("--job.config_file", dest="config_file", default="", help="TOML file that describes the model")
    parser.add_argument("--no_verify", action="store_true", help=NO_VERIFY)
    parser.add_trust()
    options = parser.parse_args(args)
    command.init_logging(world.read_world())
    from_megatron(
        options.megatron_dir,
        options.out_checkpoint,
        config_file=options.config_file,
        verify=not options.no_verify,
        trust_components=options.trust_components,
    )
    return 0
