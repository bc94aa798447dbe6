"""States in bfloat16, rounded stochastically: an update sees them in fp32, and they are rounded when it writes them.

Rounded to nearest a moment would stop moving: with beta2 = 0.999 a step changes the second moment by a thousandth, and
bfloat16 has eight bits. So a number goes to the neighbour above or below, as often as it takes to be right on average.

The random bits are a hash of the step, the parameter's place among the optimizer's parameters, the state, and the
element's indices in the whole tensor. So they are the same in every layout and after resuming, they disturb no
generator, and the host waits for nothing. A number that bfloat16 holds stays, so a skipped step changes nothing.

Shapes: R rows of a stack, N the last dimension, S the states of a parameter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.optimizer.groups import table_of
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.transform import Kernel, State, Transform

# Elements whose fp32 copies there are at a time: so many fit into the cache of a CPU, and keep a GPU busy.
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 17, 1 << 24
QUIET_NAN = 0x7FC00000  # bits of an fp32 NaN to which noise may be added; those of a GPU's own NaN are 0x7FFFFFFF


class Place(NamedTuple):
    """Where a tensor's elements are: the parameter's number, and which indices of each dim of the whole there are."""

    number: int
    slices: tuple[slice, ...]


class Keys(NamedTuple):
    """Hashes, int32, that make the noise of a parameter's states: of all dims but the last, and of the last (S, N)."""

    rows: Tensor
    columns_SN: Tensor

    def row(self, row: int, count: int) -> "Keys":
        """Those of one of the `count` rows of the first dim."""
        return self._replace(rows=self.rows.view(count, -1)[row])


def mixed(number: Tensor) -> Tensor:
    """Hash int64 numbers below 2^32 to such numbers, one to one, by integers, which are exact on every device."""
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)


def keys_of(place: Place, steps: Tensor, count: int) -> Keys:
    """Hash indices for `count` states at a place; `steps`, a scalar or (R,) for the first dim, has this step already.

    The noise of an element is the product of its row's key and its column's, which costs a pass over memory less than
    a hash. Keys are odd, so that the product takes all odd values alike; its upper half is used.
    """
    # Nested, a dim after another: the key of an index does not depend on how long the dims of this rank's part are.
    device = steps.device
    rows = mixed((steps.to(torch.int64) + 0x9E3779B1 * (place.number + 1)) & 0xFFFFFFFF)
    for dim, indices in enumerate(place.slices[:-1]):
        index = mixed(torch.arange(indices.start, indices.stop, device=device))
        rows = mixed((rows if dim == 0 and rows.dim() else rows.unsqueeze(-1)) ^ index)

    last = place.slices[-1]
    columns = mixed(torch.arange(last.start, last.stop, device=device))  # (N,)
    states = mixed(torch.arange(1, count + 1, device=device))  # (S,)
    return Keys(_odd(rows.flatten()), _odd(mixed(columns ^ states[:, None])))


def _odd(number: Tensor) -> Tensor:
    """Odd int32 numbers of int64 ones below 2^32."""
    return (number - 2**31).to(torch.int32) | 1


def round_into(out: Tensor, values: Tensor, rows: Tensor, columns_N: Tensor) -> None:
    """Round fp32 `values` (..., N) stochastically into `out`, bfloat16; `rows` are as many keys as there are rows.

    An infinity stays one and a NaN stays a NaN; the largest numbers may become infinite, as in rounding to nearest.
    """
    # A float's bits are a number of its own: adding noise below the last bit kept carries into it as often as the rest
    # is a part of it, for either sign.
    width = max(1, columns_N.numel())
    values, target = values.view(-1, width), out.view(-1, width)
    for part in _parts(len(values), width, values.device):
        noise = (rows[part].unsqueeze(-1) * columns_N).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        noise.add_(values[part].view(torch.int32).clamp(max=QUIET_NAN)).bitwise_and_(-0x10000)
        target[part].copy_(noise.view(torch.float32))


def _elements(device: torch.device) -> int:
    """How many elements are worked on together."""
    return CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS


def _parts(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Rows that are worked on together."""
    count = max(1, _elements(device) // width)
    return (slice(start, start + count) for start in range(0, rows, count))


def is_narrow(group: Group) -> bool:
    """Whether a group keeps in bfloat16 what may be."""
    return group.get("state_dtype") == "bfloat16"


def check_state_dtype(kind: str, group: Group, transform: Transform) -> None:
    """Raise ValueError where a group's states are to be in bfloat16, and its transform has none that may be."""
    if is_narrow(group) and not transform.rounded:
        raise ValueError(
            f"[{table_of(group.get('name', ''))}] state_dtype = 'bfloat16': {kind} keeps none of its states in "
            "bfloat16: choose another optimizer, or 'float32' for that group"
        )


def narrowed(states: State, names: Sequence[str]) -> State:
    """A new state with those of `names` in bfloat16."""
    return {name: value.to(torch.bfloat16) if name in names else value for name, value in states.items()}


@contextmanager
def in_fp32(states: State, names: Sequence[str], place: Place, steps_R: Tensor) -> Iterator[State]:
    """The states (R, ...) of a stack with fp32 copies of those of `names` in bfloat16, which are rounded at the end.

    `place` is that of the stack's rows, and `steps_R` counts this step already. Other states are given as they are.
    """
    narrow = [name for name in names if name in states and states[name].dtype == torch.bfloat16]
    if not narrow:
        yield states
        return
    wide = {name: states[name].float().contiguous() for name in narrow}
    yield {**states, **wide}

    for number, name in enumerate(narrow):
        shape = states[name].shape
        slices = (place.slices[0], *(slice(0, size) for size in shape[1:]))
        keys = keys_of(place._replace(slices=slices), steps_R, len(narrow))
        round_into(states[name], wide[name], keys.rows, keys.columns_SN[number])


def step_in_fp32(
    kernel: Kernel,
    tensors: Sequence[list[Tensor]],
    steps: Sequence[Tensor],
    keys: Sequence[Keys],
    lr: float | Tensor,
    weight_decay: float,
    *,
    skip: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """Take a kernel's `Step` on fp32 copies of what is in bfloat16, some rows at a time.

    `keys` are those of each parameter. Weights in bfloat16 are rounded to nearest, as they are without this.
    """
    count = 2 + len(kernel.states)  # after them come scalars
    weights, gradients, *states = ([_rows(tensor) for tensor in of_kind] for of_kind in tensors[:count])
    is_rounded = [name in kernel.rounded for name in kernel.states]
    for batch in _batches(weights):
        # what is in fp32 already is not copied, and so is stepped in place
        narrow = [[of_kind[number][part] for number, part in batch] for of_kind in (weights, gradients, *states)]
        wide = [[tensor.float() for tensor in of_kind] for of_kind in narrow]
        counts = [steps[number] for number, _ in batch]
        scalars = [[of_kind[number] for number, _ in batch] for of_kind in tensors[count:]]
        kernel.step([*wide, *scalars], counts, lr, weight_decay, skip=skip, grad_scale=grad_scale)

        for old, new in zip(narrow[0], wide[0], strict=True):
            if old is not new:
                old.copy_(new)
        for state, rounds in enumerate(is_rounded):
            for (number, part), old, new in zip(batch, narrow[2 + state], wide[2 + state], strict=True):
                if rounds and old is not new:
                    round_into(old, new, keys[number].rows[part], keys[number].columns_SN[state])
                elif old is not new:
                    old.copy_(new)


def _rows(tensor: Tensor) -> Tensor:
    """A view (rows, N) of a contiguous tensor of any shape."""
    return tensor.view(-1, max(1, tensor.shape[-1] if tensor.dim() else 1))


def _batches(weights: Sequence[Tensor]) -> Iterator[list[tuple[int, slice]]]:
    """Rows that are stepped in one call: of each of (rows, N) its number and which of them, until they are many."""
    batch, size = [], 0
    for number, weight in enumerate(weights):
        for part in _parts(len(weight), weight.shape[1], weight.device):
            batch.append((number, part))
            size += len(weight[part]) * weight.shape[1]
            if size >= _elements(weight.device):
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
