"""The report: results.jsonl, table.md, figures as PNG and SVG, and report.html, one file that needs nothing else."""

import datetime
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.config import to_toml
from titan_moe.files import write_atomic
from titan_moe.markdown import plain
from titan_moe.study import theme
from titan_moe.study.analysis import (
    AxisInfo,
    Entry,
    Summary,
    axes_of,
    best,
    number_text,
    paired_difference,
    read_entries,
    short_name,
    summarize,
)
from titan_moe.study.curves import curve_panels, load_panel
from titan_moe.study.figures import Panel, measure_panels
from titan_moe.study.grid import Run, value_text
from titan_moe.study.measures import COLUMNS, MEASURES
from titan_moe.study.progress import counts
from titan_moe.study.runs import write_results
from titan_moe.study.spec import Study


class Page(NamedTuple):
    """What a report is about."""

    title: str
    mirrors: str
    description: str
    labels: Mapping[str, str]  # axis id -> its name
    report: Sequence[str]  # measures to draw against the axes
    curves: Sequence[str]


def study_report(study: Study, runs: Sequence[Run], refresh: float | None = None) -> Path:
    """Write the report of a study into its folder; with `refresh` the page loads itself anew after these seconds."""
    section = study.section
    page = Page(
        section.title or study.name,
        section.mirrors,
        section.description,
        {axis.id: axis.label for axis in study.axes},
        section.report,
        section.curves,
    )
    return write_report(page, runs, study.folder, refresh)


def write_report(page: Page, runs: Sequence[Run], folder: Path, refresh: float | None = None) -> Path:
    """Write everything that a report consists of; the path of report.html."""
    entries = read_entries(runs)
    summaries = summarize(entries)
    axes = axes_of(page.labels, runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.jsonl", [entry.result for entry in entries])
    columns = [c for c in dict.fromkeys((*COLUMNS, *page.report)) if any(c in s.measures for s in summaries)]
    if all(s.measures.get("loss") == s.measures.get("best_loss") for s in summaries) and "best_loss" in columns:
        columns.remove("best_loss")
    cells = table(summaries, axes, columns)
    write_atomic(folder / "table.md", markdown(cells))
    with theme.style():
        sections = draw(page, summaries, axes, folder / "figures")
    context = {
        "page": page,
        "table": cells,
        "sections": sections,
        "points": [point_context(summary, axes) for summary in summaries],
        "unfinished": [e for e in entries if e.status.state != "finished"],
        "best": headline(summaries, axes),
        "counts": counts([entry.status for entry in entries]),
        "machines": sorted({str(e.result["device"]) for e in entries if e.result["device"]}),
        "commits": sorted({str(e.result["git_commit"])[:12] for e in entries if e.result["git_commit"]}),
        "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "refresh": refresh,
        "colours": list(zip(theme.LIGHT, theme.DARK, strict=True)),
    }
    write_atomic(folder / "report.html", render(context))
    return folder / "report.html"


def render(context: Mapping[str, Any]) -> str:
    """Fill in the page's template."""
    from jinja2 import Environment, StrictUndefined

    template = files("titan_moe.study").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(context)


def draw(page: Page, summaries: Sequence[Summary], axes: Sequence[AxisInfo], folder: Path) -> list[dict[str, Any]]:
    """Draw all figures into `folder` and give them, embedded, by section; files of figures no longer drawn go."""
    panels = {
        "Results": [panel for measure in page.report for panel in measure_panels(summaries, axes, measure)],
        "Curves": curve_panels(summaries, axes, page.curves),
        "Load of the experts": load_panel(summaries, axes),
    }
    folder.mkdir(exist_ok=True)
    kept = set()
    sections = []
    for title, found in panels.items():
        shown = []
        for panel in found:
            svg = theme.save_figure(panel.figure, folder, panel.name)
            kept |= {f"{panel.name}.png", f"{panel.name}.svg"}
            shown.append({"caption": panel.caption, "name": panel.name, "svg": embed(panel, svg)})
        if shown:
            sections.append({"title": title, "panels": shown})
    for path in folder.iterdir():
        if path.name not in kept and path.suffix in (".png", ".svg"):
            path.unlink()
    return sections


def embed(panel: Panel, svg: str) -> Any:
    """The panel's SVG, marked as safe to stand in a page: text in it was escaped by matplotlib."""
    from markupsafe import Markup, escape

    return Markup(theme.embedded(svg, panel.name, str(escape(panel.caption))))


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    half: str = ""  # half the width of the interval
    is_best: bool = False
    is_number: bool = True


class Table(NamedTuple):
    """The table of a report: a row for each point."""

    head: Sequence[tuple[str, str]]  # title, unit
    rows: Sequence[tuple[bool, Sequence[Cell]]]  # whether its numbers are final, its cells


def table(summaries: Sequence[Summary], axes: Sequence[AxisInfo], columns: Sequence[str]) -> Table:
    """The axes, the number of seeds, each measure with its interval, and how far the loss is from the best one's."""
    winners = {measure: best(summaries, measure) for measure in columns}
    lead = winners.get("loss")

    def is_best(summary: Summary, measure: str) -> bool:  # equal as written is as good
        winner = winners[measure]
        if winner is None or not summary.is_final:
            return False
        texts = [number_text(measure, s.measures[measure])[0] for s in summaries if measure in s.measures]
        text = number_text(measure, summary.measures[measure])[0]
        return len(set(texts)) > 1 and text == number_text(measure, winner.measures[measure])[0]

    head = [(axis.label, "") for axis in axes] or [("point", "")]
    head += [("seeds", ""), *((MEASURES[c].label, MEASURES[c].unit) for c in columns)]
    place = len(head) - len(columns) + 1
    if lead is not None:
        head.insert(place, ("loss above best", "paired by seed"))
    rows = []
    for summary in summaries:
        cells = [Cell(value_text(summary.point[axis.id]), is_number=axis.is_numeric) for axis in axes]
        cells = cells or [Cell(summary.name, is_number=False)]
        cells.append(Cell(str(len(summary.counted)) if summary.is_final else seeds_text(summary)))
        for measure in columns:
            found = summary.measures.get(measure)
            cells.append(Cell(*number_text(measure, found), is_best(summary, measure)) if found else Cell("-"))
        if lead is not None:
            cells.insert(place, difference(summary, lead))
        rows.append((summary.is_final, cells))
    return Table(head, rows)


def seeds_text(summary: Summary) -> str:
    """What stands for the number of seeds of a point without a finished run."""
    steps = [entry.status.step for entry in summary.entries]
    return f"at step {max(steps)}" if max(steps) else "none"


def difference(summary: Summary, lead: Summary) -> Cell:
    """How far the loss of a point is above that of the best, paired by seed."""
    if summary is lead:
        return Cell("0")
    found = paired_difference(summary, lead, "loss") if summary.is_final else None
    if found is None:
        return Cell("-")
    return Cell(format(found.mean, "+.4f"), "" if math.isnan(found.half) else format(found.half, ".4f"))


def markdown(made: Table) -> str:
    """The table as Markdown; the best of each column is bold."""

    def text(cell: Cell) -> str:
        shown = plain(f"{cell.text} ± {cell.half}" if cell.half else cell.text)
        return f"**{shown}**" if cell.is_best else shown

    lines = [
        "| " + " | ".join(plain(f"{title} ({unit})" if unit else title) for title, unit in made.head) + " |",
        "|" + "---|" * len(made.head),
        *("| " + " | ".join(text(cell) for cell in cells) + " |" for _, cells in made.rows),
    ]
    return "\n".join(lines) + "\n"


def headline(summaries: Sequence[Summary], axes: Sequence[AxisInfo]) -> dict[str, str] | None:
    """The best point by validation loss, in words; None without one."""
    winner = best(summaries, "loss")
    if winner is None:
        return None
    mean, half = number_text("loss", winner.measures["loss"])
    return {
        "name": short_name(winner.point, axes),
        "value": f"{mean} ± {half}" if half else mean,
        "seeds": str(len(winner.counted)),
    }


def point_context(summary: Summary, axes: Sequence[AxisInfo]) -> dict[str, Any]:
    """A point with its runs, for the list of configurations."""
    return {"name": short_name(summary.point, axes), "runs": [run_context(entry) for entry in summary.entries]}


def run_context(entry: Entry) -> dict[str, Any]:
    """A run with its configuration in full: as it ran where it has begun, else as it will."""
    written = entry.run.folder / "config.toml"
    config = written.read_text(encoding="utf-8") if written.exists() else to_toml(entry.run.config)
    loss = entry.result.get("loss")
    return {
        "seed": entry.run.seed,
        "state": entry.status.state,
        "message": entry.status.message,
        "loss": None if loss is None else format(loss, ".4f"),
        "folder": str(entry.run.folder),
        "config": config,
    }
