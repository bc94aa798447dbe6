"""What a user can get wrong: exit code 2, one line that says what and where and what to do, nothing half-written."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, command, contents, records
from titan_moe.data.tokenizer import bytes_tokenizer

Train = Callable[..., Ended]


def error_line(ended: Ended) -> str:
    """The one line of an error, alone but for what was logged before."""
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, ended.err
    assert lines[-1] == errors[0]
    assert "Traceback" not in ended.err
    return errors[0]


# changes to the configuration file, words of the command line -> parts of the line
CONFIGURATIONS: dict[str, tuple[dict[str, object], str, list[str]]] = {
    "unknown section": ({"modle.dim": 32}, "", ["run.toml", "modle", "model"]),
    "unknown key": ({"training.step": 5}, "", ["run.toml", "training.step", "training.steps"]),
    "unknown key on the command line": ({}, "--training.sqe_len 8", ["training.sqe_len", "training.seq_len"]),
    "unknown router": ({"router.name": "topk_sofmax"}, "", ["run.toml", "router.name", "topk_sofmax", "topk_softmax"]),
    "unknown balancer": ({"balancer.aux_los": {}}, "", ["run.toml", "aux_los", "aux_loss"]),
    "unknown optimizer": ({"optimizer.name": "adamv"}, "", ["run.toml", "optimizer.name", "adamw"]),
    "unknown schedule": ({"lr_scheduler.name": "cosin"}, "", ["run.toml", "lr_scheduler.name", "cosine"]),
    "unknown dataset": ({"data.dataset": "txt"}, "", ["run.toml", "data.dataset", "txt", "text"]),
    "unknown argument of a component": ({"router.temprature": 1.0}, "", ["run.toml", "temprature", "temperature"]),
    "component of nowhere": ({"router.name": "no_such_package.module:router"}, "", ["router.name", "no_such_package"]),
    "wrong type": ({"training.steps": "ten"}, "", ["run.toml", "training.steps", "ten", "int"]),
    "wrong type of an argument": ({"balancer.aux_loss.coeff": "big"}, "", ["balancer.aux_loss.coeff", "big"]),
    "wrong type on the command line": ({}, "--compile.enable perhaps", ["compile.enable", "perhaps"]),
    "out of range": ({"optimizer.lr": -1.0}, "", ["run.toml", "optimizer.lr", "-1"]),
    "no such file": ({"data.path": "no/such.txt"}, "", ["data.path", "no/such.txt", "no such file"]),
    "no such tokenizer": ({"data.tokenizer": "no/tokenizer.json"}, "", ["data.tokenizer", "no/tokenizer.json"]),
    "no such base file": ({"base": "nowhere.toml"}, "", ["run.toml", "base", "nowhere.toml"]),
    "no such checkpoint step": ({"checkpoint.load_step": 77}, "", ["checkpoint.load_step", "step-77"]),
    "no such initial checkpoint": (
        {"checkpoint.initial_load_path": "nowhere"},
        "",
        ["initial_load_path nowhere"],
    ),
    "small vocabulary": ({"model.vocab_size": 256}, "", ["model.vocab_size (256)", "(257)", "raise it"]),
    "top_k > num_experts": ({"moe.top_k": 5}, "", ["moe.top_k (5)", "moe.num_experts (4)"]),
    "seq_len": ({"training.seq_len": 100_000}, "", ["training.seq_len (100000)", "longer than the data", "shorten it"]),
    "local batch": ({"training.local_batch_size": 3}, "", ["training.local_batch_size (3)", "global_batch_size (4)"]),
    "shard degree": (
        {"parallelism.data_parallel_shard_degree": 3},
        "",
        ["data_parallel_shard_degree (3)", "processes (1)", "nproc_per_node"],
    ),
    "float8 on a CPU": (
        {"quantize.converters": ["quantize.grouped_mm.float8"]},
        "",
        ["quantize.converters", "H100", "a CPU", "quantize.emulate = true"],
    ),
    "unknown converter": (
        {"quantize.converters": "quantize.linear.mx"},
        "",
        ["run.toml", "quantize.converters", "quantize.linear.mx", "quantize.linear.float8"],
    ),
    "float8 experts of a dense model": (
        {"moe.num_experts": 0, "balancer": None, "quantize.converters": ["quantize.grouped_mm.float8"]},
        "",
        ["quantize.grouped_mm.float8", "moe.num_experts is 0"],
    ),
    "float8 of odd sizes": (
        {"moe.expert_dim": 24, "quantize.converters": ["quantize.grouped_mm.float8"], "quantize.emulate": True},
        "",
        ["quantize.grouped_mm.float8", "multiples of 16", "layers.0.moe.experts", "24 x 32", "moe.expert_dim"],
    ),
    "experts backend that is not there": (
        {"moe.experts_backend": "liger"},
        "",
        ["moe.experts_backend = 'liger'", "take 'grouped_mm'"],
    ),
    "expert degree": (
        {"parallelism.expert_parallel_degree": 2},
        "",
        ["expert_parallel_degree (2)", "must divide data_parallel_shard_degree (1)"],
    ),
    "tensor degree": (
        {"parallelism.tensor_parallel_degree": 2},
        "",
        ["data_parallel_shard_degree (1) x tensor_parallel_degree (2)", "processes (1)", "nproc_per_node"],
    ),
    "tensor degree and heads": (
        {"parallelism.tensor_parallel_degree": 2, "model.num_kv_heads": 1},
        "",
        ["tensor_parallel_degree (2)", "model.num_kv_heads (1)"],
    ),
    "tensor degree and float8": (
        {"parallelism.tensor_parallel_degree": 2, "quantize.converters": ["quantize.linear.float8"]},
        "",
        ["tensor_parallel_degree = 2", "quantize.linear.float8", "leave the converter out"],
    ),
    "context degree": (
        {"parallelism.context_parallel_degree": 3},
        "",
        ["training.seq_len (", "2 x context_parallel_degree (3)"],
    ),
    "heads": ({"model.num_heads": 3}, "", ["model.num_heads (3)", "model.dim (32)"]),
    "dump folder below a file": ({}, "--job.dump_folder {file}/run", ["job.dump_folder", "{file}", "not writable"]),
    "dump folder in /proc": ({}, "--job.dump_folder /proc/run", ["job.dump_folder /proc/run", "not writable"]),
    "cache folder below a file": ({"data.cache_folder": "{file}/cache"}, "", ["data.cache_folder", "{file}"]),
    "no validation data": ({"data.validation_fraction": 0.0}, "", ["validation.enable", "data.validation_fraction"]),
    "balancers of a dense model": ({"moe.num_experts": 0}, "", ["moe.num_experts = 0", "aux_loss = false"]),
    "no such configuration file": ({}, "--job.config_file nowhere.toml", ["job.config_file", "nowhere.toml"]),
    "word without a key": ({}, "--compile.enable true extra", ["compile.enable", "extra"]),
    "wandb that is not installed": ({"metrics.enable_wandb": True}, "", ["metrics.enable_wandb", "pip install"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(
    train: Train, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    changes, words, parts = CONFIGURATIONS[name]
    file = tmp_path / "file"
    file.write_text("a file, not a folder")

    def fill(value: object) -> object:
        return value.replace("{file}", str(file)) if isinstance(value, str) else value

    changes = {key: fill(value) for key, value in changes.items()}
    line = error_line(train(more=str(fill(words)), **changes))
    for part in parts:
        assert str(fill(part)) in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "run.toml"}


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate", "estimate.cli"])
def test_a_torch_of_another_version(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """The first thing that a command looks at."""
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert "torch 2.10.0 is too old: titan_moe needs torch>=2.11,<2.16" in error_line(command(verb, ["--no", "sense"]))


def empty(path: Path) -> Path:
    path.write_text("")
    return path


def not_utf8(path: Path) -> Path:
    path.write_bytes(b"some text \xff\xfe and more" * 100)
    return path


def truncated(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"".join(b"line %d of a text\n" % i for i in range(500)))[:-100])
    return path


def not_json(path: Path) -> Path:
    path.write_text(json.dumps({"text": "good"}) + "\nnot json\n")
    return path


def no_text(path: Path) -> Path:
    path.write_text(json.dumps({"content": "good"}) + "\n")
    return path


def no_text_column(path: Path) -> Path:
    pq.write_table(pa.table({"content": ["a", "b"]}), path)
    return path


def not_parquet(path: Path) -> Path:
    path.write_bytes(b"PAR1 not really")
    return path


DATA: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "empty.txt": (empty, ["no data", "is empty"]),
    "latin.txt": (not_utf8, ["not UTF-8 at byte 10", "0xff", "convert the file"]),
    "cut.txt.gz": (truncated, ["truncated archive", "fetch it again"]),
    "bad.jsonl": (not_json, [":2: not JSON"]),
    "other.jsonl": (no_text, [":1: no string in the field 'text'", "content"]),
    "other.parquet": (no_text_column, ["no column 'text'", "content"]),
    "broken.parquet": (not_parquet, ["not a readable parquet file"]),
    "table.csv": (empty, ["no format that is known", "jsonl"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(train: Train, tmp_path: Path, name: str) -> None:
    """A bad file leaves no run behind and no token cache that a next run could take for whole."""
    make, parts = DATA[name]
    file, cache = make(tmp_path / name), tmp_path / "cache"
    for _ in range(2):
        line = error_line(train(data__path=[str(file)], data__cache_folder=str(cache)))
        for part in (str(file), *parts):
            assert part in line
    assert not (tmp_path / "run").exists()
    assert not list(cache.rglob("*.tmp"))
    assert not list(cache.rglob("meta.json"))
    assert not list(cache.rglob("*.bin"))


def test_a_configuration_that_is_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    for content, part in ((b"[model\ndim = 3", "line 1"), (b"# \xff\n[model]\n", "not UTF-8")):
        file.write_bytes(content)
        line = error_line(command("train", ["--job.config_file", str(file)]))
        assert str(file) in line
        assert part in line


def test_a_tokenizer_with_a_larger_vocabulary(train: Train, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(bytes_tokenizer().to_json())
    line = error_line(train(data__tokenizer=str(tokenizer), model__vocab_size=200))
    assert "model.vocab_size (200) is smaller than the tokenizer's vocabulary (257)" in line
    tokenizer.write_text('{"no": "tokenizer"}')
    assert str(tokenizer) in error_line(train(data__tokenizer=str(tokenizer)))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model(train: Train, tmp_path: Path) -> None:
    """Refused in one line, with the run as it was, for resuming and for initial weights."""
    assert train().code == 0
    before = contents(tmp_path / "run")
    line = error_line(train(model__ffn_dim=96, moe__expert_dim=48))
    assert str(tmp_path / "run" / "checkpoint" / "step-6") in line
    assert "another model" in line
    assert "model.ffn_dim: 64, now 96; moe.expert_dim: 32, now 48" in line
    assert contents(tmp_path / "run") == before

    line = error_line(train("other", model__dim=48, checkpoint__initial_load_path=str(tmp_path / "run")))
    assert "another model" in line
    assert not (tmp_path / "other").exists()


def test_a_data_position_that_does_not_fit(train: Train, tmp_path: Path) -> None:
    """Another batch size can go on only from where it divides the sequences seen."""
    assert train(training__steps=3, checkpoint__interval=3).code == 0
    sizes = {"training__local_batch_size": 8, "training__global_batch_size": 8}
    line = error_line(train(training__steps=6, **sizes, job__allow_config_change=True))
    assert "saved data position (12 sequences)" in line
    assert "local_batch_size" in line


def test_broken_checkpoints_for_evaluation_and_generation(train: Train, tmp_path: Path) -> None:
    """A step folder that was named is an error, a dump folder falls back and says so."""
    assert train().code == 0
    folder = tmp_path / "run" / "checkpoint"
    (folder / "step-6" / ".metadata").unlink()
    for verb in ("generate", "evaluate"):
        line = error_line(command(verb, ["--checkpoint", str(folder / "step-6")]))
        assert f"{folder / 'step-6'} is broken: file .metadata is missing" in line
        ended = command(verb, ["--checkpoint", str(tmp_path / "run")])
        assert ended.code == 0
        assert f"using {folder / 'step-4'}" in ended.err
        shutil.copytree(folder, tmp_path / "none", dirs_exist_ok=True)
        for step in (2, 4, 6):
            (tmp_path / "none" / f"step-{step}" / "manifest.json").unlink()
        assert "no complete step-N folder" in error_line(command(verb, ["--checkpoint", str(tmp_path / "none")]))


def test_debug_shows_the_traceback(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_MOE_DEBUG", "1")
    ended = train(moe__top_k=5)
    assert ended.code == 2
    assert ended.err.startswith("Traceback (most recent call last):")
    assert ended.err.splitlines()[-1].startswith("error: moe.top_k (5)")


def test_a_fault_is_no_error_of_the_user(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of ours keeps its traceback: run_command lets it through, so Python exits with 1."""

    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("titan_moe.train.train_step", broken)
    with pytest.raises(TypeError, match="a bug"):
        train()


def test_in_real_processes(arguments: Arguments, tmp_path: Path) -> None:
    """The same with nothing in between: exit code, one line on standard error, no noise of libraries there."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(*words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "titan_moe.train", *words]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )

    with start(*arguments("bad", data__path="nowhere.txt")) as bad:
        out, err = bad.communicate(timeout=100)
    assert (bad.returncode, out) == (2, "")
    assert err == "error: data.path: no such file or folder: nowhere.txt\n"

    with start(*arguments("unheard", training__steps=3)) as unheard:
        assert unheard.stdout is not None
        assert unheard.stderr is not None
        unheard.stdout.close()  # as `| head` does
        err = unheard.stderr.read()
    assert unheard.returncode == 128 + signal.SIGPIPE
    *lines, last = err.splitlines()
    assert last.startswith("error: CANNOT WRITE TO the console")
    assert all(line.startswith(("token", "model: ", "  ")) for line in lines), err
    assert len(records(tmp_path / "unheard")) == 3
