"""Data sets of one's own: `dataset = "examples.data:sums"` is read by index, `"examples.data:walks"` is a stream."""

import random
from collections.abc import Iterator, Sequence
from typing import Any


def sums(*, count: int = 2000, digits: int = 3) -> Sequence[str]:
    """Sums as text, each a document: tokenized once, and found in the cache from then on."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10**digits), draw.randrange(10**digits)) for _ in range(count)]
    return [f"{a} + {b} = {a + b}" for a, b in pairs]


class Walks:
    """Random walks without an end. The state is all that the next document depends on."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.number = length, seed, 0

    def __iter__(self) -> Iterator[str]:
        """Yield the documents from the state on."""
        while True:
            draw = random.Random(f"{self.seed} {self.number}")
            self.number += 1  # before the document is given: what the state then says is the next one
            yield " ".join(draw.choice(("north", "east", "south", "west")) for _ in range(self.length))

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in plain numbers and strings."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.number = state["number"]


def walks(*, length: int = 40, seed: int = 0) -> Walks:
    """Walks of `length` steps, read while training."""
    return Walks(length, seed)
