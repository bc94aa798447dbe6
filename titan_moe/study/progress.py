"""The progress of a study: one table that stays in place on a terminal, lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from titan_moe.runtime.progress import clock
from titan_moe.study.grid import Run, point_text
from titan_moe.study.runs import Status, status

ORDER = ("running", "failed", "interrupted", "finished", "new")
STYLES = {"running": "bold cyan", "finished": "green", "failed": "bold red", "interrupted": "yellow", "new": "dim"}


def statuses(runs: Sequence[Run]) -> list[Status]:
    """How far each run has come."""
    return [status(run.folder, run.config.training.steps) for run in runs]


def counts(run_statuses: Sequence[Status]) -> str:
    """`3 finished, 2 running, 7 new`."""
    total = {state: sum(run_status.state == state for run_status in run_statuses) for state in ORDER}
    return ", ".join(f"{total[state]} {state}" for state in ORDER if total[state]) or "no runs"


def seconds_left(runs: Sequence[Run], run_statuses: Sequence[Status], jobs: int) -> float | None:
    """Steps that are left times the mean time of the last step of each run, over `jobs`; None before the first step."""
    speeds = [s.train["step_seconds"] for s in run_statuses if s.train and "step_seconds" in s.train]
    left = sum(r.config.training.steps - s.step for r, s in zip(runs, run_statuses, strict=True) if s.state != "failed")
    return left * sum(speeds) / len(speeds) / jobs if speeds else None


def table(title: str, runs: Sequence[Run], run_statuses: Sequence[Status], jobs: int, height: int) -> Any:
    """The table of runs and how far they are, of at most `height` rows."""
    from rich.markup import escape
    from rich.table import Table

    # Titles and points are users' text: rich would take brackets in them for markup.
    left = seconds_left(runs, run_statuses, jobs)
    caption = counts(run_statuses) + (f"; about {clock(left)} left" if left else "")
    view = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left", expand=False)
    view.add_column("run", overflow="fold", ratio=1)
    for name in ("seed", "state", "step", "loss", "validation", "MaxVio", "tokens/s"):
        view.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)

    # A terminal may have fewer lines than a study has runs: what goes on, or went wrong, comes first.
    rows = sorted(zip(runs, run_statuses, strict=True), key=lambda row: ORDER.index(row[1].state))
    shown = rows if len(rows) <= height else rows[: height - 1]
    for run, run_status in shown:
        train, validation = run_status.train or {}, run_status.validation or {}
        view.add_row(
            escape(point_text(run.point)),
            str(run.seed),
            f"[{STYLES[run_status.state]}]{run_status.state}[/]",
            f"{run_status.step}/{run.config.training.steps}",
            _number(train.get("loss"), ".4f"),
            _number(validation.get("loss"), ".4f"),
            _number(train.get("maxvio_batch"), ".3f"),
            _number(train.get("tokens_per_second"), ",.0f"),
        )
    if len(shown) < len(rows):
        view.add_row(f"and {len(rows) - len(shown)} more", *[""] * 7)
    return view


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


Show = Callable[..., None]


@contextmanager
def progress(title: str, runs: Sequence[Run], jobs: int, every: float = 1.0) -> Iterator[tuple[Show, Show]]:
    """Show the progress of the runs; yield a function to call often, and one to call with a run that has just ended.

    On a terminal the table is drawn again at most every `every` seconds.
    """
    from rich.console import Console
    from rich.live import Live

    # Six lines are the table's own: title, head, frame and caption.
    console = Console()
    drawn = 0.0

    def draw() -> Any:
        return table(title, runs, statuses(runs), jobs, max(5, console.height - 6))

    # A file or a pipe cannot be drawn over: a line for each run that ends is all that it gets.
    if not console.is_terminal:

        def print_end(run: Run) -> None:
            s = status(run.folder, run.config.training.steps)
            text = f"validation loss {s.validation['loss']:.4f}" if s.validation else s.message
            print(f"{s.state:<11} {point_text(run.point)}, seed {run.seed}: {text}", flush=True)

        yield (lambda *_: None), print_end
        return

    # Each drawing reads the ends of all runs' files, so the caller's ticks are thinned out.
    with Live(draw(), console=console, auto_refresh=False) as live:

        def tick(*_: Any) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= every:
                live.update(draw(), refresh=True)
                drawn = time.monotonic()

        yield tick, lambda _: live.update(draw(), refresh=True)
        live.update(draw(), refresh=True)
