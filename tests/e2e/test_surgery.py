"""Training goes on from what surgery and conversion leave, by the configuration that lies there."""

from collections.abc import Callable
from pathlib import Path

from tests.e2e.harness import Ended, command, records
from titan_moe.checkpoint import latest_complete
from titan_moe.convert.hf.convert import from_hf, to_hf
from titan_moe.convert.surgery_cli import surgery

Train = Callable[..., Ended]
DENSE = {
    **{"moe__num_experts": 0, "balancer": None, "training__steps": 4, "training__deterministic": True},
    "lr_scheduler__min_lr_factor": 1.0,
}


def go_on(folder: Path, *words: str) -> list[dict[str, float]]:
    """Train to step 8 and give the records."""
    found = latest_complete(folder / "checkpoint")
    assert found is not None
    ended = command("train", ["--job.config_file", str(found / "config.toml"), "--training.steps", "8", *words])
    assert ended.code == 0, ended.err
    assert f"resuming from {found}" in ended.err
    return records(folder)


def test_training_goes_on_after_surgery(train: Train, tmp_path: Path) -> None:
    """A dense run, upcycled: step 5 has the loss that the dense run has there; then more experts, and fewer."""
    assert train("dense", **DENSE).code == 0
    dense, moe, more = (tmp_path / name for name in ("dense", "moe", "more"))
    surgery(["upcycle", str(dense), str(moe), "--num_experts", "4", "--moe.top_k", "2"])
    upcycled = go_on(moe)
    assert [record["step"] for record in upcycled] == [5, 6, 7, 8]
    expected = go_on(dense)
    assert abs(upcycled[0]["loss"] - expected[4]["loss"]) < 1e-5
    assert upcycled[0]["num_tokens"] == expected[4]["num_tokens"]
    assert abs(upcycled[-1]["loss"] - expected[-1]["loss"]) < 0.2
    surgery(["add", str(moe), str(more), "--num_experts", "6", "--noise", "0.01", "--steps", "2"])
    surgery(["prune", str(more), str(tmp_path / "fewer"), "--num_experts", "3", "--steps", "2"])
    for folder in (more, tmp_path / "fewer"):
        assert abs(go_on(folder, "--training.steps", "10")[0]["loss"] - upcycled[-1]["loss"]) < 0.5


def test_a_run_begins_with_imported_weights(train: Train, tmp_path: Path) -> None:
    """Trained, exported, imported: another run begins where the first one ended."""
    bias = {"router__name": "sigmoid"}
    assert train("first", **bias).code == 0
    to_hf(tmp_path / "first", tmp_path / "hf", verify=False)
    from_hf(tmp_path / "hf", tmp_path / "imported", verify=False)
    for name in ("first", "imported"):
        ended = train(f"from-{name}", checkpoint__initial_load_path=str(tmp_path / name), **bias)
        assert ended.code == 0, ended.err
    assert records(tmp_path / "from-first") == records(tmp_path / "from-imported")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "at step 6" in card
    assert command("generate", ["--checkpoint", str(tmp_path / "imported"), "--max_new_tokens", "3"]).code == 0

    changes = {"job__allow_config_change": True, "checkpoint__exclude": ["optimizer"]}
    ended = train("imported", **changes, **bias)
    assert ended.code == 2
    assert "step-0 is of no run, as it has no position in the data: take its weights into another" in ended.err
