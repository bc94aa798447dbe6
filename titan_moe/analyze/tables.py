"""The analysis as tables of Markdown, for reading where no browser is."""

from collections.abc import Mapping, Sequence
from typing import Any

from titan_moe.markdown import code, plain


def tables(analysis: dict[str, Any]) -> str:
    """A page: what was analyzed, a table of the layers, of the texts' and classes' favourite experts, of top tokens."""
    # What was looked at comes first, for a table of numbers does not say what they are of.
    model, checkpoint = analysis["model"], analysis["checkpoint"]
    texts = ", ".join(f"{plain(one['name'])} ({one['num_tokens']:,} tokens)" for one in analysis["texts"])
    parts = [
        f"# {plain(checkpoint['name'])}",
        f"{len(analysis['layers'])} MoE layers of {model['num_experts']} experts, top_k {model['top_k']}, "
        f"router {code(model['router'])}. Texts: {texts}; loss {number(analysis['loss'])} nats/token.",
        "## Layers",
        layer_table(analysis),
        *margin_notes(analysis),
        "## Load of texts and token classes",
        "The expert with the largest share of each, and that share over an even one.",
        group_table(analysis),
        "## Experts",
        expert_table(analysis),
    ]

    # Single experts are left to the report and to analysis.json: they are as many as the table above has rows.
    if pruning := analysis["pruning"]:
        rows = [[str(point["removed"]), number(point["loss"])] for point in pruning["curve"]]
        parts += ["## Loss without the least loaded experts", table(["removed from each layer", "loss"], rows)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers on the right."""
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """A number for a cell."""
    return "-" if value is None else f"{value:.4g}"


def layer_table(analysis: dict[str, Any]) -> str:
    """One row for each layer: how even, how specialised, how certain."""
    head = [
        "layer",
        "MaxVio",
        "load entropy",
        "MaxVio of documents",
        "specialisation (nats)",
        "margin",
        "entropy (nats)",
        "dead",
        "overlapping pairs",
        "experts a token",
        "unused slots",
        "tokens without expert",
    ]

    # Numbers that are not there, as a margin where every expert is chosen, are a dash.
    rows = [
        [
            str(layer["layer"]),
            number(layer["maxvio"]),
            number(layer["load_entropy"]),
            number(layer["documents"]["maxvio_mean"]),
            number(layer["specialisation"]["mean"]),
            number(None if layer["margin"] is None else layer["margin"]["mean"]),
            number(layer["entropy"]["mean"]),
            str(len(layer["dead_experts"])),
            str(len(layer["overlapping_pairs"])),
            number(layer["choices_per_token"]),
            f"{layer['unused_slots']:,}",
            f"{layer['unrouted_tokens']:,}",
        ]
        for layer in analysis["layers"]
    ]
    return table(head, rows)


def margin_notes(analysis: Mapping[str, Any]) -> list[str]:
    """Why layers have no router margin, a sentence for each reason; none where all have one."""
    layers_of: dict[str, list[str]] = {}
    for layer in analysis["layers"]:
        if reason := layer["margin_missing"]:
            layers_of.setdefault(reason, []).append(str(layer["layer"]))
    return [
        f"No margin in {'layer' if len(layers) == 1 else 'layers'} {', '.join(layers)}: {reason}."
        for reason, layers in layers_of.items()
    ]


def group_table(analysis: dict[str, Any]) -> str:
    """For each text and token class the expert of each layer that has most of it."""
    layers = analysis["layers"]
    rows = []
    for key, entries in (("load_by_text", analysis["texts"]), ("load_by_class", analysis["token_classes"])):
        for i, entry in enumerate(entries):
            if entry["num_tokens"]:
                rows.append([plain(entry["name"]), *(favourite(layer[key][i]) for layer in layers)])
    return table(["", *(f"layer {layer['layer']}" for layer in layers)], rows)


def favourite(load: list[int]) -> str:
    """The expert with the largest load, and how many times an even one that is."""
    total = sum(load)
    best = max(range(len(load)), key=load.__getitem__)
    return f"{best} ({load[best] * len(load) / total:.2f}x)" if total else "-"


def expert_table(analysis: dict[str, Any]) -> str:
    """One row for each expert: its share, specialisation and top tokens."""
    rows = []
    for layer in analysis["layers"]:
        for expert, share in enumerate(layer["share"]):
            tokens = " ".join(code(one["text"].replace(" ", "\N{OPEN BOX}")) for one in layer["top_tokens"][expert])
            excess = layer["specialisation"]["excess"][expert]
            rows.append([str(layer["layer"]), str(expert), f"{share:.2%}", number(excess), tokens])
    return table(["layer", "expert", "share", "specialisation (nats)", "top tokens"], rows)
