"""The progress of a study: one table that stays in place on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from titan_moe.sinks.console import clock
from titan_moe.study.grid import Run, point_text
from titan_moe.study.runs import Status, status

ORDER = ("running", "failed", "interrupted", "finished", "new")
STYLES = {"running": "bold cyan", "finished": "green", "failed": "bold red", "interrupted": "yellow", "new": "dim"}


def statuses(runs: Sequence[Run]) -> list[Status]:
    """How far each run has come."""
    return [status(run.folder, run.config.training.steps) for run in runs]


def counts(found: Sequence[Status]) -> str:
    """`3 finished, 2 running, 7 new`."""
    total = {state: sum(one.state == state for one in found) for state in ORDER}
    return ", ".join(f"{total[state]} {state}" for state in ORDER if total[state]) or "no runs"


def seconds_left(runs: Sequence[Run], found: Sequence[Status], jobs: int) -> float | None:
    """Estimate from the steps that are left and the mean time of the last steps seen, None before the first."""
    speeds = [one.train["step_seconds"] for one in found if one.train and "step_seconds" in one.train]
    left = sum(r.config.training.steps - s.step for r, s in zip(runs, found, strict=True) if s.state != "failed")
    return left * sum(speeds) / len(speeds) / jobs if speeds else None


def table(title: str, runs: Sequence[Run], found: Sequence[Status], jobs: int, height: int) -> Any:
    """Runs and how far they are, at most `height` rows: those that are going or failed come first."""
    from rich.markup import escape
    from rich.table import Table

    left = seconds_left(runs, found, jobs)
    caption = counts(found) + (f"; about {clock(left)} left" if left else "")
    made = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left", expand=False)
    made.add_column("run", overflow="fold", ratio=1)
    for name in ("seed", "state", "step", "loss", "validation", "MaxVio", "tokens/s"):
        made.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    rows = sorted(zip(runs, found, strict=True), key=lambda row: ORDER.index(row[1].state))
    shown = rows if len(rows) <= height else rows[: height - 1]
    for run, one in shown:
        train, validation = one.train or {}, one.validation or {}
        made.add_row(
            escape(point_text(run.point)),
            str(run.seed),
            f"[{STYLES[one.state]}]{one.state}[/]",
            f"{one.step}/{run.config.training.steps}",
            _number(train.get("loss"), ".4f"),
            _number(validation.get("loss"), ".4f"),
            _number(train.get("maxvio_batch"), ".3f"),
            _number(train.get("tokens_per_second"), ",.0f"),
        )
    if len(shown) < len(rows):
        made.add_row(f"and {len(rows) - len(shown)} more", *[""] * 7)
    return made


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


Show = Callable[..., None]


@contextmanager
def progress(title: str, runs: Sequence[Run], jobs: int, every: float = 1.0) -> Iterator[tuple[Show, Show]]:
    """Give two functions: one to call often, which keeps the table new, and one for a run that has just ended."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    drawn = 0.0

    def draw() -> Any:
        return table(title, runs, statuses(runs), jobs, max(5, console.height - 6))

    if not console.is_terminal:

        def said(run: Run) -> None:
            one = status(run.folder, run.config.training.steps)
            loss = f"validation loss {one.validation['loss']:.4f}" if one.validation else one.message
            print(f"{one.state:<11} {point_text(run.point)}, seed {run.seed}: {loss}", flush=True)

        yield (lambda *_: None), said
        return
    with Live(draw(), console=console, auto_refresh=False) as live:

        def tick(*_: Any) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= every:
                live.update(draw(), refresh=True)
                drawn = time.monotonic()

        yield tick, lambda _: live.update(draw(), refresh=True)
        live.update(draw(), refresh=True)
