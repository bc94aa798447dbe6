"""The safetensors format, read and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets) and the
tensors' bytes. The library of that name is not used, because it writes a whole dict at once and maps whole files, which
count as memory. Source: the format's description, https://github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_moe.checkpoint.lazy import Lazy, LazyTensors
from titan_moe.runtime.files import is_plain_name

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_shards(folder: Path, tensors: Mapping[str, Lazy], shard_bytes: int) -> list[str]:
    """Write tensors into model.safetensors, or into shards of at most `shard_bytes` with an index; return files' names.

    A tensor larger than a shard has one of its own.
    """
    # Sizes are known before anything is loaded: a shard's name says how many there are.
    shards: list[dict[str, Lazy]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = _size(tensor)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return [SINGLE]

    # The index comes last: a folder without it is not taken for a model.
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def read_folder(folder: Path) -> LazyTensors:
    """Every tensor of a folder's safetensors files, by name. Raises ValueError in one line for what is wrong."""
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder)
        files = sorted(set(weight_map.values()))
        tensors = {name: tensor for file in files for name, tensor in _read_file(folder / file).items()}
        if missing := sorted(set(weight_map) - set(tensors)):
            raise ValueError(f"{folder}: {INDEX} lists {missing[0]}, but {weight_map[missing[0]]} does not hold it")
        return tensors
    if (folder / SINGLE).exists():
        return _read_file(folder / SINGLE)

    # The usual reason is a model in another format: the message names its file.
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf") for path in folder.glob(pattern))
    hint = f"; {others[0]} is of another format: save it as safetensors" if others else ""
    raise ValueError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}{hint}")


def weight_files(folder: Path) -> list[str]:
    """The names of the files that `read_folder` reads."""
    return [INDEX, *sorted(set(_weight_map(folder).values()))] if (folder / INDEX).exists() else [SINGLE]


def _weight_map(folder: Path) -> dict[str, str]:
    """Which file has which tensor, as the index says; files are of the same folder."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read ({type(error).__name__})") from error
    if outside := [file for file in files.values() if not is_plain_name(file)]:
        raise ValueError(f"{folder / INDEX} names the file {outside[0]!r}: only files in the same folder are read")
    return files


def _write_file(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write tensors into one file, each made when its turn comes."""
    # The header comes first in the file: it is made of the announced shapes, and padded to multiples of 8 bytes so that
    # tensors are aligned for readers that map the file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _size(tensor)
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    # A tensor of another size would shift all after it, and each be read as garbage.
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, planned in tensors.items():
            tensor = planned.load()
            assert (tuple(tensor.shape), tensor.dtype) == (planned.shape, planned.dtype), name
            file.write(_bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def _read_file(path: Path) -> LazyTensors:
    """The tensors of one file by name; ValueError in one line for what is wrong with it."""
    # The length may be any number in a broken file: it is compared with the file's size before so much is read.
    broken = f"{path} is broken"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"{broken}: its header does not fit into {size} bytes")
            header = json.loads(file.read(length))

        # Every tensor is checked to lie within the file now, not only when its turn comes.
        header.pop("__metadata__", None)
        start, tensors = 8 + length, {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} is of type {entry['dtype']}, which cannot be read: dequantise it")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if last - first != math.prod(shape) * dtype.itemsize or not 0 <= first <= last <= size - start:
                raise ValueError(f"{broken}: {name} of shape {shape} does not fit its place (a file cut short?)")
            tensors[name] = Lazy(shape, dtype, _reader(path, start + first, shape, dtype))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{broken}: its header cannot be read ({type(error).__name__})") from error
    return tensors


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    def load() -> Tensor:
        # Straight into the tensor's memory, without a copy in between; a read may give less than was asked for.
        tensor = torch.empty(shape, dtype=dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = _bytes_of(tensor), 0
            while done < len(view):
                read = file.readinto(view[done:])
                if not read:
                    raise ValueError(f"{path} is broken: it ends within a tensor")
                done += read
        return tensor

    return load


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor."""
    bytes_of: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(bytes_of)


def _size(tensor: Lazy) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
