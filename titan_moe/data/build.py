"""From a few settings to batches: the one entrance to the data, for training and evaluation."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_moe.config.sections import DATASETS
from titan_moe.data import hub
from titan_moe.data.cache import TokenCache, build_cache
from titan_moe.data.corpus import (
    Corpus,
    Split,
    corpus_tokenizer,
    digest,
    fraction_for_both,
    joined,
    make_corpus,
    make_split,
    same_files,
)
from titan_moe.data.loader import (
    CPU,
    TrainLoader,
    WindowBatches,
    make_loader,
    num_windows,
    on_device,
    validation_batches,
    window_loader,
)
from titan_moe.data.mixture import MANY_EPOCHS, MixedBatches, Source, epochs, mixture_loader
from titan_moe.data.own import (
    OwnDocuments,
    OwnStream,
    is_own,
    open_own,
    own_corpus,
    own_data,
    own_token_file,
)
from titan_moe.data.packing import Borders, PackedTokens, Windows, describe, pack, tell_waste
from titan_moe.data.remote import fetch_all
from titan_moe.data.sources import are_tokens, find_files, stdlib_files
from titan_moe.data.stream import LaneBatches, Stream, TrainStream, check_lanes, sample_stream
from titan_moe.data.tasks import Task
from titan_moe.data.token_files import (
    DividedTokens,
    Documents,
    TokenSource,
    all_documents,
    divide_documents,
    join_borders,
    load_documents,
    open_tokens,
)
from titan_moe.data.tokenizer import Tokenizer, bpe_vocab_size, load_tokenizer, token_contents
from titan_moe.data.waves import Texts, WaveCache, build_waves, find_texts, hashed_corpus, texts_tokenizer
from titan_moe.runtime.remote import is_url

STREAM_VALIDATION_TOKENS = 1 << 20  # a stream has no end: what "all of it" (validation.steps -1) stands for
STREAM_BPE_BYTES = 16 << 20  # text of a stream on which a BPE is trained
BYTES_PER_TOKEN = 6  # more than English has, so that a sample of a stream has enough tokens

Batches = Iterator[tuple[Tensor, Tensor]]
T = TypeVar("T")
log = logging.getLogger(__name__)


class ValidationSet(NamedTuple):
    """Data to evaluate on: `batches()` returns a new iterator over the set."""

    batches: Callable[[], Batches]
    fingerprint: str


class SourceFiles(NamedTuple):
    """One of several sources of training data, as [data.sources.NAME] has it."""

    name: str
    dataset: str
    path: str | Sequence[str]
    weight: float
    from_step: int = 1
    until_step: int = 0
    arguments: Mapping[str, Any] = {}

    @property
    def key(self) -> str:
        """The table that it is from: of one source alone [data]."""
        return f"data.sources.{self.name}" if self.name else "data"


class DataFiles(NamedTuple):
    """Files of documents, and their kind where their names don't tell."""

    files: list[str]
    kind: str = ""


Fixed = DataFiles | OwnDocuments  # documents that are made into tokens before training


class Data(NamedTuple):
    """The data of a run. `validation()` returns a new iterator over the validation set; None where there is no set.

    `validation_sets` are more of them, by their names: of several sources what is held out of each. `packing` is what
    best_fit makes of the training data, by their key (`describe`). `tasks` are questions to ask at validations.
    """

    tokenizer: Tokenizer
    train: TrainLoader
    validation: Callable[[], Batches] | None
    fingerprints: dict[str, str]
    validation_sets: Mapping[str, ValidationSet] = {}
    packing: Mapping[str, Mapping[str, int | float]] = {}
    tasks: Mapping[str, Task] = {}


class _Wanted(NamedTuple):
    """The settings that decide what is prepared in the cache folder."""

    dataset: str
    path: str | Sequence[str]
    tokenizer: str
    eot_token: str
    validation_path: str | Sequence[str]
    fraction: float
    validation_tokens: int
    folder: str
    endpoint: str
    progress: bool
    pack_to: int  # seq_len where documents are packed best-fit, 0 where they stand end to end
    sources: Sequence[SourceFiles] = ()
    arguments: Mapping[str, Any] = {}
    document_mask: bool = False


class _Prepared(NamedTuple):
    """What batches are made of, the same on all ranks."""

    tokenizer: Tokenizer
    fingerprint: str
    train: Windows | TrainStream | list[Source]
    validation: Sequence[Windows]
    by_source: dict[str, Windows] | None = None  # the source that each of these is of, where there are several


class _Packed(NamedTuple):
    """The training and validation data of a source, packed, and how many documents each has."""

    train: Windows
    validation: Windows
    num_documents: dict[str, int]


class _Tokenized(NamedTuple):
    """The tokens of several sources, divided, and what each was made of."""

    fingerprints: list[str]
    tokenizer: Tokenizer
    caches: Sequence[TokenCache | WaveCache | DividedTokens | _Packed]


def build_data(
    *,
    dataset: str,
    path: str | Sequence[str] = (),
    arguments: Mapping[str, Any] = {},
    sources: Sequence[SourceFiles] = (),
    steps: int = 0,
    tokenizer: str,
    eot_token: str = "",
    seq_len: int,
    packing: str = "concat",
    seed: int,
    global_batch_size: int,
    local_batch_size: int,
    dp_rank: int = 0,
    dp_degree: int = 1,
    num_workers: int = 0,
    validation_fraction: float = 0.0,
    validation_path: str | Sequence[str] = (),
    validation_steps: int = -1,
    validation_local_batch_size: int = 1,
    cache_folder: str,
    is_main: bool = True,
    barrier: Callable[[], object] | None = None,
    progress: bool = True,
    endpoint: str = hub.HUB_ENDPOINT,
    positions: Tensor | None = None,
    device: torch.device = CPU,
    document_mask: bool = False,
) -> Data:
    """Return the training and validation batches (tokens (B, S), labels (B, S), int64) of one rank of `dp_degree`.

    `dataset` is one of `DATASETS`, or a function outside with its `arguments`; `path` names the files of `text` and the
    data set of `hf`. With `sources` training data are theirs instead; `steps`, the length of the run, tells how often
    it reads them. `eot_token` ends every document (empty: the one that the tokenizer's files name), and with
    `document_mask` some document of each file of ids must end with it. `packing` is "concat" (windows over documents
    end to end) or "best_fit" (`titan_moe.data.packing`). Validation data are the files of `validation_path`, else
    `validation_fraction` of the documents, chosen by the hash of their content, and one at least. On every node the one
    process with `is_main` fills the cache while the others wait at `barrier`. A `global_batch_size` of -1 is that of
    one micro-batch a step. Where ranks share sequences, `positions` (S',) are those of this rank, and batches are
    (B, S'). Batches are on `device`. Errors: ValueError and OSError of one line.
    """
    # Mistakes in the settings are told before anything is read or written.
    size, local_batch_size = resolve_batch_sizes(global_batch_size, local_batch_size, dp_degree)
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction ({validation_fraction}) must be at least 0 and below 1")
    if path and dataset in ("stdlib", "fineweb_edu"):
        raise ValueError(f"data.path ({path}) has no use with data.dataset {dataset}: add --data.dataset text (or hf)")
    pack_to = _pack_to(packing, seq_len, [source.dataset for source in sources] or [dataset])

    # Whatever the layout, the same things are prepared: the cache is shared, and so is the split.
    fraction = 0.0 if validation_path else validation_fraction
    tokens = _stream_tokens(validation_steps, validation_local_batch_size, seq_len)
    show = progress and is_main
    wanted = (dataset, path, tokenizer, eot_token, validation_path, fraction, tokens, cache_folder, endpoint, show)
    want = _Wanted(*wanted, pack_to, sources, arguments, document_mask)
    prepare = partial(_prepare_sources if sources else _prepare_one, want)
    data = main_process_first(prepare, is_main, barrier)

    # A loader is made anew for every position from which training goes on.
    rank = {"seq_len": seq_len, "dp_rank": dp_rank, "dp_degree": dp_degree}
    batch = {**rank, "seed": seed, "local_batch_size": local_batch_size}
    if isinstance(data.train, list):
        streams = [source.name for source in data.train if isinstance(source.file, TrainStream)]
        for source in data.train:
            if not isinstance(source.file, TrainStream):
                _check_length(source.file, seq_len, f"data.sources.{source.name}")
        mixture = MixedBatches(data.train, global_batch_size=size, **batch)
        make = partial(mixture_loader, mixture, data.tokenizer.files, num_workers, device)
        if is_main:
            tell_epochs(epochs(data.train, steps, size, seq_len), streams)
    elif isinstance(data.train, TrainStream):
        make = partial(_stream_loader, data, batch, size, num_workers, device)
    else:
        _check_length(data.train, seq_len, "data.path")
        make = partial(window_loader, WindowBatches(data.train, **batch), num_workers, device)
    position_in = f"{data.fingerprint}-{data.tokenizer.fingerprint}-{seq_len}{'_best_fit' if pack_to else ''}"
    loader = TrainLoader(make, position_in, positions, device)
    packed = _tell_packing(data.train, seq_len, is_main)

    # Validation begins at the start of its set each time.
    batches = {"steps": validation_steps, "local_batch_size": validation_local_batch_size}
    held_out = partial(validation_batches, **rank, **batches)
    validation = None
    if data.validation:
        key = "data.validation_path" if validation_path else f"data.validation_fraction ({fraction})"
        _check_length(max(data.validation, key=lambda file: file.num_tokens), seq_len, key)
        validation = partial(_batches_on, device, positions, partial(held_out, data.validation))

    # Of several sources each has its numbers, too; a file that is shorter than a sequence has none.
    by_source = {
        name: ValidationSet(partial(_batches_on, device, positions, partial(held_out, [file])), data.fingerprint)
        for name, file in (data.by_source or {}).items()
        if num_windows(file, seq_len)
    }
    fingerprints = {"data": data.fingerprint, "tokenizer": data.tokenizer.fingerprint}
    return Data(data.tokenizer, loader, validation, fingerprints, by_source, packed)


def build_validation(
    *,
    dataset: str = "text",
    path: str | Sequence[str] = (),
    arguments: Mapping[str, Any] = {},
    key: str = "data.path",
    tokenizer: str | Tokenizer,
    seq_len: int,
    packing: str = "concat",
    steps: int = -1,
    local_batch_size: int,
    dp_rank: int = 0,
    dp_degree: int = 1,
    cache_folder: str,
    is_main: bool = True,
    barrier: Callable[[], object] | None = None,
    progress: bool = True,
    endpoint: str = hub.HUB_ENDPOINT,
    positions: Tensor | None = None,
    device: torch.device = CPU,
    document_mask: bool = False,
) -> ValidationSet:
    """Return all documents of a data set, or the first ones of a stream, to evaluate a model on them.

    Arguments and errors are those of `build_data`, with `key` in place of data.path; the batches (b, S) are those of
    `validation_batches`, on `device`.
    """
    show = progress and is_main

    # All of it is validation data, so that no document is left out. Of a stream as much is read as a run's own
    # validation would.
    def build() -> tuple[str, Windows]:
        words = load_tokenizer(tokenizer, endpoint) if isinstance(tokenizer, str) else tokenizer
        place = find_data(dataset, path, arguments, key, endpoint=endpoint, folder=cache_folder)
        if isinstance(place, Stream):
            num_bytes = _stream_tokens(steps, local_batch_size, seq_len) * BYTES_PER_TOKEN
            sample = {"fraction": 1.0, "num_bytes": num_bytes, "folder": cache_folder, "progress": show}
            place = DataFiles([sample_stream(place, "validation", **sample)])
        options = {"folder": cache_folder, "progress": show, "key": key, "document_mask": document_mask}
        return _whole(place, words, _pack_to(packing, seq_len), **options)

    fingerprint, file = main_process_first(build, is_main, barrier)
    _check_length(file, seq_len, key)
    rank = {"seq_len": seq_len, "dp_rank": dp_rank, "dp_degree": dp_degree}
    batches = partial(validation_batches, [file], steps=steps, local_batch_size=local_batch_size, **rank)
    return ValidationSet(partial(_batches_on, device, positions, batches), fingerprint)


def dataset_files(dataset: str, path: str | Sequence[str], key: str = "data.path") -> tuple[list[str], str]:
    """Return the files of a data set that is not streamed, and their kind where their names don't tell.

    `key` names `path` in errors, which are of one line.
    """
    return (stdlib_files(), "source") if dataset == "stdlib" else (find_files(path, key), "")


def find_data(
    dataset: str,
    path: str | Sequence[str],
    arguments: Mapping[str, Any],
    key: str = "data.path",
    *,
    endpoint: str = hub.HUB_ENDPOINT,
    folder: str,
) -> Fixed | Stream:
    """Return the documents that a dataset, its path and its arguments name; `key` is that of the path.

    Errors, of one line: no such files, no such data set on the hub, a function outside that gives no documents.
    """
    if is_own(dataset):
        return open_own(own_data(dataset, arguments, f"{key.removesuffix('path')}dataset"), folder)
    if is_streamed(dataset):
        return _find_stream(dataset, path, endpoint)
    return DataFiles(*dataset_files(dataset, path, key))


Named = tuple[str, Sequence[str], Mapping[str, Any]]  # a data set: dataset, path and arguments


def trained_on(named: Named, train: Sequence[Named], folder: str) -> list[str]:
    """Return what of a validation set is trained on as well: its files that are also files of `train`, or all of it.

    `folder` is the cache's. Single documents are not looked for.
    """
    dataset, path, _ = named
    if _has_no_files(dataset):
        return [f"{dataset} {' '.join(path)}".strip()] if named in train else []
    others = [file for d, p, _ in train if not _has_no_files(d) for file in dataset_files(d, p)[0]]
    return same_files(dataset_files(dataset, path)[0], others, folder)


def _has_no_files(dataset: str) -> bool:
    return is_own(dataset) or is_streamed(dataset)


def _batches_on(device: torch.device, positions: Tensor | None, make: Callable[[], Batches]) -> Batches:
    yield from on_device(make(), device, positions)


def token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Return the UTF-8 bytes each token stands for (vocab_size,), int64.

    The bits per byte of a text are its cross-entropy in nats / ln 2 / the sum of its tokens' bytes.
    """
    return torch.tensor([len(content) for content in token_contents(tokenizer)])


def resolve_batch_sizes(global_batch_size: int, local_batch_size: int, dp_degree: int) -> tuple[int, int]:
    """Return the sequences of a step (global) and of a rank's forward pass (local).

    A -1 is what the other number makes it when there is one pass a step. Raises ValueError where they don't divide.
    """
    local = max(1, global_batch_size // dp_degree) if local_batch_size == -1 else local_batch_size
    sequences_per_pass = local * dp_degree
    size = sequences_per_pass if global_batch_size == -1 else global_batch_size
    if local < 1 or size < 1 or size % sequences_per_pass:
        factors = [] if local_batch_size == -1 else [f"training.local_batch_size ({local_batch_size})"]
        text = " x ".join([*factors, f"{dp_degree} data-parallel ranks"])
        raise ValueError(f"training.global_batch_size ({global_batch_size}) must be a multiple of {text}")
    return size, local


def main_process_first(work: Callable[[], T], is_main: bool, barrier: Callable[[], object] | None) -> T:
    """Do idempotent work in every process, the main one first; when it fails, the others go on and fail alike."""
    # The main process reaches its barrier even when it fails: the others would wait for it for ever.
    if barrier is not None and not is_main:
        barrier()
    try:
        return work()
    finally:
        if barrier is not None and is_main:
            barrier()


def is_streamed(dataset: str) -> bool:
    """Whether a data set of ours is read from its source while training; ValueError for one that there is not."""
    if dataset not in DATASETS and not is_own(dataset):
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"data.dataset ({dataset}): {hint}there are {', '.join(DATASETS)}")
    return dataset in ("fineweb_edu", "hf")


def _stream_tokens(steps: int, local_batch_size: int, seq_len: int) -> int:
    """How many tokens of a stream a validation of `steps` batches takes."""
    return STREAM_VALIDATION_TOKENS if steps < 0 else steps * local_batch_size * seq_len + 1


def _pack_to(packing: str, seq_len: int, datasets: Sequence[str] = ()) -> int:
    """Return the length of sequences that are packed, 0 for "concat"; ValueError where it can't be done."""
    if packing not in ("concat", "best_fit"):
        raise ValueError(f"data.packing ({packing}): there are concat and best_fit")
    for dataset in datasets if packing == "best_fit" else ():
        if is_streamed(dataset):
            raise _unpackable(f"data.dataset {dataset}")
    return seq_len if packing == "best_fit" else 0


def _unpackable(name: str) -> ValueError:
    return ValueError(
        f"data.packing (best_fit) needs to know all documents, and {name} is read while training: set it to concat, or "
        "give files"
    )


def _packed(
    tokenizer: Tokenizer, pack_to: int, folder: str, fingerprint: str, tokens: Windows, borders: Borders | None = None
) -> Windows:
    """Pack tokens of the data of `fingerprint` into sequences of `pack_to` (0: leave them as they are)."""
    if not pack_to or isinstance(tokens, PackedTokens):
        return tokens
    of_tokens = f"{fingerprint}-{tokenizer.fingerprint}"
    return pack(tokens, borders, eot_id=tokenizer.eot_id, seq_len=pack_to, fingerprint=of_tokens, folder=folder)


def _pack_caches(done: _Tokenized, want: _Wanted) -> _Tokenized:
    """Pack both sides of each cache."""
    packed = partial(_packed, done.tokenizer, want.pack_to, want.folder)
    both = []
    for fingerprint, cache in zip(done.fingerprints, done.caches, strict=True):
        borders = cache.borders if isinstance(cache, DividedTokens) else {}
        train = packed(f"{fingerprint}-train", cache.train, borders.get("train"))
        validation = packed(f"{fingerprint}-validation", cache.validation, borders.get("validation"))
        both.append(_Packed(train, validation, cache.num_documents))
    return done._replace(caches=both)


def _tell_packing(
    train: Windows | TrainStream | list[Source], seq_len: int, is_main: bool
) -> dict[str, dict[str, Any]]:
    """Say what packing wastes of the training data, and return it by their keys."""
    sources = train if isinstance(train, list) else []
    of_key = {f"data.sources.{source.name}": source.file for source in sources} or {"data.path": train}
    wastes = {key: file.waste for key, file in of_key.items() if isinstance(file, PackedTokens)}
    for key, waste in wastes.items() if is_main else ():
        tell_waste(key, waste, seq_len)
    return {key: describe(waste, seq_len) for key, waste in wastes.items()}


def _check_length(file: Windows, seq_len: int, key: str) -> None:
    if not num_windows(file, seq_len):
        raise ValueError(
            f"training.seq_len ({seq_len}) is longer than the data of {key} ({file.num_tokens} tokens): "
            "shorten it or give more data"
        )


def tell_epochs(passes: Mapping[str, float], streams: Sequence[str] = ()) -> None:
    """Say how often a run reads its sources, and warn of those that it reads very often; of streams nobody knows."""
    counts = [f"data.sources.{name} {count:.2f} times" for name, count in passes.items()]
    counts += [f"data.sources.{name} as a stream, which may end and begin again" for name in streams]
    log.info("the run reads %s", ", ".join(counts))
    often = [f"data.sources.{name} {count:.1f} times" for name, count in passes.items() if count > MANY_EPOCHS]
    if often:
        log.warning("the run reads %s: text is worth less each time; lower the weight or give more", ", ".join(often))


def _stream_loader(
    data: _Prepared, batch: dict[str, Any], size: int, num_workers: int, device: torch.device, state: dict[str, Any]
) -> StatefulDataLoader:
    stream = data.train
    assert isinstance(stream, TrainStream)
    check_lanes(state, size)
    files = data.tokenizer.files
    batches = LaneBatches(stream.dataset, files, stream.split, global_batch_size=size, state=state, **batch)
    return make_loader(batches, min(num_workers, 1), device)  # a lane is one line of documents: it has one reader


def _prepare_one(want: _Wanted) -> _Prepared:
    """Prepare one data set: documents are tokenized into the cache, a stream is read while training."""
    one = SourceFiles("", want.dataset, want.path, 1.0, arguments=want.arguments)
    (place,) = _find_sources(want, [one])
    if isinstance(place, Stream):
        return _prepare_stream(want, place)
    (fingerprint,), tokenizer, (cache,) = _tokenize(want, [one], [place])
    return _Prepared(tokenizer, fingerprint, cache.train, [cache.validation] if _is_split(want) else [])


def _find_sources(want: _Wanted, sources: Sequence[SourceFiles]) -> list[Fixed | Stream]:
    """Find the documents of each source; two of the same data set have the same."""
    places: list[Fixed | Stream] = []
    for number, source in enumerate(sources):
        named = (source.dataset, source.path, source.arguments)
        earlier = [(other.dataset, other.path, other.arguments) for other in sources[:number]]
        if named in earlier:
            places.append(places[earlier.index(named)])
        else:
            where_to_look = {"endpoint": want.endpoint, "folder": want.folder}
            places.append(find_data(*named, f"{source.key}.path", **where_to_look))
        if want.pack_to and isinstance(place := places[-1], Stream):
            raise _unpackable(place.place)
    return places


def _prepare_sources(want: _Wanted) -> _Prepared:
    """Prepare several sources, each for itself, with one tokenizer."""
    # A BPE is trained on files and on the beginnings of streams together.
    places = _find_sources(want, want.sources)
    streams = dict.fromkeys(place for place in places if isinstance(place, Stream))
    samples = [_bpe_sample(want, stream) for stream in streams] if bpe_vocab_size(want.tokenizer) else []
    pairs = list(zip(want.sources, places, strict=True))
    fixed = [(source, place) for source, place in pairs if not isinstance(place, Stream)]
    done = _tokenize(want, [source for source, _ in fixed], [place for _, place in fixed], samples)

    # In the order of the tables, whichever are streams.
    caches, fingerprints = iter(done.caches), iter(done.fingerprints)
    train: list[Source] = []
    names: list[str] = []
    held_out: dict[str, Windows] = {}
    for source, place in pairs:
        if isinstance(place, Stream):
            part, validation = _divide_stream(want, place, done.tokenizer)
            names.append(_stream_name(place, part))
        else:
            cache = next(caches)
            part, validation = cache.train, cache.validation
            names.append(next(fingerprints))
        train.append(Source(source.name, part, Fraction(str(source.weight)), source.from_step, source.until_step))
        if validation is not None and _is_split(want) and validation not in held_out.values():
            held_out[source.name] = validation

    # Validation data are the files of validation_path, which are the same for each source, or what is held out of each.
    if want.validation_path:
        return _Prepared(done.tokenizer, digest(names), train, [next(iter(held_out.values()))])
    return _Prepared(done.tokenizer, digest(names), train, list(held_out.values()), held_out if want.fraction else {})


def _is_split(want: _Wanted) -> bool:
    return bool(want.validation_path or want.fraction)


def _tokenize(
    want: _Wanted, sources: Sequence[SourceFiles], places: Sequence[Fixed], samples: Sequence[str] = ()
) -> _Tokenized:
    """Tokenize the documents of each source into a cache; files of token ids are read where they are. Packed if
    wanted.

    A BPE is trained on `samples` of streams as well.
    """
    held_out = _held_out_files(want)
    has_tokens = any(map(_are_ids, (DataFiles(held_out), *places)))
    if has_tokens and places:
        done = _divide_tokens(want, places, held_out)
    else:
        done = _tokenize_texts(want, places, held_out, samples)

    # One document can't be on both sides, and files may turn out to hold none.
    for source, count in zip(sources, (cache.num_documents for cache in done.caches), strict=True):
        if _is_split(want) and not all(count.values()):
            of_source = f" of data.sources.{source.name}" if source.name else ""
            raise ValueError(
                f"data.validation_fraction ({want.fraction}) divides the documents{of_source} into {count['train']} "
                f"for training and {count['validation']} for validation: choose another fraction, or files with "
                "--data.validation_path"
            )
    return _pack_caches(done, want) if want.pack_to else done


def _held_out_files(want: _Wanted) -> list[str]:
    return find_files(want.validation_path, "data.validation_path") if want.validation_path else []


def _are_ids(place: Fixed) -> bool:
    return place.are_ids if isinstance(place, OwnDocuments) else are_tokens(place.files)


def _corpus_of(place: Fixed, held_out: list[str], fraction: float, folder: str) -> Corpus:
    if isinstance(place, OwnDocuments):
        return own_corpus(place, held_out, fraction, folder)
    return make_corpus(place.files, held_out, fraction=fraction, folder=folder, kind=place.kind)


def _tokenize_texts(want: _Wanted, places: Sequence[Fixed], held_out: list[str], samples: Sequence[str]) -> _Tokenized:
    """Tokenize text by one tokenizer, which may be trained on all of it and on `samples`."""
    # What is behind URLs is fetched a part at a time, but beside what is in no files: then all of it at once.
    urls = any(map(is_url, chain(held_out, *(place.files for place in places if isinstance(place, DataFiles)))))
    if urls and (samples or any(isinstance(place, OwnDocuments) for place in places)):
        urls, held_out = False, fetch_all(held_out, want.folder)
        places = [_fetched(place, want.folder) for place in places]
    others = [make_corpus([path], held_out, fraction=want.fraction, folder=want.folder) for path in samples]
    if not places and not others:
        return _Tokenized([], load_tokenizer(want.tokenizer, want.endpoint, want.eot_token), [])

    def tokenize(fractions: Sequence[float]) -> _Tokenized:
        if urls:
            texts = _find_texts(places, held_out, fractions)
            tokenizer = texts_tokenizer(want.tokenizer, texts, want.folder, want.endpoint, want.eot_token)
            done = [build_waves(some, tokenizer, want.folder, progress=want.progress) for some in texts]
            return _Tokenized([fingerprint for fingerprint, _ in done], tokenizer, [cache for _, cache in done])
        corpora = [
            _corpus_of(place, held_out, fraction, want.folder)
            for place, fraction in zip(places, fractions, strict=True)
        ]
        every = joined([*corpora, *others])
        tokenizer = corpus_tokenizer(
            want.tokenizer, every, want.folder, want.endpoint, want.eot_token, progress=want.progress
        )
        caches = [build_cache(corpus, tokenizer, want.folder, progress=want.progress) for corpus in corpora]
        return _Tokenized([corpus.fingerprint for corpus in corpora], tokenizer, caches)

    # Of few documents a small fraction may be none, or a large one all. Tokenizing them twice costs less than reading
    # every corpus once more to know before.
    fractions = [want.fraction] * len(places)
    done = tokenize(fractions)
    lacking = [number for number, cache in enumerate(done.caches) if not all(cache.num_documents.values())]
    if want.fraction and lacking:
        for number in lacking:
            place, fraction = places[number], fractions[number]
            if isinstance(place, DataFiles):
                corpus = hashed_corpus(_find_texts([place], held_out, [fraction])[0], want.folder)
            else:
                corpus = _corpus_of(place, held_out, fraction, want.folder)
            fractions[number] = fraction_for_both(corpus, want.folder)
            log.info(
                "data.validation_fraction is taken as %.3g: one document at least on either side", fractions[number]
            )
        done = tokenize(fractions)
    return done


def _find_texts(places: Sequence[Fixed], held_out: list[str], fractions: Sequence[float]) -> list[Texts]:
    return [
        find_texts(place.files, held_out, fraction=fraction, kind=place.kind)
        for place, fraction in zip(places, fractions, strict=True)
        if isinstance(place, DataFiles)
    ]


def _fetched(place: Fixed, folder: str) -> Fixed:
    """The same documents, their files on a disk of ours."""
    return DataFiles(fetch_all(place.files, folder), place.kind) if isinstance(place, DataFiles) else place


def _divide_tokens(want: _Wanted, places: Sequence[Fixed], held_out: list[str]) -> _Tokenized:
    """Divide files of token ids where they are; what is text among them is tokenized whole, and then one of them.

    So sides go by the ids of a document in all of them, and no copy of one is on two sides.
    """
    if bpe_vocab_size(want.tokenizer):
        place = next(place for place in (*places, DataFiles(held_out)) if _are_ids(place))
        name = place.function.label() if isinstance(place, OwnDocuments) else place.files[0]
        raise _untrainable(want, name)
    tokenizer = load_tokenizer(want.tokenizer, want.endpoint, want.eot_token)
    options = {"folder": want.folder, "progress": want.progress, "document_mask": want.document_mask}
    documents = partial(_documents, tokenizer=tokenizer, **options)
    others = documents(DataFiles(held_out)) if held_out else []
    trained = [documents(place) for place in places]
    caches = [divide_documents(some, want.fraction, others) for some in trained]
    rest = [want.fraction, [other.fingerprint for other in others]]
    fingerprints = [digest([[one.fingerprint for one in some], *rest]) for some in trained]
    return _Tokenized(fingerprints, tokenizer, caches)


def _untrainable(want: _Wanted, name: str) -> ValueError:
    return ValueError(
        f"data.tokenizer ({want.tokenizer}) is trained on text, and {name} holds token ids: name the tokenizer that "
        "made them with --data.tokenizer"
    )


def _documents(
    place: Fixed, *, tokenizer: Tokenizer, folder: str, progress: bool, document_mask: bool
) -> list[Documents]:
    """Return the documents of token files, or of text once it is tokenized."""
    place = _fetched(place, folder)
    if not _are_ids(place):
        corpus = _corpus_of(place, [], 0.0, folder)
        sources = [TokenSource(build_cache(corpus, tokenizer, folder, progress=progress).train)]
        return load_documents(sources, tokenizer, folder, must_end=document_mask)
    if isinstance(place, DataFiles):
        sources = [open_tokens(path, tokenizer.vocab_size) for path in place.files]
        return load_documents(sources, tokenizer, folder, must_end=document_mask)

    # The file is ours, and says nothing to the user.
    path = own_token_file(place, folder)
    try:
        return load_documents([open_tokens(path, tokenizer.vocab_size)], tokenizer, folder, must_end=document_mask)
    except ValueError as error:
        raise ValueError(str(error).replace(path, place.function.label())) from error


def _whole(
    place: Fixed, tokenizer: Tokenizer, pack_to: int, *, folder: str, progress: bool, key: str, document_mask: bool
) -> tuple[str, Windows]:
    """Return the tokens of all documents, packed if wanted, and a fingerprint of these."""
    packed = partial(_packed, tokenizer, pack_to, folder)
    if _are_ids(place):
        options = {"tokenizer": tokenizer, "folder": folder, "progress": progress}
        documents = _documents(place, **options, document_mask=document_mask)
        fingerprint = digest([one.fingerprint for one in documents])
        return fingerprint, packed(fingerprint, all_documents(documents), join_borders(documents))

    # All of a corpus is its validation side. Of what is fetched no file stays: there are its tokens alone.
    if isinstance(place, OwnDocuments):
        corpus = own_corpus(place, [], 1.0, folder)
    elif any(map(is_url, place.files)):
        texts = find_texts([], place.files, fraction=0.0, key=key)
        fingerprint, waves = build_waves(texts, tokenizer, folder, progress=progress)
        return fingerprint, packed(fingerprint, waves.validation)
    elif place.kind:
        corpus = make_corpus(place.files, fraction=1.0, folder=folder, kind=place.kind, key=key)
    else:
        corpus = make_corpus([], place.files, fraction=0.0, folder=folder, key=key)
    cache = build_cache(corpus, tokenizer, folder, progress=progress)
    return corpus.fingerprint, packed(corpus.fingerprint, cache.validation)


def _find_stream(dataset: str, path: str | Sequence[str], endpoint: str) -> hub.HubDataset:
    """Find the data set on the hub that `dataset` and `path` name."""
    name = path if isinstance(path, str) else ",".join(path)
    if dataset == "hf" and not name:
        raise ValueError(f"data.path is empty: data.dataset hf needs the name of a data set, e.g. {hub.FINEWEB_EDU}")
    return hub.find_dataset(hub.FINEWEB_EDU if dataset == "fineweb_edu" else name, endpoint)


def _prepare_stream(want: _Wanted, stream: Stream) -> _Prepared:
    """Prepare a stream: write what is needed of it before training, text for a BPE and the validation data."""
    # A BPE is trained on the beginning of the stream, on training documents alone.
    if bpe_vocab_size(want.tokenizer):
        corpus = make_corpus([_bpe_sample(want, stream)], fraction=0.0, folder=want.folder)
        tokenizer = corpus_tokenizer(
            want.tokenizer, corpus, want.folder, want.endpoint, want.eot_token, progress=want.progress
        )
    else:
        tokenizer = load_tokenizer(want.tokenizer, want.endpoint, want.eot_token)
    train, validation = _divide_stream(want, stream, tokenizer)
    is_own_stream = isinstance(stream, OwnStream)
    name = _stream_name(stream, train) if is_own_stream else f"{stream.position_name}@{stream.revision}"
    return _Prepared(tokenizer, name, train, [] if validation is None else [validation])


def _stream_name(stream: Stream, part: TrainStream) -> str:
    """A fingerprint of what of a stream is trained on."""
    return digest([stream.position_name, part.split.fraction, os.path.basename(part.split.held_out)])


def _bpe_sample(want: _Wanted, stream: Stream) -> str:
    if isinstance(stream, OwnStream) and stream.are_ids:
        raise _untrainable(want, stream.place)
    sample = {"fraction": want.fraction, "folder": want.folder, "progress": want.progress}
    return sample_stream(stream, "train", num_bytes=STREAM_BPE_BYTES, **sample)


def _divide_stream(want: _Wanted, stream: Stream, tokenizer: Tokenizer) -> tuple[TrainStream, Windows | None]:
    """Divide a stream into what is trained on, and its validation data, which are files and may be none."""
    held_out = _held_out_files(want)
    are_ids = isinstance(stream, OwnStream) and stream.are_ids
    if held_out and (are_ids or are_tokens(held_out)):
        kinds = ("token ids", "a file") if are_ids else ("text", "token ids")
        raise ValueError(
            f"data.validation_path ({held_out[0]}): {stream.place} is a stream of {kinds[0]}, which must leave out the "
            f"documents of validation files by their text, and this is {kinds[1]}: "
            + ("set data.validation_fraction instead" if are_ids else "name files of text")
        )

    # Validation data are files, which are read again and again, even where they are a part of the stream.
    held_out = fetch_all(held_out, want.folder)
    if not held_out and want.fraction:
        num_bytes = want.validation_tokens * BYTES_PER_TOKEN
        sample = {"fraction": want.fraction, "folder": want.folder, "progress": want.progress}
        held_out = [sample_stream(stream, "validation", num_bytes=num_bytes, **sample)]

    # Documents of validation files are left out of the stream by their hashes. Those of a sample need none: the
    # fraction leaves them out.
    split = Split(want.fraction)
    if not held_out:
        return TrainStream(stream, split), None
    if want.validation_path:
        split = make_split(make_corpus([], held_out, fraction=0.0, folder=want.folder), want.folder)
    options = {"folder": want.folder, "progress": want.progress, "document_mask": want.document_mask}
    _, tokens = _whole(DataFiles(held_out), tokenizer, 0, key="data.validation_path", **options)
    return TrainStream(stream, split), tokens
