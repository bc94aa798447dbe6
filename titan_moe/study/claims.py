"""A page of claims about studies that ran: what each says, what was measured, and whether it holds.

A claim is one or more contrasts. A contrast is a sum over points of one study, `plus` less `minus`, taken for each
seed, so that its interval has no more noise than paired runs leave (`analysis.paired_difference`).
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.commands import Parser
from titan_moe.config.layers import tomllib
from titan_moe.files import write_atomic
from titan_moe.study.analysis import Interval, interval
from titan_moe.study.measures import MEASURES

KEYS = {"study", "plus", "minus", "measure", "expect", "margin", "says"}
EXPECTED = ("lower", "higher", "equal")  # of plus less minus
Results = list[Mapping[str, Any]]  # lines of results.jsonl


class Finding(NamedTuple):
    """A contrast with what was measured; no interval where runs are missing."""

    text: str
    value: Interval | None
    verdict: str


def claims(args: list[str]) -> int:
    """Write README.md, tables and figures of the studies that a file of claims is about; 1 where runs are missing."""
    parser = Parser("paper_claims.py", "Say which claims hold, from the results of studies that ran.")
    parser.add_argument("claims", type=Path, metavar="CLAIMS.toml", help="the claims, by their contrasts")
    parser.add_argument("--studies", type=Path, required=True, help="folder that has the folders of the studies")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page, its tables and figures")
    options = parser.parse_args(args)
    document = tomllib.loads(options.claims.read_text(encoding="utf-8"))
    found = {name: read_results(options.studies / name) for name in document["studies"]}
    check(options.claims, document)
    findings = [[judge(contrast, found[contrast["study"]]) for contrast in c["contrasts"]] for c in document["claims"]]
    options.out.mkdir(parents=True, exist_ok=True)
    for name, results in found.items():
        if results:
            copy_report(options.studies / name, options.out / name, document.get("figures", {}).get(name, []))
    write_atomic(options.out / "README.md", page(document, findings, found))
    print(f"page         {options.out / 'README.md'}")
    return int(any(finding.value is None for row in findings for finding in row))


def read_results(folder: Path) -> Results:
    """The runs of a study, none where it has not begun."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check(path: Path, document: Mapping[str, Any]) -> None:
    """Raise ValueError for a contrast that can't be one."""
    for number, claim in enumerate(document["claims"], 1):
        for contrast in claim["contrasts"]:
            where = f"{path}: claims[{number}]"
            if unknown := sorted(set(contrast) - KEYS):
                raise ValueError(f"{where}: contrasts.{unknown[0]}: there is no such key: {', '.join(sorted(KEYS))}")
            if contrast["study"] not in document["studies"]:
                raise ValueError(f"{where}: study {contrast['study']!r} is not among studies: add it there")
            if contrast["measure"] not in MEASURES:
                raise ValueError(f"{where}: measure {contrast['measure']!r} is none of {', '.join(MEASURES)}")
            if contrast["expect"] not in EXPECTED:
                raise ValueError(f"{where}: expect {contrast['expect']!r} is none of {', '.join(EXPECTED)}")
            if (contrast["expect"] == "equal") != ("margin" in contrast):
                raise ValueError(f'{where}: margin is for expect = "equal", and "equal" needs one')


def judge(contrast: Mapping[str, Any], results: Results) -> Finding:
    """Measure a contrast and say agree, disagree, can't tell, or not run.

    It agrees where the whole interval lies on the expected side of zero, or for "equal" within the margin; it
    disagrees where the whole interval lies on the other side, or outside of the margin.
    """
    measure = MEASURES[contrast["measure"]]
    values = by_seed(contrast, results)
    text = f"{contrast['says']} ({measure.label})"
    if len(values) < 2:
        return Finding(text, None, "not run")
    found = interval(values)
    low, high = found.mean - found.half, found.mean + found.half
    margin = contrast.get("margin", 0.0)
    agrees = {"lower": high < 0, "higher": low > 0, "equal": -margin <= low and high <= margin}
    refutes = {"lower": low > 0, "higher": high < 0, "equal": low > margin or high < -margin}
    expect = contrast["expect"]
    return Finding(text, found, "agree" if agrees[expect] else "disagree" if refutes[expect] else "can't tell")


def by_seed(contrast: Mapping[str, Any], results: Results) -> list[float]:
    """The contrast of each seed that all its points have."""
    signed = [*((1, point) for point in contrast["plus"]), *((-1, point) for point in contrast["minus"])]
    parts = []
    for sign, point in signed:
        if results and all(r["point"] != point for r in results):
            raise ValueError(f"{contrast['study']} has no point {dict(point)}: give one of its results.jsonl")
        done = [r for r in results if r["point"] == point and r["state"] == "finished"]
        of_point = [r for r in done if r.get(contrast["measure"]) is not None]
        parts.append({r["seed"]: sign * r[contrast["measure"]] for r in of_point})
    seeds = set.intersection(*(set(part) for part in parts))
    return [math.fsum(part[seed] for part in parts) for seed in sorted(seeds)]


def overall(findings: Sequence[Finding]) -> str:
    """One word for a claim of several contrasts: partly where some agree, disagree where none does and one refutes."""
    verdicts = {finding.verdict for finding in findings}
    if len(verdicts) == 1:
        return verdicts.pop()
    return "partly" if "agree" in verdicts else "disagree" if "disagree" in verdicts else "can't tell"


def page(document: Mapping[str, Any], findings: Sequence[Sequence[Finding]], found: Mapping[str, Results]) -> str:
    """The page as Markdown."""
    lines = [f"# {document['title']}", "", document["introduction"].strip(), ""]
    lines += ["| claim | the paper | ours: difference and 95 % interval over seeds | verdict |", "|---|---|---|---|"]
    for claim, row in zip(document["claims"], findings, strict=True):
        measured = "<br>".join(f"{one.text}: {_number(c, one)}" for c, one in zip(claim["contrasts"], row, strict=True))
        lines.append(f"| {claim['claim']} ({claim['where']}) | {claim['paper']} | {measured} | **{overall(row)}** |")
    lines += ["", document.get("discussion", "").strip(), "", "## The studies", ""]
    for name, about in document["studies"].items():
        finished = sum(r["state"] == "finished" for r in found[name])
        shown = f"[table]({name}/table.md)" if finished else "not run"
        lines.append(f"- `{name}`: {about} {finished} finished runs, {shown}.")
        figures = document.get("figures", {}).get(name, [])
        lines += [f"\n  ![{name}: {figure}]({name}/{figure}.png)\n" for figure in figures if finished]
    return "\n".join(lines).rstrip() + "\n"


def _number(contrast: Mapping[str, Any], finding: Finding) -> str:
    if finding.value is None:
        return "not run"
    digits = MEASURES[contrast["measure"]].digits
    mean, half = format(finding.value.mean, f"+{digits}"), format(finding.value.half, digits)
    return f"{mean} ± {half} ({finding.value.count} seeds, {finding.verdict})"


def copy_report(study: Path, out: Path, figures: Sequence[str]) -> None:
    """Copy a study's table and the figures that the page shows beside the page."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(study / "table.md", out)
    for figure in figures:
        shutil.copy(study / "figures" / f"{figure}.png", out)
