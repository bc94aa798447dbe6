"""report.html of an analysis: one file that needs nothing else, whose figures need no JavaScript."""

import base64
import datetime
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_moe import theme
from titan_moe.analyze.figures import Map, Scale, heatmap, levels, numbers, over_even, palette
from titan_moe.analyze.panels import (
    CONTROL_IN_TEXT,
    Analysis,
    Choice,
    Section,
    counted,
    layer_choices,
    layer_names,
    mean,
    mean_pair,
    number,
    sections_of,
    shown,
    shown_layer,
    token_text,
)
from titan_moe.runtime.files import write_atomic

# Bounds of what a page holds, so that a model of 24 layers of 128 experts has one that a browser opens at once.
MOST_CHOICES = 300_000  # choices of experts in the coloured text, over its tokens and layers
MOST_TOKENS = 20_000  # top tokens of all experts together
MOST_CONTEXTS = 6_000  # of all experts together, and of one of them
MOST_CONTEXTS_OF_ONE = 4
BEFORE = 24  # characters before a token, so that a phone shows it
MOST_PAIRS = 12  # overlapping pairs in the table
MOST_PAIRS_OF_EXPERTS = 400_000  # in the layers that a reader can choose from
MOST_NUMBERS = 60_000  # numbers of one choice of maps that go in as they are; more go in as one byte each


def write_report(analysis: Analysis, folder: Path) -> Path:
    """Write report.html, the picture of an analysis.json of format 1, into `folder`, and return its path.

    It holds all that it needs and asks no network. Texts and tokens are others' and may be anything: all are escaped.
    Raises OSError as the file system does.
    """
    # Figures are drawn in the style of all reports; the layer to show first is one that has something to show.
    first, choices = shown_layer(analysis), layer_choices(analysis)
    offered = offered_layers(analysis, first)
    with theme.style():
        sections = [section_context(section) for section in sections_of(analysis)]
        chosen = [choice_context(choice, first) for choice in choices]

    # What JavaScript needs to tell numbers, to exchange maps and to colour the text stands once, as data.
    sample = sample_context(analysis, first)
    data = {
        "maps": {panel["name"]: panel["data"] for section in sections for panel in section["panels"] if panel["data"]},
        "choices": {choice.name: choice_data(choice, offered) for choice in choices},
        "layers": layer_names(analysis),
        "offered": offered,
        "first": first,
        "sample": sample and sample["data"],
    }
    context = {
        "title": shown(analysis["checkpoint"]["name"]),
        "facts": facts(analysis),
        "tiles": tiles(analysis),
        "sentences": sentences(analysis),
        "sections": {section["id"]: section for section in sections},
        "choices": chosen,
        "layer_names": layer_names(analysis),
        "offered": offered,
        "first": first,
        "pairs": pairs_context(analysis),
        "experts": experts_context(analysis),
        "sample": sample,
        "table": layer_table(analysis),
        "settings": [(shown(key), shown(str(value))) for key, value in sorted(analysis["settings"].items())],
        "path": shown(str(analysis["checkpoint"]["path"])),
        "time": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": shown(str(analysis["version"])),
        "data": data,
    }
    path = folder / "report.html"
    write_atomic(path, theme.render("titan_moe.analyze", "report.html.j2", context))
    return path


def facts(analysis: Analysis) -> str:
    """What was looked at, in one line."""
    model, texts = analysis["model"], analysis["texts"]
    return " · ".join(
        [
            f"{model['num_experts']} experts in each of {counted(len(analysis['layers']), 'MoE layer')}, "
            f"{experts_of_token(analysis)} for each token",
            f"router {shown(model['router'])}, "
            + (f"balanced by {shown(', '.join(model['balancers']))}" if model["balancers"] else "not balanced"),
            f"{analysis['num_tokens']:,} tokens of {counted(len(texts), 'text')}",
            f"loss {number(analysis['loss'], '.3f')} nats a token",
        ]
    )


def mean_choices(analysis: Analysis) -> float:
    """Experts that a token chose, mean over tokens and layers: fewer than top_k where a router leaves slots unused."""
    choices = sum(sum(layer["load"]) for layer in analysis["layers"])
    return choices / len(analysis["layers"]) / analysis["num_tokens"]


def experts_of_token(analysis: Analysis) -> str:
    """How many experts a token has, in words."""
    top_k, choices = analysis["model"]["top_k"], mean_choices(analysis)
    return f"{top_k}" if abs(choices - top_k) < 1e-9 else f"{choices:.2f} on average (top_k {top_k})"


def tiles(analysis: Analysis) -> list[dict[str, str]]:
    """The numbers to see first, each with words that say what it is."""
    layers, experts = analysis["layers"], analysis["model"]["num_experts"]
    even = mean_choices(analysis) / experts
    dead = sum(len(layer["dead_experts"]) for layer in layers)

    # An analysis names at most 20 pairs of a layer, so that their number may be larger than the sum says.
    pairs = sum(len(layer["overlapping_pairs"]) for layer in layers)
    many = "or more " if any(len(layer["overlapping_pairs"]) >= 20 for layer in layers) else ""
    busiest = mean(layer["maxvio"] for layer in layers)
    entropy = mean(layer["entropy"]["normalised_mean"] for layer in layers)
    special = mean(layer["specialisation"]["mean"] for layer in layers)
    alike = mean(mean_pair(layer["output_similarity"]) for layer in layers)
    settings = analysis["settings"]

    # A number means something beside what it is measured against, so that is said with each.
    rows = [
        (
            f"{dead} of {experts * len(layers)}",
            "dead experts",
            f"with a load below {settings['dead_fraction']:g} of the even one, which is {even:.1%} of the tokens",
        ),
        (
            f"{number(None if busiest is None else 1 + busiest)}x",
            "busiest expert",
            "its load over the even share, mean over layers (MaxVio + 1)",
        ),
        (f"{number(special)} nats", "specialisation", "how far an expert's tokens are from all tokens, beyond chance"),
        (
            f"{pairs} {many}".strip(),
            "overlapping pairs",
            f"outputs with a cosine of {settings['overlap_cosine']:g} or more",
        ),
        (number(alike), "likeness of outputs", "cosine of two experts' outputs, mean over pairs"),
        (
            number(entropy),
            "router entropy",
            "of the most that it can be: 1 is all experts alike, 0 one alone",
        ),
    ]
    return [{"value": value, "name": name, "text": text} for value, name, text in rows]


def sentences(analysis: Analysis) -> list[str]:
    """What the numbers say, in words: which experts are dead, what a token's expert tells, what differs."""
    layers, texts = analysis["layers"], analysis["texts"]
    result = []
    dead = [(layer["layer"], expert) for layer in layers for expert in layer["dead_experts"]]
    if dead:
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:8])
        result.append(f"Dead: expert {named}" + (f" and {len(dead) - 8} more." if dead[8:] else "."))
    else:
        result.append("No expert is dead.")

    # The one expert that is most its own says more than a mean over all of them.
    excess_LE = numbers([layer["specialisation"]["excess"] for layer in layers])
    for index, layer in enumerate(layers):
        excess_LE[index, layer["dead_experts"]] = np.nan  # a handful of tokens says little
    if np.isfinite(excess_LE).any():
        place, expert = np.unravel_index(int(np.nanargmax(excess_LE)), excess_LE.shape)
        top = [f"“{token_text(one['text'])}”" for one in layers[place]["top_tokens"][expert][:4]]
        words = f": it takes {', '.join(top)}" if top else ""
        result.append(
            f"The most specialised expert is {expert} of layer {layers[place]['layer']} "
            f"({excess_LE[place, expert]:.2f} nats){words}."
        )

    # Loads by text differ for the text's sake only where shares do, not sizes.
    if texts[1:]:
        shares_LXE = over_even([layer["load_by_text"] for layer in layers])
        spread_LE = np.nanmax(shares_LXE, 1) - np.nanmin(shares_LXE, 1)
        if np.isfinite(spread_LE).any():
            place, expert = np.unravel_index(int(np.nanargmax(spread_LE)), spread_LE.shape)
            shares = shares_LXE[place, :, expert]
            low, high = int(np.nanargmin(shares)), int(np.nanargmax(shares))
            result.append(
                f"Texts differ most in expert {expert} of layer {layers[place]['layer']}: {shares[high]:.2f} of its "
                f"even share in {shown(texts[high]['name'])}, {shares[low]:.2f} in {shown(texts[low]['name'])}."
            )
    return result


def section_context(section: Section) -> dict[str, Any]:
    """A section for the template, its figures drawn."""
    panels = [
        {
            "name": panel.name,
            "caption": panel.caption,
            "svg": theme.embedded(theme.svg_of(panel.figure), panel.name, panel.caption),
            "data": panel.map and {**map_names(panel.map), "values": rounded(panel.map.values)},
        }
        for panel in section.panels
    ]
    return {**section._asdict(), "panels": panels}


def choice_context(choice: Choice, first: int) -> dict[str, Any]:
    """The figure of a layer's map for the template; where the layer has none that of another stands, hidden."""
    heat = choice.maps[first] or next(one for one in choice.maps if one is not None)
    svg = theme.svg_of(heatmap(heat, title=choice.title, has_numbers=False))
    return {
        "name": choice.name,
        "caption": choice.caption,
        "svg": theme.embedded(svg, choice.name, f"{choice.title}: {choice.caption}"),
        "is_hidden": choice.maps[first] is None,
    }


def offered_layers(analysis: Analysis, first: int) -> list[int]:
    """The indices of the layers that a reader can choose from: all, or every n-th of a model with many experts."""
    num_layers, pairs = len(analysis["layers"]), analysis["model"]["num_experts"] ** 2
    step = math.ceil(num_layers * pairs / MOST_PAIRS_OF_EXPERTS)
    return list(range(first % step, num_layers, step))


def choice_data(choice: Choice, offered: Sequence[int]) -> dict[str, Any]:
    """The map of every layer that is offered: numbers while they are few, else a byte each, its place on the scale."""
    maps = [choice.maps[index] for index in offered]
    given = [one for one in choice.maps if one is not None]
    is_small = sum(one.values.size for one in given) <= MOST_NUMBERS
    pack = rounded if is_small else packed
    return {**map_names(given[0]), "layers": [one and pack(one.values, one.scale) for one in maps]}


def map_names(heat: Map) -> dict[str, Any]:
    """What is needed beside its values to read a map and to draw another one like it."""
    scale = heat.scale
    return {
        **{key: getattr(heat, key) for key in ("row", "rows", "column", "columns")},
        **{key: getattr(scale, key) for key in ("low", "high", "unit")},
        "isLog": scale.is_log,
        "palette": palette(scale),
    }


def rounded(values: np.ndarray, scale: Scale | None = None) -> list[float | None]:
    """Values row by row, to three digits, None where there is none."""
    return [float(f"{value:.3g}") if math.isfinite(value) else None for value in values.ravel().tolist()]


def packed(values: np.ndarray, scale: Scale) -> str:
    """Values row by row as places on the scale, 0 to 254 and 255 where there is none, in base64."""
    return in_base64(levels(values, scale))


class SampleToken(NamedTuple):
    """A token of the text: what it looks like, and the colour of its expert."""

    text: str
    rank: int  # of its expert, -1 where it has none


def sample_pieces(analysis: Analysis) -> list[tuple[int, int, Mapping[str, Any]]]:
    """The sequences of the sample, each with the index of its text and with how many of its tokens are shown."""
    # What is beyond the bound is cut from the end of each text alike.
    texts = analysis["sample"]["texts"]
    top_k = max(1, analysis["model"]["top_k"])
    bound = MOST_CHOICES // (len(analysis["layers"]) * top_k * max(1, len(texts)))
    pieces = []
    for text in texts:
        left = bound
        for one in text["sequences"]:
            count = min(left, len(one["tokens"]))
            left -= count
            if count:
                pieces.append((text["text"], count, one))
    return pieces


def sample_context(analysis: Analysis, first: int) -> dict[str, Any] | None:
    """The text to colour for the template, in the colours of the layer shown first and of the first choice."""
    experts, pieces = analysis["model"]["num_experts"], sample_pieces(analysis)
    if not pieces:
        return None

    # One array for all pieces, (L, T, K), as bytes: a model of many layers would be ten times as long as text.
    chosen_LTK = np.concatenate([np.array(one["experts"])[:, :count] for _, count, one in pieces], 1)
    weights_LTK = np.concatenate([np.array(one["weights"], float)[:, :count] for _, count, one in pieces], 1)
    none = 255 if experts <= 255 else 65535  # stands for a slot without an expert
    step = max(float(np.abs(weights_LTK).max()), 1e-9) / 255
    data = {
        "experts": in_base64(np.where(chosen_LTK < 0, none, chosen_LTK).astype("u1" if none == 255 else "<u2")),
        "none": none,
        "weights": in_base64((np.clip(weights_LTK, 0, None) / step).round().astype(np.uint8)),
        "weightStep": step,
        "topK": chosen_LTK.shape[2],
        "numExperts": experts,
        "numTokens": chosen_LTK.shape[1],
        "classes": [kind for _, count, one in pieces for kind in one["classes"][:count]],
        "classNames": [shown(kind["name"].replace("_", " ")) for kind in analysis["token_classes"]],
    }

    # Pieces of one text stand in one box.
    ranking = ranks(chosen_LTK[first, :, 0], experts)
    counts = Counter(chosen_LTK[first, :, 0].tolist())
    texts: dict[int, list[list[SampleToken]]] = {}
    for index, count, one in pieces:
        experts_S = np.array(one["experts"][first])[:count, 0].tolist()
        tokens = [
            SampleToken(in_text(text), ranking.get(expert, -1))
            for text, expert in zip(one["tokens"], experts_S, strict=False)
        ]
        texts.setdefault(index, []).append(tokens)
    legend = [
        {"expert": expert, "rank": rank, "share": percent(counts[expert] / chosen_LTK.shape[1])}
        for expert, rank in sorted(ranking.items(), key=lambda item: item[1])
    ]
    named = [(shown(analysis["texts"][index]["name"]), parts) for index, parts in texts.items()]
    total = sum(len(one["tokens"]) for text in analysis["sample"]["texts"] for one in text["sequences"])
    sizes = {"count": chosen_LTK.shape[1], "total": total, "top_k": chosen_LTK.shape[2]}
    return {"texts": named, "legend": legend, "data": data, **sizes}


def percent(share: float) -> str:
    """A share above 0 as text that does not say 0."""
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def in_base64(values: np.ndarray) -> str:
    """The bytes of an array, for a page."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def ranks(chosen_T: np.ndarray, num_experts: int) -> dict[int, int]:
    """The rank of each expert that was chosen, which is its colour: its number while there are eight, else its use."""
    counts = Counter(chosen_T[chosen_T >= 0].tolist())
    if num_experts <= len(theme.LIGHT):
        return {expert: expert for expert in sorted(counts)}
    return {expert: rank for rank, expert in enumerate(sorted(counts, key=lambda one: (-counts[one], one)))}


def in_text(text: str) -> str:
    """A token inside of the text: the end of a line is seen, and is one."""
    return shown(text, CONTROL_IN_TEXT).replace("\n", "⏎\n")


def experts_context(analysis: Analysis) -> list[dict[str, Any]]:
    """The top tokens of each expert with what stood around them, by layer."""
    # A large model has thousands of experts: each of them shows fewer tokens and contexts.
    layers, experts = analysis["layers"], analysis["model"]["num_experts"]
    most = max(2, MOST_TOKENS // (len(layers) * experts))
    most_contexts = min(MOST_CONTEXTS_OF_ONE, MOST_CONTEXTS // (len(layers) * experts))
    texts = [shown(text["name"]) for text in analysis["texts"]]
    result = []
    for layer in layers:
        # Few tokens say little of an expert, so that its load and whether it is dead stand beside its name.
        loads, excess = over_even(layer["load"]), layer["specialisation"]["excess"]
        rows = []
        for expert, tops in enumerate(layer["top_tokens"]):
            note = f"{number(float(loads[expert]))} of even, {number(excess[expert])} nats"
            rows.append(
                {
                    "expert": expert,
                    "note": f"{note}, dead" if expert in layer["dead_experts"] else note,
                    "tokens": [token_chip(top) for top in tops[:most]],
                    "contexts": [
                        token_place(top["contexts"][0], texts) for top in tops[:most_contexts] if top["contexts"]
                    ],
                }
            )
        result.append({"layer": layer["layer"], "experts": rows})
    return result


def token_chip(top: Mapping[str, Any]) -> dict[str, str]:
    """A top token of an expert: its text, how often it chose the expert, and how unusual that is."""
    return {
        "text": token_text(top["text"]),
        "share": percent(top["count"] / top["total"]),
        "title": f"{top['count']:,} of {top['total']:,}: {number(top['lift'], '.1f')} times the mean share",
    }


def token_place(place: Mapping[str, Any], texts: Sequence[str]) -> dict[str, str]:
    """A place where a top token stood; `texts` are the names of all."""
    return {
        "before": shown(place["before"])[-BEFORE:],
        "token": shown(place["token"]),
        "after": shown(place["after"]),
        "text": texts[place["text"]],
    }


def pairs_context(analysis: Analysis) -> list[list[str]]:
    """The pairs of experts whose outputs are the most alike, as rows of a table."""
    pairs = [(pair, layer["layer"]) for layer in analysis["layers"] for pair in layer["overlapping_pairs"]]
    pairs.sort(key=lambda item: -(item[0]["output_cosine"] or 0.0))
    keys = ("output_cosine", "weight_cosine", "token_overlap", "lift")
    return [
        [str(layer), "{} and {}".format(*pair["experts"]), *(number(pair[key]) for key in keys)]
        for pair, layer in pairs[:MOST_PAIRS]
    ]


def layer_table(analysis: Analysis) -> dict[str, Any]:
    """The numbers of every layer, for those who want them as numbers."""
    head = ["layer", "MaxVio", "in a document", "load entropy", "specialisation", "router entropy", "margin"]
    head += ["dead", "overlapping pairs", "outputs alike", "weights alike", "told of the next layer"]
    head += ["experts a token", "unused slots", "tokens without expert"]

    # What a layer tells of the next one stands in its own row; the last has none.
    flows = [one["mutual_information"] for one in analysis["between_layers"]]
    rows = []
    for index, layer in enumerate(analysis["layers"]):
        rows.append(
            [
                str(layer["layer"]),
                number(layer["maxvio"]),
                number(layer["documents"]["maxvio_mean"]),
                number(layer["load_entropy"], ".3f"),
                number(layer["specialisation"]["mean"]),
                number(layer["entropy"]["normalised_mean"], ".3f"),
                number(layer["margin"]["median"] if layer["margin"] else None, ".3g"),
                str(len(layer["dead_experts"])),
                str(len(layer["overlapping_pairs"])),
                number(mean_pair(layer["output_similarity"])),
                number(mean_pair(layer["weight_similarity"]), ".3f"),
                number(flows[index] if index < len(flows) else None, ".3f"),
                number(layer["choices_per_token"]),
                f"{layer['unused_slots']:,}",
                f"{layer['unrouted_tokens']:,}",
            ]
        )
    return {"head": head, "rows": rows}
