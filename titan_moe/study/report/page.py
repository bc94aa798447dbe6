"""The report: results.jsonl, table.md, figures as PNG and SVG, and report.html, one file that needs nothing else."""

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe import theme
from titan_moe.config import to_toml
from titan_moe.config.differences import flatten
from titan_moe.markdown import plain
from titan_moe.runtime.files import write_atomic
from titan_moe.study.grid import Point, Run, baseline_of, expand, value_text
from titan_moe.study.progress import counts
from titan_moe.study.report.analysis import (
    AxisInfo,
    Entry,
    Standing,
    Summary,
    at_common_length,
    axes_of,
    compared,
    counted_results,
    number_text,
    paired_difference,
    read_entries,
    short_name,
    standing,
    summarize,
)
from titan_moe.study.report.curves import curve_panels, load_panel
from titan_moe.study.report.figures import difference_panels, measure_panels
from titan_moe.study.report.findings import Finding, baseline_note, comparisons, headline, notes
from titan_moe.study.report.likeness import lengths, short_version
from titan_moe.study.report.measures import COLUMNS, measure_of, set_of
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
    baseline: Point  # the one that the others are compared with
    about: Sequence[str] = ()  # more sentences on the runs


class Written(NamedTuple):
    """A report that was written, and its findings, a sentence each."""

    path: Path
    findings: Sequence[str]


class Block(NamedTuple):
    """A table with what it shows: all runs as they are, or as they were when all had seen as many tokens."""

    title: str
    table: "Table"
    finding: Finding | None
    comparisons: str


def study_report(study: Study, runs: Sequence[Run], refresh: float | None = None) -> Written:
    """Write the report of a study into its folder; with `refresh` the page loads itself again after so many seconds."""
    # The command line is the last layer of the configuration. No file of the study shows it, so the page does.
    section = study.section
    given = flatten(study.config[-1].table)
    changed = [f"{key} = {' '.join(value.words)}" for key, value in given.items() if key != "data.cache_folder"]
    page = Page(
        section.title or study.name,
        section.mirrors,
        section.description,
        {axis.id: axis.label for axis in study.axes},
        section.report,
        section.curves,
        baseline_of(study, expand(study)),
        [f"Set on the command line, for every run: {', '.join(changed)}."] if changed else [],
    )
    return write_report(page, runs, study.folder, refresh)


def write_report(page: Page, runs: Sequence[Run], folder: Path, refresh: float | None = None) -> Written:
    """Write a report into `folder`: results.jsonl, table.md, figures and report.html."""
    # Runs of different length also get a second table, at the most tokens that all have seen: in it they are ranked.
    entries = read_entries(runs)
    summaries = summarize(entries)
    axes = axes_of(page.labels, runs)
    common = at_common_length(summaries)
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.jsonl", [entry.result for entry in entries])
    blocks = [block("Table", summaries, axes, page.report)]
    if common is not None:
        blocks.append(block(f"At {common[0]:,} tokens, the most that all have seen", common[1], axes, page.report))

    # What a reader has to know stands in the Markdown and the page alike.
    missing = baseline_note(common[1] if common else summaries, page.baseline, axes)
    warnings = [*page.about, *notes(summaries, axes), *missing]
    write_atomic(folder / "table.md", markdown(blocks, warnings))
    with theme.style():
        sections = draw(page, summaries, common, axes, folder / "figures")

    context = {
        "page": page,
        "blocks": blocks,
        "notes": warnings,
        "legend": LEGEND,
        "sections": sections,
        "points": [point_context(summary, axes) for summary in summaries],
        "unfinished": [e for e in entries if e.status.state != "finished"],
        "counts": counts([entry.status for entry in entries]),
        "length": length_text(summaries),
        "machines": sorted({str(e.result["device"]) for e in entries if e.result["device"]}),
        "commits": sorted({short_version(e.result["git_commit"]) for e in entries if e.result["git_commit"]}),
        "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "refresh": refresh,
    }
    write_atomic(folder / "report.html", theme.render("titan_moe.study.report", "report.html.j2", context))
    sentences = [item.finding.text for item in blocks[-1:] if item.finding] + [item.comparisons for item in blocks[-1:]]
    return Written(folder / "report.html", [*filter(None, sentences), *warnings])


def length_text(summaries: Sequence[Summary]) -> str:
    """How long the compared runs are, empty where they differ in length."""
    texts = lengths(counted_results(compared(summaries)))
    return f"{texts[0]} a run" if len(texts) == 1 else ""


def block(title: str, summaries: Sequence[Summary], axes: Sequence[AxisInfo], report: Sequence[str]) -> Block:
    """The table of some points, with the sentence on the best one."""
    # Whoever validates on a set wants its loss, and of a task its accuracy, without having to say so for the report.
    measured = {key: None for s in summaries for key in (*s.measures, *s.nonfinite)}
    of_sets = [key for key in measured if set_of(key) and key.endswith(("/loss", "/acc"))]
    columns = [key for key in dict.fromkeys((*COLUMNS, *report, *of_sets)) if key in measured]
    if all(s.measures.get("loss") == s.measures.get("best_loss") for s in summaries) and "best_loss" in columns:
        columns.remove("best_loss")
    places = {measure: standing(summaries, measure) for measure in columns}
    return Block(title, table(summaries, axes, places), headline(summaries, axes), comparisons(places.get("loss")))


def draw(
    page: Page,
    summaries: Sequence[Summary],
    common: tuple[int, Sequence[Summary]] | None,
    axes: Sequence[AxisInfo],
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw all figures into `folder`, and return them as SVG to embed, by section of the page."""
    # Runs of different length are ranked and paired at a common one; curves show all that was measured.
    tokens, ranked = common or (0, summaries)
    when = f", at {tokens:,} tokens" if common else ""
    panels = {
        f"Results{when}": [panel for measure in page.report for panel in measure_panels(ranked, axes, measure)],
        f"Differences to the baseline{when}": [
            panel for measure in page.report for panel in difference_panels(ranked, page.baseline, axes, measure)
        ],
        "Curves": curve_panels(summaries, axes, page.curves),
        "Load of the experts": load_panel(summaries, axes),
    }

    # A section without figures has no title either.
    folder.mkdir(exist_ok=True)
    file_names = set()
    sections = []
    for title, section_panels in panels.items():
        shown = []
        for panel in section_panels:
            svg = theme.save_figure(panel.figure, folder, panel.name)
            file_names |= {f"{panel.name}.png", f"{panel.name}.svg"}
            shown.append(
                {"caption": panel.caption, "name": panel.name, "svg": theme.embedded(svg, panel.name, panel.caption)}
            )
        if shown:
            sections.append({"title": title, "panels": shown})

    # Figures of an earlier report that are no longer drawn would contradict this one.
    for path in folder.iterdir():
        if path.name not in file_names and path.suffix in (".png", ".svg"):
            path.unlink()
    return sections


BEST, LEVEL = "★", "≈"


class Cell(NamedTuple):
    """A cell of the table."""

    text: str
    half: str = ""  # half the width of the interval
    mark: str = ""  # BEST, LEVEL, or nothing
    is_number: bool = True


class Table(NamedTuple):
    """The table of a report: a row for each point."""

    head: Sequence[tuple[str, str]]  # title, unit
    rows: Sequence[tuple[bool, Sequence[Cell]]]  # whether its numbers are compared, its cells


def table(summaries: Sequence[Summary], axes: Sequence[AxisInfo], places: Mapping[str, Standing | None]) -> Table:
    """A row for each point: axes, seeds, length, each measure with its interval, the difference to the lowest loss.

    Marks say what the paired intervals say: one best point, or all that are level with the best mean.
    """
    # The length is a column only where it differs: else it stands once on the page.
    lead = places.get("loss")
    differ = len(lengths(counted_results([s for s in summaries if s.counted]))) > 1
    measured = [("seeds", ""), *([("steps", ""), ("tokens", "")] if differ else [])]
    for measure in places:
        measured.append((measure_of(measure).label, measure_of(measure).unit))
        measured += [("loss above the lowest", "paired by seed")] if lead and measure == "loss" else []

    # What was set and what came of it may have one name, as the steps that a study varies.
    taken = {title for title, _ in measured}
    head = [(axis.label, "as set" if axis.label in taken else "") for axis in axes] or [("point", "")]
    head += measured

    # The difference to the lowest loss is paired by seed, so that it says more than the two means beside it.
    rows = []
    for summary in summaries:
        cells = [Cell(value_text(summary.point[axis.id]), is_number=axis.is_numeric) for axis in axes]
        cells = cells or [Cell(summary.name, is_number=False)]
        cells.append(Cell(seeds_cell(summary)))
        if differ:
            cells += [Cell(range_text(summary, key)) for key in ("step", "num_tokens")]
        for measure, place in places.items():
            cells.append(measure_cell(summary, measure, place))
            cells += [difference(summary, lead.lead)] if lead and measure == "loss" else []
        rows.append((summary.is_ranked, cells))
    return Table(head, rows)


def measure_cell(summary: Summary, measure: str, place: Standing | None) -> Cell:
    """The mean of a measure with its interval and its mark; where it is NaN, in how many runs."""
    value = summary.measures.get(measure)
    if value is None:
        bad = summary.nonfinite.get(measure)
        return Cell(f"NaN in {bad} of {len(summary.counted)}" if bad else "-")
    is_marked = place is not None and any(summary is one for one in place.marked)
    mark = "" if place is None or not is_marked else BEST if place.is_clear else LEVEL
    return Cell(*number_text(measure, value), mark)


def seeds_cell(summary: Summary) -> str:
    """How many runs of a point count, and of how many; the step it is at where none has finished."""
    if not summary.is_ranked:
        steps = [entry.status.step for entry in summary.entries]
        return f"at step {max(steps)}" if max(steps) else "none"
    count = len(summary.counted)
    return f"{count} of {len(summary.entries)}" if summary.left_out else str(count)


def range_text(summary: Summary, key: str) -> str:
    """The step or the tokens that a point's runs have come to, from the least to the most."""
    numbers = sorted({entry.result[key] for entry in summary.counted if entry.result.get(key) is not None})
    return " to ".join(f"{value:,}" for value in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "-"


def difference(summary: Summary, lead: Summary) -> Cell:
    """How far the loss of a point is above that of `lead`, paired by seed."""
    if summary is lead:
        return Cell("0")
    gap = paired_difference(summary, lead, "loss") if summary.is_ranked else None
    if gap is None:
        return Cell("-")
    return Cell(format(gap.mean, "+.4f"), "" if math.isnan(gap.half) else format(gap.half, ".4f"))


LEGEND = (
    f"Means over seeds; ± is half of the 95 % t-interval of the mean, which needs two seeds. {BEST}: better than every "
    f"other point by the paired 95 % interval of their difference. {LEVEL}: the best mean of the column, and all that "
    "are level with it: the paired interval contains 0. No mark: behind, or not to be told."
)


def markdown(blocks: Sequence[Block], warnings: Sequence[str]) -> str:
    """The tables as Markdown, each with its findings; the best of each column is bold, where there is one."""

    def text(cell: Cell) -> str:
        shown = plain(f"{cell.text} ± {cell.half}" if cell.half else cell.text)
        return f"**{shown}**" if cell.mark == BEST else f"{shown} {cell.mark}".rstrip()

    # Names of axes and points are users' text, so `plain` escapes what Markdown would read.
    parts = []
    for item in blocks:
        lines = [f"{plain(item.title)}:", ""] if len(blocks) > 1 else []
        lines.append(
            "| " + " | ".join(plain(f"{title} ({unit})" if unit else title) for title, unit in item.table.head) + " |"
        )
        lines.append("|" + "---|" * len(item.table.head))
        lines += ["| " + " | ".join(text(cell) for cell in cells) + " |" for _, cells in item.table.rows]
        sentences = " ".join(filter(None, [item.finding.text if item.finding else "", item.comparisons]))
        parts.append("\n".join([*lines, *(["", plain(sentences)] if sentences else [])]))
    parts.append(LEGEND.replace(f"{BEST}:", "Bold:"))
    parts += ["\n".join(f"- {plain(note)}" for note in warnings)] if warnings else []
    return "\n\n".join(parts) + "\n"


def point_context(summary: Summary, axes: Sequence[AxisInfo]) -> dict[str, Any]:
    """A point with its runs, for the list of configurations."""
    return {"name": short_name(summary.point, axes), "runs": [run_context(entry) for entry in summary.entries]}


def run_context(entry: Entry) -> dict[str, Any]:
    """A run with its whole configuration: as training wrote it where it has begun, else as the study asks for it."""
    # What training wrote has every value resolved, such as batch sizes and the vocabulary's.
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
