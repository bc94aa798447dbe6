"""What a report of an analysis draws: its sections with their figures, and the maps of a layer that one can choose."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from titan_moe.analyze.figures import (
    LIFT,
    LOAD,
    SMALL,
    Line,
    Map,
    Panel,
    Scale,
    heatmap,
    lines,
    numbers,
    over_even,
    span,
)
from titan_moe.analyze.tables import margin_notes
from titan_moe.theme import WIDTH

Analysis = Mapping[str, Any]
MOST_TEXTS = 12  # maps of load by text
# Control characters have pictures; those that turn the text around them are written as escapes.
CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {127: "\u2421"} | {9: "⇥", 10: "⏎"}
CONTROL |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
CONTROL_IN_TEXT = {code: picture for code, picture in CONTROL.items() if code not in (9, 10)}
SPACE = "␣"


SIMILARITIES = {
    "output_similarity": ("Outputs", "Cosine of two experts' outputs, mean over tokens"),
    "weight_similarity": ("Weights", "Cosine of two experts' weights"),
    "token_overlap": ("Tokens", "How alike the tokens of two experts are: 0 none in common, 1 the same"),
}


class Section(NamedTuple):
    """A title with a sentence on how to read what is below, and its figures."""

    id: str
    title: str
    text: str
    panels: Sequence[Panel]
    is_small: bool = False  # figures that stand four in a row


class Choice(NamedTuple):
    """A map of one layer, which a reader can exchange for that of another layer."""

    name: str
    title: str
    caption: str
    maps: Sequence[Map | None]  # one a layer; None: this layer has no such map


def shown(text: str, pictures: Mapping[int, str] = CONTROL) -> str:
    """A text of others that UTF-8 can write: control characters as pictures or escapes, lone surrogates as \\udcNN."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").translate(pictures)


def token_text(text: str) -> str:
    """A token by itself: spaces can be seen, too."""
    return shown(text).replace(" ", SPACE) or "∅"


def number(value: float | None, digits: str = ".2f") -> str:
    """A number as text, "-" where there is none."""
    return "-" if value is None or not math.isfinite(value) else format(value, digits)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the numbers that there are, None where there are none."""
    given = [value for value in values if value is not None and math.isfinite(value)]
    return sum(given) / len(given) if given else None


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 pair", "2 pairs"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def layer_names(analysis: Analysis) -> list[str]:
    """The block of each MoE layer, as text."""
    return [str(layer["layer"]) for layer in analysis["layers"]]


def expert_names(analysis: Analysis) -> list[str]:
    """The number of each expert, as text."""
    return [str(expert) for expert in range(analysis["model"]["num_experts"])]


def bucket_names(analysis: Analysis) -> list[str]:
    """The positions of each bucket, as text."""
    ends = [(bucket["first"], bucket["last"]) for bucket in analysis["position_buckets"]]
    return [str(first) if first == last else f"{first}-{last}" for first, last in ends]


def shown_layer(analysis: Analysis) -> int:
    """The index of the layer to show first: the one with the most specialised experts, of those with a next one."""
    layers = analysis["layers"][:-1] or analysis["layers"]
    means = [layer["specialisation"]["mean"] or 0.0 for layer in layers]
    return means.index(max(means))


def off_diagonal(matrix: Any) -> np.ndarray:
    """A matrix of pairs without those of an expert with itself, which say nothing: NaN there."""
    values_EE = numbers([[None] * len(matrix) if row is None else row for row in matrix])
    np.fill_diagonal(values_EE, np.nan)
    return values_EE


def mean_pair(matrix: Any) -> float | None:
    """The mean over pairs of two different experts; None where there is none."""
    return None if matrix is None else mean(off_diagonal(matrix).ravel().tolist())


def layers_map(analysis: Analysis, values: Any, scale: Scale) -> Map:
    """Numbers (L, E) as a map of layers and experts."""
    return Map(numbers(values), scale, "layer", layer_names(analysis), "expert", expert_names(analysis))


def load_panel(analysis: Analysis, name: str, title: str, caption: str, counts: Any, width: float = WIDTH) -> Panel:
    """A map of loads (L, E), each over its even share in its layer."""
    heat = layers_map(analysis, over_even(counts), LOAD)
    return Panel(name, caption, heatmap(heat, width, title), heat)


def sections_of(analysis: Analysis) -> list[Section]:
    """The sections with figures of all layers; what was not measured has none."""
    return [
        *load_sections(analysis),
        specialisation_section(analysis),
        router_section(analysis),
        *([pruning_section(analysis)] if analysis["pruning"] else []),
        *([training_section(analysis)] if analysis["over_training"] else []),
    ]


def load_sections(analysis: Analysis) -> list[Section]:
    """Load by text, by class of token, and how even it is by layer, by position and inside of documents."""
    layers, texts = analysis["layers"], analysis["texts"]
    everything = [layer["load"] for layer in layers]
    count = f"{analysis['num_tokens']:,} tokens"
    by_text = [
        load_panel(analysis, "load-all", "All texts" if texts[1:] else short(texts[0]["name"]), count, everything)
    ]
    for index, text in enumerate(texts[:MOST_TEXTS] if texts[1:] else []):
        counts = [layer["load_by_text"][index] for layer in layers]
        caption = f"{text['num_tokens']:,} tokens, loss {number(text['loss'], '.3f')} nats a token"
        by_text.append(load_panel(analysis, f"load-text-{index}", short(text["name"]), caption, counts))
    more = f" The first {MOST_TEXTS} of {len(texts)} texts have a map." if len(texts) > MOST_TEXTS else ""

    # A class that no token is of has no load.
    by_class = []
    for index, kind in enumerate(analysis["token_classes"]):
        if kind["num_tokens"]:
            counts = [layer["load_by_class"][index] for layer in layers]
            count = f"{counted(kind['num_tokens'], 'token')} of {counted(kind['num_types'], 'kind')}"
            caption = f"{count}; {shown(kind['meaning'])}"
            title = short(kind["name"].replace("_", " "))
            by_class.append(load_panel(analysis, f"load-class-{index}", title, caption.rstrip("."), counts, SMALL))
    return [
        Section(
            "load",
            "Load of the experts",
            "How many of the tokens each expert was chosen for, over the even share: white is even, blue is less, red "
            f"is more. The colours are the same in all maps of loads.{more}",
            [*by_text, *evenness_panels(analysis)],
        ),
        Section(
            "classes",
            "Load by class of token",
            "An expert that is red here and white above is one for this class.",
            by_class,
            is_small=True,
        ),
    ]


def evenness_panels(analysis: Analysis) -> list[Panel]:
    """MaxVio over the layers, of all tokens and inside of single documents, and by position."""
    layers = analysis["layers"]
    documents = [layer["documents"] for layer in layers]
    series = [Line("all tokens", numbers([layer["maxvio"] for layer in layers]))]
    text = "MaxVio of each layer: how far the busiest expert is above the even share; 0 is even"
    if any(one["num_pieces"] for one in documents):
        means, spreads = (numbers([one[key] for one in documents]) for key in ("maxvio_mean", "maxvio_std"))
        series.append(Line("one document, mean ± its spread", means, means - spreads, means + spreads))
        text += "; a model may be even over all documents and uneven in each"
    x = [layer["layer"] for layer in layers]
    panels = [Panel("maxvio", text, lines(x, series, "layer", "MaxVio"))]

    # With one bucket there is nothing to compare.
    buckets = analysis["position_buckets"]
    if buckets[1:]:
        loads_LPE = over_even([layer["load_by_position"] for layer in layers])
        names = bucket_names(analysis)
        values = loads_LPE.max(-1) - 1
        scale = span(values, "MaxVio")
        heat = Map(values, scale, "layer", layer_names(analysis), "position in the sequence", names)
        text = (
            "MaxVio of each layer by the token's position; buckets with few tokens look more uneven than they are: "
            f"the smallest has {min(bucket['num_tokens'] for bucket in buckets):,} tokens"
        )
        panels.append(map_panel("maxvio-position", text, heat))
    return panels


def map_panel(name: str, text: str, heat: Map) -> Panel:
    """A panel of a map, which its caption explains."""
    return Panel(name, text, heatmap(heat), heat)


def specialisation_section(analysis: Analysis) -> Section:
    """How far each expert's tokens are from all tokens."""
    layers = analysis["layers"]
    excess_LE = numbers([layer["specialisation"]["excess"] for layer in layers])
    heat = layers_map(analysis, excess_LE, span(excess_LE, "nats beyond chance", " nats"))
    series = [Line("specialisation", numbers([layer["specialisation"]["mean"] for layer in layers]), points=excess_LE)]
    panels = [
        map_panel("specialisation-experts", "Each expert's specialisation", heat),
        Panel(
            "specialisation-layers",
            "Mean over a layer's experts, weighted by load; small dots are its experts",
            lines([layer["layer"] for layer in layers], series, "layer", "nats beyond chance"),
        ),
    ]

    # Experts that do the same are seen over the layers at once, in detail in one layer further below.
    pairs = [
        Line(title.lower(), numbers([mean_pair(layer[key]) for layer in layers]), None, None)
        for key, (title, _) in SIMILARITIES.items()
        if any(layer[key] is not None for layer in layers)
    ]
    pairs = [line for line in pairs if np.isfinite(line.values).any()]
    if pairs:
        text = "How alike two experts of a layer are, mean over its pairs: 1 is the same, 0 has nothing in common"
        panels.append(
            Panel(
                "similarity-layers",
                text,
                lines([layer["layer"] for layer in layers], pairs, "layer", "likeness of two experts"),
            )
        )
    return Section(
        "specialisation",
        "What experts specialise in",
        "How far the distribution of an expert's tokens is from that of all tokens (Kullback-Leibler, nats), less what "
        "an expert with as many random tokens would have. At 0 the router does not look at which token it is.",
        panels,
    )


def router_section(analysis: Analysis) -> Section:
    """How decided the router is: margin and entropy."""
    layers, names = analysis["layers"], layer_names(analysis)
    x, panels = [layer["layer"] for layer in layers], []
    entropy = Line("entropy", numbers([layer["entropy"]["normalised_mean"] for layer in layers]))
    text = "Entropy of the router's scores over ln(number of experts), mean over tokens: 1 is all experts alike"
    panels.append(Panel("entropy", text, lines(x, [entropy], "layer", "normalised entropy")))
    edges = analysis["histograms"]["entropy_edges"]
    rows = [layer["entropy"]["histogram"] for layer in layers]
    heat = histogram_map(rows, names, "normalised entropy", [f"{edge:.2f}" for edge in edges[:-1]])
    text = "How the entropies of single tokens are spread; the number below a column is where it begins"
    panels.append(map_panel("entropy-spread", text, heat))

    # Where every expert is chosen there is no margin.
    margins = [layer["margin"] for layer in layers]
    if any(margins):
        medians, means = (numbers([one[key] if one else None for one in margins]) for key in ("median", "mean"))
        text = "Margin of a choice: the smallest score that was chosen less the largest that was not"
        series = [Line("median", medians), Line("mean", means)]
        panels.append(Panel("margin", text, lines(x, series, "layer", "margin")))
        edges = analysis["histograms"]["margin_edges"]
        begins = ["less", *(f"{edge:.0e}".replace("e-0", "e-").replace("e+0", "e") for edge in edges[1:-1])]
        rows = [one["histogram"] if one else [0] * len(begins) for one in margins]
        heat = histogram_map(rows, names, "margin", begins)
        text = "How the margins of single tokens are spread; those on the left are nearly a toss of a coin"
        panels.append(map_panel("margin-spread", text, heat))
    text = (
        "A router that is sure has a low entropy and a large margin. Choices with a small margin change with the next "
        "step of training, or with rounding."
    )
    return Section("router", "How decided the router is", " ".join([text, *margin_notes(analysis)]), panels)


def histogram_map(rows: Sequence[Sequence[int]], names: Sequence[str], column: str, columns: Sequence[str]) -> Map:
    """Histograms, one a layer, as shares of the layer's tokens."""
    counts_LB = np.asarray(rows, dtype=np.float64)
    total_L1 = counts_LB.sum(1, keepdims=True)
    share_LB = np.divide(counts_LB, total_L1, out=np.full_like(counts_LB, np.nan), where=total_L1 > 0)
    return Map(share_LB, span(share_LB, "share of the tokens"), "layer", names, column, columns)


def pruning_section(analysis: Analysis) -> Section:
    """Loss when experts are taken away."""
    # How many experts the model could do without: those with the least load of every layer go first.
    pruning = analysis["pruning"]
    curve = [Line("loss", numbers([point["loss"] for point in pruning["curve"]]))]
    removed = [point["removed"] for point in pruning["curve"]]
    text = (
        f"Loss when the experts with the least load are taken away from every layer; {pruning['num_tokens']:,} tokens"
    )
    panels = [
        Panel("pruning-curve", text, lines(removed, curve, "experts taken away in each layer", "loss (nats a token)"))
    ]

    # Which of them: load does not say it, for a rare expert may know what no other does.
    if pruning["single"] is not None:
        losses_LE = numbers(pruning["single"])
        scale = span(losses_LE, "loss above that of all (nats a token)", " nats a token", signed=True, least=1e-6)
        heat = layers_map(analysis, losses_LE, scale)
        text = "Loss above that with all experts when this one is taken away: red is needed, blue does harm"
        panels.append(map_panel("pruning-single", text, heat))
    return Section("pruning", "Taking experts away", "What the model loses without some of its experts.", panels)


def training_section(analysis: Analysis) -> Section:
    """How the model came to be what it is: measures and drift over the checkpoints."""
    course = analysis["over_training"]
    steps, measures = [one["step"] for one in course["checkpoints"]], course["measures"]
    panels = [
        Panel(
            "training-loss",
            "Loss over training",
            lines(steps, [Line("loss", numbers(course["loss"]))], "step", "loss (nats a token)"),
        )
    ]
    for key, (title, label) in TRAINING.items():
        values_NL = numbers(measures[key])
        if np.isfinite(values_NL).any():
            line = over_layers(values_NL, "")
            text = f"{title}, mean over layers" + ("" if line.low is None else ", from the lowest layer to the highest")
            panels.append(Panel(f"training-{key}", text, lines(steps, [line], "step", label)))

    # Drift is between neighbours, so that the first checkpoint has none; agreement is with the last.
    drift = course["drift"]
    nobody = np.full((1, len(analysis["layers"])), np.nan)
    changed = over_layers(np.concatenate([nobody, numbers(drift["changed"])]), "tokens with other experts than before")
    agreement = over_layers(numbers(drift["agreement_with_last"]), "choices as at the last checkpoint")
    text = f"How the choices for {drift['num_tokens']:,} tokens change from checkpoint to checkpoint, mean over layers"
    panels.append(Panel("training-drift", text, lines(steps, [changed, agreement], "step", "share")))
    names = f"{len(steps)} checkpoints, from step {steps[0]:,} to step {steps[-1]:,}."
    return Section("training", "Over training", names, panels)


TRAINING = {  # measure -> its caption, and the name of its axis
    "maxvio": ("MaxVio", "MaxVio"),
    "document_maxvio": ("MaxVio inside of a document", "MaxVio in a document"),
    "specialisation": ("Specialisation", "nats beyond chance"),
    "router_entropy": ("Entropy of the router's scores", "entropy (nats)"),
    "margin": ("Margin of a choice", "margin"),
    "output_similarity": ("Likeness of two experts' outputs", "cosine of outputs"),
    "weight_similarity": ("Likeness of two experts' weights", "cosine of weights"),
    "dead_experts": ("Dead experts in a layer", "dead experts"),
}


def over_layers(values_NL: np.ndarray, label: str) -> Line:
    """A line of means over layers, with a band from the lowest layer to the highest."""
    ends = [np.full(len(values_NL), np.nan) for _ in range(3)]
    for row, values in enumerate(values_NL):
        given = values[np.isfinite(values)]
        if given.size:
            for end, value in zip(ends, (given.mean(), given.min(), given.max()), strict=True):
                end[row] = value
    has_band = values_NL.shape[1] > 1
    return Line(label, ends[0], ends[1] if has_band else None, ends[2] if has_band else None)


def short(name: str, most: int = 34) -> str:
    """A name that fits above a figure."""
    text = " ".join(shown(name).split())
    return text if len(text) <= most else text[: most - 1] + "…"


# --- Maps of one layer


def layer_choices(analysis: Analysis) -> list[Choice]:
    """What is to be seen in one layer: its loads in detail, and its experts in pairs; what no layer has is left out."""
    layers = analysis["layers"]
    kinds = [short(kind["name"].replace("_", " ")) for kind in analysis["token_classes"]]
    places = bucket_names(analysis)
    candidates = [
        load_choice(analysis, "classes", "class of token", kinds, [layer["load_by_class"] for layer in layers]),
        load_choice(analysis, "positions", "position", places, [layer["load_by_position"] for layer in layers]),
        pair_choice(
            analysis,
            "together",
            "Chosen together",
            "How much more often than by chance a token has both experts: red seek each other, blue avoid each other",
            [layer["coactivation"]["lift"] for layer in layers],
            LIFT,
        ),
        flow_choice(analysis),
    ]

    # Each kind of likeness has one scale for all layers. That of weights is often far smaller than that of outputs.
    for key, (title, text) in SIMILARITIES.items():
        matrices = [layer[key] for layer in layers]
        values = [off_diagonal(matrix).ravel() for matrix in matrices if matrix is not None]
        signed = key != "token_overlap"
        scale = span(np.concatenate(values or [np.empty(0)]), "cosine", signed=signed, least=0.1)
        scale = scale if signed else Scale("overlap", scale.colours, 0.0, 1.0)
        candidates.append(pair_choice(analysis, key, title, text, matrices, scale))
    if analysis["over_training"]:
        course = analysis["over_training"]
        steps = [f"{one['step']}" for one in course["checkpoints"]]
        counts = [[loads[index] for loads in course["load"]] for index in range(len(layers))]
        candidates.append(load_choice(analysis, "course", "step", steps, counts))
    return [choice for choice in candidates if any(one is not None for one in choice.maps)]


def load_choice(analysis: Analysis, name: str, row: str, rows: Sequence[str], counts: Sequence[Any]) -> Choice:
    """Loads (R, E) of each layer in groups of tokens, each over its even share in its group."""
    maps = [Map(over_even(group), LOAD, row, rows, "expert", expert_names(analysis)) for group in counts]
    return Choice(f"layer-{name}", f"Load by {row}", f"Load of each expert by {row}, over the even share", maps)


def pair_choice(
    analysis: Analysis, name: str, title: str, caption: str, matrices: Sequence[Any], scale: Scale
) -> Choice:
    """Numbers (E, E) of pairs of experts in each layer."""
    names = expert_names(analysis)
    maps: list[Map | None] = []
    for matrix in matrices:
        values_EE = None if matrix is None else off_diagonal(matrix)
        is_empty = values_EE is None or not np.isfinite(values_EE).any()
        maps.append(None if is_empty else Map(values_EE, scale, "expert", names, "expert", names))
    return Choice(f"layer-{name}", title, caption, maps)


def flow_choice(analysis: Analysis) -> Choice:
    """Experts of neighbouring layers that are chosen by the same tokens; the last layer has no next one."""
    names, maps = expert_names(analysis), []
    for one in analysis["between_layers"]:
        lift = numbers([row if row is not None else [None] * len(names) for row in one["lift"]])
        maps.append(Map(lift, LIFT, "expert of this layer", names, "expert of the next", names))
    text = "How much more often than by chance a token goes from an expert to one of the next MoE layer"
    return Choice("layer-flow", "On to the next layer", text, [*maps, None])
