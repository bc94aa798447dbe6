"""watch_maxvio in a stock megatron-core GPTModel on two ranks, with recomputation."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest


def test_reports_are_those_of_a_plain_count(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core.transformer.moe.router")
    command = [sys.executable, "-m", "tests.interop.megatron_maxvio_side"]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    answers = [rank.communicate(timeout=250) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], answers[0][1][-2000:]
    results = [json.loads(out.splitlines()[-1]) for out, _ in answers]
    assert results[0]["reports"] == results[1]["reports"]  # each rank has other tokens
    result = results[0]
    assert result["tokens"] == [
        0,
        2 * 2 * 2 * 8 * 2,
        2 * 2 * 2 * 8 * 2,
    ]  # ranks, micro-batches, sequences, positions, k
    for kind in ("batch", "global"):
        report, expected = result["reports"][kind], result["expected"][kind]
        assert report[f"maxvio_{kind}/layer_0"] == pytest.approx(expected[0], rel=1e-6)
        assert report[f"maxvio_{kind}/layer_1"] == pytest.approx(expected[1], rel=1e-6)
        assert report[f"maxvio_{kind}"] == pytest.approx(sum(expected) / 2, rel=1e-6)
        assert min(expected) > 0  # not balanced by chance
    assert "nothing was routed" in result["again"]  # a report begins anew


def test_models_that_it_cannot_watch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core.transformer.moe.router")
        import torch

        from titan_moe.convert.megatron.maxvio import watch_maxvio

        with pytest.raises(ValueError, match="no TopKRouter"):
            watch_maxvio(torch.nn.Linear(2, 2))
