"""What command lines share."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake in the command line as a ValueError of one line; no abbreviations."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message} (--help lists the arguments)")
