"""Tensors that are read when they are needed, to rewrite a checkpoint with one of them in memory at a time."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from titan_moe.checkpoint.metadata import read_metadata


class Lazy(NamedTuple):
    """A tensor that is known by shape and dtype; `load()` makes it, anew at each call.

    `rows`, if given, are its parts along dim 0: each can be made without the others, and is written as its own shard.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    rows: "tuple[Lazy, ...]" = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Lazy":
        """The result of an elementwise function that keeps the dtype, made when it is asked for."""
        return Lazy(self.shape, self.dtype, lambda: function(self.load()))


LazyTensors = dict[str, Lazy]


def lazy(tensor: Tensor) -> Lazy:
    """A tensor that is in memory already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_lazily(folder: Path) -> LazyTensors:
    """Every tensor of a folder that torch.distributed.checkpoint wrote, by name; each loads whole, whatever its shards.

    Raises ValueError where the folder is no such one.
    """
    try:
        metadata = read_metadata(folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint of torch.distributed: it has no .metadata") from None
    return {name: _entry(folder, metadata, name) for name in metadata.state_dict_metadata}


def _entry(folder: Path, metadata: Metadata, name: str) -> Lazy:
    """A tensor of the folder; with `rows` if each was saved as a shard, so that one can be read without the others."""
    entry: Any = metadata.state_dict_metadata[name]
    shape, dtype = tuple(entry.size), entry.properties.dtype
    rows: tuple[Lazy, ...] = ()
    if shape and shape[0] > 1 and all(chunk.sizes[0] == 1 for chunk in entry.chunks):
        rows = tuple(Lazy(shape[1:], dtype, _reader(folder, metadata, name, row)) for row in range(shape[0]))
    return Lazy(shape, dtype, _reader(folder, metadata, name), rows)


def _reader(folder: Path, metadata: Metadata, name: str, row: int | None = None) -> Callable[[], Tensor]:
    """What reads a tensor, or one `row` of it; ValueError where the files do not give it."""

    def load() -> Tensor:
        # A row is read as a part of length 1, so that no more than its shard is loaded.
        entry: Any = metadata.state_dict_metadata[name]
        size = list(entry.size)
        offsets = [0] * len(size)
        if row is not None:
            size[0], offsets[0] = 1, row
        try:
            tensor = _read(folder, metadata, name, ChunkStorageMetadata(torch.Size(offsets), torch.Size(size)))
        except Exception as error:  # a broken file may raise anything
            raise ValueError(f"{folder} is broken: {name} cannot be read ({_why(error)})") from error
        return tensor if row is None else tensor[0]

    return load


def _read(folder: Path, metadata: Metadata, name: str, part: ChunkStorageMetadata) -> Tensor:
    """A part of a tensor, put together from the shards that overlap it."""
    # One shard is in memory at a time. DCP's own planning function says which, and which box of each goes where.
    entry: Any = metadata.state_dict_metadata[name]
    tensor = torch.empty(part.sizes, dtype=entry.properties.dtype)
    for item in create_read_items_for_chunk_list(name, entry, [part]):
        place = metadata.storage_data[item.storage_index]
        with open(folder / place.relative_path, "rb") as file:
            view: Any = _create_file_view(file, place.offset, place.length)
            shard = torch.load(view, map_location="cpu", weights_only=True)

        # A shard that is the whole part is returned as it was read: dcp.load copies it, and so holds it twice.
        if shard.shape == part.sizes:
            return shard
        tensor[_box(item.dest_offsets, item.lengths)] = shard[_box(item.storage_offsets, item.lengths)]
    return tensor


def _box(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def _why(error: BaseException) -> str:
    """Why a read failed, in a few words: the file that cannot be opened, else the type of the error."""
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else type(error).__name__


def check_sums(folder: Path) -> None:
    """Compare every tensor of a folder that torch.distributed.checkpoint wrote with the CRC-32 torch put beside it.

    One tensor is in memory at a time. Raises ValueError for the first file that is missing, cut short or changed.
    """
    for index, place in read_metadata(folder).storage_data.items():
        path = folder / place.relative_path
        # torch.save writes a zip archive, which has a CRC-32 of each of its members.
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                changed = ZipFile(BytesIO(file.read(place.length))).testzip()
        except (OSError, BadZipFile, EOFError) as error:
            raise ValueError(f"{folder} is broken: {path.name} cannot be read ({_why(error)})") from error
        if changed:
            raise ValueError(f"{folder} is broken: {index.fqn} in {path.name} does not have its checksum")


def write_lazily(folder: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write tensors as torch.distributed.checkpoint does: each is made, written to its own file, and freed again.

    One process writes everything; no process group is needed.
    """
    writer = Writer(folder, single_file_per_rank=False)
    blanks = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(blanks, storage_writer=writer, planner=_LazyPlanner(tensors), no_dist=True)


class StoreErrors:
    """A part of DCP's writers: the store's own error is raised where torch.save raises one about its archive."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write, or raise OSError."""
        try:
            return super().write_data(plan, planner)  # pyrefly: ignore[missing-attribute]
        except RuntimeError as error:
            # The archive raises an error of its own while it closes; the disk's is among those that led to it.
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            if hidden is None:
                raise
            raise OSError(*hidden.args) from error


class Writer(StoreErrors, dcp.FileSystemWriter):
    """DCP's writer into a folder."""


class _LazyPlanner(DefaultSavePlanner):
    """DCP's planner, which plans with tensors on the meta device and makes each one when the writer asks for it."""

    def __init__(self, tensors: Mapping[str, Lazy]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for item in super().create_local_plan().items:
            rows = self._tensors[item.index.fqn].rows
            items += [_row_item(item, row) for row in range(len(rows))] if rows else [item]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        # The plan has an item for each row, told by its offset along dim 0, or one for the tensor.
        whole = self._tensors[write_item.index.fqn]
        part = whole
        if whole.rows:
            assert write_item.index.offset is not None
            part = whole.rows[write_item.index.offset[0]]

        # The plan, and with it `.metadata`, was made from the announced shape: another one would be read as garbage.
        tensor = part.load()
        assert (tuple(tensor.shape), tensor.dtype) == (part.shape, part.dtype), write_item.index.fqn
        return tensor.unsqueeze(0) if whole.rows else tensor  # (D, ...) -> (1, D, ...), a shard of the whole


def _row_item(item: WriteItem, row: int) -> WriteItem:
    """The planned write of a tensor, cut down to one of its rows."""
    assert item.tensor_data is not None
    size = item.tensor_data.size
    offset = torch.Size([row, *[0] * (len(size) - 1)])
    data = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(offset, torch.Size([1, *size[1:]])))
    return WriteItem(MetadataIndex(item.index.fqn, offset), WriteItemType.SHARD, tensor_data=data)


def stacked(parts: list[Lazy]) -> Lazy:
    """Parts of one shape and dtype as the rows of a new tensor, (D, ...) -> (N, D, ...), filled one at a time."""

    def load() -> Tensor:
        whole = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype)
        for row, part in zip(whole, parts, strict=True):
            row.copy_(part.load())
        return whole

    return Lazy((len(parts), *parts[0].shape), parts[0].dtype, load)


def sharded(parts: list[Lazy]) -> Lazy:
    """As `stacked`, but each part is written as a shard of its own, so that the whole is never in memory."""
    return stacked(parts)._replace(rows=tuple(parts))


def joined(parts: list[Lazy], dim: int) -> Lazy:
    """Parts one after the other along `dim`, filled one at a time."""
    # torch.cat would hold all parts beside the result.
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)

    def load() -> Tensor:
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for view, part in zip(whole.split(sizes, dim), parts, strict=True):
            view.copy_(part.load())
        return whole

    return Lazy(tuple(shape), parts[0].dtype, load)


def unstacked(whole: Lazy) -> list[Lazy]:
    """The rows of a tensor, (N, D, ...) -> N times (D, ...); loading them in this order reads the tensor once."""
    if whole.rows:
        return list(whole.rows)

    # Rows that are no shards can't be read alone. The first that is loaded reads the tensor and keeps it for the
    # others, the last frees it: else an export would read the stacked experts once for each expert.
    cache: list[Tensor] = []

    def row_loader(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            if not cache:
                cache.append(whole.load())
            row = cache[0][index].clone()  # a view would keep the whole in memory
            if index == whole.shape[0] - 1:
                cache.clear()
            return row

        return load

    return [Lazy(whole.shape[1:], whole.dtype, row_loader(index)) for index in range(whole.shape[0])]


def narrowed(whole: Lazy, dim: int, start: int, length: int) -> Lazy:
    """The `length` elements of a tensor from `start` on along `dim`."""
    shape = list(whole.shape)
    shape[dim] = length
    return Lazy(tuple(shape), whole.dtype, lambda: whole.load().narrow(dim, start, length).contiguous())


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite."""
    # A million at a time, because torch's isfinite takes twice the memory of what it tests.
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(1 << 20))


def cast(whole: Lazy, dtype: torch.dtype, name: str) -> Lazy:
    """The tensor in another type; to load it raises a ValueError that names it if that type cannot hold its values."""
    if dtype == whole.dtype:
        return whole

    def load() -> Tensor:
        tensor = whole.load()
        converted = tensor.to(dtype)
        if not _is_finite(converted) and _is_finite(tensor):
            raise ValueError(f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot: take another dtype")
        return converted

    return Lazy(whole.shape, dtype, load)
