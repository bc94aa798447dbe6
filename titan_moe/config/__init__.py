"""The configuration: strict TOML and command line; the builders' signatures are the schema of components."""

from titan_moe.config.checks import cautions
from titan_moe.config.help import help_text
from titan_moe.config.load import load_config, merge_layers, to_toml
from titan_moe.config.saved import load_saved, read_saved
from titan_moe.config.schema import find_component
from titan_moe.config.sections import Config

__all__ = [
    "Config",
    "cautions",
    "find_component",
    "help_text",
    "load_config",
    "load_saved",
    "merge_layers",
    "read_saved",
    "to_toml",
]
