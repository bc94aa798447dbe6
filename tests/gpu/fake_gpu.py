"""Whole steps on a GPU that is not there: fake tensors of a device that this process makes up.

`test_fake_gpu.py` runs this file in a process of its own, because a device can't be taken back. What would fail or wait
on a real GPU fails here: tensors on two devices, a tensor made or brought elsewhere, a value read on the host, a shape
that depends on values, and operators that CUDA refuses under `training.deterministic`. With FAKE_CUDA in the
environment the device is `cuda` itself: that takes a CUDA build of torch, and a driver that is none (`no_driver.c`).
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as make_backend

from examples.balancer import rprop
from tests.cases import OPTIMIZER_NAMES, ROUTER_CASES, Case, cases, takes_bias
from tests.invariance import INITS, OWN_BALANCER, OWN_ROUTER
from tests.tiny import SEQ, VOCAB, balancers, tiny_model
from titan_moe.balancer import BALANCERS
from titan_moe.diagnostics import balance_tax, routing_choices
from titan_moe.metrics import StepOutput, eval_metrics
from titan_moe.model.attention import max_logits
from titan_moe.model.kv_cache import empty_cache, extend
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.records import train_record
from titan_moe.runtime.compat import VARLEN_ATTENTION
from titan_moe.runtime.watch import line_of
from titan_moe.step import Balancers, eval_step, train_step


def make_device() -> torch.device:
    """Make a device of torch's kind for other people's hardware, or let fake tensors of CUDA pass without any."""
    if not os.environ.get("FAKE_CUDA"):
        make_backend("fake_gpu")
        torch.get_device_module("fake_gpu").get_amp_supported_dtype = lambda: [torch.bfloat16]  # checkpointing asks
        return torch.device("fake_gpu", 0)
    fake_tensor.init_gpu_context = lambda device: None
    torch.cuda.is_available = lambda: False
    torch.cuda.current_device = lambda: 0
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._ensureCUDADeviceGuardSet()  # as long as there is no device, or it keeps the real guard
    ctypes.CDLL(None).stub_devices(100)  # autograd asks for as many as any kind of device may have
    return torch.device("cuda", 0)


aten = torch.ops.aten
DEVICE = make_device()
FAKE = FakeTensorMode()  # one for all tests: the package keeps some tensors for ever
SIZES = {"dim": 64, "num_kv_heads": 2, "ffn_dim": 64, "expert_dim": 64}
ROUTERS = [case for case in ROUTER_CASES if case.arguments.get("assignment") != "exact"]  # that is solved on the host
# settings of experts, and rates and decays of the groups
SETTINGS: list[dict[str, Any]] = [
    {},
    {"load_lr": "batch_fraction", "matmul_dtype": "bfloat16"},
    {"load_lr": "ideal_normalized", "load_lr_ema": 0.5, "load_lr_decay": False, "state_dtype": "bfloat16"},
]
RATES = {"expert": 1e-3, "router": 3e-4, "embedding": 2e-3, "norm": 1e-4, "dense": 5e-4}

# Fused updates have no fake form: what is left to check is that all their tensors are on the device.
FUSED = {aten._fused_adamw_, aten._fused_sgd_}
# Of the operators that torch.use_deterministic_algorithms lists as errors on CUDA, those that are not of images.
NONDETERMINISTIC = {
    *(aten.bincount, aten.histc, aten.kthvalue, aten.median, aten.nll_loss2d_forward),
    *(aten.index_reduce, aten.index_reduce_, aten.put, aten.put_),
}


class OnTheDevice(TorchDispatchMode):
    """Refuses what leaves the device; values that are read on the host are 1, and `reads` notes where."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet is aten._local_scalar_dense:
            if args[0].device.type == "cpu":
                return 1
            self.reads.append(f"{func} {line_of(threading.current_thread())}")
            return 1

        in_floats = packet in (aten.cumsum, aten.cumsum_) and args[0].is_floating_point()
        multiplies = packet in (aten.scatter_reduce, aten.scatter_reduce_) and "prod" in args
        if packet in NONDETERMINISTIC or in_floats or multiplies:
            raise AssertionError(f"{func} {line_of(threading.current_thread())} is not deterministic on CUDA")

        result = None if packet in FUSED else func(*args, **kwargs)
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device != DEVICE and not may_be_elsewhere(tensor):
                raise AssertionError(f"{func} {line_of(threading.current_thread())}: a tensor on {tensor.device}")
        return result


def may_be_elsewhere(tensor: Tensor) -> bool:
    """A number that the host keeps for itself, or the placeholder (0,) of checkpointing in torch before 2.13."""
    return tensor.dim() == 0 or (tensor.shape == (0,) and tensor.dtype == torch.float32)


@contextmanager
def on_the_device(reads: int = 0) -> Iterator[None]:
    """Nothing leaves the device in the block, but for so many values that are read on the host."""
    with OnTheDevice() as mode:
        yield
    assert len(mode.reads) == reads, mode.reads


@pytest.fixture(autouse=True)
def _fake() -> Iterator[None]:
    """Every tensor of a test is fake. Backward runs in the test's own thread, where the modes are."""
    with torch.autograd.set_multithreading_enabled(False), sdpa_kernel(SDPBackend.MATH), FAKE:
        yield


def build(
    router: str | Case | None = "topk_softmax", *, dtype: torch.dtype = torch.float32, **options: Any
) -> Transformer:
    model = tiny_model(router, device=str(DEVICE), **{**SIZES, **options})
    for parameter in model.parameters():  # not by model.to(), which can't swap fake tensors that are tied
        parameter.data = parameter.data.to(dtype)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(4, SEQ, dtype=torch.int64, device=DEVICE)
    return tokens, tokens


def make_optimizer(model: nn.Module, name: str = "adamw", **of_experts: Any) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), {"expert": of_experts} if of_experts else {})
    return OPTIMIZERS[name](groups, lr=1e-3)


def steps(
    model: Transformer,
    own: Balancers | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    micro_batches: int = 1,
    reads: int = 0,
    **options: Any,
) -> StepOutput:
    """Two steps and their records: the optimizer's state is made in the first."""
    own = (balancers() if model.expert_biases() else {}) if own is None else own
    optimizer = optimizer or make_optimizer(model)
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    options |= {"max_norm": 1.0}
    for _ in range(2):
        with on_the_device(reads):
            output = train_step(model, [batch()] * micro_batches, optimizer, own, model.expert_biases(), **options)
            train_record(model, output, lrs)
    return output


def evaluation(model: Transformer) -> None:
    batches, token_bytes = batch(), torch.ones(VOCAB, device=DEVICE)
    with on_the_device():
        eval_metrics(eval_step(model, *batches, token_bytes))


@pytest.mark.parametrize("case", ROUTERS, ids=str)
def test_router(case: Case) -> None:
    model = build(case)
    steps(model, balancers(takes_bias(case.name)))
    evaluation(model)


@pytest.mark.parametrize("router", ["topk_softmax", "sigmoid", "expert_choice"])
def test_accumulation_in_bf16(router: str) -> None:
    steps(build(router, dtype=torch.bfloat16), balancers(takes_bias(router)), micro_batches=2)


@pytest.mark.parametrize("case", cases(BALANCERS, extra={"loss_free": [{"decay_ratio": 1.0}]}), ids=str)
def test_balancer(case: Case) -> None:
    balancer = BALANCERS[case.name](**case.arguments)
    keeps = {} if balancer.init is None else {case.name: balancer.init}
    looks = {} if balancer.measure is None else {case.name: balancer.measure}
    model = build(balancer_inits=keeps, measures=looks)
    steps(model, {case.name: (0.1, balancer)}, progress=0.5, balancer_states=model.balancer_states())


def test_own_parts() -> None:
    """A router with parameters of its own and a balancer that keeps a state, in bf16."""
    model = build(OWN_ROUTER, dtype=torch.bfloat16, balancer_inits=INITS)
    own = {str(OWN_BALANCER): (1.0, rprop())}
    steps(model, own, balancer_states=model.balancer_states())


@pytest.mark.parametrize(
    "options",
    [
        {"router": None, "num_experts": 0},
        {"num_shared_experts": 1, "first_dense_layers": 1},
        {"qk_norm": True, "tie_embeddings": False},
        {"loss_chunk_tokens": 24},
    ],
    ids=["dense", "shared", "untied", "chunks"],
)
def test_model(options: dict[str, Any]) -> None:
    model = build(**options)
    steps(model)
    evaluation(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_documents(mode: str, dtype: torch.dtype) -> None:
    """On CUDA attention in bf16 is one operator for all documents; where they are is found without a look at it."""
    model = build(dtype=dtype, document_mask=True, restart_positions=True)
    options = {"param_dtype": dtype, "reduce_dtype": torch.float32, "compile_blocks": False, "seq_len": SEQ}
    parallelize(model, mesh=None, checkpoint_mode=mode, **options)
    with count_varlen() as calls:
        steps(model, qk_clip=1.0)
        evaluation(model)
    is_varlen = DEVICE.type == "cuda" and dtype == torch.bfloat16
    again = 4 if mode == "full" else 0  # two layers in two steps
    assert len(calls) == is_varlen * (6 + again)


@contextmanager
def count_varlen() -> Iterator[list[int]]:
    """Notes the calls of attention for sequences of different lengths."""
    calls: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is VARLEN_ATTENTION:
                calls.append(1)
            return func(*args, **kwargs or {})

    with Counting():
        yield calls


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_qk_clip(num_kv_heads: int) -> None:
    """The step, in which the operator is known by its shapes alone, and what it does itself."""
    steps(build(num_kv_heads=num_kv_heads), micro_batches=2, qk_clip=1.0)
    with on_the_device():
        q = torch.zeros(2, 2, SEQ, 8, dtype=torch.bfloat16, device=DEVICE)
        assert max_logits._init_fn(q, q[:, :num_kv_heads]).shape == (2,)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_activations(mode: str) -> None:
    model = build()
    options = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "compile_blocks": False, "seq_len": SEQ}
    parallelize(model, mesh=None, checkpoint_mode=mode, **options)
    steps(model)


@pytest.mark.parametrize("of_experts", SETTINGS, ids="-".join)
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_optimizer(name: str, of_experts: dict[str, Any]) -> None:
    """One reads a number a step if it updates matrices, whether the gradients' norm is finite, and the others none.

    On a sphere each matrix asks for its radius in its first step, as which every step here is read on the host.
    """
    model = build()
    own = {group: {"lr": rate, "weight_decay": rate, "beta1": 0.8} for group, rate in RATES.items()}
    if name == "schedule_free_adamw":  # which refuses it
        of_experts = {key: value for key, value in of_experts.items() if key != "load_lr_decay"}
    own["expert"] |= expand_load_lr(of_experts, top_k=2)
    groups = parameter_groups(model.named_parameters(), own)
    optimizer = OPTIMIZERS[name](groups, lr=1e-3, state_dtype=of_experts.get("state_dtype", "float32"))
    assert optimizer.waits() == (name not in BY_ELEMENT)
    radii = sum(map(optimizer.is_matrix, model.parameters())) if name in ("muonh", "adamh") else 0
    reads = optimizer.waits() + radii
    steps(model, optimizer=optimizer, measure_experts=True, gradient_moments={}, reads=reads)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="asks the driver to wait for the device")
def test_probes() -> None:
    """The choices go to the host, by design; the balance tax is timed there, and nothing else."""
    model = build("topk_softmax")
    routing_choices(model, *batch())
    with on_the_device():
        balance_tax(model, *batch(), repeats=1)


@pytest.mark.parametrize("document_mask", [False, True])
def test_decoding(document_mask: bool) -> None:
    model = build(document_mask=document_mask)
    tokens, first, rows = batch()[0][:3, :4], *torch.arange(6, device=DEVICE).view(2, 3)
    with on_the_device():
        extend(model, empty_cache(model, 3, 8), tokens, first, rows)
