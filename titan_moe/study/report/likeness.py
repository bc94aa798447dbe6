"""Differences between runs that no axis of a study makes: length, data, seeds, hardware, and faults on the way."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from titan_moe.study.report.measures import key_in_set, set_of

Records = Sequence[Mapping[str, Any]]  # lines of results.jsonl
PER_TOKEN = ("loss", "best_loss", "perplexity", "best_perplexity", "accuracy", "best_accuracy")  # of a validation
PER_TEXT = (*PER_TOKEN, "bits_per_byte")
OF_A_TASK = "acc"  # what each task has, and no validation set
COST = ("step_seconds", "train_seconds", "tokens_per_second", "peak_memory_gib")
MACHINE = {"device": "device", "world_size": "processes", "threads": "threads of a process"}
VERSIONS = {"torch": "torch", "git_commit": "commit"}
MOST_SHOWN = 4  # values or names in a sentence


def unlike(records: Records, measure: str) -> str:
    """Why a measure of these runs cannot be compared, empty where it can."""
    # A longer run has a lower loss, a mean over more steps, and took more time, whatever the study varies.
    if len(lengths(records)) > 1:
        return "the runs differ in length"

    # Those of a task are by question, of texts that are the same whatever a token is.
    name, key = set_of(measure), key_in_set(measure)
    if name is not None and any(f"validation/{name}/{OF_A_TASK}" in record for record in records):
        return "the runs are asked different questions" if differ_in_set(records, name) else ""

    # Numbers by token depend on what a token is, and on which ones are predicted; costs on the machine.
    if key in PER_TEXT and len(values(records, "tokenizer_fingerprint")) > 1:
        what = "their tokens are not the same" if key in PER_TOKEN else "they may have read different parts of the text"
        return f"the runs have different tokenizers, so {what}"
    if key in PER_TEXT and (differ_in_validation(records) if name is None else differ_in_set(records, name)):
        return "the runs are validated on different data"
    if measure in COST:
        for key, name in MACHINE.items():
            if len(values(records, key)) > 1:
                return f"the runs differ in their machine ({name})"
    return ""


def lengths(records: Records) -> list[str]:
    """The different lengths of runs as text, in steps and tokens; in steps alone where tokens were not recorded."""
    if values(records, "num_tokens"):
        texts = {r["num_tokens"]: length_text(r) for r in records if r.get("num_tokens") is not None}
    else:
        texts = {r.get("step", 0): length_text(r) for r in records}
    return [texts[key] for key in sorted(texts)]


def length_text(record: Mapping[str, Any]) -> str:
    """`400 steps (409,600 tokens)`."""
    step, tokens = record.get("step", 0), record.get("num_tokens")
    return f"{step:,} steps" + (f" ({tokens:,} tokens)" if tokens is not None else "")


def values(records: Records, key: str) -> list[Any]:
    """The different known values of a key, in the order of the records."""
    return list({repr(r[key]): r[key] for r in records if r.get(key) is not None}.values())


def differ_in_validation(records: Records) -> bool:
    """Whether runs are validated on different files, on what is held out of different data, or on more of it."""
    sets = {repr(r.get("validation_path") or r["data_fingerprint"]) for r in records if r.get("data_fingerprint")}
    return len(sets) > 1 or len(values(records, "validation_tokens")) > 1


def differ_in_set(records: Records, name: str) -> bool:
    """Whether runs have different data, or more of it, under one name of a validation set."""
    sets = {r["validation_sets"].get(name) for r in records if r.get("validation_sets")} - {None}
    return len(sets) > 1 or len(values(records, f"validation/{name}/num_tokens")) > 1


def cautions(records: Records) -> list[str]:
    """Sentences on the differences between the runs that are compared, for the reader of the comparison."""
    return [
        *_of_lengths(records),
        *_of_data(records),
        *_of_machines(records),
        *_of_seeds(records),
        *_of_trouble(records),
    ]


def _of_lengths(records: Records) -> list[str]:
    if len(different := lengths(records)) < 2:
        return []
    text = f"The runs differ in length: {listed(different)}. Runs of different length are not ranked"
    if len(values(records, "steps")) > 1:
        text += "; where they are compared earlier, the learning rate of the longer has not come as far down"
    return [f"{text}."]


def _of_data(records: Records) -> list[str]:
    sentences = []
    if len(values(records, "data_fingerprint")) > 1:
        named = [", ".join([r["dataset"], *map(str, r["path"])]) for r in records if "dataset" in r]
        sentences.append(f"The runs were trained on different data{_of(named)}.")
    if differ_in_validation(records):
        sentences.append("The runs were validated on different data, so losses and accuracies are not ranked.")
    if len(values(records, "tokenizer_fingerprint")) > 1:
        named = [str(r["tokenizer"]) for r in records if "tokenizer" in r]
        sentences.append(f"The runs have different tokenizers{_of(named)}: numbers by token are not ranked.")
    return sentences


def _of(named: Sequence[str]) -> str:
    """The different ones among some names, in brackets; empty where all are the same."""
    return f" ({listed(different)})" if len(different := list(dict.fromkeys(named))) > 1 else ""


def _of_machines(records: Records) -> list[str]:
    sentences = []
    for key, name in MACHINE.items():
        if len(values(records, key)) > 1:
            counted = Counter(str(r[key]) for r in records if r.get(key) is not None)
            text = listed([f"{value} ({count} runs)" if count > 1 else value for value, count in counted.items()])
            sentences.append(f"The runs differ in {name}: {text}. Times and memory are not ranked.")
    for key, name in VERSIONS.items():
        if len(different := values(records, key)) > 1:
            sentences.append(f"The runs differ in their {name}: {listed([short_version(one) for one in different])}.")
    return sentences


def short_version(version: object) -> str:
    """A version or the beginning of a commit, with `-dirty` where it is not just that commit."""
    commit, dash, rest = str(version).partition("-")
    return f"{commit[:12]}{dash}{rest}"


def _of_seeds(records: Records) -> list[str]:
    seeds: dict[str, set[int]] = {}
    for record in records:
        seeds.setdefault(record["name"], set()).add(record["seed"])
    if len({frozenset(seeds_of_point) for seeds_of_point in seeds.values()}) < 2:
        return []
    return ["The points were not run with the same seeds; differences are of the seeds that two points share."]


def _of_trouble(records: Records) -> list[str]:
    """Sentences on steps without a finite loss, and on configurations that changed on the way."""
    # Both leave no trace in the measures: means over steps leave such steps out, and the end is all that is compared.
    sentences = []
    if bad := [record for record in records if record.get("nonfinite_steps")]:
        steps = sum(record["nonfinite_steps"] for record in bad)
        sentences.append(
            f"{steps} step{'' if steps == 1 else 's'} had no finite loss, in {_runs(bad)}: means over steps leave "
            "them out."
        )
    if changed := [record for record in records if record.get("changed_keys")]:
        keys = listed(sorted({key for record in changed for key in record["changed_keys"]}))
        sentences.append(f"The configuration ({keys}) was changed on the way in {_runs(changed)}: run.json says when.")
    return sentences


def _runs(records: Records) -> str:
    return listed([f"{record['name']} (seed {record['seed']})" for record in records], "; ")


def listed(texts: Sequence[str], comma: str = ", ") -> str:
    """Some texts in one sentence: `a, b and c`, and how many more where they are many."""
    shown = list(texts[:MOST_SHOWN])
    if len(texts) > MOST_SHOWN:
        shown.append(f"{len(texts) - MOST_SHOWN} more")
    if len(shown) < 2 or comma != ", ":
        return comma.join(shown)
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
