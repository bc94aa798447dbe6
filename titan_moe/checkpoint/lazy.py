"""Tensors that are read when they are needed: how a checkpoint is rewritten with one tensor in memory at a time."""

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

    Where `rows` is given, its rows can be made by themselves, and are written as shards of their own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    rows: "tuple[Lazy, ...]" = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "Lazy":
        """The result of an elementwise function of the tensor, as lazy as it."""
        return Lazy(self.shape, self.dtype, lambda: function(self.load()))


LazyTensors = dict[str, Lazy]


def lazy(tensor: Tensor) -> Lazy:
    """A tensor that is there already."""
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_lazily(folder: Path) -> LazyTensors:
    """Every tensor of a folder that torch.distributed.checkpoint wrote, by name; whole, whatever its shards were.

    Raises ValueError where the folder is not one.
    """
    try:
        metadata = read_metadata(folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint of torch.distributed: it has no .metadata") from None
    return {name: _entry(folder, metadata, name) for name in metadata.state_dict_metadata}


def _entry(folder: Path, metadata: Metadata, name: str) -> Lazy:
    entry: Any = metadata.state_dict_metadata[name]
    shape, dtype = tuple(entry.size), entry.properties.dtype
    rows: tuple[Lazy, ...] = ()
    if shape and shape[0] > 1 and all(chunk.sizes[0] == 1 for chunk in entry.chunks):
        rows = tuple(Lazy(shape[1:], dtype, _reader(folder, metadata, name, row)) for row in range(shape[0]))
    return Lazy(shape, dtype, _reader(folder, metadata, name), rows)


def _reader(folder: Path, metadata: Metadata, name: str, row: int | None = None) -> Callable[[], Tensor]:
    def load() -> Tensor:
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
    """A part of a tensor, from the shards that hold some of it.

    A part that is one whole shard is that shard as it was read: dcp.load would copy it, and hold it twice.
    """
    entry: Any = metadata.state_dict_metadata[name]
    tensor = torch.empty(part.sizes, dtype=entry.properties.dtype)
    for item in create_read_items_for_chunk_list(name, entry, [part]):
        place = metadata.storage_data[item.storage_index]
        with open(folder / place.relative_path, "rb") as file:
            view: Any = _create_file_view(file, place.offset, place.length)
            shard = torch.load(view, map_location="cpu", weights_only=True)
        if shard.shape == part.sizes:
            return shard
        tensor[_box(item.dest_offsets, item.lengths)] = shard[_box(item.storage_offsets, item.lengths)]
    return tensor


def _box(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def _why(error: BaseException) -> str:
    """What a failed read comes from: the file that is missing, or the sort of the error."""
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else type(error).__name__


def check_sums(folder: Path) -> None:
    """Compare every tensor of a folder that torch.distributed.checkpoint wrote with the CRC-32 torch put beside it.

    One is in memory at a time. Raises ValueError for the first file that is missing, cut short or changed.
    """
    for index, place in read_metadata(folder).storage_data.items():
        path = folder / place.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                changed = ZipFile(BytesIO(file.read(place.length))).testzip()
        except (OSError, BadZipFile, EOFError) as error:
            raise ValueError(f"{folder} is broken: {path.name} cannot be read ({_why(error)})") from error
        if changed:
            raise ValueError(f"{folder} is broken: {index.fqn} in {path.name} does not have its checksum")


def write_lazily(folder: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write tensors as torch.distributed.checkpoint does, each in a file of its own and gone before the next is made.

    Names must be free of parallelism: one process writes everything.
    """
    writer = Writer(folder, single_file_per_rank=False)
    blanks = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(blanks, storage_writer=writer, planner=_LazyPlanner(tensors), no_dist=True)


class Writer(dcp.FileSystemWriter):
    """DCP's writer, with the disk's own error where torch.save hides it behind one about its archive."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write, or raise OSError."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            hidden: BaseException | None = error
            while hidden is not None and not isinstance(hidden, OSError):
                hidden = hidden.__context__
            if hidden is None:
                raise
            raise OSError(*hidden.args) from error


class _LazyPlanner(DefaultSavePlanner):
    """DCP's planner, which plans with tensors without memory and makes each one when the writer asks for it."""

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
        made = self._tensors[write_item.index.fqn]
        if made.rows:
            assert write_item.index.offset is not None
            made = made.rows[write_item.index.offset[0]]
        tensor = made.load()
        assert (tuple(tensor.shape), tensor.dtype) == (made.shape, made.dtype), write_item.index.fqn
        return tensor.unsqueeze(0) if self._tensors[write_item.index.fqn].rows else tensor


def _row_item(item: WriteItem, row: int) -> WriteItem:
    """The part of a planned write that is one row of its tensor, a shard."""
    assert item.tensor_data is not None
    size = item.tensor_data.size
    offset = torch.Size([row, *[0] * (len(size) - 1)])
    data = dataclasses.replace(item.tensor_data, chunk=ChunkStorageMetadata(offset, torch.Size([1, *size[1:]])))
    return WriteItem(MetadataIndex(item.index.fqn, offset), WriteItemType.SHARD, tensor_data=data)


def stacked(parts: list[Lazy]) -> Lazy:
    """Equal parts as the rows of one tensor, filled one at a time."""

    def load() -> Tensor:
        whole = torch.empty(len(parts), *parts[0].shape, dtype=parts[0].dtype)
        for row, part in zip(whole, parts, strict=True):
            row.copy_(part.load())
        return whole

    return Lazy((len(parts), *parts[0].shape), parts[0].dtype, load)


def sharded(parts: list[Lazy]) -> Lazy:
    """As `stacked`, but written in shards, so that the whole is never in memory."""
    return stacked(parts)._replace(rows=tuple(parts))


def joined(parts: list[Lazy], dim: int) -> Lazy:
    """Parts one after the other along `dim`, filled one at a time."""
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)

    def load() -> Tensor:
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for place, part in zip(whole.split(sizes, dim), parts, strict=True):
            place.copy_(part.load())
        return whole

    return Lazy(tuple(shape), parts[0].dtype, load)


def unstacked(whole: Lazy) -> list[Lazy]:
    """The rows of a tensor, in order; reading them in this order reads the whole once."""
    if whole.rows:
        return list(whole.rows)
    kept: dict[str, Tensor] = {}

    def row(index: int) -> Callable[[], Tensor]:
        def load() -> Tensor:
            if "whole" not in kept:
                kept["whole"] = whole.load()
            found = kept["whole"][index].clone()
            if index == whole.shape[0] - 1:
                kept.clear()
            return found

        return load

    return [Lazy(whole.shape[1:], whole.dtype, row(index)) for index in range(whole.shape[0])]


def narrowed(whole: Lazy, dim: int, start: int, length: int) -> Lazy:
    """The part of a tensor from `start` on along `dim`."""
    shape = list(whole.shape)
    shape[dim] = length
    return Lazy(tuple(shape), whole.dtype, lambda: whole.load().narrow(dim, start, length).contiguous())


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are; a part at a time, as torch's test takes more memory than what it tests."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(1 << 20))


def cast(whole: Lazy, dtype: torch.dtype, name: str) -> Lazy:
    """The tensor in another type; values that it cannot hold are a ValueError that names the tensor when it is made."""
    if dtype == whole.dtype:
        return whole

    def load() -> Tensor:
        tensor = whole.load()
        converted = tensor.to(dtype)
        if not _is_finite(converted) and _is_finite(tensor):
            raise ValueError(f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot: take another dtype")
        return converted

    return Lazy(whole.shape, dtype, load)
