"""What command lines share."""

import argparse
from typing import NoReturn

TRUST = "--trust_components"


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake in the command line as a ValueError of one line; no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (--help lists the arguments)")

    def add_trust(self) -> None:
        """Add --trust_components, for commands that build from the configuration of a checkpoint."""
        self.add_argument(
            TRUST,
            nargs="+",
            default=[],
            metavar="MODULE",
            help="modules or packages whose code the checkpoint's configuration may name and run here (none)",
        )
