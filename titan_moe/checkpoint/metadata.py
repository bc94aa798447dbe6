"""The `.metadata` of torch.distributed.checkpoint, read so that a stranger's file runs no code.

It is a pickle. A pickle names classes and functions, and to read it as usual is to import and call them. Here only the
names that torch writes are known, and not even their code runs: each object becomes a record of its attributes, and a
Metadata is built from the records of tensors. Entries that are not tensors are left out, because torch would read their
content by a pickle once more.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from titan_moe.runtime.files import is_plain_name

METADATA = ".metadata"
# What torch names: its checkpoint package (as a whole, because Megatron keeps the plans of a save as well and versions
# differ), and what objects of it hold.
_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.")  # the second: torch 2.2 and before
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_NAMES = {
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
}


class Reader(dcp.FileSystemReader):
    """DCP's reader for a folder that a stranger may have written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As `read_metadata` below."""
        return read_metadata(Path(self.path))


def read_metadata(folder: Path) -> Metadata:
    """Names, shapes, dtypes and files of the tensors in a folder of torch.distributed.checkpoint.

    Raises FileNotFoundError where it has no `.metadata`, and ValueError in one line where that names anything but what
    torch writes, names files outside of the folder, or is broken.
    """
    with open(folder / METADATA, "rb") as file:
        try:
            return _to_metadata(_Unpickler(file).load())
        except _RefusedError as error:
            raise ValueError(f"{folder}: {METADATA} {error}") from None
        except Exception as error:  # a broken pickle may raise anything
            raise ValueError(f"{folder}: {METADATA} cannot be read ({type(error).__name__})") from error


class _RefusedError(Exception):
    """What is refused of a pickle that can be read."""


class _Record:
    """Stands for an object of the pickle and holds its attributes; the arguments of its construction are dropped."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes records. A pickle can also change the classes that it names, so each reading makes new classes."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Give a class of records; of torch itself only what a pickle cannot change: torch.Size and the dtypes."""
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if not module.startswith(_MODULES) and (module, name) not in _NAMES:
            raise _RefusedError(
                f"names {module}.{name}, which no checkpoint needs and which could run code here: it is not read"
            )
        return self._classes.setdefault(name, type(name, (_Record,), {}))


def _fields(record: Any, name: str) -> dict[str, Any]:
    """The attributes of a record of the class `name`; TypeError where it is none."""
    if not isinstance(record, _Record) or type(record).__name__ != name or not isinstance(record.state, dict):
        raise TypeError(f"{name} is missing")
    return record.state


def _to_metadata(record: Any) -> Metadata:
    """The Metadata that a record stands for, reduced to its tensors."""
    # An entry of bytes is no tensor, and torch would read its content with `weights_only=False`.
    fields = _fields(record, "Metadata")
    tensors: dict[str, Any] = {
        _text(name): _tensor(_fields(entry, "TensorStorageMetadata"))
        for name, entry in fields["state_dict_metadata"].items()
        if type(entry).__name__ != "BytesStorageMetadata"
    }

    # With an entry its places go as well.
    places: dict[MetadataIndex, _StorageInfo] = {}
    for index, place in fields["storage_data"].items():
        key, info = _fields(index, "MetadataIndex"), _fields(place, "_StorageInfo")
        if key["fqn"] in tensors:
            places[MetadataIndex(key["fqn"], key.get("offset"), key.get("index"))] = _place(info)
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=fields.get("version"))


def _tensor(fields: dict[str, Any]) -> TensorStorageMetadata:
    dtype = fields["properties"].state[0]  # torch calls the other properties deprecated
    if not isinstance(dtype, torch.dtype):
        raise TypeError("dtype is missing")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(fields["size"]),
        [ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])) for chunk in chunks],
    )


def _place(fields: dict[str, Any]) -> _StorageInfo:
    name = _text(fields["relative_path"])
    if not is_plain_name(name):
        raise _RefusedError(f"names the file {name!r}: only files in the same folder are read")
    transforms = fields.get("transform_descriptors")
    return _StorageInfo(name, int(fields["offset"]), int(fields["length"]), transforms and [*map(_text, transforms)])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is not text")
    return value
