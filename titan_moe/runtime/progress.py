"""How far long work is, and how long it will take: a bar on a terminal, else a line in the log now and then."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Generator

LOG_SECONDS = 30.0  # between two lines of a log
log = logging.getLogger(__name__)

Show = Callable[[float | None, str], None]  # (the part that is done, 0 to 1, None: unknown; what else to say)


def clock(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextlib.contextmanager
def progress_of(work: str, *, show: bool = True) -> Generator[Show, None, None]:
    """A function that shows on standard error how far `work` is, with the time left; nothing unless `show`.

    The time left goes by what was done since the first call, so that a resumed work's earlier part does not count.
    """
    first: tuple[float, float] | None = None  # the part that was done then, and the clock
    logged = time.monotonic()

    def text_of(done: float | None, more: str) -> str:
        nonlocal first
        if done is None:
            return more
        first = first or (done, time.monotonic())
        began, start = first
        if done <= began:
            return more
        seconds = (time.monotonic() - start) / (done - began) * (1 - done)
        return f"{more}{more and ', '}{clock(seconds)} left"

    with contextlib.ExitStack() as stack:
        bar = None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            bar = stack.enter_context(tqdm(total=1.0, leave=False, bar_format=work, dynamic_ncols=True))

        # Set before the bar moves, which is when it is drawn, ten times a second at most.
        def update(done: float | None, more: str = "") -> None:
            nonlocal logged
            text = text_of(done, more)
            if bar is not None:
                bar.bar_format = (
                    f"{work}  {{desc}}" if done is None else f"{work} {{percentage:3.0f}}% {{bar}} {{desc}}"
                )
                bar.set_description_str(text, refresh=False)
                bar.update((done or 0.0) - bar.n)
            elif show and time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                log.info("%s: %s%s", work, "" if done is None else f"{done:.0%}, ", text)

        yield update
