"""The tests that feel the last bit once more with other instructions, as another machine would run them.

Sums of another order are other round-off. What blows it up, a basis of directions without evidence, a near tie that is
taken for an error, a tolerance below what the format holds, passes on one processor and fails on the next: here it
fails on every one. More of them: `ATEN_CPU_CAPABILITY=avx2`, `MKL_CBWR=AVX2`, `OMP_NUM_THREADS=2` before `pytest`.
"""

import os
import subprocess
import sys

import pytest

INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
UNIT = tuple(f"optimizer/test_{name}.py" for name in ("load_lr", "shampoo", "matrix_optimizers", "optimizer"))
CHOSEN = "equal or round_off or evidence or alike or accumulation or golden or curve_of_two_ranks"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sensitive_tests_pass_with_other_instructions() -> None:
    """Optimizers against their references, the curve of a layout, and the golden losses."""
    files = [f"tests/unit/{name}" for name in UNIT]
    curve = "tests/distributed/test_parts_dist.py::test_the_curve_of_two_ranks_is_that_of_one[tp2]"
    golden = "tests/e2e/test_train.py::test_golden_losses"
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CHOSEN, *files, curve, golden]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env={**os.environ, **INSTRUCTIONS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-1000:]
    assert " passed" in ended.stdout
