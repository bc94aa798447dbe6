"""QK-clip of a whole run: its numbers are in metrics.jsonl, and a resumed run is the run that was never stopped."""

from collections.abc import Callable
from pathlib import Path

from torch.testing import assert_close

from tests.e2e.harness import Ended, records
from titan_moe.checkpoint import load_model

CLIPPED = {"training__qk_clip": 0.005, "lr_scheduler__name": "constant"}


def test_a_run_is_clipped_and_resumes(train: Callable[..., Ended], tmp_path: Path) -> None:
    for name, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        ended = train(name, training__steps=steps, **CLIPPED)
        assert ended.code == 0, ended.err
    whole, cut = records(tmp_path / "whole"), records(tmp_path / "cut")
    assert cut == whole
    models = [load_model(tmp_path / name)[0] for name in ("whole", "cut")]
    assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)

    layers = len(models[0].layers)
    for record in whole:
        of_layers = [record[f"max_attention_logit/layer_{i}"] for i in range(layers)]
        assert record["max_attention_logit"] == max(of_layers) > 0.005
        assert record["clipped_heads"] > 0

    changed = train("cut", training__steps=7, **{**CLIPPED, "training__qk_clip": 1.0})
    assert changed.code == 2
    assert "training.qk_clip: 0.005, now 1.0" in changed.err


def test_a_run_without_it_has_no_such_numbers(train: Callable[..., Ended], tmp_path: Path) -> None:
    assert train(training__steps=1).code == 0
    assert not [name for name in records(tmp_path / "run")[0] if "attention_logit" in name or "clipped" in name]
