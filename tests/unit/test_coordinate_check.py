"""`titan_moe.coordinate_check`: what changes in a step keeps its size in muP, and does not in the standard one."""

import math
from pathlib import Path

import pytest
import torch

from titan_moe.coordinate_check import MEASURED, Check, check, exponent, main, text_batches

# Exponents are of the change after the fifth step, fitted over the factors, of two seeds.
BOUND = 0.25


def exponents(axis: str, name: str, words: str = "", factors: tuple[int, ...] = (1, 2, 4)) -> dict[str, float]:
    return check(axis, factors, words.split(), name, steps=5, seeds=2).exponents()


def test_an_exponent_is_the_slope() -> None:
    factors = (1, 2, 4, 8)
    change_RF = torch.tensor([[3.0 * f**0.5 for f in factors], [5.0 * f**0.5 for f in factors]])
    assert exponent(factors, change_RF) == pytest.approx(0.5, abs=1e-6)
    one = Check(factors, {"logits": torch.stack([change_RF, change_RF**2], -1)})
    assert one.exponents()["logits"] == pytest.approx(1.0, abs=1e-6)
    assert one.exponents(0)["logits"] == pytest.approx(0.5, abs=1e-6)


def test_the_text_is_the_same_for_all_sizes() -> None:
    first, second = text_batches(2, 0), text_batches(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], text_batches(2, 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        "shampoo_fast --optimizer.precondition_frequency 1",
        "muon --optimizer.lr 0.02",
    ],
)
def test_widths_change_alike_in_mup_and_not_in_standard(optimizer: str) -> None:
    words = f"--optimizer.name {optimizer}"
    mup, standard = (exponents("width", name, words) for name in ("mup", "standard"))
    assert set(mup) == set(MEASURED)
    for name in MEASURED:
        assert abs(mup[name]) < BOUND, (name, mup)
        assert standard[name] > 0.3, (name, standard)


@pytest.mark.slow
def test_depths_change_alike_in_mup() -> None:
    mup, standard = (exponents("depth", name) for name in ("mup", "standard"))
    assert all(abs(value) < BOUND for value in mup.values()), mup
    assert standard["residual stream"] > 0.5, standard


@pytest.mark.slow
def test_numbers_of_experts_change_alike_in_mup() -> None:
    """With weights that are not normalized the experts' sum grows with top_k; else it does not, in either one."""
    words = "--moe.num_experts 4 --moe.top_k 1 --router.name sigmoid --router.norm_topk false"
    mup, standard = (exponents("experts", name, words) for name in ("mup", "standard"))
    assert all(abs(value) < BOUND for value in mup.values()), mup
    assert standard["feed-forward"] > 0.5, standard


@pytest.mark.slow
def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--out", str(tmp_path / "new"), "--factors", "1", "2", "--steps", "2", "--seeds", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*MEASURED, "standard", "mup"))
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        f"coordinate_check_width.{e}" for e in ("png", "svg")
    }

    # One of one's own is checked alone, at the sizes that it says itself.
    words = ["--moe.num_experts", "0", "--parametrization.name", "mup", "--parametrization.base_dim", "32"]
    assert main([*arguments, *words]) == 0
    printed = capsys.readouterr().out
    assert "given" in printed
    assert "router logits" not in printed
    (logits,) = (line for line in printed.splitlines() if line.startswith("logits"))
    assert not math.isnan(float(logits.split()[-1]))


@pytest.mark.parametrize("words", ["--factors 1", "--factors 2 2", "--factors 1 0", "--steps 0", "--seeds 0"])
def test_too_little_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--factors must be two or more"):
        main(["--out", str(tmp_path), *words.split()])
