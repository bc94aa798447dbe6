"""Conversions of bad input as commands: one line, exit code 2, nothing left behind. No other library is needed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.models import configure, make_checkpoint
from tests.unit.checkpoint.test_store import LimitedFileSize
from tests.unit.convert.test_commands import _logger_as_before, names, run  # noqa: F401
from titan_moe.config import to_toml
from titan_moe.convert.cli import convert_from_hf, convert_from_megatron, convert_to_megatron
from titan_moe.convert.hf.convert import to_hf
from titan_moe.convert.megatron.convert import to_megatron
from titan_moe.convert.new_folder import new_folder

Refuse = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path) -> Refuse:
    """A function that runs a command, whose last words are given, and expects one line with `message`."""

    def refuse(message: str, main: Callable[[list[str]], int], *words: object) -> None:
        before = names(tmp_path)
        code, err = run(main, *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("error: ")
        assert message in err
        assert names(tmp_path) == before

    return refuse


def test_models_of_hugging_face(tmp_path: Path, refused: Refuse) -> None:
    """Another architecture, other shapes than config.json says, weights that are missing, cut short or changed."""
    hf, out = tmp_path / "hf", tmp_path / "out"
    to_hf(make_checkpoint(tmp_path / "run"), hf, verify=False)
    good = json.loads((hf / "config.json").read_text())
    for changes, message in (
        ({"model_type": "gpt2"}, "model_type = 'gpt2' cannot be read; llama, qwen2, qwen3, mixtral"),
        ({"model_type": "olmoe"}, "lacks model.layers.0.self_attn.q_norm.weight"),
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3' cannot be read"),
        ({"intermediate_size": 56}, "w1 is of shape (8, 24, 32), config.json makes it (8, 56, 32)"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_local_experts": 7}, "no place for: model.layers.0.block_sparse_moe.experts.7.w1.weight"),
    ):
        (hf / "config.json").write_text(json.dumps({**good, **changes}))
        refused(message, convert_from_hf, hf, out)
    (hf / "config.json").write_text(json.dumps(good))
    (weights,) = hf.glob("*.safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused("(a file cut short?)", convert_from_hf, hf, out)
    weights.write_bytes(bytes([data[0] ^ 4]) + data[1:])
    refused("is broken: its header", convert_from_hf, hf, out)
    weights.unlink()
    refused("holds no weights", convert_from_hf, hf, out)


def test_megatron_folders(tmp_path: Path, refused: Refuse) -> None:
    step, theirs, out = make_checkpoint(tmp_path / "run"), tmp_path / "theirs", tmp_path / "out"
    to_megatron(step, theirs, verify=False)
    to_hf(step, tmp_path / "hf", verify=False)
    own = tmp_path / "wide.toml"
    own.write_text(to_toml(configure(**{"moe.expert_dim": 32})))
    refused("nowhere: no such folder", convert_to_megatron, tmp_path / "nowhere", out)
    refused("hf is there already", convert_to_megatron, step, tmp_path / "hf")
    refused("invalid choice: 'apex'", convert_to_megatron, step, out, "--spec", "apex")
    refused("nowhere does not say which model it holds", convert_from_megatron, tmp_path / "nowhere", out)
    refused("hf is not a checkpoint of torch.distributed", convert_from_megatron, tmp_path / "hf", out)
    refused("(8, 24, 32) there, (8, 32, 32)", convert_from_megatron, theirs, out, "--job.config_file", own)
    refused("cannot be read", convert_from_megatron, theirs, out, "--job.config_file", tmp_path / "none.toml")

    shutil.copytree(theirs, tmp_path / "broken")
    file = max((tmp_path / "broken").glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    middle = len(data) // 2
    for wrong, message in (
        (data[:middle], f"{file.name} cannot be read (BadZipFile)"),
        (b"", f"{file.name} cannot be read (BadZipFile)"),
        (data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :], "does not have its checksum"),
    ):
        file.write_bytes(wrong)
        refused(message, convert_from_megatron, tmp_path / "broken", out)
    file.write_bytes(data[:middle])
    refused("cannot be read (RuntimeError)", convert_from_megatron, tmp_path / "broken", out, "--no_verify")
    file.unlink()
    refused(f"{file.name} cannot be read (No such file", convert_from_megatron, tmp_path / "broken", out)
    refused("cannot be read (No such file", convert_from_megatron, tmp_path / "broken", out, "--no_verify")


@pytest.mark.parametrize("size", [0, 20_000])
def test_full_disk_for_megatron(tmp_path: Path, refused: Refuse, size: int) -> None:
    step = make_checkpoint(tmp_path / "run")
    with LimitedFileSize(size):
        refused("File too large", convert_to_megatron, step, tmp_path / "out", "--no_verify")
    to_megatron(step, tmp_path / "theirs", verify=False)
    with LimitedFileSize(size):
        refused("File too large", convert_from_megatron, tmp_path / "theirs", tmp_path / "out", "--no_verify")


def test_a_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    """As Ctrl-C; after the block the signal is what it was before."""
    before = signal.getsignal(signal.SIGTERM)

    def convert() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        convert()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
