"""Memory of tensors that are read when they are needed: how often each is there at once."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.checkpoint.lazy import Lazy, cast, joined, lazy, read_lazily, sharded, write_lazily


class Made(TorchDispatchMode):
    """The elements of each tensor that an operator made, views aside, and of all copies."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copied += args[0].numel()
        elif isinstance(result, Tensor) and result._base is None:
            self.made.append(result.numel())
        return result


def test_a_whole_shard_is_not_copied_and_many_are_put_together(tmp_path: Path) -> None:
    parts = [torch.randn(6, 5) for _ in range(3)]
    tensors = {"one": lazy(parts[0]), "three": sharded([lazy(part) for part in parts])}
    write_lazily(tmp_path, tensors)
    found = read_lazily(tmp_path)
    with Made() as made:
        one = found["one"].load()
        row = found["three"].rows[1].load()
    assert made.copied == 0
    assert torch.equal(one, parts[0])
    assert torch.equal(row, parts[1])
    assert torch.equal(found["three"].load(), torch.stack(parts))


def test_parts_are_joined_one_at_a_time() -> None:
    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    loaded: list[int] = []

    def part(index: int) -> Lazy:
        def load() -> Tensor:
            loaded.append(index)
            return parts[index]

        return Lazy(tuple(parts[index].shape), torch.float32, load)

    whole = joined([part(0), part(1)], 0)
    assert whole.shape == (6, 3)
    assert loaded == []
    with Made() as made:
        tensor = whole.load()
    assert torch.equal(tensor, torch.cat(parts))
    assert made.made == [tensor.numel()]
    assert made.copied == tensor.numel()


def test_a_cast_makes_one_tensor_of_its_size() -> None:
    tensor = torch.randn(3 << 20)
    with Made() as made:
        converted = cast(lazy(tensor), torch.bfloat16, "weight").load()
    assert made.made.count(converted.numel()) == 1
    assert torch.equal(converted, tensor.bfloat16())
