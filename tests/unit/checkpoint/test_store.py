"""Checkpoints in one process: exact resume, whole or absent, broken ones recognised, other models refused."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from titan_moe.build import build_model
from titan_moe.checkpoint import (
    CheckpointError,
    complete_steps,
    latest_complete,
    load_checkpoint,
    load_model,
    resolve_checkpoint,
    save_checkpoint,
)
from titan_moe.checkpoint import folder as checkpoint_folder
from titan_moe.checkpoint.verify import verify_checkpoint
from titan_moe.config import load_config, to_toml
from titan_moe.optimizer.build import OPTIMIZERS


class Tiny(nn.Module):
    """Tied embeddings, a stacked expert tensor, a buffer that is saved and one that is not."""

    def __init__(self, dim: int = 8, *, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, dim)
        self.experts = nn.Parameter(torch.randn(4, dim, dim) / dim)
        self.unused = nn.Parameter(torch.ones(3))
        self.output = nn.Linear(dim, 16, bias=bias)
        self.head = nn.Linear(dim, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("expert_bias", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = torch.einsum("bd,edf->bf", x, self.experts)
        return self.output(x) + self.head(x)


def make(seed: int = 0, lr: float = 1e-2, dim: int = 8, **options):
    torch.manual_seed(seed)
    model = Tiny(dim)
    experts = [model.experts]
    rest = [p for p in model.parameters() if p is not model.experts]
    groups = [{"params": experts, "lr": lr / 2}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr, fused=True, **options)


def train(model: Tiny, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(16, (8,)) + 0 * random.randint(0, 9) + 0 * np.random.randint(9)
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.expert_bias += torch.rand(4) + random.random() + np.random.rand()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        losses.append(loss.item())
    return losses


def save(folder: Path, step: int, model, optimizer, **changes) -> Path:
    arguments: dict[str, Any] = {
        "extra": {"position": step},
        "files": {"config.toml": "# ü\n"},
        "keep_latest_k": 0,
    } | changes
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, **arguments)


@pytest.fixture(autouse=True)
def only_warnings(caplog):
    caplog.set_level(logging.WARNING)


@pytest.fixture
def trained():
    model, optimizer = make()
    train(model, optimizer, 2)
    return model, optimizer


@pytest.fixture
def steps(tmp_path, trained):
    """A folder with steps 1, 2, 3."""
    for step in (1, 2, 3):
        save(tmp_path, step, *trained)
    return tmp_path


def test_resume_is_bit_for_bit(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 3)
    path = save(tmp_path, 3, model, optimizer, extra={"position": [1, {"a": (2, None)}]})
    assert path == tmp_path / "step-3"
    assert (path / "config.toml").read_text(encoding="utf-8") == "# ü\n"
    expected = train(model, optimizer, 3)

    again, fresh = make(seed=1, lr=0.5)
    restored = load_checkpoint(path, model=again, optimizer=fresh)
    assert restored.step == 3
    assert restored.extra == {"position": [1, {"a": (2, None)}]}
    assert [g["lr"] for g in fresh.param_groups] == [1e-2 / 2 * 0.9**3, 1e-2 * 0.9**3]
    assert again.unused not in fresh.state or not fresh.state[again.unused]  # had no state, has none
    assert train(again, fresh, 3) == expected
    assert torch.equal(again.expert_bias, model.expert_bias)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_saving_changes_nothing(tmp_path):
    """Also before the first step, where torch makes optimizer states by a fake step that would count."""
    plain, plain_optimizer = make()
    saved, saved_optimizer = make()
    torch.manual_seed(1)
    expected = train(plain, plain_optimizer, 2)
    path = save(tmp_path, 0, saved, saved_optimizer)
    torch.manual_seed(1)
    assert train(saved, saved_optimizer, 2) == expected
    loaded, loaded_optimizer = make(seed=5)
    load_checkpoint(path, model=loaded, optimizer=loaded_optimizer)
    torch.manual_seed(1)
    assert train(loaded, loaded_optimizer, 2) == expected


def test_weights_alone_leave_the_random_state(tmp_path, trained):
    path = save(tmp_path, 1, *trained)
    model = Tiny()
    before = torch.get_rng_state()
    load_checkpoint(path, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.experts, trained[0].experts)


def test_names_outlive_wrappers(tmp_path):
    """Saved under compile and activation checkpointing, loaded plain."""
    model, optimizer = make()
    train(model, optimizer, 2)
    other, other_optimizer = make()
    inner = other.output
    other.output = checkpoint_wrapper(inner)  # pyrefly: ignore[bad-assignment]
    wrapped: Any = torch.compile(other, backend="eager")
    other_optimizer = torch.optim.AdamW(
        [{"params": [other.experts], "lr": 5e-3}, {"params": [p for p in other.parameters() if p is not other.experts]}]
    )
    load_checkpoint(save(tmp_path, 1, model, optimizer), model=wrapped, optimizer=other_optimizer)
    assert torch.equal(inner.weight, model.output.weight)
    assert torch.equal(other_optimizer.state[inner.weight]["exp_avg"], optimizer.state[model.output.weight]["exp_avg"])
    plain, plain_optimizer = make(seed=3)
    load_checkpoint(save(tmp_path, 2, wrapped, other_optimizer), model=plain, optimizer=plain_optimizer)
    assert torch.equal(plain.output.weight, model.output.weight)
    assert torch.equal(plain_optimizer.state[plain.experts]["exp_avg_sq"], optimizer.state[model.experts]["exp_avg_sq"])


def test_states_keep_their_dtype(tmp_path):
    """fp32 moments of a bf16 parameter are not rounded by Optimizer.load_state_dict."""

    class Momentum(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        state.setdefault("average", torch.zeros_like(p, dtype=torch.float32)).add_(p.grad, alpha=0.3)
                        state["count"] = state.get("count", 0) + 1

    def make_one():
        model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        return model, Momentum(model.parameters(), {"lr": 0.1})

    model, optimizer = make_one()
    model.weight.grad = torch.randn(4, 4).bfloat16()
    optimizer.step()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer)
    again, fresh = make_one()
    load_checkpoint(path, model=again, optimizer=fresh)
    assert fresh.state[again.weight]["count"] == 2
    assert fresh.state[again.weight]["average"].dtype == torch.float32
    assert torch.equal(fresh.state[again.weight]["average"], optimizer.state[model.weight]["average"])


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BREAK = {
    "truncated": (lambda step: (step / "__0_0.distcp").write_bytes(b"short"), "__0_0.distcp has 5 bytes"),
    "flipped bit": (lambda step: flip_bit(step / "__0_0.distcp"), "__0_0.distcp does not have its checksum"),
    "flipped bit in the rest": (lambda step: flip_bit(step / "common.pt"), "common.pt does not have its checksum"),
    "no metadata": (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest cut": (lambda step: (step / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "manifest edited": (
        lambda step: (step / "manifest.json").write_text(
            (step / "manifest.json").read_text().replace('"world_size": 1', '"world_size": 2')
        ),
        "manifest.json was changed",
    ),
    "empty": (lambda step: [path.unlink() for path in step.iterdir()], "it has no manifest.json"),
}


@pytest.mark.parametrize("how", BREAK)
def test_broken_step_is_recognised(steps, trained, caplog, how):
    break_it, message = BREAK[how]
    break_it(steps / "step-3")
    assert latest_complete(steps) == steps / "step-2"
    assert len(caplog.records) == 1
    assert str(steps / "step-3") in caplog.text
    assert message in caplog.text
    assert f"using {steps / 'step-2'}" in caplog.text
    for refuse in (lambda path: load_checkpoint(path, model=trained[0]), resolve_checkpoint):
        with pytest.raises(ValueError, match=r"step-3 is broken") as error:
            refuse(steps / "step-3")
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_cheap_list(steps, caplog):
    (steps / "step-2" / "rank-0.pt").unlink()
    (steps / "notes").mkdir()
    (steps / "step-9").write_text("a file")
    assert complete_steps(steps) == [1, 3]
    assert "step-2 is broken: file rank-0.pt is missing" in caplog.text
    assert complete_steps(steps / "nowhere") == []
    assert latest_complete(steps / "nowhere") is None


def test_no_complete_step_is_left(tmp_path, trained, caplog):
    (save(tmp_path, 1, *trained) / ".metadata").unlink()
    assert latest_complete(tmp_path) is None
    assert "no complete one is left" in caplog.text


def test_resolve(tmp_path, trained):
    folder = tmp_path / "checkpoint"
    path = save(folder, 7, *trained)
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(str(folder)) == resolve_checkpoint(path) == path
    for wrong in (tmp_path / "nothing", path / "config.toml"):
        with pytest.raises(ValueError, match="no such folder"):
            resolve_checkpoint(wrong)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no complete step-N folder"):
        resolve_checkpoint(tmp_path / "other")


def test_a_step_that_does_not_exist(tmp_path, trained):
    with pytest.raises(CheckpointError, match=r"step-7 does not exist$"):
        load_checkpoint(tmp_path / "step-7", model=trained[0])


def test_load_model(tmp_path):
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    args = [f"--model.{key}={value}" for key, value in sizes.items()]
    config = load_config([*args, "--moe.expert_dim=8", "--balancer.loss_free.rate=0.1"])
    trained = build_model(config)
    trained.init_weights(0)
    trained.expert_biases()[0].fill_(0.5)
    files = {"config.toml": to_toml(config)}
    for step, text in ((7, files), (8, {})):
        arguments = {"model": trained, "optimizer": None, "extra": {}, "files": text, "keep_latest_k": 0}
        save_checkpoint(tmp_path / "checkpoint", step, **arguments)
    model, loaded = load_model(tmp_path / "checkpoint" / "step-7")
    assert loaded == config
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))
    assert torch.equal(model.expert_biases()[0], torch.full((8,), 0.5))
    with pytest.raises(ValueError, match=r"has no config\.toml"):
        load_model(tmp_path)


def test_another_model_is_refused(tmp_path, trained):
    path = save(tmp_path, 1, *trained)
    wider, wider_optimizer = make(dim=12)
    with pytest.raises(ValueError, match="another model") as error:
        load_checkpoint(path, model=wider, optimizer=wider_optimizer)
    assert "model.experts is (4, 8, 8) there, (4, 12, 12) here" in str(error.value)
    assert not wider_optimizer.state
    with pytest.raises(ValueError, match=r"only there: model\.output\.bias"):
        load_checkpoint(path, model=Tiny(bias=False))
    bigger = Tiny()
    bigger.extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    before = bigger.experts.clone()
    with pytest.raises(ValueError, match=r"only here: model\.extra\.0\.weight, .* and 5 more") as error:
        load_checkpoint(path, model=bigger)
    assert "\n" not in str(error.value)
    assert torch.equal(bigger.experts, before)


def test_another_optimizer_is_refused(tmp_path, trained):
    model, _ = trained
    path = save(tmp_path, 1, *trained)
    with pytest.raises(ValueError, match="AdamW there, SGD here"):
        load_checkpoint(path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"only here: optimizer\.state\..*max_exp_avg_sq"):
        load_checkpoint(path, model=model, optimizer=make(amsgrad=True)[1].__class__(model.parameters(), amsgrad=True))
    one_group = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(ValueError, match=r"parameter groups differ, embedding\.weight is with experts only here"):
        load_checkpoint(path, model=model, optimizer=one_group)
    weights = save(tmp_path, 2, model, None)
    with pytest.raises(ValueError, match="without an optimizer"):
        load_checkpoint(weights, model=model, optimizer=trained[1])


def test_hyperparameters_are_those_of_the_checkpoint(tmp_path, trained, caplog):
    """Without a word: a run puts back its own, and says itself what has changed."""
    path = save(tmp_path, 1, *trained)
    model, optimizer = make(lr=0.3, eps=1e-3)
    load_checkpoint(path, model=model, optimizer=optimizer)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8, 1e-8]
    assert not caplog.records


def test_replacing_a_step(tmp_path, trained):
    model, optimizer = trained
    path = save(tmp_path, 1, model, optimizer, files={"old.txt": "old"})
    with torch.no_grad():
        model.experts.fill_(3.0)
    assert save(tmp_path, 1, model, optimizer, files={}) == path
    assert not (path / "old.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    other = Tiny()
    load_checkpoint(path, model=other)
    assert bool((other.experts == 3.0).all())


def test_killed_between_the_renames_of_a_replacement(steps, trained):
    (steps / "step-3").rename(steps / "step-3.old")
    shutil.copytree(steps / "step-2", steps / "step-3.tmp")
    assert complete_steps(steps) == [1, 2, 3]
    assert latest_complete(steps) == steps / "step-3.old"
    assert load_checkpoint(steps / "step-3.old", model=Tiny()).extra == {"position": 3}
    save(steps, 4, *trained)
    assert sorted(p.name for p in steps.iterdir()) == ["step-1", "step-2", "step-3", "step-4"]


def test_leftovers_are_cleaned(steps, trained):
    for name in ("step-4.tmp", "step-2.old", "step-0.trash"):
        (steps / name).mkdir()
        (steps / name / "junk").write_text("junk")
    save(steps, 5, *trained)
    assert sorted(p.name for p in steps.iterdir()) == ["step-1", "step-2", "step-3", "step-5"]


def test_keep_latest(steps, trained):
    save(steps, 4, *trained, keep_latest_k=3)
    assert complete_steps(steps) == [2, 3, 4]
    (steps / "step-3" / ".metadata").unlink()  # does not count as one of the three
    save(steps, 5, *trained, keep_latest_k=3)
    assert sorted(p.name for p in steps.iterdir()) == ["step-2", "step-4", "step-5"]
    save(steps, 1, *trained, keep_latest_k=1)  # a branch from an earlier step: never removes what is newer
    assert complete_steps(steps) == [1, 2, 4, 5]


def test_a_link_to_a_step_goes_and_what_it_leads_to_stays(steps, trained, tmp_path_factory, caplog):
    """A step that was moved to another disk: removed, replaced, or left by a removal that was killed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for step, name in ((1, "step-1"), (2, "step-2"), (3, "step-3.trash")):
        (steps / f"step-{step}").rename(elsewhere / f"step-{step}")
        (steps / name).symlink_to(elsewhere / f"step-{step}")
    (steps / "step-4").symlink_to(elsewhere / "gone")
    for step in (2, 4, 5):
        save(steps, step, *trained, keep_latest_k=2)
    assert sorted(p.name for p in steps.iterdir()) == ["step-4", "step-5"]
    assert not (steps / "step-4").is_symlink()
    assert complete_steps(elsewhere) == [1, 2, 3]
    assert not caplog.records


def refuse(monkeypatch, function, pattern, number=errno.EBUSY):
    """Let a function of os fail for paths of such a name, as on NFS where another process has a file open."""
    real = getattr(os, function)

    def fail(path, *args, **kwargs):
        if fnmatch(Path(path).name, pattern):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, function, fail)


def test_a_step_that_cannot_be_removed_is_one_warning(steps, trained, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        refuse(patch, "rmdir", "step-1.*")
        for step in (4, 5, 6):
            save(steps, step, *trained, keep_latest_k=2)
        assert sorted(p.name for p in steps.iterdir()) == ["step-1.trash", "step-5", "step-6"]
        assert list((steps / "step-1.trash").iterdir()) == []  # what can be removed is
        assert [record.getMessage() for record in caplog.records] == [
            f"cannot remove {steps}/step-1.trash, which nothing reads any more: Device or resource busy: "
            "remove it by hand"
        ]
        save(steps, 1, *trained, keep_latest_k=0)
        save(steps, 7, *trained, keep_latest_k=2)  # step 1 once more, while its first one is still there
        assert sorted(p.name for p in steps.iterdir()) == ["step-1.trash", "step-1.trash.1", "step-6", "step-7"]
    save(steps, 8, *trained, keep_latest_k=2)
    assert sorted(p.name for p in steps.iterdir()) == ["step-7", "step-8"]


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_a_leftover_that_cannot_even_be_renamed(steps, trained, monkeypatch, caplog, kind):
    (steps / f"step-3.{kind}" / "junk").mkdir(parents=True)
    refuse(monkeypatch, "rename", f"step-3.{kind}", errno.EACCES)
    for _ in range(2):
        assert save(steps, 3, *trained, extra={"position": 33}) == steps / "step-3"
    assert load_checkpoint(latest_complete(steps), model=Tiny()).extra == {"position": 33}
    assert sorted(p.name for p in steps.iterdir()) == ["step-1", "step-2", "step-3", f"step-3.{kind}"]
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot remove old checkpoint files: Permission denied: {steps}/step-3.{kind}"
    ]


def test_files_with_the_names_of_steps(steps, trained, caplog):
    names = ("step-0", "step-9", "step-9.tmp", "step-9.old", "step-5.trash")
    for name in names:
        (steps / name).write_text(name)
    for step in (4, 5, 9, 10):
        save(steps, step, *trained, keep_latest_k=2)
        assert latest_complete(steps) == steps / f"step-{step}"
    left = {p.name: p.read_text() for p in steps.iterdir() if p.is_file()}
    assert left == {{"step-9": "step-9.file"}.get(name, name): name for name in names}
    assert complete_steps(steps) == [9, 10]
    assert [record.getMessage() for record in caplog.records] == [
        f"{steps}/step-9 is a file, and a step is to have that name: the file is now step-9.file"
    ]


def test_verify_checkpoint_knows_what_is_no_checkpoint(steps, capsys):
    """A removal, a save and a replacement that were killed: only the last has left a step."""
    shutil.copytree(steps / "step-1", steps / "step-0.trash")
    (steps / "step-0.trash" / ".metadata").unlink()
    shutil.copytree(steps / "step-1", steps / "step-4.tmp")
    (steps / "step-3").rename(steps / "step-3.old")
    assert verify_checkpoint([str(steps)]) == 0
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == [str(steps / name) for name in ("step-1", "step-2", "step-3.old")]
    with pytest.raises(ValueError, match="1 broken checkpoint"):
        verify_checkpoint([str(steps / "step-0.trash")])  # asked for by its name


class LimitedFileSize:
    """Every write beyond `size` bytes in a file fails, as on a full disk (EFBIG instead of ENOSPC)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.old[1]))

    def __exit__(self, *_) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 2000, 12_000, 17_000], ids=lambda size: f"{size} bytes")
def test_full_disk(steps, trained, size):
    """The kernel refuses a write: of the tensors, of the rest, of the manifest, whatever comes first."""
    with (
        LimitedFileSize(size),
        pytest.raises(CheckpointError, match=r"cannot save .*step-4: File too large") as error,
    ):
        save(steps, 4, *trained)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, OSError)
    assert sorted(p.name for p in steps.iterdir()) == ["step-1", "step-2", "step-3"]
    assert latest_complete(steps) == steps / "step-3"
    assert save(steps, 4, *trained).exists()


def test_full_disk_within_a_large_tensor(tmp_path):
    """torch.save then raises an error of its own, about its archive."""
    model, optimizer = make(dim=120)
    train(model, optimizer, 1)
    with LimitedFileSize(400_000), pytest.raises(CheckpointError, match=r"cannot save .*step-1: File too large"):
        save(tmp_path, 1, model, optimizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["write_synced", "fsync_folder", "crc32_of_json"])
def test_full_disk_while_publishing(steps, trained, monkeypatch, function):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, function, fail)
        with pytest.raises(OSError, match=r"cannot save .*No space left"):
            save(steps, 3, *trained)
    assert sorted(p.name for p in steps.iterdir()) == ["step-1", "step-2", "step-3"]
    assert latest_complete(steps) == steps / "step-3"


def test_unwritable_folder(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot save"):
        save(tmp_path / "file", 1, *trained)


@pytest.mark.parametrize("allowed", [[], [PosixPath]])
def test_what_could_not_be_read_back_is_refused(tmp_path, trained, allowed):
    """Also where another package of this process lets torch read it."""
    with torch.serialization.safe_globals(allowed):
        with pytest.raises(TypeError, match=r"common\.pt may hold numbers"):
            save(tmp_path, 1, *trained, extra={"path": PosixPath("x")})
        assert {*allowed} <= {*torch.serialization.get_safe_globals()}
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from test_store import make, save, train
model, optimizer = make(dim=400)
print("ready", flush=True)
for step in range(1, 10_000):
    train(model, optimizer, 1)
    save(Path(sys.argv[1]), step, model, optimizer, keep_latest_k=2)
    save(Path(sys.argv[1]), step, model, optimizer, keep_latest_k=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    """However a run that saves all the time dies, what it had saved is there and loads."""
    arguments = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert process.stdout.readline() == "1\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        done = [int(line) for line in process.stdout.read().split()]
    found = latest_complete(tmp_path)
    assert found is not None
    model, optimizer = make(dim=400)
    assert load_checkpoint(found, model=model, optimizer=optimizer).step >= max(done, default=1)


def test_a_thousand_files(tmp_path, trained):
    path = save(tmp_path, 1, *trained, files={f"f{i}": "x" * 50 for i in range(1000)})
    assert len(json.loads((path / "manifest.json").read_text())["body"]["files"]) == 1004
    start = time.perf_counter()
    assert complete_steps(tmp_path) == [1]
    assert latest_complete(tmp_path) == path
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("options", [{}, {"maximize": True}])
def test_a_checkpoint_of_torchs_adamw_is_one_of_ours(tmp_path, options):
    """As AdamW was saved once, with settings that only torch's class has; not where one of them means another step."""
    model, optimizer = make(**options)
    train(model, optimizer, 2)
    path = save(tmp_path, 2, model, optimizer)
    again, theirs = make(seed=1)
    ours = OPTIMIZERS["adamw"]([{"params": group["params"], "lr": 0.1} for group in theirs.param_groups])
    if options:
        with pytest.raises(ValueError, match="holds another optimizer: only there: maximize"):
            load_checkpoint(path, model=again, optimizer=ours)
        return
    load_checkpoint(path, model=again, optimizer=ours)
    torch.manual_seed(5)
    expected = train(model, optimizer, 3)
    torch.manual_seed(5)
    assert train(again, ours, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
