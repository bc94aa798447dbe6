"""Several GPUs over NCCL: every layout gives the numbers of one process; a process that dies or hangs is named."""

from pathlib import Path
from typing import Any

import torch

from tests.distributed.layouts import LAYOUTS, degrees_of
from tests.e2e import test_faults
from tests.e2e.conftest import Arguments, _process_as_before, arguments, shared  # noqa: F401 (fixtures)
from tests.gpu.harness import DEVICE, build, four_gpus, numbers, run_ranks, train, two_gpus
from titan_moe.parallelize.mesh import build_mesh


def all_layouts(rank: int, world: int) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    results = {}
    for name in LAYOUTS[world]:
        degrees = degrees_of(world, name)
        mesh = build_mesh(device=torch.device(DEVICE), **degrees._asdict())
        own = {"rank": rank, "world": world, "degrees": degrees, "mesh": mesh}
        for mode in ("none", "selective"):
            results[f"{name}, {mode}"] = numbers(train(build(mesh, checkpoint_mode=mode), **own))
        results[f"{name}, bf16"] = numbers(train(build(mesh, dtype=torch.bfloat16), **own))
    return results


def compare(world: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    data = {degrees_of(world, name).data for name in LAYOUTS[world]}
    alone = {count: numbers(train(build(None), micro_batches=count)) for count in data}  # losses are by micro-batch
    for result in run_ranks(world, all_layouts):
        for name, got in result.items():
            expected = alone[degrees_of(world, name.partition(",")[0]).data]
            if name.endswith("bf16"):
                torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-2, atol=0, msg=name)
            else:
                for key, value in expected.items():
                    torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@two_gpus
def test_layouts_of_two() -> None:
    compare(2)


@four_gpus
def test_layouts_of_four() -> None:
    compare(4)


@two_gpus
def test_a_process_that_hangs(arguments: Arguments, tmp_path: Path) -> None:  # noqa: F811
    test_faults.test_a_process_that_hangs(arguments, tmp_path)
