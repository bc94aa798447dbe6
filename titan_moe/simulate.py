"""One training step of a rank of a world that does not exist: fake tensors, a fake process group, nothing allocated.

The model is the one that a run builds and the step is `train_step`; what is counted are the bytes of every storage
while it is alive, the bytes of every collective by axis, and the operations of every matrix product.
"""

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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
from titan_moe.build import build_balancers, build_optimizer
from titan_moe.config import Config
from titan_moe.job import build_sharded
from titan_moe.model.moe import MoE
from titan_moe.parallelize.expert import all_to_all
from titan_moe.parallelize.mesh import Degrees, build_mesh
from titan_moe.step import train_step

aten, c10d = torch.ops.aten, torch.ops.c10d


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


class Traffic(NamedTuple):
    """A collective's calls in a step, and the bytes that a rank sends in them (a ring's, where there is a choice)."""

    calls: int
    bytes: int


class Simulation(NamedTuple):
    """What a step of rank 0 takes; bytes, each part as it is at the moment of the peak."""

    parameters: int
    gradients: int
    optimizer_state: int
    gathered: int  # unsharded parameters and the buffers of their collectives
    activations: int  # and every other tensor
    traffic: dict[tuple[str, str], Traffic]  # by collective and axis
    flops: int  # of matrix products and attention, recomputation included
    expert_rows: int  # received for this rank's experts in a MoE layer

    @property
    def peak(self) -> int:
        """All parts together."""
        return self.parameters + self.gradients + self.optimizer_state + self.gathered + self.activations


class Meter(TorchDispatchMode):
    """Counts what passes: storages from their first operation to their end, collectives, operations."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.sizes: dict[int, tuple[str, int, Any]] = {}  # by identity: kind, bytes, reference
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.flops = 0
        self.paused = False
        self.answers = False  # whether a value that is read on the host is 1: a finite number, a first step

    def track(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage, if it is not counted yet."""
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
        """Note what FSDP does to the storages of gathered parameters."""
        if id(storage) in self.sizes:
            _, size, reference = self.sizes[id(storage)]
            self.live[self.sizes[id(storage)][0]] -= size
            self.sizes[id(storage)] = ("gathered", storage.nbytes(), reference)
            self._add("gathered", storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its local tensor comes here again
        kwargs = kwargs or {}
        if self.answers and func is aten._local_scalar_dense.default:
            return 1
        result = args[0] if func is torch.ops._c10d_functional.wait_tensor.default else func(*args, **kwargs)
        if self.paused:
            return result
        if func in collective_ops - sync_ops:
            self._note_traffic(func, result, args, kwargs)
        if func is c10d._reduce_scatter_base_.default:
            self._retag(args[0], "gradients")
        if func.namespace == "fsdp":
            for tensor in kwargs.get("out", ()):
                self._retag(tensor, "gathered")
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        kind = "gathered" if func.namespace in ("fsdp", "c10d") else "activations"
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.fake:
                self.track(tensor, kind)
        return result

    def _retag(self, tensor: Tensor, kind: str) -> None:
        self.track(tensor, kind)
        key = id(tensor.untyped_storage())
        old, size, reference = self.sizes[key]
        self.live[old] -= size
        self.live[kind] += size
        self.sizes[key] = (kind, size, reference)

    def _note_traffic(self, func: Any, result: Any, args: Any, kwargs: Any) -> None:
        group = CollectiveOp.get_process_group(func, args)
        size = group.size()
        name = func._overloadpacket.__name__.strip("_").removesuffix("_base").removesuffix("_into_tensor")
        name = {"allgather": "all_gather", "allreduce": "all_reduce", "reduce_scatter_tensor": "reduce_scatter"}.get(
            name, name
        )
        passes = 2 if name == "all_reduce" else 1  # a ring reduces, then gathers
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)  # gathered, or before the scatter
        sent = passes * whole * (size - 1) // size
        key = (name, f"{group.group_desc.removeprefix('mesh_')} ({size})")
        before = self.traffic.get(key, Traffic(0, 0))
        self.traffic[key] = Traffic(before.calls + 1, before.bytes + sent)


@contextmanager
def _what_no_mode_sees(meter: Meter) -> Iterator[None]:
    """Tell the meter of storages that change their size, of tensors that are made only to know their shapes, and of
    the end of backward: optimizers of matrices look from there on at numbers, which are not there.
    """
    resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached
    norm = step.grad_norm

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        meter.resized(storage)
        return result

    def propagate_unseen(*args: Any) -> Any:
        meter.paused = True
        try:
            return propagate(*args)
        finally:
            meter.paused = False

    def norm_and_answer(*args: Any) -> Tensor:
        meter.answers = True
        return norm(*args)

    step.grad_norm = norm_and_answer  # pyrefly: ignore
    torch.UntypedStorage.resize_ = resize_and_tell  # pyrefly: ignore
    ShardingPropagator._propagate_tensor_meta_non_cached = propagate_unseen  # pyrefly: ignore
    try:
        yield
    finally:
        step.grad_norm = norm
        torch.UntypedStorage.resize_ = resize
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate


@contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """A process group of `world_size` ranks of which this process is rank 0 and the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate(config: Config, degrees: Degrees, *, accumulates: bool = False, excess: float = 0.0) -> Simulation:
    """Run one step, of one micro-batch, of rank 0 in a `fake_world`; the vocabulary's size must be known.

    With `accumulates` the gradients of earlier micro-batches are there from the start. `excess` is how much more than
    its even share of rows this rank's experts receive: at a MaxVio of v at most v, where each of them is the fullest.
    """
    training = config.training
    mesh = build_mesh(device=torch.device("cpu"), **degrees._asdict())
    model = build_sharded(config, mesh, compile_blocks=False)
    rows = rows_sent(config) // degrees.per_sequence
    received = -(-int(rows * (1 + excess)) // degrees.expert) * degrees.expert
    if mesh.ep is not None:
        give_splits(model, mesh.ep, rows, received)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to(getattr(torch, training.dtype)).to_empty(device="cpu")
        optimizer, balancers = build_optimizer(without_load_lr(config), model), build_balancers(config)
        own_length = training.seq_len // degrees.per_sequence
        tokens = torch.zeros(training.local_batch_size, own_length, dtype=torch.int64)
        meter = Meter(fake)
        parameters = _local_bytes(model.parameters())
        for tensor in (*model.parameters(), *model.buffers()):
            meter.track(tensor.to_local() if isinstance(tensor, DTensor) else tensor, "parameters")
        before: list[Counter[str]] = []
        at_step: list[int] = []

        def start_optimizer(*_: Any) -> None:
            at_step.append(_local_bytes(p.grad for p in model.parameters()))
            before.append(meter.at_peak)
            meter.at_peak = Counter(meter.live)

        handle = optimizer.register_step_pre_hook(start_optimizer)
        with meter, _what_no_mode_sees(meter):
            train_step(
                model,
                [(tokens, tokens)],
                optimizer,
                balancers,
                model.expert_biases(),
                max_norm=training.max_norm,
                sequence_group=mesh.sequence_group,
            )
        handle.remove()
        state = _local_bytes(leaf for s in optimizer.state.values() for leaf in tree_leaves(s))
    # The state is made in this first step; from the second on it is there in forward and backward, too.
    peak = before[0] + Counter(optimizer_state=state)
    if meter.at_peak.total() > peak.total():  # in the optimizer's step
        peak = meter.at_peak + Counter(optimizer_state=state, activations=-state)
    return Simulation(
        parameters=parameters,
        gradients=max(peak["gradients"], at_step[0]) if accumulates else peak["gradients"],
        optimizer_state=state,
        gathered=peak["gathered"],
        activations=peak["activations"],
        traffic=meter.traffic,
        flops=meter.flops,
        expert_rows=received,
    )


def rows_sent(config: Config) -> int:
    """Rows that the tokens of a micro-batch become in a MoE layer."""
    choices = config.training.local_batch_size * config.training.seq_len * config.moe.top_k
    factor = config.router.arguments.get("capacity_factor") or 1.0
    return int(choices * (factor if config.router.name == "expert_choice" else min(1.0, factor)))


def without_load_lr(config: Config) -> Config:
    """Without rates by load, which on a CPU are read on the host; their state is a few numbers for each expert."""
    groups = dict(config.optimizer.groups)
    expert = {key: value for key, value in groups.pop("expert", {}).items() if not key.startswith("load_lr")}
    groups |= {"expert": expert} if expert else {}
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=groups))


def give_splits(model: torch.nn.Module, mesh: DeviceMesh, rows: int, received: int) -> None:
    """Tell dispatchers how many rows go where, which in a real step the host reads from the device."""
    sent = [rows // mesh.size()] * mesh.size()
    sent[0] += rows - sum(sent)
    splits = sent, [received // mesh.size()] * mesh.size()
    dispatcher = all_to_all(mesh, read=lambda *_: splits)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher = dispatcher


def _local_bytes(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in local)
