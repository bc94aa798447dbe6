"""generate and evaluate on a checkpoint, and --help of every verb."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.e2e.harness import Ended, command, contents, records, tiny_config, write_text
from titan_moe.checkpoint import load_model
from titan_moe.data.tokenizer import load_tokenizer

SEQ = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned a little, with a loss_free bias, validated on 4 of its batches; its data beside it."""
    folder = tmp_path_factory.mktemp("verbs")
    changes = {
        "data.path": [str(write_text(folder / "text.jsonl"))],
        "data.cache_folder": str(folder / "cache"),
        "training.steps": 25,
        "training.seq_len": SEQ,
        "validation.freq": 25,
        "validation.steps": 4,
        "checkpoint.interval": 20,
    }
    config = tiny_config(folder / "config.toml", changes)
    ended = command("train", ["--job.config_file", str(config), "--job.dump_folder", str(folder / "run")])
    assert ended.code == 0, ended.err
    return folder / "run"


def generate(run: Path, **options: object) -> Ended:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return command("generate", ["--checkpoint", str(run), *words])


def evaluate(run: Path, *words: str) -> Ended:
    return command("evaluate", ["--checkpoint", str(run), *words])


def numbers(ended: Ended) -> dict[str, float]:
    """The numbers of the whole, which stand above the table of its parts."""
    assert ended.code == 0, ended.err
    return {name: float(value) for name, value in map(str.split, ended.out.partition("\n\n")[0].splitlines())}


@pytest.mark.parametrize("prompt", ["the cat", "", "our big red house ran far from the blue sky " * 3])
def test_greedy_text_is_the_argmax_by_hand(run: Path, prompt: str) -> None:
    """For prompts shorter and longer than the context (16 tokens), and for none."""
    model, _ = load_model(run)
    tokenizer = load_tokenizer(str(run / "checkpoint" / "step-25" / "tokenizer.json"))
    tokens = tokenizer.encode(prompt) or [tokenizer.eot_id]
    new: list[int] = []
    for _ in range(24):
        logits, _ = model(torch.tensor([(tokens + new)[-SEQ:]]))
        token = int(logits[0, -1, : tokenizer.vocab_size].argmax())
        if token == tokenizer.eot_id:
            break
        new.append(token)
    ended = generate(run, prompt=prompt, temperature=0, max_new_tokens=24)
    assert (ended.code, ended.out) == (0, prompt + tokenizer.decode(new) + "\n")
    assert new


def test_the_seed_decides_the_text(run: Path) -> None:
    options = {"prompt": "the ", "max_new_tokens": 40}
    texts = [generate(run, seed=seed, **options).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the ")
    greedy = generate(run, temperature=0, **options).out
    assert generate(run, top_k=1, seed=3, **options).out == greedy
    assert generate(run, temperature=1e-4, top_k=0, **options).out == greedy
    assert generate(run / "checkpoint" / "step-25", temperature=0, **options).out == greedy
    assert generate(run / "checkpoint" / "step-20", temperature=5.0, **options).out != greedy


def test_bad_arguments_of_generate(run: Path) -> None:
    cases = {
        "--prmpt": (["--checkpoint", str(run), "--prmpt", "x"], "--prmpt"),
        "no checkpoint": (["--prompt", "x"], "--checkpoint"),
        "no such folder": (["--checkpoint", str(run / "nowhere")], "nowhere: no such folder"),
        "no checkpoint inside": (["--checkpoint", str(run.parent / "cache")], "no complete step-N folder"),
        "no number": (["--checkpoint", str(run), "--temperature", "warm"], "--temperature"),
        "negative": (["--checkpoint", str(run), "--temperature", "-1"], "--temperature (-1.0) must be at least 0"),
        "nan": (["--checkpoint", str(run), "--temperature", "nan"], "--temperature (nan) must be at least 0"),
        "latin-1": (["--checkpoint", str(run), "--prompt", "caf\udce9"], "must be UTF-8 text"),
        "no tokens": (["--checkpoint", str(run), "--max_new_tokens", "0"], "--max_new_tokens (0)"),
    }
    for name, (words, part) in cases.items():
        ended = command("generate", words)
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), name
        assert ended.err.startswith("error: ")
        assert part in ended.err


def test_evaluation_gives_the_numbers_of_the_run(run: Path) -> None:
    before = contents(run)
    found = numbers(evaluate(run))
    expected = records(run, "validation")[-1]
    assert expected.pop("step") == 25
    expected = {key: value for key, value in expected.items() if not key.startswith("load/")}  # for reports only
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["num_tokens"] == 4 * 8 * SEQ
    assert numbers(evaluate(run / "checkpoint" / "step-20"))["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    other_batches = numbers(evaluate(run, "--validation.local_batch_size", "32", "--validation.steps", "1"))
    assert other_batches == pytest.approx(expected, rel=1e-5)
    assert contents(run) == before


def test_evaluation_of_a_file_is_of_all_of_it(run: Path, tmp_path: Path) -> None:
    """Loss, accuracy and bits per byte as computed by hand, over more than the run's validation.steps."""
    texts = ["the blue cat sat on a mat. " * 30, "der große Hund läuft. " * 20]
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(str(run / "checkpoint" / "step-25" / "tokenizer.json"))
    ids = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eot_id)]
    size = (len(ids) - 1) // SEQ * SEQ
    assert size > 4 * 8 * SEQ
    tokens, labels = (torch.tensor(ids[start : start + size]).view(-1, SEQ) for start in (0, 1))
    model, _ = load_model(run)
    with torch.no_grad():
        log_p = model(tokens)[0].double().log_softmax(-1)
    loss_sum = -log_p.gather(-1, labels[..., None]).sum().item()
    num_bytes = int((labels != tokenizer.eot_id).sum())  # the tokens are bytes
    found = numbers(evaluate(run, "--data.path", str(file)))
    assert found["num_tokens"] == size
    assert found["loss"] == pytest.approx(loss_sum / size, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss_sum / size), rel=1e-5)
    assert found["accuracy"] == pytest.approx((log_p.argmax(-1) == labels).double().mean().item())
    assert found["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / num_bytes, rel=1e-6)
    assert numbers(evaluate(run, f"--data.path={file}", "--validation.steps", "1"))["num_tokens"] == 8 * SEQ
    two = numbers(evaluate(run, "--data.path", str(file), str(run.parent / "text.jsonl")))
    assert two["num_tokens"] > found["num_tokens"]


def test_bad_arguments_of_evaluate(run: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    at = ["--checkpoint", str(run)]
    cases = {
        "no checkpoint": ([], "arguments are required: --checkpoint"),
        "no such folder": (["--checkpoint", str(run / "nowhere")], "nowhere: no such folder"),
        "unknown key": ([*at, "--data.pth", "x"], "data.path"),
        "of the model": ([*at, "--model.dim", "64"], "--model.dim changes nothing here"),
        "of training": ([*at, "--training.seed", "1"], "--training.seed changes nothing here"),
        "word": ([*at, "x"], "unexpected word"),
        "no such file": ([*at, "--data.path", "nowhere.txt"], "nowhere.txt"),
        "short": ([*at, "--data.path", str(short)], "training.seq_len (16) is longer than the data of data.path"),
        "wrong type": ([*at, "--validation.steps", "all"], "validation.steps"),
    }
    for name, (words, part) in cases.items():
        ended = command("evaluate", words)
        assert (ended.code, ended.out) == (2, ""), name
        line = ended.err.splitlines()[-1]
        assert line.startswith("error: "), name
        assert part in line
        assert "Traceback" not in ended.err
    assert numbers(evaluate(run, "--data.path", str(short), "--training.seq_len", "4"))["num_tokens"] == 4


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate", "analyze.cli"])
def test_help(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("--help", "-h"):
        ended = command(verb, [word])
        assert (ended.code, ended.err) == (0, "")
        assert "--checkpoint" in ended.out or "[training]" in ended.out
    assert list(tmp_path.iterdir()) == []
