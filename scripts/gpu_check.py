"""Everything to ask of a GPU machine, in one command of some minutes: `python3 scripts/gpu_check.py --out FOLDER`.

Each part is a process of its own with a time limit; one that fails or hangs costs its part of the table only. Full
output is in FOLDER/log.txt, numbers in FOLDER/results.json, kernels in FOLDER/profile.txt; the table comes last, and
docs/gpu.md explains it. `--tiny` tries the script itself on a CPU: small sizes, few repetitions, numbers without a
meaning.

    --budget SECONDS   of all parts together (480); a part that no longer fits is left out, so the first matter most
    --parts NAME ...   only these
"""

import argparse
import functools
import gc
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")


class Sizes(NamedTuple):
    """Sizes of moe8x, or tiny ones."""

    dim: int = 768
    heads: int = 12
    layers: int = 24
    experts: int = 8
    width: int = 2048
    vocab: int = 50304
    sequence: int = 512
    sequences: int = 40  # of a step


TINY = Sizes(dim=64, heads=4, layers=2, experts=4, width=64, vocab=512, sequence=64, sequences=4)


class Results(dict[str, Any]):
    """The results of a part so far. Each new entry is written to the disk, so that a time limit costs only the rest."""

    def __init__(self, path: Path, tiny: bool) -> None:
        super().__init__()
        self.path, self.tiny, self.sizes = path, tiny, TINY if tiny else Sizes()

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep an entry, and write all of them."""
        super().__setitem__(key, value)
        self.path.write_text(json.dumps(self, default=str))

    @contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """Record an error of the block as the result `key`, so that one case that fails does not cost the others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self[key] = f"failed: {type(error).__name__} {str(error).splitlines()[0][:90]}"

    def compile(self, function: Any) -> Any:
        """Compile for the shapes given; with `--tiny` by the eager backend, which is enough to try the script."""
        return torch.compile(function, dynamic=False, backend="eager" if self.tiny else "inductor")


def milliseconds(task: Callable[[], Any], most_seconds: float = 3.0) -> float:
    """Median time of `task`, by events on a GPU."""
    # The first calls allocate and compile. Slow tasks are repeated less often: all parts together have some minutes.
    for _ in range(3 if CUDA else 1):
        task()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < (20 if CUDA else 2) and time.perf_counter() - begin < most_seconds:
        if not CUDA:
            start = time.perf_counter()
            task()
            times.append(1000 * (time.perf_counter() - start))
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        task()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def fresh_memory() -> None:
    """Forget what was allocated before."""
    gc.collect()
    torch.compiler.reset()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most memory since `fresh_memory`."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")


def normal(*shape: int, requires_grad: bool = False) -> Tensor:
    """Random numbers, bf16."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=requires_grad)


# The parts, each in a process of its own.


def env(results: Results) -> None:
    """Versions, and what copies and matrix products reach."""
    results["python"], results["torch"] = sys.version.split()[0], torch.__version__
    for name in ("triton", "transformers", "tokenizers", "pydantic", "torchdata", "torchao", "numpy"):
        try:
            results[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            results[name] = "missing"
    if not CUDA:
        return

    # What this GPU reaches in a plain copy and a large product, to compare the other parts with.
    properties = torch.cuda.get_device_properties(0)
    results["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    x = normal(1 << 30)
    y = torch.empty_like(x)
    results["copy"] = f"{2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e9:.2f} TB/s"
    a, b = normal(8192, 8192), normal(8192, 8192)
    results["matrix product"] = f"{2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s"


def tests(results: Results) -> None:
    """tests/gpu; those for several GPUs are skipped on one."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--tb=short", "-rfEs"]
    command += ["--ignore=tests/gpu/test_fake_gpu.py"]  # which is for machines without one
    command += ["-n", "10", "-p", "no:cacheprovider", "-p", "no:benchmark", "--timeout=100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-40000:], done.stderr[-5000:])
    lines = done.stdout.splitlines()
    results["pytest"] = lines[-1] if lines else "no output"
    for number, line in enumerate(line for line in lines if line.startswith(("FAILED", "ERROR"))):
        results[f"bad {number}"] = line[:110]


def arguments_of(results: Results, folder: str, **changes: Any) -> list[str]:
    """Command-line arguments of training moe8x on text that is always there; of `changes` the dots are `__`."""
    # Python's own source needs no download. Its tokens are bytes, but the vocabulary keeps the recipe's size.
    sizes = results.sizes
    keys = {
        "job.dump_folder": folder,
        "data.dataset": "stdlib",
        "data.tokenizer": "bytes",
        "data.validation_fraction": 0.02,
        "data.cache_folder": str(Path(tempfile.gettempdir()) / "titan_moe_gpu_check"),
        "model.vocab_size": sizes.vocab,
        "training.steps": 60,
        "validation.enable": "false",
        "checkpoint.enable": "false",
        "metrics.enable_tensorboard": "false",
    }
    if results.tiny:
        keys |= {"model.dim": sizes.dim, "model.num_heads": sizes.heads, "model.num_layers": sizes.layers}
        keys |= {"moe.num_experts": sizes.experts, "moe.expert_dim": sizes.width, "training.steps": 4}
        keys |= {"training.seq_len": sizes.sequence, "training.global_batch_size": sizes.sequences}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    config = ROOT / "train_configs" / "moe8x.toml"
    return ["--job.config_file", str(config), *(f"--{key}={value}" for key, value in keys.items())]


def train(results: Results, name: str, **changes: Any) -> None:
    """Run the training command; time, tokens/s and MFU are of all steps after the first third."""
    # A process of its own, as users start it; its error becomes the result.
    folder = tempfile.mkdtemp()
    command = [sys.executable, "-m", "titan_moe.train", *arguments_of(results, folder, **changes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-6000:])
    if done.returncode:
        tail = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        results[name] = f"failed: {tail[-1][:160]}"
        return

    # The first third warms up and compiles. MFU is scaled from that of the last step.
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    early, late = records[: len(records) // 3], records[len(records) // 3 :]
    seconds = sum(record["step_seconds"] for record in late)
    rate = (late[-1]["num_tokens"] - early[-1]["num_tokens"]) / seconds
    mfu = 100 * late[-1]["mfu"] / late[-1]["tokens_per_second"] * rate if "mfu" in late[-1] else float("nan")
    results[f"{name}, ms of steps"] = " ".join(f"{1000 * record['step_seconds']:.0f}" for record in late)
    results[name] = (
        f"{1000 * seconds / len(late):.1f} ms, {rate:,.0f} tokens/s, MFU {mfu:.1f} %, "
        f"{late[-1]['peak_memory_gib']:.1f} GiB, loss {records[0]['loss']:.2f} -> {late[-1]['loss']:.3f}, "
        f"first step {records[0]['step_seconds']:.0f} s"
    )


def train_compiled(results: Results) -> None:
    """Train as the recipe does on a GPU."""
    train(results, "learned balance", compile__enable="false" if results.tiny else "auto")


def train_balanced(results: Results) -> None:
    """Train with every expert as full as the others."""
    train(
        results,
        "forced balance",
        debug__force_balanced_routing="true",
        compile__enable="false" if results.tiny else "auto",
    )


def train_eager(results: Results) -> None:
    """Train without torch.compile."""
    train(results, "eager", compile__enable="false", **({} if results.tiny else {"training__steps": 45}))


def train_launched(results: Results) -> None:
    """Train without a CUDA graph: the host launches each kernel."""
    steps = {} if results.tiny else {"training__steps": 45}
    compiled = "false" if results.tiny else "auto"
    train(results, "kernel by kernel", compile__cuda_graph="false", compile__enable=compiled, **steps)


def train_accumulated(results: Results) -> None:
    """Train in several micro-batches, as smaller GPUs need it."""
    steps = {} if results.tiny else {"training__steps": 30}
    size = results.sizes.sequences // 4
    train(results, "4 micro-batches", training__local_batch_size=size, compile__enable="auto", **steps)


def profile(results: Results) -> None:
    """A warm step of the recipe: kernels by time, launches, idle time."""
    from titan_moe.config import load_config
    from titan_moe.job import build_job, start_processes
    from titan_moe.runtime.world import close_process_group, read_world
    from titan_moe.step import train_step

    # A real batch, once: what is profiled is the step, without data loading.
    changes = {"compile__enable": "false" if results.tiny else "auto"}
    config, rt = load_config(arguments_of(results, tempfile.mkdtemp(), **changes)), read_world()
    start_processes(config, rt)
    job = build_job(config, rt)
    tokens, labels = next(iter(job.data.train))
    micro_batches = [(tokens.to(DEVICE), labels.to(DEVICE))]
    biases = job.model.expert_biases()

    def step() -> None:
        options = {"max_norm": 1.0, "gradients": job.gradients}
        train_step(job.model, micro_batches, job.optimizer, job.balancers, biases, **options)

    # The launch time tells whether host or device sets the pace: it is measured without waiting for the device.
    results["ms a step"] = round(milliseconds(step, 6.0), 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if CUDA:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        results["ms to launch a step"] = round(1000 * (time.perf_counter() - begin), 1)
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    with torch.profiler.profile(activities=activities) as trace:
        step()
        if CUDA:
            torch.cuda.synchronize()
    close_process_group()
    report_kernels(results, trace)


def report_kernels(results: Results, trace: torch.profiler.profile) -> None:
    """The kernels of a trace by time (operators on a CPU), all in profile.txt and the first in the table."""
    # Annotations have the time of all kernels within them, which would count twice.
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [e for e in trace.key_averages() if not CUDA or e.device_type == torch.autograd.DeviceType.CUDA]
    rows = sorted((e for e in rows if getattr(e, key)), key=lambda e: -getattr(e, key))
    rows = [e for e in rows if not e.key.startswith(("Optimizer.step", "FSDP::", "## Call", "Torch-Compiled"))]
    lines = [f"{getattr(e, key) / 1000:9.3f} ms {e.count:5d} x {e.key[:150]}" for e in rows]
    (results.path.parent / "profile.txt").write_text("\n".join(lines) + "\n")
    results["kernels"] = sum(e.count for e in rows)
    results["ms in kernels"] = round(sum(getattr(e, key) for e in rows) / 1000, 1)
    for number, line in enumerate(lines[:16]):
        results[f"top {number}"] = line[:110]
    if CUDA:
        report_gaps(results, trace)


def report_gaps(results: Results, trace: torch.profiler.profile) -> None:
    """When the device had nothing to do in a trace, in all and the longest times, with the kernels on both sides."""
    events = trace.events() or []
    rows = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    rows = [e for e in rows if not e.name.startswith(("Optimizer.step", "FSDP::", "## Call", "Torch-Compiled"))]
    rows.sort(key=lambda e: e.time_range.start)
    gaps, end, before = [], rows[0].time_range.start, rows[0].name
    for event in rows:
        gaps.append((event.time_range.start - end, before, event.name))
        if event.time_range.end > end:
            end, before = event.time_range.end, event.name
    idle = [gap for gap, _, _ in gaps if gap > 0]
    results["ms idle"] = f"{sum(idle) / 1000:.1f} of {(end - rows[0].time_range.start) / 1000:.1f}"
    results["ms idle in gaps over 10 us"] = f"{sum(gap for gap in idle if gap > 10) / 1000:.1f}"
    for number, (gap, before, after) in enumerate(sorted(gaps, reverse=True)[:10]):
        results[f"gap {number}"] = f"{gap / 1000:7.3f} ms, {before[:42]} -> {after[:42]}"


def layers_of(sizes: Sizes) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the dense layer of the same active operations, of ours and of transformers'."""
    from titan_moe.model.moe import FeedForward, MoE
    from titan_moe.model.routing import ROUTERS

    # transformers with grouped products, as ours.
    def mixtral() -> nn.Module:
        from transformers import MixtralConfig
        from transformers.models.mixtral import modeling_mixtral

        arguments: dict[str, Any] = {"hidden_size": sizes.dim, "intermediate_size": sizes.width}
        arguments |= {"num_local_experts": sizes.experts, "num_experts_per_tok": 2}
        arguments |= {"num_attention_heads": sizes.heads, "experts_implementation": "grouped_mm"}
        return modeling_mixtral.MixtralSparseMoeBlock(MixtralConfig(**arguments))

    def ours() -> nn.Module:
        route = ROUTERS["topk_softmax"](top_k=2)
        return MoE(dim=sizes.dim, num_experts=sizes.experts, expert_dim=sizes.width, route=route)

    return {"dense roof": lambda: FeedForward(sizes.dim, 2 * sizes.width), "titan_moe": ours, "mixtral": mixtral}


def filled(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a layer on the device, bf16, with small normal weights."""
    with torch.device(DEVICE):
        module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.to(torch.bfloat16)


def layer(results: Results) -> None:
    """Forward and backward of a layer, as time and as ratio to the dense layer of the same active operations."""
    # With four times the tokens, too, where launches weigh less.
    sizes = results.sizes
    for sequences, mode in ((sizes.sequences, "eager"), (sizes.sequences, "compiled"), (4 * sizes.sequences, "eager")):
        x = normal(sequences, sizes.sequence, sizes.dim, requires_grad=True)
        upstream = torch.randn_like(x)
        tokens, roof = sequences * sizes.sequence, float("nan")
        for name, make in layers_of(sizes).items():
            with results.attempt(f"{tokens} {mode} {name}"):
                fresh_memory()
                module = filled(make)
                called = results.compile(module) if mode == "compiled" else module

                def run(module: nn.Module = module, called: Any = called, x: Tensor = x, up: Tensor = upstream) -> None:
                    y = called(x)
                    (y[0] if isinstance(y, tuple) else y).backward(up)
                    module.zero_grad()
                    x.grad = None

                # 18: three products, forward and twice backward, of 2 operations; each token is in two experts.
                ms = milliseconds(run)
                roof = ms if name == "dense roof" else roof
                rate = 18 * tokens * 2 * sizes.width * sizes.dim / ms / 1e9
                text = f"{ms:.3f} ms, {rate:.0f} TFLOP/s, {peak_gib():.2f} GiB, {ms / roof:.2f} x roof"
                results[f"{tokens} {mode} {name}"] = text


def experts(results: Results) -> None:
    """The experts alone, forward and backward, by each library that is installed."""
    from benchmarks.bench_experts import time_backends

    # Two experts a token, spread evenly.
    sizes = results.sizes
    rows = 2 * sizes.sequences * sizes.sequence
    for compiled in (False,) if results.tiny else (False, True):
        texts = time_backends(
            device=DEVICE,
            experts=sizes.experts,
            dim=sizes.dim,
            hidden=sizes.width,
            rows=rows,
            compiled=compiled,
        )
        for name, text in texts.items():
            results[f"{name}{', compiled' if compiled else ''}"] = text


def head(results: Results) -> None:
    """Output head and cross-entropy, forward and backward, of the logits whole and in chunks."""
    from titan_moe.model.cross_entropy import linear_cross_entropy, softmax_

    # Weights as small as a new model's.
    sizes = results.sizes
    tokens = sizes.sequences * sizes.sequence
    x, weight = normal(tokens, sizes.dim, requires_grad=True), normal(sizes.vocab, sizes.dim)
    weight = (0.02 * weight).requires_grad_()
    labels = torch.randint(0, sizes.vocab, (tokens,), device=DEVICE)

    def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    # Larger chunks launch fewer kernels and take more memory.
    cases: dict[str, Callable[..., Tensor]] = {"whole": whole, "whole, compiled": results.compile(whole)}
    for chunk in (1024, 4096, 10240):
        options = {"chunk_tokens": chunk, "softmax_": results.compile(softmax_)}
        cases[f"chunks of {chunk}"] = functools.partial(linear_cross_entropy, **options)
    for name, function in cases.items():
        with results.attempt(name):
            fresh_memory()

            def run(function: Any = function) -> None:
                function(x, weight, labels).backward()
                x.grad = weight.grad = None

            results[name] = f"{milliseconds(run):.2f} ms, {peak_gib():.2f} GiB"


def optimizers(results: Results) -> None:
    """Time of an update of moe8x' parameters in plain steps, and memory of the states.

    A third of the layers is updated, and the numbers are tripled.
    """
    from titan_moe.build import build_model, build_optimizer
    from titan_moe.config import load_config

    layers = results.sizes.layers if results.tiny else results.sizes.layers // 3
    scale = results.sizes.layers / layers

    # The model is made once: only the optimizers of its experts differ, and an update's time not with the gradients.
    arguments = arguments_of(results, tempfile.mkdtemp(), model__num_layers=layers)
    with torch.device(DEVICE):
        model = build_model(load_config(arguments))
    model.init_weights(0)
    gradients = [1e-3 * torch.randn_like(p) for p in model.parameters()]
    finite = torch.ones((), dtype=torch.bool, device=DEVICE)
    for name in ("adamw", "shampoo_fast", "muon", "shampoo", "soap"):
        with results.attempt(name):
            fresh_memory()
            before = torch.cuda.memory_allocated() if CUDA else 0
            optimizer = build_optimizer(load_config([*arguments, f"--optimizer.expert.name={name}"]), model)

            def update(optimizer: Any = optimizer) -> None:
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step(finite=finite)

            begin = time.perf_counter()
            update()
            if CUDA:
                torch.cuda.synchronize()
            first = time.perf_counter() - begin
            state = (torch.cuda.memory_allocated() - before) / 2**30 if CUDA else float("nan")
            ms = milliseconds(update)
            results[name] = f"{ms * scale:.1f} ms, state {state * scale:.1f} GiB, first {first:.1f} s"
            del optimizer, update


def float8(results: Results) -> None:
    """The experts alone, bf16 and float8; and the numbers of the float8 kernel beside its emulation."""
    from titan_moe.model.experts import float8_grouped_mm
    from titan_moe.model.moe import Experts

    # The same weights in both precisions. A CPU has no float8 kernel, so it emulates.
    sizes = results.sizes
    rows = 2 * sizes.sequences * sizes.sequence
    counts = torch.full((sizes.experts,), rows // sizes.experts, device=DEVICE)
    experts = filled(lambda: Experts(sizes.experts, sizes.dim, sizes.width))
    assert isinstance(experts, Experts)
    x = normal(rows, sizes.dim, requires_grad=True)
    upstream = torch.randn_like(x)
    for precision, compiled in itertools.product(("high", "float8" if CUDA else "float8_emulated"), (False, True)):
        name = f"{precision}{' compiled' if compiled else ''}"
        with results.attempt(name):
            fresh_memory()
            experts.precision = precision  # pyrefly: ignore[bad-assignment]
            called = results.compile(experts) if compiled else experts

            def run(called: Any = called) -> None:
                called(x, counts).backward(upstream)
                experts.zero_grad()
                x.grad = None

            results[name] = f"{milliseconds(run):.3f} ms"

    # Tests on CPUs rest on the emulation, so the kernel must give the same numbers.
    offs, w = counts.cumsum(0, dtype=torch.int32), experts.w1.detach().transpose(1, 2)
    exact = float8_grouped_mm(x.detach(), w, offs, emulate=True).float()
    got = float8_grouped_mm(x.detach(), w, offs, emulate=not CUDA).float()
    results["kernel against emulation"] = f"{((got - exact).norm() / exact.norm()).item():.1e}"


# Parts in the order of their worth, and the seconds that each may take.
PARTS: dict[str, tuple[Callable[[Results], None], int]] = {
    "env": (env, 40),
    "train_compiled": (train_compiled, 100),
    "tests": (tests, 120),
    "profile": (profile, 70),
    "layer": (layer, 60),
    "experts": (experts, 40),
    "train_balanced": (train_balanced, 60),
    "optimizers": (optimizers, 60),
    "head": (head, 40),
    "train_launched": (train_launched, 60),
    "train_accumulated": (train_accumulated, 60),
    "train_eager": (train_eager, 60),
    "float8": (float8, 40),
}


def run_part(name: str, limit: float, out: Path, tiny: bool) -> dict[str, Any]:
    """Run a part in a process of its own; its results, how long it took, and how it failed."""
    path = out / f".{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", str(out), *(["--tiny"] if tiny else [])]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # liger-kernel times 160 ways to multiply before its first step, which takes minutes
    environment = {"LIGER_FUSED_MOE_AUTOTUNE": "0", **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {name}, at most {limit:.0f} s\n")
        log.flush()
        # a session of its own, so that what it has started ends with it
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "time limit"
    entries: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    entries |= json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    return {**entries, "failed": f"{code}: see log.txt"} if code else entries


def table(results: dict[str, dict[str, Any]]) -> str:
    """All numbers, part by part."""
    lines = []
    for name, entries in results.items():
        lines.append(f"{name} ({entries.get('seconds', 0)} s)")
        lines += [f"    {key:28} {value}" for key, value in entries.items() if key != "seconds"]
    return "\n".join(lines)


def main() -> int:
    """Run the parts one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=480.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    # With --part this is the process of one part, which `run_part` has started.
    if options.part:
        PARTS[options.part][0](Results(out / f".{options.part}.json", options.tiny))
        return 0

    # Results are written after each part, so that a run that is cut off keeps what it has.
    begin, results = time.monotonic(), {}
    (out / "log.txt").write_text("")
    for name in options.parts:
        left = options.budget - (time.monotonic() - begin)
        if left < 15:
            results[name] = {"left out": f"{left:.0f} s were left"}
        else:
            results[name] = run_part(name, min(PARTS[name][1], left), out, options.tiny)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(f"[{time.monotonic() - begin:5.0f} s] {name} done", flush=True)
    (out / "table.txt").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
