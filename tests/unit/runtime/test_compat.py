"""What differs between versions of torch, and what a machine lacks: one line each, before anything is written."""

import datetime
import importlib
import logging
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tests.tiny import tiny_model
from titan_moe import job
from titan_moe.build import degrees_of
from titan_moe.config import load_config
from titan_moe.estimate.simulate import fake_world
from titan_moe.job import can_compile, check_own_gpu, start_processes
from titan_moe.parallelize import parallelize
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.runtime import command, compat, machine, world
from titan_moe.runtime.watch import line_of
from titan_moe.runtime.world import Runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+nv", "2.13.0+cpu", "2.14.1+cu130", "2.15.3"])
def test_versions_that_are_known(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    compat.check_torch()


@pytest.mark.parametrize(
    ("version", "fault"),
    [("2.10.1+cu128", "too old"), ("1.13.1", "too old"), ("2.16.0.dev20261101", "newer"), ("3.0.0", "newer")],
)
def test_versions_that_are_not(monkeypatch: pytest.MonkeyPatch, version: str, fault: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        compat.check_torch()
    for part in (version, fault, "torch>=2.11,<2.16"):
        assert part in str(error.value)


def test_the_range_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    (limits,) = re.findall(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
    assert tuple(map(int, limits)) == compat.OLDEST + compat.FIRST_UNKNOWN


def test_the_public_function_sets_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; the private one is deprecated then, and warnings are errors here."""
    calls: list[Any] = []
    monkeypatch.setattr(dist, "set_timeout", lambda *args: calls.append(args), raising=False)
    try:
        assert importlib.reload(compat).set_group_timeout is dist.set_timeout
    finally:
        monkeypatch.undo()
        importlib.reload(compat)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        compat.set_group_timeout(datetime.timedelta(seconds=7), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def refusal(rt: Runtime, folder: Path, *words: str) -> str:
    """The line that refuses a run; nothing is there afterwards."""
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        start_processes(load_config(["--job.dump_folder", str(folder / "run"), *words]), rt)
    assert not dist.is_initialized()
    assert not list(folder.iterdir())
    return str(error.value)


def test_tensor_parallelism_wants_a_mesh_by_parameter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compat, "MESH_BY_PARAMETER", False)
    line = refusal(Runtime(0, 2, 0, CPU), tmp_path, "--parallelism.tensor_parallel_degree", "2")
    assert "parallelism.tensor_parallel_degree = 2 needs torch 2.13 or newer" in line
    assert degrees_of(load_config(["--parallelism.expert_parallel_degree", "2"]), 2).expert == 2


@pytest.mark.parametrize("by_parameter", sorted({False, compat.MESH_BY_PARAMETER}))
def test_units_of_experts(monkeypatch: pytest.MonkeyPatch, by_parameter: bool) -> None:
    """A unit of FSDP2 of their own where it has one mesh; sharded over what expert parallelism leaves either way."""
    monkeypatch.setattr(parallelize, "MESH_BY_PARAMETER", by_parameter)
    with fake_world(4):
        model = tiny_model(device="meta")
        mesh = build_mesh(device=CPU, shard=4, expert=2)
        precision: dict[str, Any] = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        parallelize.parallelize(model, mesh=mesh, checkpoint_mode="none", compile_blocks=False, **precision)
        layer: Any = model.layers[0].moe
        assert isinstance(layer.experts, FSDPModule) != by_parameter
        assert layer.experts.w1.device_mesh.mesh_dim_names == ("efsdp", "ep")
        assert layer.router.weight.device_mesh.mesh_dim_names == ("dp_shard",)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_processes_than_gpus(tmp_path: Path, local_rank: int) -> None:
    """Every rank says so: one of them alone would leave the others waiting."""
    line = refusal(Runtime(local_rank, 2, local_rank, torch.device("cuda", local_rank), 2), tmp_path)
    assert "2 processes on a node where each sees 1 GPU(s)" in line
    assert "--nproc_per_node 1" in line


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_without_bfloat16(tmp_path: Path) -> None:
    rt = Runtime(0, 1, 0, GPU)
    line = refusal(rt, tmp_path)
    assert "training.mixed_precision_param = 'bfloat16' needs a GPU of compute capability 8.0" in line
    assert "Tesla V100" in line
    in_fp32 = ("--training.mixed_precision_param", "float32")
    assert "training.dtype = 'bfloat16'" in refusal(rt, tmp_path, *in_fp32, "--training.dtype", "bfloat16")
    job.check_gpu(rt, load_config([*in_fp32]).training)


def test_two_ranks_with_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand without LOCAL_RANK, each believes to be the first of its node."""
    gpus = ["GPU-a", "GPU-b", "GPU-a"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"uuid": "GPU-a"}))
    monkeypatch.setattr(world, "all_gather", lambda mine: gpus)
    with pytest.raises(ValueError, match=r"^ranks \[0, 2\] have the same GPU: .*LOCAL_RANK"):
        check_own_gpu(Runtime(2, 3, 0, GPU))
    gpus[2] = "GPU-c"
    check_own_gpu(Runtime(2, 3, 0, GPU))


def test_the_world_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    rt = world.read_world()
    assert (rt.rank, rt.world_size, rt.local_rank, rt.local_world_size) == (5, 8, 1, 4)
    assert not {"RANK", "LOCAL_WORLD_SIZE"} & set(machine.worker_environment(threads=1))


def test_what_a_compiler_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parallelize, "has_triton", lambda: False)
    assert "Triton" in str(parallelize.missing_compiler(GPU))
    monkeypatch.setattr(parallelize, "has_triton", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in str(parallelize.missing_compiler(GPU))
    monkeypatch.setenv("CC", sys.executable)  # any program
    assert shutil.which(sys.executable)
    assert parallelize.missing_compiler(GPU) is None
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert "C++ compiler" in str(parallelize.missing_compiler(CPU))


def test_all_ranks_compile_or_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(command.logger, "propagate", True)
    monkeypatch.setattr(job, "missing_compiler", lambda device: None)
    faults = [None, "no C++ compiler"]
    monkeypatch.setattr(world, "all_gather", lambda mine: faults)
    with caplog.at_level(logging.WARNING):
        assert not can_compile(Runtime(0, 2, 0, CPU))
    assert "rank 1 has no C++ compiler: training goes on eager" in caplog.text
    faults[1] = None
    assert can_compile(Runtime(0, 2, 0, CPU))


def test_a_library_in_a_folder_of_our_name_is_not_ours() -> None:
    names: dict[str, Any] = {"line_of": line_of, "thread": threading.current_thread()}
    exec(compile("def wait():\n    return line_of(thread)", "/home/titan_moe/.venv/torch/library.py", "exec"), names)
    assert "library.py" not in names["wait"]()
