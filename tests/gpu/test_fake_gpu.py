"""Whole steps on fake tensors of a GPU: `fake_gpu.py`, in a process of its own, also where there is no GPU."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.gpu.harness import no_waits

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")

without_gpu = pytest.mark.skipif(
    not torch.version.cuda or torch.cuda.is_available() or COMPILER is None or sys.platform != "linux",
    reason="needs a CUDA build of torch on Linux without a GPU, and a C compiler",
)


def test_the_guard_against_waits_fails_by_no_warning_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch notes that its mode is a prototype, and warnings are errors here; the mode is gone afterwards."""
    modes: list[str] = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(RuntimeError, match="called a synchronizing"), no_waits():
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes == ["error", "default"]


def run(chosen: str, **environment: str) -> None:
    """Run the chosen tests of `fake_gpu.py`; their output is what a failure shows."""
    words = [sys.executable, "-m", "pytest", str(HERE / "fake_gpu.py"), "-q", "-k", chosen]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    without = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    ended = subprocess.run([*words, *without], env=own | environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["optimizer or adamw", "not optimizer and not adamw"])
def test_steps_stay_on_the_device(chosen: str) -> None:
    """Of every router, balancer and optimizer, dense and MoE: what a real GPU would refuse or wait for fails."""
    run(chosen)


@without_gpu
@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["optimizer or adamw", "not optimizer and not adamw"])
def test_steps_stay_on_cuda(chosen: str, tmp_path: Path) -> None:
    """The same with torch's own CUDA device, whose driver is one of nothing but answers."""
    driver = tmp_path / "libcuda.so.1"
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{driver.name}"]
    subprocess.run([str(COMPILER), *flags, "-o", str(driver), str(HERE / "no_driver.c")], check=True)
    run(chosen, FAKE_CUDA="1", LD_PRELOAD=str(driver))
