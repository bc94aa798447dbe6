"""Whole steps on fake tensors of a GPU: `fake_gpu.py`, in a process of its own, also where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["optimizer or adamw", "not optimizer and not adamw"])
def test_steps_stay_on_the_device(chosen: str) -> None:
    """Of every router, balancer and optimizer, dense and MoE: what a real GPU would refuse or wait for fails."""
    file = Path(__file__).with_name("fake_gpu.py")
    words = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr
