"""A parametrization's factors on the way to other formats, through expert surgery, and into another run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interop.models import KINDS, configure, make_checkpoint
from tests.unit.convert.test_surgery import logits, make_trained, resumed, tokens_of
from titan_moe.checkpoint import load_model
from titan_moe.config.sections import Component
from titan_moe.convert.hf.convert import OUR_CONFIG, from_hf, to_hf
from titan_moe.convert.megatron.convert import from_megatron, to_megatron
from titan_moe.convert.surgery import change_experts, keep, upcycle
from titan_moe.convert.verify import rounded_model
from titan_moe.model.multipliers import Multipliers
from titan_moe.resume import check_same_factors

# Every factor of mup is another than 1: head_dim is 8, that of the base 3.
MUP = {
    **{"parametrization.name": "mup", "parametrization.base_dim": 12, "parametrization.base_num_heads": 4},
    **{"parametrization.base_num_layers": 1},
}


@pytest.mark.parametrize("kind", ["dense", "dense qk-norm tied", "topk_softmax tied", "topk_softmax shared"])
def test_exports_have_the_factors_in_their_weights(tmp_path: Path, kind: str) -> None:
    """There and back is a model in the standard parametrization with the same logits, by either format."""
    step = make_checkpoint(tmp_path / "run", **{**KINDS[kind][1], **MUP})
    model, config = load_model(step)
    assert all(value != 1 for value in model.multipliers[1:4])
    to_hf(step, tmp_path / "hf", verify=False)
    from_hf(tmp_path / "hf", tmp_path / "from_hf", verify=False)
    to_megatron(step, tmp_path / "megatron", verify=False)
    from_megatron(tmp_path / "megatron", tmp_path / "from_megatron", verify=False)
    for name in ("from_hf", "from_megatron"):
        plain, plain_config = load_model(tmp_path / name)
        assert plain_config.parametrization == Component("standard")
        assert plain.multipliers == Multipliers()
        assert plain_config.model == config.model
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_what_is_compared_is_rounded_with_the_factors_in_it(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run", **{**KINDS["topk_softmax tied"][1], **MUP})
    _, config = load_model(step)
    to_hf(step, tmp_path / "hf", dtype="bfloat16", verify=False)
    from_hf(tmp_path / "hf", tmp_path / "back", verify=False)
    back, _ = load_model(tmp_path / "back")
    rounded = rounded_model(step, config, torch.bfloat16)
    assert not isinstance(rounded, SimpleNamespace)
    torch.testing.assert_close(rounded(tokens_of(1))[0], back(tokens_of(1))[0], rtol=1e-4, atol=1e-4)


def test_weights_of_others_are_not_multiplied(tmp_path: Path) -> None:
    """A configuration with factors for weights that were made without them is refused; nothing is left."""
    step = make_checkpoint(tmp_path / "run", **KINDS["topk_softmax"][1])
    to_hf(step, tmp_path / "hf", verify=False)
    to_megatron(step, tmp_path / "megatron", verify=False)
    for folder, convert in (("hf", from_hf), ("megatron", from_megatron)):
        file = tmp_path / folder / OUR_CONFIG
        text = file.read_text().replace('name = "standard"', 'name = "mup"\nbase_dim = 16')
        file.write_text(text)
        with pytest.raises(ValueError, match="set it to 'standard'"):
            convert(tmp_path / folder, tmp_path / "out", verify=False)
        assert not (tmp_path / "out").exists()


def test_surgery_keeps_the_factors(tmp_path: Path) -> None:
    """More experts, and experts of a dense model: the same logits, and the new router begins as mup says."""
    step = make_trained(tmp_path / "run", **MUP)
    change_experts(step, tmp_path / "out", lambda tensors: [[keep(e) for e in (0, 1, 2, 3)]] * 2, [])
    assert torch.equal(logits(resumed(tmp_path / "out")[0]), logits(load_model(step)[0]))

    dense = make_trained(tmp_path / "dense", **{"moe.num_experts": 0, "moe.top_k": 1, **MUP})
    words = ["--moe.num_experts", "4", "--moe.top_k", "2"]
    upcycle(dense, tmp_path / "up", granularity=1, noise=0.0, overrides=words)
    model = resumed(tmp_path / "up")[0]
    torch.testing.assert_close(logits(model), logits(load_model(dense)[0]), rtol=1e-4, atol=1e-4)
    router: Any = model.layers[1].moe.router.weight
    assert router.std().item() == pytest.approx(0.02 * 12 / 32, rel=0.2)


def test_surgery_refuses_other_factors(tmp_path: Path) -> None:
    step = make_trained(tmp_path / "run", **MUP)
    plans: Any = lambda tensors: [[keep(e) for e in range(4)]] * 2  # noqa: E731
    for words, key in (
        (["--parametrization.base_dim", "16"], r"logits \(0.5, before 0.375\)"),
        (["--parametrization.name", "standard"], r"logits \(1, before 0.375\)"),
    ):
        with pytest.raises(ValueError, match=key):
            change_experts(step, tmp_path / "out", plans, words)
        assert not (tmp_path / "out").exists()


def test_first_weights_are_of_the_same_parametrization(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """initial_load_path: another one is refused, or with initial_load_strict = false said."""
    step = make_checkpoint(tmp_path / "run", **MUP)

    def start(**changes: Any) -> None:
        job: Any = SimpleNamespace(config=configure(**changes))
        check_same_factors(job, step)

    start(**MUP)
    with pytest.raises(ValueError, match=r"'mup' .* this run of 'standard'"):
        start()
    with caplog.at_level("WARNING"):
        start(**{"checkpoint.initial_load_strict": False})
    assert "this run of 'standard'" in caplog.text
