"""Routers of recent papers by the commands: a cut run is the whole run, and what takes a checkpoint takes theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from tests.e2e.harness import Ended, command, records
from titan_moe.checkpoint import load_model
from titan_moe.convert.hf.convert import to_hf
from titan_moe.convert.megatron.convert import to_megatron

CASES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "mlp": {"latent_dim": 16},
    "prototype": {},
    "threshold": {},
    "token_rounding": {"tile": 8},
    "causal_bias": {},
    "emo": {},
}


@pytest.mark.parametrize("name", CASES)
def test_resume_evaluate_generate_and_refused_exports(train: Callable[..., Ended], tmp_path: Path, name: str) -> None:
    rule = "quantile" if name == "threshold" else "sign"
    words = {"router": {"name": name, **CASES[name]}, "balancer": {"loss_free": {"rule": rule}}}
    for folder, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
        constant = {"lr_scheduler__name": "constant", "training__steps": steps}
        ended = train(folder, **words, **constant)
        assert ended.code == 0, ended.err
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert ("experts_per_token" in records(tmp_path / "cut")[0]) == (name in ("threshold", "token_rounding"))
    one, two = (load_model(tmp_path / folder)[0] for folder in ("whole", "cut"))
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)

    start = ["--checkpoint", str(tmp_path / "cut")]
    for verb, more in (("evaluate", []), ("generate", ["--max_new_tokens", "2", "--prompt", "a b"])):
        ended = command(verb, [*start, *more])
        assert ended.code == 0, ended.err
    for convert in (to_hf, to_megatron):
        with pytest.raises(ValueError, match=rf"^router\.name = '{name}'.* has no counterpart in "):
            convert(tmp_path / "cut", tmp_path / "out")
