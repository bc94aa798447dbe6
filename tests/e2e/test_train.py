"""What a run leaves behind, what it says, and that settings which must not change the numbers do not."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Command, Ended, command, records
from titan_moe.config import load_config
from titan_moe.data.tokenizer import load_tokenizer

Train = Callable[..., Ended]

TRAIN_KEYS = {
    *("step", "kind", "loss", "total_loss", "grad_norm", "param_norm", "num_tokens", "lr/dense", "lr/embedding"),
    *("lr/norm", "tokens_per_second", "step_seconds", "data_seconds", "peak_memory_gib"),
}
PER_LAYER = ("maxvio_batch", "router_logit_norm", "router_confidence")
TRAIN_KEYS_MOE = {
    *("aux_loss", "z_loss", "entropy_loss", "lr/expert", "lr/router", "load_entropy", "dead_experts"),
    *("minvio_batch", "avgvio_batch", "load_cv", "expert_batch_mean", "expert_batch_min"),
    *(f"{name}{of}" for name in PER_LAYER for of in ("", "/layer_0", "/layer_1")),
}
VALIDATION_KEYS = {"step", "kind", "loss", "perplexity", "accuracy", "num_tokens", "bits_per_byte"}
VALIDATION_KEYS_MOE = {
    *("aux_loss", "z_loss", "entropy_loss", "maxvio_global", "maxvio_global/layer_0", "maxvio_global/layer_1"),
    *(f"load/layer_{layer}/expert_{expert}" for layer in range(2) for expert in range(4)),
}
DENSE = {"moe__num_experts": 0, "balancer": None}
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_losses.json"


def lines(folder: Path, kind: str) -> list[dict[str, float]]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


def test_what_a_run_leaves(train: Train, tmp_path: Path) -> None:
    ended = train(metrics__enable_tensorboard=True)
    run = tmp_path / "run"
    assert ended.code == 0, ended.err
    assert {p.name for p in run.iterdir()} == {"config.toml", "metrics.jsonl", "run.json", "tensorboard", "checkpoint"}

    for line in lines(run, "train"):
        assert set(line) == TRAIN_KEYS | TRAIN_KEYS_MOE
        assert all(math.isfinite(value) for value in line.values() if not isinstance(value, str))
        layers = [line["maxvio_batch/layer_0"], line["maxvio_batch/layer_1"]]
        assert line["maxvio_batch"] == pytest.approx(sum(layers) / 2)
        balance = 0.1 * line["aux_loss"] + 0.001 * line["z_loss"] + 0.01 * line["entropy_loss"]
        assert line["total_loss"] == pytest.approx(line["loss"] + balance, rel=1e-5)
        assert isinstance(line["dead_experts"], int)
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]
    assert [line["num_tokens"] for line in lines(run, "train")] == [64 * step for step in range(1, 7)]
    assert [line["step"] for line in lines(run, "validation")] == [3, 6]
    for line in lines(run, "validation"):
        drift = {"routing_drift"} if line["step"] > 3 else set()  # since the validation before
        assert set(line) == VALIDATION_KEYS | VALIDATION_KEYS_MOE | drift
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert isinstance(line["num_tokens"], int)
        assert line["num_tokens"] > 0

    facts = json.loads((run / "run.json").read_text())
    assert {"titan_moe", "git_commit", "torch", "data", "tokenizer", "world_size", "device"} <= set(facts)
    assert facts["world_size"] == 1
    assert facts["parameters"] == 43_424 > facts["active_parameters"] > 0

    steps = {path.name: path for path in (run / "checkpoint").iterdir()}
    assert set(steps) == {"step-2", "step-4", "step-6"}
    assert (steps["step-6"] / "config.toml").read_text() == (run / "config.toml").read_text()
    assert load_tokenizer(str(steps["step-6"] / "tokenizer.json")).encode("a") == [97]
    check_words(ended, lines(run, "validation")[-1], run)
    check_tensorboard(run)


def check_words(ended: Ended, validation: dict[str, float], run: Path) -> None:
    """Lines of progress and the closing summary on standard output; on standard error what the model is."""
    progress = [line for line in ended.out.splitlines() if line.startswith("step ")]
    assert progress[0].startswith("step 1/6  loss")
    assert any(line.startswith("step 3/6  validation") for line in progress)
    summary = ended.out[ended.out.index("\nvalidation") :]
    for part in (f"loss {validation['loss']:.4f}", "ppl", "accuracy", f"MaxVio {validation['maxvio_global']:.3f}"):
        assert part in summary
    assert str(run / "tensorboard") in summary
    assert f"titan_moe.generate --checkpoint {run / 'checkpoint'}" in summary
    assert "model: 43,424 parameters" in ended.err
    assert "Warning" not in ended.err


def check_tensorboard(run: Path) -> None:
    """Scalars as in metrics.jsonl, and at each validation the load of layers x experts as a picture."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    losses = [line["loss"] for line in lines(run, "train")]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert events.Scalars("train_per_layer/maxvio_batch/layer_1")
    assert [event.step for event in events.Scalars("validation/maxvio_global")] == [3, 6]
    pictures = events.Images("validation/load")
    assert [picture.step for picture in pictures] == [3, 6]
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 0 for picture in pictures)


def test_the_resolved_configuration_is_the_same_run(train: Train, tmp_path: Path) -> None:
    assert train(training__steps=2).code == 0
    again, file = tmp_path / "again", ["--job.config_file", str(tmp_path / "run" / "config.toml")]
    written = load_config(file)
    assert written.model.vocab_size == 320  # the tokenizer's 257, padded
    assert command("train", [*file, "--job.dump_folder", str(again)]).code == 0
    assert records(again) == records(tmp_path / "run")
    rewritten = ["--job.config_file", str(again / "config.toml"), "--job.dump_folder", str(tmp_path / "run")]
    assert load_config(rewritten) == written


def test_dense_model(train: Train, tmp_path: Path) -> None:
    ended = train(**DENSE)
    assert ended.code == 0, ended.err
    run = tmp_path / "run"
    for line in lines(run, "train"):
        assert set(line) == TRAIN_KEYS
        assert line["total_loss"] == line["loss"]
    assert [set(line) for line in lines(run, "validation")] == [VALIDATION_KEYS] * 2
    assert "MaxVio" not in ended.out


def test_balancers_that_are_off_have_no_keys(train: Train, tmp_path: Path) -> None:
    assert train(more="--balancer.entropy_loss false --balancer.z_loss false", training__steps=1).code == 0
    (line,) = lines(tmp_path / "run", "train")
    assert set(line) == TRAIN_KEYS | TRAIN_KEYS_MOE - {"entropy_loss", "z_loss"}
    (line,) = lines(tmp_path / "run", "validation")
    assert set(line) == VALIDATION_KEYS | VALIDATION_KEYS_MOE  # measured all the same


def test_a_run_that_diverges_stops_with_the_layers_name(train: Train, tmp_path: Path) -> None:
    ended = train(optimizer__lr=3e38, training__steps=4)
    assert ended.code == 2
    message = ended.err.splitlines()[-1]
    assert message.startswith("error: step ")
    assert "NaN or infinite router logits in layers.0.moe" in message
    assert len(lines(tmp_path / "run", "train")) < 4


DENSE_OFF = " ".join(f"--balancer.{name} false" for name in ("aux_loss", "entropy_loss", "z_loss", "loss_free"))


def test_a_validation_that_is_not_finite_ends_the_run(train: Train, tmp_path: Path) -> None:
    """Numbers that are not finite are null in metrics.jsonl, and nan on the console."""
    more = f"--moe.num_experts 0 {DENSE_OFF} --checkpoint.enable false"
    ended = train(
        more=more, optimizer__lr=3e38, optimizer__weight_decay=1e3, training__steps=1, lr_scheduler__warmup_steps=0
    )
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: step 1: validation loss nan: the run has diverged")
    assert lines(tmp_path / "run", "validation")[-1]["loss"] is None
    assert ended.out.splitlines()[-1].split()[2:5] == ["validation", "loss", "nan"]


@pytest.mark.parametrize(
    ("lr", "what"), [(1e30, "step 2: grad_norm nan"), (3e38, "step 1: a parameter is NaN or infinite")]
)
def test_what_has_diverged_is_not_saved(train: Train, tmp_path: Path, lr: float, what: str) -> None:
    """Whether the next step shows it, or the step's own loss and gradients were finite and its update was not."""
    more = f"--moe.num_experts 0 {DENSE_OFF}"
    options = {"training__steps": 3 if lr == 1e30 else 1, "lr_scheduler__warmup_steps": 0, "validation__enable": False}
    ended = train(more=more, optimizer__lr=lr, **options)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(f"error: {what}")
    assert not list(tmp_path.glob("run/checkpoint/step-*"))
    assert lines(tmp_path / "run", "train")  # what led there is on record


def test_measurements_on_request_change_nothing(train: Train, tmp_path: Path) -> None:
    """Timings of balanced routing and measures of experts come when they are due, and training does not notice."""
    muon = {"optimizer__expert__name": "muon"}  # which keeps no moments that the measures could be of
    assert train("plain", **muon).code == 0
    ended = train("measured", metrics__balance_tax_freq=2, metrics__expert_stats_freq=3, **muon)
    assert ended.code == 0, ended.err
    requested = {2: {"balance_tax"}, 3: {"gradient_snr", "update_ratio", "load/layer_1/expert_3"}}
    plain, measured = (records(tmp_path / name) for name in ("plain", "measured"))
    for before, after in zip(plain, measured, strict=True):
        assert before == {key: after[key] for key in before}
        for freq, keys in requested.items():
            assert keys <= set(after) if after["step"] % freq == 0 else not keys & set(after)
    assert all(0.2 < line["balance_tax"] < 5 for line in measured[1::2])
    assert all(line["gradient_snr"] >= 0 for line in measured[2::3])
    validations = [records(tmp_path / name, "validation") for name in ("plain", "measured")]
    assert validations[0] == validations[1]
    assert 0 <= validations[0][1]["routing_drift"] <= 1


def test_golden_losses(train: Train, tmp_path: Path) -> None:
    """The losses of a tiny fp32 run are those of the past: a refactoring that changes numerics shows here.

    To record new ones after an intended change: UPDATE_GOLDEN=1 python -m pytest tests/e2e -k golden
    """
    assert train(training__steps=20, training__local_batch_size=4).code == 0
    names = ("loss", "aux_loss", "grad_norm", "maxvio_batch")
    found = {name: [record[name] for record in records(tmp_path / "run")] for name in names}
    found["validation_loss"] = [record["loss"] for record in records(tmp_path / "run", "validation")]
    assert found["loss"][-1] < 0.75 * found["loss"][0]
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name


def test_checkpointed_activations_change_nothing(train: Train, tmp_path: Path) -> None:
    assert train("plain", training__steps=4).code == 0
    assert train("full", training__steps=4, activation_checkpoint__mode="full").code == 0
    assert records(tmp_path / "full") == records(tmp_path / "plain")
    assert records(tmp_path / "full", "validation") == records(tmp_path / "plain", "validation")


def test_micro_batches_change_nothing_but_the_scope_of_aux_loss(train: Train, tmp_path: Path) -> None:
    """One micro-batch of 4 or four of 1: the same sequences, so the same losses but for round-off."""
    assert train("one", training__local_batch_size=4, balancer__aux_loss=None).code == 0
    assert train("four", training__local_batch_size=1, balancer__aux_loss=None).code == 0
    for one, four in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        assert four == pytest.approx(one, rel=1e-5)


def test_bfloat16_learns(train: Train, tmp_path: Path) -> None:
    """Mixed precision in one process: close to fp32."""
    options = {"training__mixed_precision_param": "bfloat16", "training__steps": 16, "validation__freq": 8}
    assert train("fp32", **{**options, "training__mixed_precision_param": "float32"}).code == 0
    ended = train("bf16", **options)
    assert ended.code == 0, ended.err
    losses, exact = ([record["loss"] for record in records(tmp_path / name)] for name in ("bf16", "fp32"))
    assert losses != exact
    assert losses == pytest.approx(exact, rel=2e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_deterministic_algorithms(train: Train, tmp_path: Path) -> None:
    assert train("plain", training__steps=2).code == 0
    ended = train("deterministic", training__steps=2, training__deterministic=True)
    assert ended.code == 0, ended.err
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("plain", "deterministic")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert not torch._C._get_deterministic_fill_uninitialized_memory()


@pytest.mark.slow
def test_compiled_model(train: Train, arguments: Arguments, tmp_path: Path) -> None:
    sizes = {"training__steps": 3, "training__local_batch_size": 4, "model__num_layers": 1, "validation__enable": False}
    assert train("eager", **sizes).code == 0
    # in a process of its own: torch's compiler gives warnings that users do not see
    ended = Command("train", arguments("compiled", **sizes, compile__enable=True), tmp_path / "log").end()
    assert ended.code == 0, ended.err
    assert "arning" not in ended.err
    eager, compiled = ([record["loss"] for record in records(tmp_path / name)] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_compiling_without_a_compiler_is_a_warning(train: Train, tmp_path: Path) -> None:
    assert train("eager", training__steps=2).code == 0
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        ended = train("uncompiled", training__steps=2, compile__enable=True)
    assert ended.code == 0, ended.err
    assert "warning: compile.enable: rank 0 has no C++ compiler (g++ or $CXX): training goes on eager" in ended.err
    eager, uncompiled = ([record["loss"] for record in records(tmp_path / name)] for name in ("eager", "uncompiled"))
    assert uncompiled == eager


def test_two_processes_equal_one(arguments: Arguments, train: Train, tmp_path: Path) -> None:
    """torchrun with two processes, each with half of the heads, tokens and experts: as one, which goes on from it."""
    options = {"training__local_batch_size": 1, "training__steps": 4, "validation__freq": 2}
    layout = {f"parallelism__{axis}_parallel_degree": 2 for axis in ("tensor", "expert")}
    layout["activation_checkpoint__mode"] = "selective"
    words = arguments("two", **options, **layout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [*torchrun, "-m", "titan_moe.train", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert train("one", **options).code == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    check_equal(tmp_path / "two", tmp_path / "one")

    resumed = train("two", **options, more="--checkpoint.load_step 2")
    assert resumed.code == 0, resumed.err
    assert "saved by 2 processes and is loaded by 1" in resumed.err
    check_equal(tmp_path / "two", tmp_path / "one")


def check_equal(found: Path, expected: Path) -> None:
    """All numbers equal to 1e-5; loads, which are counts, exactly."""
    for kind in ("train", "validation"):
        assert len(records(found, kind)) == len(records(expected, kind))
        for mine, theirs in zip(records(found, kind), records(expected, kind), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-9)
