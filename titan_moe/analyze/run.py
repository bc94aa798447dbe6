"""From checkpoints and texts to the document: each model reads all texts once, and the last is looked at closely.

Shapes: L MoE layers, E experts, K choices.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe import __version__
from titan_moe.analyze.analysis import (
    FORMAT,
    Checkpoint,
    Settings,
    Text,
    Tokens,
    between_layers,
    bucket_entries,
    class_entries,
    histogram_entries,
    layer_numbers,
    over_training,
    pair_numbers,
    plain,
    pruning_entry,
    run_pass,
    sequences_for,
    study_scalars,
    text_entries,
)
from titan_moe.analyze.counts import count_tokens
from titan_moe.analyze.excerpts import find_places, sample_of, top_tokens
from titan_moe.analyze.probes import (
    OUTPUTS_PER_SEQUENCE,
    KeptSequence,
    Pruning,
    batches_of,
    of_all_ranks,
    output_similarity,
    prune,
)
from titan_moe.analyze.tokens import rare_ids, read_vocabulary
from titan_moe.build import build_balancers
from titan_moe.checkpoint import load_model
from titan_moe.checkpoint.folder import read_manifest
from titan_moe.checkpoint.lazy import read_lazily
from titan_moe.checkpoint.store import read_config
from titan_moe.config import Config
from titan_moe.convert.hf.architectures import moe_layers
from titan_moe.convert.surgery import similarity
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.evaluate import evaluation_config, validation_batches
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.parallelize import move_for_inference
from titan_moe.records import size_record
from titan_moe.runtime.command import logger
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.world import Runtime

VALIDATION = "validation"  # the name of the run's own validation data
CONCAT = ("--data.packing", "concat")


class Source(NamedTuple):
    """A checkpoint to analyze."""

    folder: Path  # its step folder
    path: str  # as the document names it
    name: str


def analyze(
    checkpoints: Sequence[Source],
    paths: Sequence[str],
    overrides: Sequence[str],
    settings: Settings,
    rt: Runtime,
    trust_components: Sequence[str] = (),
) -> dict[str, Any]:
    """The document (docs/analyze.md): of the last checkpoint everything, of all of them the numbers over training.

    Call it on every rank; all of them get it. `paths` are texts as --data.path has them, `overrides` words for the
    configuration. `trust_components` as in `load_model`.
    """
    # What can't be analyzed is told before texts are read.
    for source in checkpoints:
        check_alike(source, checkpoints[0], trust_components)

    # What a text is made of does not depend on the step: the last one's tokenizer reads it for all.
    last = checkpoints[-1]
    texts = read_texts(last.folder, paths, overrides, rt, trust_components)
    vocabulary = read_vocabulary(load_tokenizer(str(last.folder / "tokenizer.json")), rt.device)
    by_class = count_tokens([text.batches for text in texts], vocabulary)
    tokens = Tokens(vocabulary, by_class, rare_ids(by_class.sum(0), vocabulary, settings.rare_share))

    # Of each checkpoint only what is shown over training stays in memory.
    heads: list[dict[str, Any]] = []
    layers: list[list[dict[str, Any]]] = []
    choices: list[Tensor] = []
    for source in checkpoints:
        model, config = load_model(source.folder, trust_components)
        move_for_inference(model, rt.device, DTYPES[config.training.mixed_precision_param])
        measured, sequences = measure(model, config, source, texts, tokens, settings, rt)
        loss = (measured.counts.loss_sum.sum() / measured.counts.num_tokens.sum()).item()
        heads.append({"path": source.path, "step": measured.step, "name": source.name, "loss": loss})
        layers.append([layer_numbers(measured, i, tokens, settings) for i in range(len(model.moe_layers()))])
        choices.append(torch.cat([one.experts for one in measured.sequences], dim=1))
        logger.info("%s: loss %.4f", source.name, loss)

    # The last one is still in memory.
    pruning = prune_model(model, config, sequences, texts, measured, settings)
    document = describe(measured, model, config, texts, tokens, settings, layers[-1], pruning)
    return plain({**document, "loss": heads[-1]["loss"], "over_training": over_training(heads, layers, choices)})


def read_texts(
    step_folder: Path, paths: Sequence[str], overrides: Sequence[str], rt: Runtime, trust_components: Sequence[str]
) -> list[Text]:
    """The texts that `paths` name, or the run's validation data; ValueError for two of one name."""
    # A path that is there is one, whatever is in its name. Only who gives a name can mean to join files.
    files_of: dict[str, list[str]] = {}
    for word in paths:
        name, separator, path = word.partition("=")
        is_named = bool(separator) and not Path(word).exists()
        if is_named and not (name and path):
            what = "has no name before the =" if path else "names no file"
            raise ValueError(f"--data.path {word}: {what}: write NAME=F, or F alone")
        name, path = (name, path) if is_named else (Path(word).stem or word, word)
        if name in files_of and not is_named:
            raise ValueError(f"--data.path: two texts are called {name}: give {word} another name: NAME={word}")
        files_of.setdefault(name, []).append(path)

    # Each text is cut into sequences by itself, as an evaluation of it would; end to end, as padding is no text.
    texts = []
    for name, files in (files_of or {VALIDATION: []}).items():
        words = ["--data.path", *files] if files else []
        config, _ = evaluation_config(step_folder, [*CONCAT, *words, *overrides], trust_components)
        if config.data.packing != "concat":
            raise ValueError(f"--data.packing {config.data.packing}: an analysis reads text end to end: leave it out")
        batches = partial(validation_batches, config, str(step_folder / "tokenizer.json"), files, rt.device, rt)
        texts.append(Text(name, files, batches, config.training.seq_len, config.validation.local_batch_size))
    return texts


def check_alike(source: Source, first: Source, trust_components: Sequence[str]) -> None:
    """Raise ValueError for a model without experts, and for one that can't be compared with the first."""
    # Each checkpoint is looked at, for a dense model may stand anywhere in the list.
    config = read_config(source.folder, trust_components)
    if not config.moe.num_experts:
        raise ValueError(f"checkpoint {source.path} is of a dense model: it has no router and no experts to analyze")
    if source is first:
        return

    # What decides the shapes of the numbers, and which tokens they are of: all else may change over training.
    other = read_config(first.folder, trust_components)
    for key, value, wanted in (
        ("MoE layers", list(moe_layers(config)), list(moe_layers(other))),
        ("moe.num_experts", config.moe.num_experts, other.moe.num_experts),
        ("moe.num_identity_experts", config.moe.num_identity_experts, other.moe.num_identity_experts),
        ("moe.top_k", config.moe.top_k, other.moe.top_k),
        ("tokenizer", *(load_tokenizer(str(one.folder / "tokenizer.json")).fingerprint for one in (source, first))),
    ):
        if value != wanted:
            raise ValueError(
                f"checkpoint {source.path} has other {key} ({value}) than {first.path} ({wanted}): over training the "
                "model stays the same: analyze them one by one"
            )


def measure(
    model: Transformer,
    config: Config,
    source: Source,
    texts: Sequence[Text],
    tokens: Tokens,
    settings: Settings,
    rt: Runtime,
) -> tuple[Checkpoint, list[KeptSequence]]:
    """What is measured of every checkpoint, and the sequences of this rank for more."""
    counts, sequences = run_pass(model, texts, tokens, settings, rt)

    # Of the outputs a few tokens of many sequences say more than many of few.
    outputs = None
    if settings.output_tokens:
        per_text = sequences_for(settings.output_tokens, texts, OUTPUTS_PER_SEQUENCE)
        outputs = output_similarity(model, batches_of(sequences, per_text, texts[0].batch_size, rt.device))

    # Weights are compared as they were saved: on a GPU the model's are rounded.
    tensors = read_lazily(source.folder)
    weights = torch.stack([similarity(tensors, layer) for layer in moe_layers(config)])
    without = config.moe.num_identity_experts  # the last ids, which have no weights
    weights = F.pad(weights, (0, without, 0, without), value=math.nan)
    step = read_manifest(source.folder)["step"]
    of_all = of_all_ranks(sequences)
    return Checkpoint(source.path, step, source.name, counts, of_all, weights, outputs), sequences


def prune_model(
    model: Transformer,
    config: Config,
    sequences: Sequence[KeptSequence],
    texts: Sequence[Text],
    checkpoint: Checkpoint,
    settings: Settings,
) -> Pruning | None:
    """Losses without some experts; None where they are not asked for, or experts choose their tokens."""
    # An expert that chooses takes its tokens whatever its logits are: without it nobody else would get them.
    if not settings.ablation_tokens or config.router.name == "expert_choice":
        return None
    per_text = sequences_for(settings.ablation_tokens, texts)
    load_LE = checkpoint.counts.coactivation.diagonal(dim1=1, dim2=2)
    batches = batches_of(sequences, per_text, texts[0].batch_size, load_LE.device)
    return prune(model, batches, load_LE, top_k=config.moe.top_k, passes=settings.ablation_passes)


def describe(
    checkpoint: Checkpoint,
    model: Transformer,
    config: Config,
    texts: Sequence[Text],
    tokens: Tokens,
    settings: Settings,
    layers: Sequence[dict[str, Any]],
    pruning: Pruning | None,
) -> dict[str, Any]:
    """The document of one checkpoint, without what is over training."""
    # Of pairs and of text only the last checkpoint is told: it is what the document is about.
    counts, places = checkpoint.counts, find_places(checkpoint.sequences, tokens.vocabulary)
    full_layers = [
        {
            "layer": number,
            **layer,
            **pair_numbers(checkpoint, i, settings),
            "top_tokens": top_tokens(checkpoint, i, tokens, places, settings),
        }
        for i, (number, layer) in enumerate(zip(moe_layers(config), layers, strict=True))
    ]

    # In the order in which a reader asks: what was looked at, of which texts, and then what was found.
    return {
        "format": FORMAT,
        "version": __version__,
        "checkpoint": {"path": checkpoint.path, "step": checkpoint.step, "name": checkpoint.name},
        "model": model_entry(model, config),
        "settings": settings._asdict(),
        "texts": text_entries(texts, counts),
        "num_tokens": counts.num_tokens.sum(),
        "token_classes": class_entries(tokens),
        "position_buckets": bucket_entries(counts, texts[0].seq_len),
        "histograms": histogram_entries(),
        "layers": full_layers,
        "between_layers": [between_layers(counts, i) for i in range(len(layers) - 1)],
        "sample": sample_of(checkpoint.sequences, texts, tokens, settings),
        "pruning": pruning_entry(pruning),
        "scalars": study_scalars(layers),
    }


def model_entry(model: Transformer, config: Config) -> dict[str, Any]:
    """What the model is."""
    # Of experts those that a router chooses from, identity experts too: layers have that many columns.
    size = size_record(config, model)
    return {
        "num_layers": config.model.num_layers,
        "moe_layers": list(moe_layers(config)),
        "num_experts": config.moe.router_width,
        "num_identity_experts": config.moe.num_identity_experts,
        "top_k": config.moe.top_k,
        "num_shared_experts": config.moe.num_shared_experts,
        "dim": config.model.dim,
        "expert_dim": config.moe.expert_dim,
        "vocab_size": config.model.vocab_size,
        "router": config.router.name,
        "balancers": list(build_balancers(config)),
        "num_parameters": size["parameters"],
        "active_parameters": size["active_parameters"],
    }
