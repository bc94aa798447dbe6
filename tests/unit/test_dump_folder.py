"""What a dump folder's run may change on its way, what makes it another one, and how it is written down."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titan_moe.checkpoint import save_checkpoint
from titan_moe.config import Config, load_config, to_toml
from titan_moe.convert.hf.card import model_card
from titan_moe.data.tokenizer import bytes_tokenizer, train_bpe
from titan_moe.dump_folder import changes_on_the_way, check_same_run, read_facts, write_run_files
from titan_moe.job import Job
from titan_moe.runtime.world import Runtime

BASE = {
    **{"model.dim": 32, "model.num_heads": 2, "model.num_layers": 2, "model.vocab_size": 320, "moe.num_experts": 4},
    **{"training.global_batch_size": 8, "training.local_batch_size": 4, "balancer.aux_loss.coeff": 0.1},
    **{"optimizer.lr": 1e-3, "data.dataset": "text", "data.path": "a.txt", "data.tokenizer": "bytes"},
}
TOKENIZER = bytes_tokenizer()
OTHER_TOKENIZER = train_bpe(["some words to learn from"], 260)


@pytest.fixture(autouse=True)
def _words(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("titan_moe"), "propagate", True)
    caplog.set_level(logging.WARNING)


def configure(**changes: Any) -> Config:
    """BASE with changes, by key with __ for the dot."""
    values = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return load_config(words)


def make_job(folder: Path, config: Config, *, data: str = "text1", tokenizer: Any = TOKENIZER, world: int = 1) -> Job:
    """The parts of a job that say what it is."""
    fingerprints = {"data": data, "tokenizer": tokenizer.fingerprint}
    parts: Any = dict.fromkeys(Job._fields)
    parts |= {
        "config": config,
        "model": torch.nn.Linear(1, 1),
        "folder": folder,
        "runtime": Runtime(0, world, 0, torch.device("cpu")),
    }
    empty = {"validation_sets": {}, "tasks": {}, "packing": {}}
    return Job(**parts | {"data": SimpleNamespace(tokenizer=tokenizer, fingerprints=fingerprints, **empty)})


def save(job: Job, step: int, fingerprint: str = "", text: str = "") -> Path:
    """A checkpoint of the job, as training leaves them; `text` in place of its config.toml."""
    data = job.data.fingerprints
    fingerprint = fingerprint or f"{data['data']}-{data['tokenizer']}-{job.config.training.seq_len}"
    files = {"config.toml": text or to_toml(job.config), **job.data.tokenizer.files}
    if (job.folder / "run.json").exists():
        files["run.json"] = (job.folder / "run.json").read_text()
    extra = {"num_tokens": 8, "data": {"sequences": 8, "fingerprint": fingerprint}}
    arguments: dict[str, Any] = {"optimizer": None, "extra": extra, "files": files, "keep_latest_k": 0}
    return save_checkpoint(job.folder / "checkpoint", step, model=torch.nn.Linear(1, 1), **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The dump folder of a run of BASE that has come to step 20."""
    job = make_job(tmp_path / "run", configure())
    job.folder.mkdir()
    write_run_files(job, 0)
    (job.folder / "metrics.jsonl").write_text('{"step": 20, "kind": "train", "loss": 1.0}\n')
    save(job, 20)
    return job.folder


def refusal(job: Job, *, checkpoint: bool = True) -> str:
    """The line that refuses the job in its folder, empty if none does; nothing is written."""
    before = {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}
    try:
        check_same_run(job, job.folder / "checkpoint" / "step-20" if checkpoint else None)
    except ValueError as error:
        return str(error)
    finally:
        assert before == {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file()}
    return ""


# what makes another run of it: changes -> parts of the line
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "router": ({"router__name": "sigmoid", "moe__top_k": 1}, ["router.name: 'topk_softmax', now 'sigmoid'"]),
    "rate": ({"optimizer__lr": 0.03}, ["optimizer.lr: 0.001, now 0.03"]),
    "rate of a group": ({"optimizer__expert__lr": 0.03}, ["optimizer.expert.lr: unset, now 0.03"]),
    "rates by load": ({"optimizer__expert__load_lr": "batch_fraction"}, ["optimizer.expert.load_lr: unset, now "]),
    "schedule": ({"lr_scheduler__warmup_steps": 7}, ["lr_scheduler.warmup_steps: 300, now 7"]),
    "coefficient": ({"balancer__aux_loss__coeff": 0.2}, ["balancer.aux_loss.coeff: 0.1, now 0.2"]),
    "balancer": ({"balancer__z_loss__coeff": 0.2}, ["balancer.z_loss.coeff: unset, now 0.2"]),
    "seed": ({"training__seed": 7}, ["training.seed: 42, now 7"]),
    "sequences": ({"training__global_batch_size": 16}, ["training.global_batch_size: 8, now 16"]),
    "length": ({"training__seq_len": 64}, ["training.seq_len: 512, now 64"]),
    "type": ({"training__dtype": "bfloat16"}, ["training.dtype: 'float32', now 'bfloat16'"]),
    "positions": ({"model__rope_theta": 5e5}, ["model.rope_theta: 10000.0, now 500000.0"]),
    "epsilon": ({"model__norm_eps": 1e-6}, ["model.norm_eps: 1e-05, now 1e-06"]),
    "temperature": ({"router__temperature": 0.5}, ["router.temperature: 1.0, now 0.5"]),
    "no routing": ({"debug__force_balanced_routing": True}, ["debug.force_balanced_routing: False, now True"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_configuration_is_refused_by_its_keys(folder: Path, name: str) -> None:
    """With a checkpoint and, where metrics were recorded, without one; allowed where asked for, with a warning."""
    changes, parts = OTHERS[name]
    for checkpoint in (True, False):
        line = refusal(make_job(folder, configure(**changes)), checkpoint=checkpoint)
        for part in (*parts, str(folder), "give another job.dump_folder", "job.allow_config_change = true"):
            assert part in line
        assert "\n" not in line
    assert not refusal(make_job(folder, configure(**changes, job__allow_config_change=True)))


def test_a_change_that_is_allowed_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not refusal(make_job(folder, configure(optimizer__lr=0.03, job__allow_config_change=True)))
    assert "optimizer.lr: 0.001, now 0.03" in caplog.text


MODELS: dict[str, dict[str, Any]] = {
    "width": {"model__dim": 64},
    "heads": {"model__num_heads": 4},
    "shared heads": {"model__num_kv_heads": 1},
    "layers": {"model__num_layers": 3},
    "experts": {"moe__num_experts": 8},
    "dense layers": {"moe__first_dense_layers": 1},
    "norms": {"model__qk_norm": True},
    "head": {"model__tie_embeddings": False},
    "bias": {"balancer__loss_free__rate": 0.1},
    "parametrization": {"parametrization__name": "mup", "parametrization__base_dim": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("allowed", [False, True])
def test_another_model_is_never_allowed(folder: Path, name: str, allowed: bool) -> None:
    line = refusal(make_job(folder, configure(**MODELS[name], job__allow_config_change=allowed)))
    key = next(iter(MODELS[name])).replace("__", ".")
    assert "is of another model: " in line
    assert f"{key}: " in line
    assert "checkpoint.initial_load_path" in line


@pytest.mark.parametrize("allowed", [False, True])
def test_another_tokenizer_is_never_allowed(folder: Path, allowed: bool) -> None:
    """By its content: the same name may stand for others, other names for the same."""
    config = configure(job__allow_config_change=allowed)
    line = refusal(make_job(folder, config, tokenizer=OTHER_TOKENIZER))
    assert "is of another tokenizer: data.tokenizer (content): " in line
    assert f"data.tokenizer = '{folder / 'checkpoint' / 'step-20'}'" in line
    named = configure(job__allow_config_change=allowed, data__tokenizer="moved/tokenizer.json")
    assert "data.tokenizer: 'bytes', now 'moved/tokenizer.json'" in refusal(
        make_job(folder, named, tokenizer=OTHER_TOKENIZER)
    )
    assert not refusal(make_job(folder, named))


def test_a_fingerprint_by_another_version_of_the_library(folder: Path) -> None:
    """The tokenizer in the checkpoint is asked, too."""
    job = make_job(folder, configure())
    save(job, 20, "text1-0123456789abcdef-512")
    assert not refusal(job)


SAME: dict[str, dict[str, Any]] = {
    "smaller micro-batches": {"training__local_batch_size": 2},
    "the batch that -1 is": {"training__global_batch_size": -1, "training__local_batch_size": 8},
    "layout": {"parallelism__fsdp_reshard_after_forward": "never", "activation_checkpoint__mode": "full"},
    "speed": {"training__loss_chunk_tokens": 512, "data__num_workers": 2, "compile__enable": True},
    "determinism": {"training__deterministic": True},
    "cache": {"data__cache_folder": "elsewhere"},
    "the end of a text by its name": {"data__eot_token": "<|endoftext|>"},
    "moved data": {"data__path": "moved/a.txt"},
    "records": {"metrics__log_freq": 1, "validation__freq": 7, "checkpoint__interval": 3, "job__description": "x"},
    "heads in other words": {"model__num_kv_heads": 2},
    "a group's rate in other words": {"optimizer__expert__lr": 1e-3},
    "rates by load that are off": {"optimizer__expert__load_lr": "none", "optimizer__expert__load_lr_ema": 0.5},
}


@pytest.mark.parametrize("name", SAME)
def test_what_computes_the_same_is_the_same_run(folder: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    assert not refusal(make_job(folder, configure(**SAME[name])))
    assert not caplog.records


def test_a_longer_run_is_the_same_with_other_rates(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not refusal(make_job(folder, configure(training__steps=60000)))
    assert "learning rates are those of a cosine schedule over 60000 steps from here on" in caplog.text
    caplog.clear()
    assert not refusal(make_job(folder, configure(training__steps=20)))  # it has ended there
    assert not caplog.records


def test_other_data_under_the_same_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = refusal(make_job(folder, configure(), data="text2"))
    assert "data.path (content): 'text1', now 'text2'" in line
    assert "job.allow_config_change" in line
    assert not refusal(make_job(folder, configure(job__allow_config_change=True), data="text2"))
    assert "'text1', now 'text2'" in caplog.text
    line = refusal(make_job(folder, configure(data__validation_fraction=0.5), data="text2"))
    assert "data.validation_fraction: 0.01, now 0.5" in line
    assert "content" not in line


def test_a_stream_of_a_newer_revision_goes_on(folder: Path) -> None:
    """Its owner may have mended a page that says what it is; the loader warns. Another one is refused."""
    stream = {"data__dataset": "hf", "data__path": "someone/texts"}
    save(make_job(folder, configure(**stream), data="someone/texts:@abc-1"), 20)
    assert not refusal(make_job(folder, configure(**stream), data="someone/texts:@def"))
    other = make_job(folder, configure(**{**stream, "data__path": "someone/else"}), data="someone/else:@abc")
    assert "data.path: ['someone/texts'], now ['someone/else']" in refusal(other)


def test_a_batch_that_follows_the_processes_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configure(training__global_batch_size=-1)
    save(make_job(folder, config), 20)
    check_same_run(make_job(folder, config), folder / "checkpoint" / "step-20")
    assert not caplog.records
    job = make_job(folder, configure(training__global_batch_size=-1, training__local_batch_size=6))
    check_same_run(job, folder / "checkpoint" / "step-20")
    assert "a step has 6 sequences from here on, it had 4" in caplog.text


def test_another_optimizer_is_asked_for_by_exclude(folder: Path) -> None:
    """Of [optimizer] alone."""
    asked = {"checkpoint__exclude": "optimizer", "optimizer__name": "muon"}
    assert not refusal(make_job(folder, configure(**asked)))
    line = refusal(make_job(folder, configure(**asked, training__seed=1)))
    assert "training.seed" in line
    assert "optimizer.name" not in line


def test_a_folder_without_records_is_free(folder: Path) -> None:
    job = make_job(folder, configure(training__seed=7, model__dim=64))
    (folder / "metrics.jsonl").write_text("")
    assert not refusal(job, checkpoint=False)
    (folder / "metrics.jsonl").unlink()
    assert not refusal(job, checkpoint=False)


def test_a_configuration_that_cannot_be_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key of it may have gone since; whoever knows better may go on."""
    (folder / "config.toml").write_text("[model]\nwings = 2\n")
    assert "model.wings" in (line := refusal(make_job(folder, configure()), checkpoint=False))
    assert "job.allow_config_change = true" in line
    job = make_job(folder, configure(job__allow_config_change=True))
    assert not refusal(job, checkpoint=False)
    assert "model.wings" in caplog.text
    save(job, 20, text="[model]\nwings = 2\n")
    assert not refusal(job)
    write_run_files(job, 20)
    assert "model.wings" in read_facts(folder)["history"][-1]["changes"]["config.toml"][0]


def test_keys_that_are_newer_than_a_checkpoint_are_no_difference(folder: Path) -> None:
    """What an old config.toml does not have is at its default: the line goes, the file means the same."""
    text = to_toml(configure())
    old = "".join(line + "\n" for line in text.splitlines() if not line.startswith(("norm_eps", "jitter", "beta1")))
    assert len(old) < len(text)
    (folder / "config.toml").write_text(old)
    assert not refusal(make_job(folder, configure()), checkpoint=False)
    assert "model.norm_eps" in refusal(make_job(folder, configure(model__norm_eps=1e-6)), checkpoint=False)


def test_run_json_keeps_a_history(folder: Path) -> None:
    """Of each start: its facts, the step it went on from, what it changed; the latest facts stand outside of it."""
    assert not refusal(make_job(folder, configure()))
    write_run_files(make_job(folder, configure(optimizer__lr=2e-3, training__steps=7), world=2), 20)
    facts = json.loads((folder / "run.json").read_text())
    first, second = facts["history"]
    assert (first["step"], first["changes"], first["world_size"]) == (0, {}, 1)
    assert (second["step"], second["world_size"], facts["world_size"]) == (20, 2, 2)
    assert second["changes"] == {"optimizer.lr": [0.001, 0.002], "training.steps": [50000, 7]}
    assert {"time", "host", "torch", "titan_moe", "git_commit", "data", "tokenizer"} <= set(first) & set(facts)
    assert (folder / "config.toml").read_text() == to_toml(configure(optimizer__lr=2e-3, training__steps=7))


def test_a_run_json_from_before_there_was_a_history(folder: Path) -> None:
    facts = json.loads((folder / "run.json").read_text())
    del facts["history"]
    (folder / "run.json").write_text(json.dumps(facts))
    write_run_files(make_job(folder, configure()), 20)
    first, second = json.loads((folder / "run.json").read_text())["history"]
    assert first == facts
    assert (second["step"], second["changes"]) == (20, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"history": 1}', '{"history": [1]}'])
def test_a_damaged_run_json_is_put_aside(folder: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (folder / "run.json").write_text(text)
    write_run_files(make_job(folder, configure()), 20)
    assert (folder / "run.json.damaged").read_text() == text
    assert "run.json is damaged" in caplog.text
    assert len(json.loads((folder / "run.json").read_text())["history"]) == 1


def test_the_model_card_tells_what_has_changed(folder: Path) -> None:
    """Of the way to this checkpoint: not of starts that a later one has left behind."""
    step = folder / "checkpoint" / "step-20"
    assert "Changed on the way" not in model_card(step, configure(), "mixtral")
    write_run_files(make_job(folder, configure(optimizer__lr=9e-3)), 20)  # killed before it saved
    write_run_files(make_job(folder, configure(optimizer__lr=2e-3, training__steps=7)), 20)
    save(make_job(folder, configure(optimizer__lr=2e-3)), 30)
    write_run_files(make_job(folder, configure(optimizer__lr=2e-3, training__seed=1)), 30)
    step = save(make_job(folder, configure(optimizer__lr=2e-3, training__seed=1)), 40)
    expected = "| Changed on the way | after step 20: optimizer.lr: 0.001, now 0.002. after step 30: training.seed: 42"
    assert expected in model_card(step, configure(), "mixtral")
    assert "training.seed" not in model_card(folder / "checkpoint" / "step-30", configure(), "mixtral")
    write_run_files(make_job(folder, configure(training__seed=2)), 20)  # from step 20 once more
    assert [(s, list(changes)) for s, changes in changes_on_the_way(folder)] == [(20, ["training.seed"])]


def test_code_that_the_folder_names_is_not_run(folder: Path) -> None:
    """Whoever wrote the checkpoint: what this run does not name itself is a difference, and no more."""
    job, text = make_job(folder, configure()), to_toml(configure())
    save(job, 20, text=text.replace('name = "topk_softmax"', 'name = "no_such_module:router"'))
    assert "router.name: 'no_such_module:router', now 'topk_softmax'" in refusal(job)
    save(job, 20, text=text + '[balancer."no_such_module:balancer"]\nrate = 1.0\n')
    assert "balancer.no_such_module:balancer.rate: 1.0, now unset" in refusal(job)
