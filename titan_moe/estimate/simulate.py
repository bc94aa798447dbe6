"""Run one training step of rank 0 on fake tensors in a fake process group: nothing is allocated, nothing is sent.

The model is the one that a run builds, and the step is `train_step`. A dispatch mode counts the bytes of every storage
while it is alive, the bytes of every collective by axis, the operations of every matrix product, and the bytes that
every other operator reads and writes.
"""

import dataclasses
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from titan_moe import step
from titan_moe.build import build_balancers, build_optimizer, build_router, build_sharded, has_expert_bias
from titan_moe.config import Config
from titan_moe.model import cross_entropy
from titan_moe.model.attention import MAX_LOGITS
from titan_moe.model.documents import DOCUMENT_ATTENTION, DOCUMENT_ATTENTION_BACKWARD
from titan_moe.model.moe import MoE, linear_router
from titan_moe.model.routing import Places
from titan_moe.model.routing.common import OFFERED, asked_for
from titan_moe.optimizer import kernels, matrix, rounding
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.expert_parallel import all_to_all
from titan_moe.parallelize.grad import Squares
from titan_moe.parallelize.mesh import Degrees, build_mesh
from titan_moe.runtime.dtensor import local
from titan_moe.step import train_step

aten, c10d = torch.ops.aten, torch.ops.c10d
FIRST, LATER = 1, 10_007  # steps of an optimizer: one makes its state; at a large prime nothing periodic is due


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _max_logits_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    B, H, S, C = q  # shapes; of the last S of K positions, whose products are with the keys up to their own
    return B * H * S * (2 * k[2] - S) * C


# torch counts a CPU's attention from 2.15 on, and takes no second formula. How long documents are is not known here: as
# long as sequences, at most.
for operator, formula in (
    (aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops),
    (DOCUMENT_ATTENTION.overloadpacket, _attention_flops),
    (DOCUMENT_ATTENTION_BACKWARD.overloadpacket, _attention_backward_flops),
    (MAX_LOGITS.overloadpacket, _max_logits_flops),
):
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)


class Traffic(NamedTuple):
    """A collective's calls in a step, and the bytes that a rank sends in them (a ring's, where there is a choice)."""

    calls: int
    bytes: int


# What a step does. The keys are
# - ("flops", kind): operations of matrix products,
# - ("bytes", kind): bytes that operators read and write,
# - ("operators", kind): how many operators launch a kernel,
# - ("calls", collective, axis), ("sent", collective, axis): calls of a collective, and the bytes that a rank sends,
# - ("waited", collective, axis): those of the bytes sent that the next operator waits for: activations, and parts of
#   matrices on their way to the ranks that update them.
# Products are of kind attention, grouped, head, dense or fp32; other operators of kind layers, loss (a size of a tensor
# is the vocabulary's), copies (FSDP's) or update (everything after the last backward).
Work = Counter[tuple[str, ...]]


class Simulation(NamedTuple):
    """What a step of rank 0 takes. Memory is in bytes, each part as large as it is when the total is at its peak."""

    parameters: int
    gradients: int
    optimizer_state: int
    gathered: int  # unsharded parameters and the buffers of their collectives
    activations: int  # and every other tensor
    expert_rows: int  # received for this rank's experts in a MoE layer
    work: Work  # of the whole step
    groups: dict[str, tuple[int, ...]]  # the ranks of each axis that something is sent over

    @property
    def peak(self) -> int:
        """All parts together."""
        return self.parameters + self.gradients + self.optimizer_state + self.gathered + self.activations

    @property
    def traffic(self) -> dict[tuple[str, str], Traffic]:
        """By collective and axis."""
        names = [key[1:] for key in self.work if key[0] == "calls"]
        return {
            (name, axis): Traffic(self.work["calls", name, axis], self.work["sent", name, axis]) for name, axis in names
        }

    @property
    def flops(self) -> int:
        """Of matrix products and attention, recomputation included."""
        return sum(count for key, count in self.work.items() if key[0] == "flops")


class Meter(TorchDispatchMode):
    """Count memory, collectives and operations of every operator that runs while the mode is active.

    A storage counts from the first operator that returns it until Python frees it. `vocab_sizes` are the sizes of the
    vocabulary, whole and of one rank, by which the operators of the head and the loss are told from the others. Of the
    rows of the experts' products `computed_share` are computed.
    """

    def __init__(self, fake: FakeTensorMode, vocab_sizes: Set[int], computed_share: float = 1.0) -> None:
        super().__init__()
        self.fake, self.vocab_sizes, self.computed_share = fake, vocab_sizes, computed_share

        # Memory: each storage is of one kind at a time, so that the parts add up to the total.
        self.live: Counter[str] = Counter()  # bytes now, by kind
        self.at_peak: Counter[str] = Counter()
        self.before_update: Counter[str] = Counter()  # at the peak of forward and backward
        self.sizes: dict[int, tuple[str, int, Any]] = {}  # by the storage's id: kind, bytes, weak reference

        # Work is split at each forward pass: the middle one of three stands for all that are not run.
        self.passes: list[Work] = [Counter()]  # before the model's first forward, from there to its second, ...
        self.groups: dict[str, tuple[int, ...]] = {}

        self.paused = False
        self.step = 0  # of the optimizer, from the end of backward on
        self.counts_work = True

    def track(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        # Views share their storage. The weak reference tells when the last of them is gone, without keeping it alive.
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self.sizes:
            reference = weakref.ref(storage, lambda _: self._forget(key))
            self.sizes[key] = (kind, storage.nbytes(), reference)
            self._add(kind, storage.nbytes())

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        if self.live.total() > self.at_peak.total():
            self.at_peak = Counter(self.live)

    def _forget(self, key: int) -> None:
        kind, size, _ = self.sizes.pop(key)
        self.live[kind] -= size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note the new size of a storage: FSDP frees and allocates gathered parameters in this way."""
        if id(storage) in self.sizes:
            _, size, reference = self.sizes[id(storage)]
            self.live[self.sizes[id(storage)][0]] -= size
            self.sizes[id(storage)] = ("gathered", storage.nbytes(), reference)
            self._add("gathered", storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        # An operator of a DTensor runs one of its local tensor, which comes here again and is counted then.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a tensor's device is asked for more often than anything else happens
            return func(*args, **kwargs)

        # Optimizers read numbers on the host, and a fake tensor has none. They ask whether a norm is finite (bool),
        # which row is rank 0's first (int64), and their step's number.
        if self.step and func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 0}.get(args[0].dtype, self.step)

        result = args[0] if func is torch.ops._c10d_functional.wait_tensor.default else func(*args, **kwargs)
        if self.paused:
            return result
        if func is aten._foreach_copy_.default and not self.step:
            self._note_precision(*args[:2])
        if func in collective_ops - sync_ops:
            self._note_traffic(func, result, args, kwargs)
        elif self.counts_work:
            self._note_work(func, result, args, kwargs)

        # FSDP writes into buffers that it made before with plain operators: what they are for is known only now.
        if func is c10d._reduce_scatter_base_.default:
            self.retag(args[0], "gradients")
        if func.namespace == "fsdp":
            for tensor in kwargs.get("out", ()):
                self.retag(tensor, "gathered")

        # Of a storage seen for the first time only the operator that made it tells what it is.
        kind = "gathered" if func.namespace in ("fsdp", "c10d") else "activations"
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake:
                self.track(tensor, kind)
        return result

    def _note_precision(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        # One process copies its parameters to what it computes with, and the gradients of that to those that it keeps.
        for target, source in zip(targets, sources, strict=True):
            self.retag(target, "gathered" if target.itemsize < source.itemsize else "gradients")

    def _note_work(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        size = bytes_moved(func, result, args, kwargs)
        if size is None:
            return
        work, formula = self.passes[-1], flop_registry.get(func._overloadpacket)
        kind = self._kind(func, result, args, is_product=formula is not None)
        work["operators", kind] += 1
        work["bytes", kind] += size
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            work["flops", kind] += int(flops * self.computed_share) if "grouped" in str(func) else flops

    def _kind(self, func: Any, result: Any, args: Any, *, is_product: bool) -> str:
        tensors = _tensors((args, result))
        has_vocabulary = any(not self.vocab_sizes.isdisjoint(tensor.shape) for tensor in tensors)
        name = func._overloadpacket.__name__

        # Passes over memory reach different shares of the bandwidth, and torch.compile fuses them differently. FSDP
        # copies with plain operators, too: those are known by what their largest tensor is.
        if not is_product:
            if self.step:
                return "update"
            if has_vocabulary:
                return "loss"
            largest = max(tensors, key=torch.Tensor.numel)
            is_copy = self.sizes.get(id(largest.untyped_storage()), ("",))[0] in ("parameters", "gathered", "gradients")
            return "copies" if is_copy or func.namespace in ("fsdp", "c10d") else "layers"

        # Products: each kind reaches another share of the tensor cores' peak, and fp32 has a peak of its own.
        if tensors[0].dtype == torch.float32 or func is MAX_LOGITS:
            return "fp32"
        if "scaled_dot_product" in name or "document_attention" in name:
            return "attention"
        return "grouped" if "grouped" in name else "head" if has_vocabulary else "dense"

    def retag(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage as another kind from now on."""
        self.track(tensor, kind)
        key = id(tensor.untyped_storage())
        old, size, reference = self.sizes[key]
        self.live[old] -= size
        self.live[kind] += size
        self.sizes[key] = (kind, size, reference)

    def _note_traffic(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        # The first update is not one of most steps, see `_mark_phases`.
        if not self.counts_work:
            return

        # c10d and functional collectives call the same thing by different names.
        group = CollectiveOp.get_process_group(func, args)
        size = group.size()
        name = func._overloadpacket.__name__.strip("_").removesuffix("_base").removesuffix("_into_tensor")
        name = COLLECTIVES.get(name, name)

        # In a ring a rank sends all parts but one. (torch's get_comm_tensor_size adds input and output: of an
        # all-to-all that is twice the bytes.)
        passes = 2 if name == "all_reduce" else 1  # a ring reduces, then gathers
        tensors = _tensors((args, kwargs, result))
        whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)  # gathered, or before the scatter
        sent = passes * whole * (size - 1) // size
        is_of_owners = func is c10d.alltoall_base_.default
        if is_of_owners:  # each rank sends to each as much as it says
            rows, to_ranks = args[1], args[4]
            sent = (sum(to_ranks) - to_ranks[group.rank()]) * rows.element_size()

        # FSDP's collectives are c10d's and hide behind products; the functional ones carry activations. Parts of
        # matrices on their way to owners and back hide behind no more than the update of other matrices.
        axis = f"{group.group_desc.removeprefix('mesh_')} ({size})"
        self.groups[axis] = tuple(dist.get_process_group_ranks(group))
        self.passes[-1] += Counter({("calls", name, axis): 1, ("sent", name, axis): sent})
        if func.namespace == "_c10d_functional" or is_of_owners:
            self.passes[-1]["waited", name, axis] += sent


# Collectives of c10d by the names that functional ones have.
COLLECTIVES = {
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "alltoall": "all_to_all_single",
    "reduce_scatter_tensor": "reduce_scatter",
}
# Operators that launch no kernel: they allocate without writing, or only read a number on the host.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense")
# Operators that read only the rows they return, however large their first tensor is.
GATHERS = ("embedding", "index", "index_select", "gather")
# Operators that write their first tensor without reading it.
OVERWRITE = ("copy_", "fill_", "zero_")


def bytes_moved(func: Any, result: Any, args: Any, kwargs: Any) -> int | None:
    """Bytes that an operator reads and writes, each tensor once; None where nothing runs on the device, as for views.

    Not counted are buffers that it allocates inside. Counted are reads that a cache would serve.
    """
    name = func._overloadpacket.__name__
    if name in FREE or func.namespace == "profiler":
        return None

    # A view has the storage of an argument. An operator that gives only views and writes nothing runs no kernel.
    names, written = arguments_of(func)
    tensors = {key: _tensors(value) for key, value in (dict(zip(names, args, strict=False)) | kwargs).items()}
    argument_storages = {leaf.untyped_storage()._cdata for leaves in tensors.values() for leaf in leaves}
    new_tensors = [leaf for leaf in _tensors(result) if leaf.untyped_storage()._cdata not in argument_storages]
    if not new_tensors and not written:
        return None

    # New tensors are written once, arguments read once; an argument changed in place is read and written.
    total = sum(map(_bytes, new_tensors))
    for position, (key, leaves) in enumerate(tensors.items()):
        size = sum(map(_bytes, leaves))
        is_read = not (written.get(key, False) or (name in OVERWRITE and position == 0))
        if name in GATHERS and position == 0:
            size = min(size, total)
        total += size * (is_read + (key in written))
    return total


@cache
def arguments_of(func: Any) -> tuple[list[str], dict[str, bool]]:
    """Names of an operator's arguments; and of those it writes, whether they are only written, as `out` is."""
    arguments = func._schema.arguments
    written = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
    return [argument.name for argument in arguments], {argument.name: argument.kwarg_only for argument in written}


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes that a tensor refers to: an expanded one refers to fewer than its shape says."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextmanager
def _report_what_dispatch_misses(meter: Meter) -> Iterator[None]:
    """Patch torch and the step, so that the meter learns three things that a dispatch mode is not told."""
    resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached
    squares = step.grad_squares

    # Resizing a storage is a method, not an operator, and it is how FSDP frees gathered parameters.
    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        meter.resized(storage)
        return result

    # DTensor runs operators on full-size fake tensors to learn shapes. Counted, they were 9 GiB where 3 GiB are used.
    def propagate_unseen(*args: Any) -> Any:
        meter.paused = True
        try:
            return propagate(*args)
        finally:
            meter.paused = False

    # The step sums the squares of gradients when backward is over. From then on the meter answers what optimizers read
    # on the host.
    def squares_and_answer(*args: Any) -> Squares:
        meter.step = FIRST
        return squares(*args)

    step.grad_squares = squares_and_answer  # pyrefly: ignore
    torch.UntypedStorage.resize_ = resize_and_tell  # pyrefly: ignore
    ShardingPropagator._propagate_tensor_meta_non_cached = propagate_unseen  # pyrefly: ignore
    try:
        yield
    finally:
        step.grad_squares = squares
        torch.UntypedStorage.resize_ = resize
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate


@contextmanager
def _take_gpu_paths() -> Iterator[None]:
    """Patch the places where a CPU runs other operators than a GPU would, so that a GPU's are counted."""
    rms_norm, elements, add_product = F.rms_norm, matrix.CPU_ELEMENTS_PER_UPDATE, cross_entropy._add_product
    chunk_tokens, of_kernels = cross_entropy.CPU_CHUNK_TOKENS, (kernels.CPU_ELEMENTS, rounding.CPU_ELEMENTS)

    # An RMSNorm is one kernel on a GPU and ten operators on a CPU, which made the peak 9 % too high. LayerNorm is one
    # operator everywhere; it reads, writes and saves as much.
    def one_operator(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return F.layer_norm(x, shape, weight, eps=1e-5 if eps is None else eps)

    # A GPU's product of bf16 matrices can give fp32 at once; a CPU needs copies of them in fp32.
    def add_in_fp32(sum_VD: Tensor | None, a_VC: Tensor, b_CD: Tensor) -> Tensor:
        is_fp32 = a_VC.dtype == torch.float32
        product_VD = torch.mm(a_VC, b_CD) if is_fp32 else torch.mm(a_VC, b_CD, out_dtype=torch.float32)
        return product_VD if sum_VD is None else sum_VD.add_(product_VD)

    # A GPU takes larger chunks of the loss, and updates all rows of a stacked matrix, and more elements, at once.
    F.rms_norm = one_operator  # pyrefly: ignore
    cross_entropy._add_product = add_in_fp32
    cross_entropy.CPU_CHUNK_TOKENS = cross_entropy.GPU_CHUNK_TOKENS  # pyrefly: ignore
    matrix.CPU_ELEMENTS_PER_UPDATE = sys.maxsize
    kernels.CPU_ELEMENTS = kernels.GPU_ELEMENTS  # pyrefly: ignore
    rounding.CPU_ELEMENTS = rounding.GPU_ELEMENTS
    try:
        yield
    finally:
        F.rms_norm, cross_entropy._add_product = rms_norm, add_product  # pyrefly: ignore
        matrix.CPU_ELEMENTS_PER_UPDATE, cross_entropy.CPU_CHUNK_TOKENS = elements, chunk_tokens
        kernels.CPU_ELEMENTS, rounding.CPU_ELEMENTS = of_kernels  # pyrefly: ignore


@contextmanager
def _mark_phases(meter: Meter, model: torch.nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Hook model and optimizer, so that the meter knows where forward passes and the update begin; update twice."""

    # Gradients of earlier micro-batches are alive in this one. Where no reduce-scatter made them, they are known by
    # their parameter alone.
    def start_forward(*_: Any) -> None:
        meter.passes.append(Counter())
        for parameter in model.parameters():
            if parameter.grad is not None:
                meter.retag(local(parameter.grad), "gradients")

    # On one process autograd makes them, where it computes in the parameters' own type.
    def tell_gradient(parameter: Tensor) -> None:
        if isinstance(parameter.grad, FakeTensor):
            meter.retag(parameter.grad, "gradients")

    # The first update makes the optimizer's state. Its memory has a peak of its own; its work is not counted, as it is
    # not that of most steps.
    def start_update(*_: Any) -> None:
        if meter.step == FIRST:
            meter.before_update, meter.at_peak = meter.at_peak, Counter(meter.live)
            meter.counts_work = False

    # The work that counts is that of a second update, in which the state exists and nothing periodic is due.
    def update_again(*_: Any) -> None:
        if meter.step == FIRST:
            meter.step, meter.counts_work = LATER, True
            finite = torch.ones((), dtype=torch.bool)  # or the gradients would be checked a second time
            optimizer.step(finite=finite)

    handles = [
        *(
            p.register_post_accumulate_grad_hook(tell_gradient)
            for p in model.parameters()
            if not isinstance(p, DTensor)
        ),
        model.register_forward_pre_hook(start_forward),
        optimizer.register_step_pre_hook(start_update),
        optimizer.register_step_post_hook(update_again),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which this process is rank 0 and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(config: Config, degrees: Degrees, *, micro_batches: int = 1, excess: float = 0.0) -> Simulation:
    """Run one step of rank 0 in a `fake_world`, and count what it takes.

    `config.model.vocab_size` must be set. Of `micro_batches` at most three are run: the first and the last may gather
    and reduce, and all others are alike. `excess` is how much more than its even share of rows this rank's experts
    receive. At a MaxVio of v it is at most v, when each of these experts is as full as the fullest.
    """
    # In a real step the host reads the split sizes of dispatch. Fake tensors have no values, so they are set.
    training, simulated = config.training, min(micro_batches, 3)
    alone = dist.get_world_size() == 1
    mesh = None if alone else build_mesh(device=torch.device("cpu"), **degrees._asdict())
    model = build_sharded(config, mesh, compile_blocks=False)
    local_length = training.seq_len // degrees.per_sequence
    rows = rows_sent(config, training.local_batch_size, local_length)
    received = -(-int(rows * (1 + excess)) // degrees.expert) * degrees.expert
    ep = None if mesh is None else mesh.ep
    if ep is not None:
        fix_split_sizes(model, ep, rows, received)

    # On one rank there is memory for a row of each choice, of which those of identity experts are not computed.
    share = 1.0 if ep is not None or not config.moe.num_experts else config.moe.num_experts / config.moe.router_width

    # Under the fake mode nothing is allocated; what is built before the step is not work, so the meter starts later.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        model.eot_id = 0  # any: documents cost the same wherever they end
    optimizer = build_optimizer(without_load_lr(config), model)  # outside: it asks what other ranks hold
    with fake:
        balancers = build_balancers(config)
        tokens = torch.zeros(training.local_batch_size, local_length, dtype=torch.int64)  # (B, S)
        vocabulary = config.model.vocab_size
        meter = Meter(fake, {vocabulary, vocabulary // degrees.tensor}, share)
        parameters = _local_bytes(model.parameters())
        for tensor in (*model.parameters(), *model.buffers()):
            meter.track(local(tensor), "parameters")
        with meter, _report_what_dispatch_misses(meter), _take_gpu_paths(), _mark_phases(meter, model, optimizer):
            train_step(
                model,
                [(tokens, tokens)] * simulated,
                optimizer,
                balancers,
                model.expert_biases(),
                max_norm=training.max_norm,
                qk_clip=training.qk_clip,
                balancer_states=model.balancer_states(),
                sequence_group=None if mesh is None else mesh.sequence_group,
            )
    states = [leaf for s in optimizer.state.values() for leaf in tree_leaves(s) if isinstance(leaf, Tensor)]
    state = largest_state(states)
    peak = steady_peak(meter, state, _local_bytes(states))
    return Simulation(
        parameters=parameters,
        gradients=peak["gradients"],
        optimizer_state=state,
        gathered=peak["gathered"],
        activations=peak["activations"],
        expert_rows=received,
        work=whole_step(meter.passes, simulated, micro_batches),
        groups=meter.groups,
    )


def largest_state(states: Iterable[Tensor]) -> int:
    """Bytes of the optimizer's state on the rank that has most of it."""
    # what one rank keeps for all, as owners of matrices do, is on that rank; the rest is taken to be spread evenly
    everywhere, by_owner = 0, Counter[int]()
    for tensor in states:
        if isinstance(tensor, DTensor) and tensor.device_mesh.size() == 1:
            by_owner[int(tensor.device_mesh.mesh)] += tensor.numel() * tensor.element_size()
        else:
            everywhere += _local_bytes([tensor])
    return everywhere + max(by_owner.values(), default=0)


def steady_peak(meter: Meter, state: int, seen: int) -> Counter[str]:
    """Bytes by kind at the peak of a step that finds the optimizer's state, of `state` bytes, already made.

    `seen` bytes of state were made on the rank that was simulated.
    """
    # The simulated step makes the state at its end; from the second step on it is alive in forward and backward, too.
    peak = meter.before_update + Counter(optimizer_state=state)

    # The peak may be in the update itself. There the meter saw the state being made, and took it for activations.
    if meter.at_peak.total() + state - seen > peak.total():
        peak = meter.at_peak + Counter(optimizer_state=state, activations=-seen)
    return peak


def whole_step(passes: list[Work], simulated: int, micro_batches: int) -> Work:
    """Work of a step of `micro_batches` from that of its simulated passes: the second of three stands for the others.

    `passes` begins with what comes before the first forward; then comes a pass for each simulated micro-batch. Where a
    balancer needs the whole batch's load first, there are twice as many: a forward pass of each goes ahead.
    """
    work: Work = sum(passes, start=Counter())
    # Pass 2 is the second micro-batch's; in a second series of passes that is `simulated` later.
    for one_of_many in passes[2::simulated]:
        for key, count in one_of_many.items():
            work[key] += (micro_batches - simulated) * count
    return work


def rows_sent(config: Config, sequences: int, length: int) -> int:
    """Rows that a rank sends to experts in a MoE layer at most, of its `sequences` parts of `length` tokens each.

    Identity experts, which take none, are taken to be chosen as often as others.
    """
    # As a layer does: only the router knows how many slots a token has, and how many of them may be used.
    router, num_tokens, width = build_router(config), sequences * length, config.moe.router_width
    with FakeTensorMode():
        place = torch.zeros(sequences, length, dtype=torch.int64)
        values = {
            "x": torch.zeros(num_tokens, config.model.dim),
            "router": (router.init or linear_router)(config.model.dim, width),
            "layer": 0,
            **Places(place, place)._asdict(),
        }
        bias_E = torch.zeros(width) if has_expert_bias(config) else None
        asked = {name: values[name] for name in asked_for(router.route, OFFERED)}
        routing = router.route(torch.zeros(num_tokens, width), bias_E, **asked)
    slots = -(-routing.topk_experts.numel() * config.moe.num_experts // max(1, width))
    return slots if routing.capacity is None else min(slots, config.moe.num_experts * routing.capacity)


def without_load_lr(config: Config) -> Config:
    """The configuration without rates by load, which on a CPU are read on the host. Their state is small."""
    groups = {
        name: {key: value for key, value in table.items() if not key.startswith("load_lr")}
        for name, table in config.optimizer.groups.items()
    }
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))


def fix_split_sizes(model: torch.nn.Module, mesh: DeviceMesh, rows: int, received: int) -> None:
    """Give the dispatchers their numbers of rows by rank, which in a real step the host reads from the device."""
    # Rows are sent evenly. What is left over goes to rank 0, the one that is simulated.
    sent = [rows // mesh.size()] * mesh.size()
    sent[0] += rows - sum(sent)
    splits = sent, [received // mesh.size()] * mesh.size()
    dispatcher = all_to_all(mesh, read=lambda *_: splits)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher = dispatcher


def _local_bytes(tensors: Any) -> int:
    parts = [local(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(part.numel() * part.element_size() for part in parts)
