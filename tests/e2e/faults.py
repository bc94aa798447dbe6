"""A router that takes its process down in the middle of a step, for tests; a component from outside the package."""

import itertools
import os
import signal
import time
from pathlib import Path

from titan_moe.model.routing import ROUTERS, Router

BUILDS = itertools.count()


def router(top_k: int, *, how: str, at_call: int, marker: str) -> Router:
    """topk_softmax that on rank 1, at its `at_call`-th call, dies or hangs; once, for the file `marker` says it did.

    Call 0 is this one, while the model is built: the second of them, after that of the dry run.
    """
    route, calls = ROUTERS["topk_softmax"](top_k=top_k), 0

    def fail_at(call: int) -> None:
        if call == at_call and os.environ.get("RANK") == "1" and not Path(marker).exists():
            Path(marker).touch()
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)

    def failing(*args):
        nonlocal calls
        calls += 1
        fail_at(calls)
        return route(*args)

    if next(BUILDS) == 1:
        fail_at(0)
    return failing
