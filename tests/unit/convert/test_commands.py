"""Conversions as commands: what is refused, what is left behind, what the check finds. transformers is not needed."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.interop.models import configure, make_checkpoint
from tests.unit.checkpoint.test_store import LimitedFileSize, flip_bit
from titan_moe.checkpoint import load_model
from titan_moe.checkpoint.lazy import lazy, read_lazily, sharded, stacked, unstacked, write_lazily
from titan_moe.convert.cli import convert_from_hf, convert_to_hf
from titan_moe.convert.hf.architectures import architecture_of
from titan_moe.convert.hf.convert import from_hf, to_hf
from titan_moe.convert.verify import check_equal, compare, our_forward
from titan_moe.runtime import command


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    logger = logging.getLogger("titan_moe")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def run(main: Callable[[list[str]], int], *words: object) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    err = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["command", *map(str, words)]),
        mock.patch("faulthandler.enable"),
        mock.patch("titan_moe.runtime.command.end_process", sys.exit),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        command.run_command(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code, err.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_commands_there_and_back(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    code, err = run(convert_to_hf, tmp_path / "run", tmp_path / "hf", "--no_verify", "--dtype", "bfloat16")
    assert (code, "mixtral, bfloat16" in err) == (0, True)
    assert run(convert_from_hf, tmp_path / "hf", tmp_path / "back", "--no_verify")[0] == 0
    after = load_model(tmp_path / "back")[0].state_dict()
    for name, value in load_model(step)[0].state_dict().items():
        assert torch.equal(after[name], value.bfloat16().float()), name
    assert names(tmp_path) == ["back", "hf", "run"]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    before = names(tmp_path)
    out = tmp_path / "out"
    cases: list[tuple[Callable[[list[str]], int], list[object], str]] = [
        (convert_to_hf, [tmp_path / "nowhere", out], "nowhere: no such folder"),
        (convert_to_hf, [tmp_path / "empty", out], "no complete step-N folder"),
        (convert_to_hf, [step, tmp_path / "empty"], "empty is there already"),
        (convert_to_hf, [step, out, "--dtype", "int8"], "invalid choice: 'int8'"),
        (convert_to_hf, [step, out, "--shard_gb", "0"], "--shard_gb (0.0) must be above 0"),
        (convert_to_hf, [step], "out_dir"),
        (convert_from_hf, [tmp_path / "nowhere", out], "nowhere is not a folder"),
        (convert_from_hf, [tmp_path / "empty", out], "holds no weights"),
        (convert_from_hf, [step, out], "holds no weights"),
    ]
    for main, words, message in cases:
        code, err = run(main, *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith("error: ")
        assert message in err
        assert names(tmp_path) == before
    flip_bit(step / "__0_0.distcp")
    code, err = run(convert_to_hf, step, out)
    assert (code, "does not have its checksum" in err, names(tmp_path)) == (2, True, before)
    (step / ".metadata").unlink()
    code, err = run(convert_to_hf, step, out)
    assert (code, ".metadata is missing" in err, names(tmp_path)) == (2, True, before)


@pytest.mark.parametrize("size", [0, 20_000])
def test_full_disk(tmp_path: Path, size: int) -> None:
    """The kernel refuses a write, at once or within the weights."""
    step = make_checkpoint(tmp_path / "run")
    with LimitedFileSize(size):
        code, err = run(convert_to_hf, step, tmp_path / "hf", "--no_verify")
    assert (code, err) == (2, "error: File too large\n")
    assert names(tmp_path) == ["run"]
    to_hf(step, tmp_path / "hf", verify=False)
    with LimitedFileSize(size):
        code, err = run(convert_from_hf, tmp_path / "hf", tmp_path / "back", "--no_verify")
    assert code == 2
    assert "File too large" in err
    assert names(tmp_path) == ["hf", "run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router.name": "expert_choice"}, "router.name = 'expert_choice' has no counterpart"),
        ({"moe.num_identity_experts": 2}, "moe.num_identity_experts = 2 has no counterpart"),
        ({"router.name": "sinkhorn"}, "router.name = 'sinkhorn' has no counterpart"),
        ({"router.num_groups": 2, "router.topk_groups": 1}, "router.num_groups = 2 has a counterpart"),
        (
            {"router.name": "sigmoid", "moe.layer_freq": 2, "model.num_layers": 4},
            "moe.layer_freq = 2 has no counterpart",
        ),
        ({"router.name": "sigmoid", "router.num_groups": 4, "router.topk_groups": 2}, "top_k / topk_groups must be 2"),
        (
            {"model.qk_norm": True, "moe.num_shared_experts": 1},
            "model.qk_norm = 'head' with moe.num_shared_experts = 1",
        ),
    ],
)
def test_models_without_a_counterpart(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        architecture_of(configure(**changes))
    assert message in str(error.value)


def test_a_bias_that_softmax_architectures_lack(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run", **{"balancer.loss_free": True})
    with pytest.raises(ValueError, match=r"layers\.0\.moe\.expert_bias is not 0, but mixtral has no selection bias"):
        to_hf(step, tmp_path / "hf")
    assert names(tmp_path) == ["run"]


def test_values_that_a_type_cannot_hold(tmp_path: Path) -> None:
    config_changes = {"moe.num_experts": 0}
    step = make_checkpoint(tmp_path / "run", **config_changes)
    tensors = read_lazily(step)
    name = "model.layers.0.attention.wq.weight"
    tensors[name] = tensors[name].map(lambda value: value * 1e6)
    from titan_moe.checkpoint.store import save_lazily

    files = {"config.toml": (step / "config.toml").read_text()}
    big = save_lazily(tmp_path / "big", 1, tensors, optimizer=None, values={}, extra={}, files=files)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight holds values that float16 cannot"):
        to_hf(big, tmp_path / "hf", dtype="float16", verify=False)
    assert names(tmp_path) == ["big", "run"]
    to_hf(big, tmp_path / "hf", dtype="bfloat16", verify=False)


def test_the_check_finds_a_wrong_conversion(tmp_path: Path) -> None:
    """A swapped gate and up, a flipped order of softmax, another theta: each is refused; the same model is not."""
    step = make_checkpoint(tmp_path / "run")
    good, config = load_model(step)
    check_equal(compare(our_forward(good), our_forward(load_model(step)[0]), config.model.vocab_size), "itself")
    swapped = load_model(step)[0]
    experts = swapped.layers[0].moe.experts
    experts.w1.data, experts.w3.data = experts.w3.data, experts.w1.data
    far = load_model(step)[0]
    far.rotation = far.rotation._replace(theta=5e5)
    other = load_model(make_checkpoint(tmp_path / "other", **{"router.name": "softmax_topk"}))[0]
    for wrong in (swapped, far, other):
        with pytest.raises(ValueError, match="check of the conversion failed: largest logit difference"):
            check_equal(compare(our_forward(good), our_forward(wrong), config.model.vocab_size), "itself")
    broken = load_model(step)[0]
    broken.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        compare(our_forward(broken), our_forward(good), config.model.vocab_size)


def test_the_model_card_says_what_the_run_recorded(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run", **{"job.description": "a test of cards", "data.path": "/x/y/text.jsonl"})
    records = [
        {"step": 2, "kind": "train", "loss": 3.25},
        {"step": 3, "kind": "train", "loss": None},
        {"step": 3, "kind": "validation", "loss": 3.125},
        {"step": 4, "kind": "train", "loss": 1.0},
    ]
    lines = [json.dumps(record) for record in records]
    torn = lines[0][: len(lines[0]) // 2]  # by a kill
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, torn]))
    to_hf(step, tmp_path / "hf", verify=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in (
        "a test of cards",
        "3.2500 at step 2",
        "3.1250 at step 3",
        "1,234",
        "`text.jsonl`",
        "8 experts",
        "3 of",
    ):
        assert part in card
    assert "/x/y" not in card
    assert "1.0000" not in card


def test_words_of_others_are_text_in_the_model_card(tmp_path: Path) -> None:
    words = "<img src=x onerror=alert(1)> [a](javascript:1) ``` | ---\n# a title"
    changes = {"job.description": words, "data.path": "/x/`<img src=x>`|.jsonl", "job.dump_folder": "/x/<img src=x>"}
    to_hf(make_checkpoint(tmp_path / "run", **changes), tmp_path / "hf", verify=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert r"\<img src=x onerror=alert(1)> \[a](javascript:1) \`\`\` \| --- # a title" in card
    assert r"`stdlib` `'<img src=x>'\|.jsonl` |" in card
    assert "\n# \\<img src=x>\n" in card


def test_lazy_tensors(tmp_path: Path) -> None:
    """Written and read one at a time, in any shape and type; a whole tensor is read once for its rows."""
    values = {
        "a": torch.randn(3, 4, 5),
        "b.c": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "count": torch.arange(5),
    }
    loads = []

    def noted(name: str) -> Any:
        made = lazy(values[name])
        return made._replace(load=lambda: [loads.append(name), made.load()][1])

    write_lazily(tmp_path, {name: noted(name) for name in values})
    assert sorted(loads) == sorted(values)
    again = read_lazily(tmp_path)
    assert again.keys() == values.keys()
    for name, value in values.items():
        assert (again[name].shape, again[name].dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(again[name].load(), value)
    loads.clear()
    parts = unstacked(noted("a"))
    assert torch.equal(torch.stack([part.load() for part in parts]), values["a"])
    assert torch.equal(stacked(parts).load(), values["a"])
    assert loads == ["a", "a"]
    write_lazily(tmp_path / "sharded", {"a": sharded(parts), "c": lazy(values["count"])})
    part = read_lazily(tmp_path / "sharded")["a"]
    assert len(part.rows) == 3
    assert torch.equal(part.rows[1].load(), values["a"][1])
    assert torch.equal(part.load(), values["a"])
    assert not read_lazily(tmp_path)["a"].rows
    with pytest.raises(ValueError, match=r"has no \.metadata"):
        read_lazily(tmp_path / "nowhere")
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        read_lazily(tmp_path)


def test_from_hf_into_a_step_folder(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    to_hf(step, tmp_path / "hf", verify=False)
    from_hf(tmp_path / "hf", tmp_path / "new" / "checkpoint" / "step-12", verify=False)
    assert names(tmp_path / "new" / "checkpoint") == ["step-12"]
    assert json.loads((tmp_path / "new/checkpoint/step-12/manifest.json").read_text())["body"]["step"] == 12
    load_model(tmp_path / "new")
