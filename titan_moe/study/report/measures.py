"""The measures of a run: their keys in results.jsonl, and how a report names and formats them."""

import re
from typing import NamedTuple


class Measure(NamedTuple):
    """How to show a number."""

    label: str
    better: str  # "lower", "higher", or "" where neither is
    digits: str  # format of a value
    from_zero: bool = False  # whether its size, not only its differences, means something: drawn as a bar
    unit: str = ""


# Measures of one run, by their key in results.jsonl.
MEASURES = {
    "loss": Measure("validation loss", "lower", ".4f", unit="nats/token"),
    "best_loss": Measure("best validation loss", "lower", ".4f", unit="nats/token"),
    "perplexity": Measure("perplexity", "lower", ".2f"),
    "best_perplexity": Measure("best perplexity", "lower", ".2f"),
    "accuracy": Measure("accuracy", "higher", ".2%"),
    "best_accuracy": Measure("best accuracy", "higher", ".2%"),
    "bits_per_byte": Measure("bits per byte", "lower", ".4f"),
    "train_loss": Measure("training loss, last tenth", "lower", ".4f", unit="nats/token"),
    "maxvio_batch": Measure("MaxVio batch, mean", "lower", ".3f", True),
    "maxvio_batch_last": Measure("MaxVio batch, last tenth", "lower", ".3f", True),
    "maxvio_global": Measure("MaxVio global", "lower", ".3f", True),
    "load_entropy": Measure("load entropy, last tenth", "higher", ".4f"),
    "aux_loss": Measure("load-balancing loss", "", ".4f"),
    "z_loss": Measure("z-loss", "", ".4g"),
    "param_norm": Measure("parameter norm", "", ".2f"),
    "step_seconds": Measure("time per step", "lower", ".3f", True, "s"),
    "train_seconds": Measure("training time", "lower", ".0f", True, "s"),
    "tokens_per_second": Measure("tokens/s", "higher", ",.0f", True),
    "peak_memory_gib": Measure("peak memory", "lower", ".2f", True, "GiB"),
}
# Those of an analysis of the last checkpoint, which `study.analyze` asks for: the scalars of `titan_moe.analyze`.
ANALYZED = {
    "specialisation": Measure("specialisation", "", ".4f", unit="nats"),
    "router_margin": Measure("router margin", "", ".4g"),
    "router_entropy": Measure("router entropy", "", ".4f", unit="nats"),
    "dead_experts": Measure("dead experts", "lower", ".1f", True),
    "output_similarity": Measure("similarity of experts' outputs", "", ".4f"),
    "weight_similarity": Measure("similarity of experts' weights", "", ".4f"),
    "document_maxvio": Measure("MaxVio of documents", "lower", ".3f", True),
}
MEASURES |= ANALYZED
# Those of a validation set, or of a task, as `validation/NAME/KEY`.
OF_TASKS = {
    "acc": Measure("acc", "higher", ".2%"),
    "acc_norm": Measure("acc_norm", "higher", ".2%"),
    "perplexity": MEASURES["perplexity"],
}
OF_SETS = ("loss", "perplexity", "accuracy", "bits_per_byte", "maxvio_global", "aux_loss", "z_loss")
_KEYS = tuple(dict.fromkeys((*OF_SETS, *OF_TASKS)))
_OF_A_SET = re.compile(rf"validation/([A-Za-z_]\w*)/({'|'.join(_KEYS)})", re.ASCII)
# The columns of the report's table.
COLUMNS = (
    *("loss", "best_loss", "perplexity", "accuracy", "maxvio_batch", "maxvio_global"),
    *("param_norm", "step_seconds", "tokens_per_second", "peak_memory_gib"),  # best_loss where it differs
)


class Curve(NamedTuple):
    """How to show a number over the steps."""

    label: str
    smooth: bool = False  # whether to draw a running mean


# Numbers of metrics.jsonl by kind/key.
CURVES = {
    "train/loss": Curve("training loss (nats/token)", True),
    "train/maxvio_batch": Curve("MaxVio batch", True),
    "train/load_entropy": Curve("load entropy", True),
    "train/param_norm": Curve("parameter norm"),
    "train/grad_norm": Curve("gradient norm before clipping", True),
    "train/aux_loss": Curve("load-balancing loss", True),
    "train/z_loss": Curve("z-loss", True),
    "train/dead_experts": Curve("dead experts", True),
    "train/router_confidence": Curve("router confidence", True),
    "train/router_logit_norm": Curve("router logit norm", True),
    "train/tokens_per_second": Curve("tokens/s", True),
    "validation/loss": Curve("validation loss (nats/token)"),
    "validation/perplexity": Curve("validation perplexity"),
    "validation/accuracy": Curve("validation accuracy"),
    "validation/maxvio_global": Curve("MaxVio global (validation)"),
    "validation/bits_per_byte": Curve("bits per byte (validation)"),
    "validation/routing_drift": Curve("routing drift (validation)"),
}


def set_of(key: str) -> str | None:
    """The name of the validation set or task that a measure or curve is of; None for any other."""
    match = _OF_A_SET.fullmatch(key)
    return match[1] if match else None


def key_in_set(key: str) -> str:
    """What a measure is of its validation set or task, as `loss`; any other as it is."""
    return key.rpartition("/")[2] if set_of(key) else key


def is_measure(key: str) -> bool:
    """Whether a key of results.jsonl is a measure."""
    return key in MEASURES or set_of(key) is not None


def measure_of(key: str) -> Measure:
    """How to show a measure, also one of a validation set."""
    name, measure = set_of(key), {**MEASURES, **OF_TASKS}[key_in_set(key)]
    return measure if name is None else measure._replace(label=f"{measure.label}, {name}")


def curve_of(key: str) -> Curve:
    """How to show a number over the steps, also one of a validation set."""
    if set_of(key) is None:
        return CURVES[key]
    label, unit = measure_of(key).label, measure_of(key).unit
    return Curve(f"{label} ({unit})" if unit else label)
