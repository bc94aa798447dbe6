"""Write a page of claims about studies that ran: what each claim says, what was measured, and whether it holds.

A claim is one or more contrasts. A contrast is a sum over points of one study, `plus` minus `minus`, taken for each
seed; runs of one seed share their noise, so the interval of the sum is narrow (`analysis.paired_difference`). What the
page says of models, data and lengths is read from the runs; what they mean is for the claims' author to write.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.config.layers import tomllib
from titan_moe.markdown import code, plain
from titan_moe.runtime.command import Parser
from titan_moe.runtime.files import write_atomic
from titan_moe.study.report.analysis import LEVEL, Interval, interval
from titan_moe.study.report.likeness import cautions, length_text, listed, unlike, values
from titan_moe.study.report.measures import MEASURES, is_measure, measure_of

DOCUMENT = {"title": True, "introduction": True, "studies": True, "claims": True, "figures": False}  # key: needed
CLAIM = {"claim": True, "where": True, "paper": True, "contrasts": True}
CONTRAST = {
    **{"says": True, "study": True, "plus": True, "minus": True, "measure": True, "expect": True},
    "margin": False,
}
EXPECTED = ("lower", "higher", "equal")  # of plus less minus
VERDICTS = ("agree", "partly", "disagree", "can't tell", "not comparable", "not run")
Results = list[Mapping[str, Any]]  # lines of results.jsonl


class Finding(NamedTuple):
    """A contrast with what was measured; no interval where runs are missing or cannot be compared."""

    text: str
    value: Interval | None
    verdict: str
    number: str  # what was measured, as text
    at_once: bool = False  # whether the verdict stays by intervals that hold for all contrasts at once


def claims(args: list[str]) -> int:
    """Write README.md, tables and figures of the studies that a file of claims is about, and print the verdicts."""
    parser = Parser("paper_claims.py", "Say which claims hold, from the results of studies that ran.")
    parser.add_argument("claims", type=Path, metavar="CLAIMS.toml", help="the claims, by their contrasts")
    parser.add_argument("--studies", type=Path, required=True, help="folder that has the folders of the studies")
    parser.add_argument("--out", type=Path, required=True, help="folder of the page, its tables and figures")
    options = parser.parse_args(args)

    # Studies may be run one after the other: a claim on one that has not run yet is "not run", and no error.
    document = tomllib.loads(options.claims.read_text(encoding="utf-8-sig"))
    check_document(options.claims, document)
    results_of = {name: read_results(options.studies / name) for name in document["studies"]}
    if not any(results_of.values()):
        raise ValueError(
            f"--studies {options.studies}: none of {', '.join(results_of)} has results here: run one by "
            "python -m titan_moe.study, or give another folder"
        )
    findings = judge_all(document, results_of)

    # The page stands alone: tables and figures that it shows are copied beside it.
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {
        name: copy_report(options.studies / name, options.out / name, document.get("figures", {}).get(name, []))
        for name, results in results_of.items()
        if results
    }
    write_atomic(options.out / "README.md", page(document, findings, results_of, figures))
    say(document, findings)
    print(f"page         {options.out / 'README.md'}")
    return 0


def judge_all(document: Mapping[str, Any], results_of: Mapping[str, Results]) -> list[list[Finding]]:
    """The findings of each claim, by intervals of 95 % and by intervals that hold for all contrasts at once."""

    # How many hold at once is known only after all were judged: as many as have an interval.
    def judged(count: int) -> list[list[Finding]]:
        return [[judge(c, results_of[c["study"]], count) for c in claim["contrasts"]] for claim in document["claims"]]

    return judged(len(with_interval(judged(1))))


def with_interval(findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The contrasts that were measured with two seeds or more."""
    return [one for row in findings for one in row if one.value is not None and not math.isnan(one.value.half)]


def say(document: Mapping[str, Any], findings: Sequence[Sequence[Finding]]) -> None:
    """Print each claim's verdict with its numbers, and how many there are of each."""
    for claim, row in zip(document["claims"], findings, strict=True):
        print(f"{overall(row):<14} {claim['claim']}")
        for finding in row:
            print(f"{'':14} {finding.text}: {finding.number}")
    total = Counter(overall(row) for row in findings)
    counted = ", ".join(f"{total[word]} {word}" for word in VERDICTS if total[word])
    print(f"\n{len(findings)} claim{'' if len(findings) == 1 else 's'}: {counted}")
    print(chance(findings))


def chance(findings: Sequence[Sequence[Finding]]) -> str:
    """A sentence on how many differences were judged, and on how many of their intervals to believe at once."""
    judged = with_interval(findings)
    if len(judged) < 2:
        return f"{len(judged)} difference{' was' if judged else 's were'} judged, by a 95 % interval."
    decided = [one for one in judged if one.verdict in ("agree", "disagree")]
    return (
        f"{len(judged)} differences were judged, each by a 95 % interval of its own: of so many, about "
        f"{(1 - LEVEL) * len(judged):.1f} intervals miss the true difference. By intervals that hold for all at once "
        f"(Bonferroni), {sum(one.at_once for one in decided)} of the {len(decided)} that agree or disagree do so (†)."
    )


def read_results(folder: Path) -> Results:
    """The runs of a study, none where it has not begun."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not whole JSON lines: write it anew by titan_moe.study ... --report") from error


def check_document(path: Path, document: Mapping[str, Any]) -> None:
    """Raise ValueError for a missing or unknown key in a file of claims, or a contrast with a wrong value."""
    # Each error names the claim by its number: claims have no names, and there are many in a file.
    _check_keys(f"{path}", document, DOCUMENT)
    for number, claim in enumerate(document["claims"], 1):
        place = f"{path}: claims[{number}]"
        _check_keys(place, claim, CLAIM)
        for contrast in claim["contrasts"]:
            _check_keys(f"{place}: contrasts", contrast, CONTRAST)
            if contrast["study"] not in document["studies"]:
                raise ValueError(f"{place}: study {contrast['study']!r} is not among studies: add it there")
            if not is_measure(contrast["measure"]):
                raise ValueError(f"{place}: measure {contrast['measure']!r} is none of {', '.join(MEASURES)}")
            if contrast["expect"] not in EXPECTED:
                raise ValueError(f"{place}: expect {contrast['expect']!r} is none of {', '.join(EXPECTED)}")
            if (contrast["expect"] == "equal") != ("margin" in contrast):
                raise ValueError(f'{place}: margin is for expect = "equal", and "equal" needs one')


def _check_keys(place: str, table: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise ValueError(f"{place}.{unknown[0]}: there is no such key: {', '.join(known)}")
    if missing := [key for key, needed in known.items() if needed and key not in table]:
        raise ValueError(f"{place}.{missing[0]}: is missing")


def judge(contrast: Mapping[str, Any], results: Results, count: int = 1) -> Finding:
    """Measure a contrast and say agree, disagree, can't tell, not comparable, or not run.

    It agrees where the whole interval lies on the expected side of zero, or for "equal" within the margin; it
    disagrees where the whole interval lies on the other side, or outside of the margin. `count` contrasts are judged
    in all.
    """
    # Without a seed that all points have there is no difference; with runs that differ in more than the points there
    # is one, but it would mean nothing.
    measure = measure_of(contrast["measure"])
    text = f"{contrast['says']} ({measure.label})"
    of_points = runs_of_points(contrast, results)
    values = by_seed(contrast, of_points)
    if not values:
        return Finding(text, None, "not run", "not run")
    used = [record for records in of_points for record in records.values()]
    if reason := unlike(used, contrast["measure"]):
        return Finding(text, None, "not comparable", f"not comparable: {reason}")

    # How many seeds it rests on is part of the number, and how many were run where these are more.
    value = interval(values)
    points = [*contrast["plus"], *contrast["minus"]]
    all_seeds = len({r["seed"] for r in results if r["point"] in points})
    seeds = f"{value.count} seed{'' if value.count == 1 else 's'}"
    seeds = seeds if value.count == all_seeds else f"{value.count} of {all_seeds} seeds"
    mean = _points(format(value.mean, f"+{measure.digits}"))
    if value.count < 2:
        return Finding(text, value, "can't tell", f"{mean} ({seeds}, no interval, can't tell)")

    # The dagger marks what holds by Bonferroni's interval, too.
    word = verdict(contrast, value)
    at_once = count > 1 and verdict(contrast, interval(values, 1 - (1 - LEVEL) / count)) == word != "can't tell"
    margin = ""
    if "margin" in contrast:
        wide = contrast["margin"]
        margin = f", margin {100 * wide:g} points" if measure.digits.endswith("%") else f", margin {wide:g}"
    number = f"{mean} ± {_points(format(value.half, measure.digits))} ({seeds}{margin}, {word}{'†' if at_once else ''})"
    return Finding(text, value, word, number, at_once)


def _points(text: str) -> str:
    """The text of a difference of percentages, which is in points."""
    return text.replace("%", " points")


def verdict(contrast: Mapping[str, Any], difference: Interval) -> str:
    """Whether a contrast with this interval is "agree", "disagree" or "can't tell"."""
    low, high = difference.mean - difference.half, difference.mean + difference.half
    margin = contrast.get("margin", 0.0)
    agrees = {"lower": high < 0, "higher": low > 0, "equal": -margin <= low and high <= margin}
    refutes = {"lower": low > 0, "higher": high < 0, "equal": low > margin or high < -margin}
    expect = contrast["expect"]
    return "agree" if agrees[expect] else "disagree" if refutes[expect] else "can't tell"


def runs_of_points(contrast: Mapping[str, Any], results: Results) -> list[dict[int, Mapping[str, Any]]]:
    """The finished runs of each point of a contrast, `plus` and then `minus`, by their seed."""
    parts = []
    for point in (*contrast["plus"], *contrast["minus"]):
        if results and all(r["point"] != point for r in results):
            raise ValueError(f"{contrast['study']} has no point {dict(point)}: give one of its results.jsonl")
        done = [r for r in results if r["point"] == point and r["state"] == "finished"]
        parts.append({r["seed"]: r for r in done if r.get(contrast["measure"]) is not None})
    return parts


def by_seed(contrast: Mapping[str, Any], of_points: Sequence[Mapping[int, Mapping[str, Any]]]) -> list[float]:
    """The contrast of each seed that all its points have."""
    signs = [1] * len(contrast["plus"]) + [-1] * len(contrast["minus"])
    seeds = set.intersection(*(set(part) for part in of_points))
    measure = contrast["measure"]
    return [
        math.fsum(sign * part[seed][measure] for sign, part in zip(signs, of_points, strict=True))
        for seed in sorted(seeds)
    ]


def overall(findings: Sequence[Finding]) -> str:
    """The verdict on a claim of several contrasts.

    "partly" where some but not all agree, else "disagree" where one does, else "can't tell".
    """
    verdicts = {finding.verdict for finding in findings}
    if len(verdicts) == 1:
        return verdicts.pop()
    return "partly" if "agree" in verdicts else "disagree" if "disagree" in verdicts else "can't tell"


def page(
    document: Mapping[str, Any],
    findings: Sequence[Sequence[Finding]],
    results_of: Mapping[str, Results],
    figures: Mapping[str, Sequence[str]],
) -> str:
    """The page as Markdown: a table of the claims, a table of the runs, a list of the studies with their figures."""
    lines = [f"# {document['title']}", "", document["introduction"].strip(), "", chance(findings), ""]
    lines += [
        "| claim | the paper | measured: difference and 95 % interval over seeds | verdict |",
        "|---|---|---|---|",
    ]
    for claim, row in zip(document["claims"], findings, strict=True):
        numbers = "<br>".join(f"{finding.text}: {finding.number}" for finding in row)
        lines.append(f"| {claim['claim']} ({claim['where']}) | {claim['paper']} | {numbers} | **{overall(row)}** |")

    # What was run stands beside what was measured: the verdicts hold for models and data of this size.
    lines += ["", "## The runs", ""]
    lines += ["| study | parameters (active a token) | a run | seeds | finished | data | tokenizer | machine |"]
    lines += ["|---|---|---|---|---|---|---|---|", *(facts(name, results_of[name]) for name in document["studies"])]
    for name, about in document["studies"].items():
        finished = [r for r in results_of[name] if r["state"] == "finished"]
        lines += ["", f"- `{name}`: {about} " + (f"[Table]({name}/table.md)." if finished else "Not run.")]
        lines += [f"  - {plain(caution)}" for caution in cautions(finished)]
        lines += [f"\n  ![{name}: {figure}]({name}/{figure}.png)" for figure in figures.get(name, [])]
    return "\n".join(lines).rstrip() + "\n"


def facts(name: str, results: Results) -> str:
    """A row of the page's table on the runs of a study, from what the finished ones recorded."""
    # Of runs that differ each value is listed once; what an older run did not record is said to be so.
    finished = [r for r in results if r["state"] == "finished"]
    if not finished:
        return f"| `{name}` | - | - | - | {len(finished)} of {len(results)} | - | - | - |"
    sizes = dict.fromkeys((r.get("parameters"), r.get("active_parameters")) for r in finished)
    size = listed([f"{_millions(total)} ({_millions(active)})" for total, active in sizes if total and active])
    paths = dict.fromkeys(
        ", ".join([str(r["dataset"]), *(Path(path).name for path in r["path"])]) for r in finished if "dataset" in r
    )
    unknown = "not recorded"
    cells = [
        *(size or unknown, listed(list(dict.fromkeys(map(length_text, finished))))),
        *(str(len(values(finished, "seed"))), f"{len(finished)} of {len(results)}", listed(list(paths)) or unknown),
        *(listed([str(value) for value in values(finished, key)]) or unknown for key in ("tokenizer", "device")),
    ]
    return f"| {' | '.join([code(name), *map(plain, cells)])} |"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


def copy_report(study: Path, out: Path, figures: Sequence[str]) -> list[str]:
    """Copy a study's table and the figures that the page shows to a folder beside it; the figures that exist."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(study / "table.md", out)
    copied = [figure for figure in figures if (study / "figures" / f"{figure}.png").exists()]
    for figure in copied:
        shutil.copy(study / "figures" / f"{figure}.png", out)
    return copied
