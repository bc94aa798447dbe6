"""What a report finds, in sentences: which point is best or that some are level, and what to know of the runs."""

from collections.abc import Sequence
from typing import NamedTuple

from titan_moe.study.grid import Point
from titan_moe.study.report.analysis import (
    AxisInfo,
    Standing,
    Summary,
    compared,
    counted_results,
    number_text,
    short_name,
    standing,
)
from titan_moe.study.report.likeness import cautions, listed, unlike
from titan_moe.study.report.measures import measure_of


class Finding(NamedTuple):
    """A sentence about one point, in three parts, so that a page can set its name apart."""

    before: str
    name: str
    after: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return self.before + self.name + self.after


def headline(summaries: Sequence[Summary], axes: Sequence[AxisInfo], measure: str = "loss") -> Finding | None:
    """A sentence on which point is best in a measure, or which are level; None where fewer than two can be compared."""
    # Where runs cannot be compared, the sentence says why, in place of a best point.
    shown = measure_of(measure)
    comparable = [summary for summary in compared(summaries) if measure in summary.measures]
    if len(comparable) < 2:
        return None
    if reason := unlike(counted_results(comparable), measure):
        return Finding(f"No best point: {reason}.", "", "")
    place = standing(summaries, measure)
    if place is None:
        return None

    # The number and its seeds are the same whatever the sentence says of the others.
    mean, half = number_text(measure, place.lead.measures[measure])
    value = f"{mean} ± {half}" if half else mean
    value = f"{value} {shown.unit} ({seeds_text(place.lead)})".replace("  ", " ")
    name = short_name(place.lead.point, axes)
    word = "lowest" if shown.better == "lower" else "highest"
    if place.is_clear:
        others = "the other" if place.compared == 1 else f"each of the {place.compared} others"
        side = "below" if shown.better == "lower" else "above"
        after = f" with {value}, {side} {others} by the paired 95 % interval of their difference."
        return Finding(f"{word.capitalize()} {shown.label}: ", name, after)

    # Not better than every other: it is not called best, and the points that may be as good are named.
    parts = []
    if place.level:
        names = listed([short_name(summary.point, axes) for summary in place.level], "; ")
        parts.append(f" Level with it, as the paired 95 % interval of the difference contains 0: {names}.")
    if place.untold:
        names = listed([short_name(summary.point, axes) for summary in place.untold], "; ")
        parts.append(f" Fewer than two seeds in common, so that there is no interval: {names}.")
    mean = "mean " if half else ""
    return Finding(f"No best point. The {word} {mean}{shown.label}, {value}, is that of ", name, "." + "".join(parts))


def comparisons(place: Standing | None) -> str:
    """A sentence on how many differences a standing rests on, and on what intervals that hold at once would say."""
    if place is None or not place.compared - len(place.untold):
        return ""
    count = place.compared - len(place.untold)
    if count == 1:
        return "One difference was looked at."
    text = f"{count} differences to the best mean were looked at, each with an interval by itself"
    if place.behind:
        level = len(place.level) + place.level_at_once
        text += f"; by intervals that hold for all at once (Bonferroni) {level or 'none'} of them would be level"
    return text + "."


def seeds_text(summary: Summary) -> str:
    """`3 seeds`, or `2 of 3 seeds` where a run failed or has not ended."""
    count, all_of_them = len(summary.counted), len(summary.entries)
    if count < all_of_them:
        return f"{count} of {all_of_them} seeds"
    return f"{count} seed{'' if count == 1 else 's'}"


def baseline_note(summaries: Sequence[Summary], baseline: Point, axes: Sequence[AxisInfo]) -> list[str]:
    """A sentence that differences to the baseline are not drawn, where it has no finished run but others have."""
    ranked = [summary.point for summary in summaries if summary.is_ranked]
    if baseline in ranked or not ranked or not axes:
        return []
    return [f"The baseline ({short_name(baseline, axes)}) has no finished run: differences to it are not drawn."]


def notes(summaries: Sequence[Summary], axes: Sequence[AxisInfo]) -> list[str]:
    """Sentences on what to know of the runs before believing a comparison of them."""
    # Of each point: seeds that its means leave out, and seeds that diverged. Then what the runs do not share.
    sentences = []
    for summary in summaries:
        name = short_name(summary.point, axes)
        states = [entry.status.state for entry in summary.entries]
        if summary.is_ranked and summary.left_out:
            others = [state for state in dict.fromkeys(states) if state != "finished"]
            states_text = listed([f"{states.count(state)} {state}" for state in others])
            sentences.append(f"{name}: the means are of {len(summary.counted)} of {len(states)} runs ({states_text}).")
        if bad := {measure_of(key).label: count for key, count in summary.nonfinite.items()}:
            count = max(bad.values())
            sentences.append(
                f"{name}: NaN or infinite in {count} of {len(summary.counted)} runs ({listed(list(bad))}): not ranked."
            )
    return [*sentences, *cautions(counted_results(compared(summaries)))]
