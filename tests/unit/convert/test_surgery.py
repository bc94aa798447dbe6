"""Plans of expert surgery, and what becomes of a checkpoint's tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.models import configure, fill
from tests.unit.convert.test_commands import _logger_as_before, names, run  # noqa: F401
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, load_model, save_checkpoint
from titan_moe.checkpoint.lazy import read_lazily
from titan_moe.checkpoint.store import read_config
from titan_moe.config import to_toml
from titan_moe.convert.surgery import (
    Expert,
    add_experts,
    change_experts,
    keep,
    merge_experts,
    prune_experts,
    revive_experts,
    similarity,
    upcycle,
)
from titan_moe.convert.surgery_cli import surgery
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.model.transformer import Transformer

LOAD = torch.tensor([5, 0, 9, 3])


def make_trained(folder: Path, **changes: Any) -> Path:
    """A checkpoint with an optimizer that has taken two steps."""
    config = configure(**{"moe.num_experts": 4, **changes})
    with torch.device("meta"):
        model = build_model(config)
    fill(model)
    optimizer = build_optimizer(config, model)
    for seed in range(2):
        tokens = tokens_of(seed)
        logits, _ = model(tokens)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    files = {"config.toml": to_toml(config), "tokenizer.json": bytes_tokenizer().to_json()}
    return save_checkpoint(
        folder / "checkpoint",
        7,
        model=model,
        optimizer=optimizer,
        extra={"num_tokens": 10, "choices": torch.zeros(3), "data": {"position": 3}},
        files=files,
        keep_latest_k=0,
    )


def tokens_of(seed: int) -> Tensor:
    return torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    return model(tokens_of(9))[0]


def resumed(folder: Path) -> tuple[Transformer, torch.optim.Optimizer, dict[str, Any]]:
    """Model and optimizer as training would go on with, built by the checkpoint's own configuration."""
    model, config = load_model(folder)
    optimizer = build_optimizer(config, model)
    restored = load_checkpoint(next((folder / "checkpoint").glob("step-*")), model=model, optimizer=optimizer)
    return model, optimizer, restored.extra


def test_plans() -> None:
    assert add_experts(LOAD, 6, 0.1) == [*map(keep, range(4)), Expert((2,), (1.0,), 0.1), Expert((0,), (1.0,), 0.1)]
    assert [e.sources[0] for e in add_experts(LOAD, 9, 0.0)[4:]] == [2, 0, 3, 1, 2]
    assert prune_experts(LOAD, 2) == [keep(0), keep(2)]
    alike = torch.eye(4)
    alike[0, 2] = alike[2, 0] = 0.9
    alike[1, 3] = alike[3, 1] = 0.5
    three = merge_experts(LOAD, 3, alike)
    assert [e.sources for e in three] == [(2, 0), (1,), (3,)]
    assert three[0].weights == pytest.approx((9 / 14, 5 / 14))
    assert [e.sources for e in merge_experts(LOAD, 2, alike)] == [(2, 0), (3, 1)]
    assert revive_experts(LOAD, 0.01, 0.2) == [keep(0), Expert((2,), (1.0,), 0.2), keep(2), keep(3)]
    assert [e.sources[0] for e in revive_experts(torch.tensor([0, 0, 9, 0]), 0.0, 0.0)] == [2, 2, 2, 2]
    for call in (
        lambda: add_experts(LOAD, 4, 0.0),
        lambda: prune_experts(LOAD, 4),
        lambda: merge_experts(LOAD, 0, alike),
    ):
        with pytest.raises(ValueError, match="--num_experts"):
            call()
    with pytest.raises(ValueError, match="leaves no expert"):
        revive_experts(LOAD, 100.0, 0.0)


@pytest.mark.parametrize("changes", [{}, {"balancer.loss_free.rate": 0.1, "optimizer.expert.load_lr": "none"}])
def test_everything_with_a_row_for_each_expert_is_carried(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Weights, router, bias and moments are those of the sources; the rest is as it was; training can go on."""
    step = make_trained(tmp_path / "run", **changes)
    plan = [keep(2), keep(0), Expert((3, 1), (0.75, 0.25))]
    change_experts(step, tmp_path / "out", lambda tensors: [plan, [keep(1), keep(2), keep(3)]], [])
    before, after = read_lazily(step), read_lazily(tmp_path / "out" / "checkpoint" / "step-7")
    assert before.keys() == after.keys()
    carried = 0
    for name, tensor in before.items():
        old, new = tensor.load(), after[name].load()
        if ".moe." not in name or old.dim() == 0:
            assert torch.equal(old, new), name
        elif "layers.0" in name:
            carried += 1
            assert torch.equal(new[:2], old[[2, 0]]), name
            torch.testing.assert_close(new[2], 0.75 * old[3] + 0.25 * old[1])
        else:
            assert torch.equal(new, old[[1, 2, 3]]), name
    assert carried == 4 + 8 + ("balancer.loss_free.rate" in changes)
    model, optimizer, extra = resumed(tmp_path / "out")
    assert extra == {"num_tokens": 10, "choices": None, "data": {"position": 3}}
    assert all(optimizer.state[p]["step"].max() == 2 for p in model.parameters())


def test_cloning_every_expert_changes_nothing(tmp_path: Path) -> None:
    """Twice the experts, each token to both copies: their weights halve, the sum is the same."""
    step = make_trained(tmp_path / "run")
    plan = add_experts(LOAD, 8, 0.0)
    change_experts(step, tmp_path / "out", lambda tensors: [plan, plan], ["--moe.top_k", "4"])
    torch.testing.assert_close(logits(load_model(tmp_path / "out")[0]), logits(load_model(step)[0]), atol=1e-5, rtol=0)
    noisy = add_experts(LOAD, 8, 0.05)
    change_experts(step, tmp_path / "noisy", lambda tensors: [noisy, noisy], ["--moe.top_k", "4"])
    w1 = load_model(tmp_path / "noisy")[0].layers[0].moe.experts.w1
    assert torch.equal(w1[:4], load_model(step)[0].layers[0].moe.experts.w1)
    difference = (w1[4] - w1[2]).std() / w1[2].std()
    assert 0.04 < difference < 0.06
    assert not torch.equal(w1[4] - w1[2], w1[5] - w1[0])


def test_weights_that_are_averaged_over_steps_are_carried_without_noise(tmp_path: Path) -> None:
    """The average and what is trained alike; noise would be on the average alone."""
    step = make_trained(tmp_path / "run", **{"optimizer.name": "schedule_free_adamw"})
    plan = revive_experts(LOAD, 0.01, 0.0)
    change_experts(step, tmp_path / "out", lambda tensors: [plan, plan], [])
    before, after = read_lazily(step), read_lazily(tmp_path / "out" / "checkpoint" / "step-7")
    for name in (n for n in before if "experts.w1" in n and len(before[n].shape) == 3):
        assert torch.equal(after[name].load()[:2], before[name].load()[[0, 2]]), name
    model, optimizer, _ = resumed(tmp_path / "out")
    w1 = model.layers[0].moe.experts.w1
    assert not torch.equal(w1, load_model(tmp_path / "out")[0].layers[0].moe.experts.w1)
    assert optimizer.state[w1]["weight_sum"].gt(0).all()

    noisy = revive_experts(LOAD, 0.01, 0.1)
    with pytest.raises(ValueError, match=r"noise \(0.1\) does not go with .* set --noise 0"):
        change_experts(step, tmp_path / "noisy", lambda tensors: [noisy, noisy], [])
    assert not (tmp_path / "noisy").exists()


def test_merged_experts_are_kept_at_their_own_norm(tmp_path: Path) -> None:
    """The mean of two is shorter than either: MuonH would stretch it at its next step. Others keep their first norm."""
    step = make_trained(tmp_path / "run", **{"optimizer.expert.name": "muonh"})
    plan = [Expert((0, 1), (0.5, 0.5)), keep(3), Expert((2,), (1.0,), 0.1)]
    change_experts(step, tmp_path / "out", lambda tensors: [plan, plan], [])
    old = read_lazily(step)["optimizer.state.layers.1.moe.experts.w1.radius"].load()
    model, optimizer, _ = resumed(tmp_path / "out")
    w1 = model.layers[1].moe.experts.w1
    norm = w1[0].detach().norm().item()
    assert norm < 0.8 * old[0]
    assert optimizer.state[w1]["radius"].tolist() == pytest.approx([norm, old[3].item(), old[2].item()], rel=1e-6)


def test_similar_experts_are_found(tmp_path: Path) -> None:
    step = make_trained(tmp_path / "run")
    found = similarity(read_lazily(step), 1)
    torch.testing.assert_close(found.diagonal(), torch.ones(4))
    experts = load_model(step)[0].layers[1].moe.experts
    flat = torch.cat([w.flatten(1) for w in (experts.w1, experts.w2, experts.w3)], 1)
    expected = torch.nn.functional.cosine_similarity(flat[1], flat[3], dim=0)
    torch.testing.assert_close(found[1, 3], expected.detach())


DENSE = {"moe.num_experts": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "words", "is_equal"),
    [
        (1, "--moe.num_experts 4 --moe.top_k 2", True),
        (2, "--moe.num_experts 8 --moe.top_k 4", True),
        (2, "--moe.num_experts 8 --moe.top_k 2 --router.name sigmoid --balancer.loss_free.rate 0.01", True),
        (1, "--moe.num_experts 4 --moe.top_k 2 --moe.first_dense_layers 1", True),
        (1, "--moe.num_experts 4 --moe.top_k 2 --router.name softmax_topk", False),
    ],
)
def test_upcycled_models_begin_where_the_dense_one_was(
    tmp_path: Path, granularity: int, words: str, is_equal: bool
) -> None:
    """The same logits where a token's weights sum to 1; copies of the moments; training can go on."""
    step = make_trained(tmp_path / "run", **DENSE)
    upcycle(step, tmp_path / "out", granularity=granularity, noise=0.0, overrides=words.split())
    dense, (model, optimizer, _) = load_model(step)[0], resumed(tmp_path / "out")
    difference = (logits(model) - logits(dense)).abs().max().item()
    assert (difference < 1e-5) == is_equal
    assert difference < 1e-5 or difference > 0.1
    layer = model.layers[1]
    before = read_lazily(step)
    moments = before["optimizer.state.layers.1.feed_forward.w1.weight.exp_avg"].load()
    carried = optimizer.state[layer.moe.experts.w1]["exp_avg"]
    assert carried.shape == (model.layers[1].moe.router.weight.shape[0], 48 // granularity, 32)
    assert torch.equal(carried[-1], moments[-(48 // granularity) :])
    assert not optimizer.state[layer.moe.router.weight]
    assert optimizer.state[layer.attention.wq.weight]["step"] == 2
    logits_, _ = model(tokens_of(3))
    logits_.square().mean().backward()
    optimizer.step()
    assert optimizer.state[layer.moe.router.weight]["step"] == 1


def test_noise_on_upcycled_experts(tmp_path: Path) -> None:
    step = make_trained(tmp_path / "run", **DENSE)
    words = ["--moe.num_experts", "4", "--moe.top_k", "2", "--optimizer.expert.load_lr", "batch_fraction"]
    upcycle(step, tmp_path / "out", granularity=1, noise=0.1, overrides=words)
    experts, dense = load_model(tmp_path / "out")[0].layers[0].moe.experts, load_model(step)[0].layers[0]
    for new, old in ((experts.w1, dense.feed_forward.w1), (experts.w2, dense.feed_forward.w2)):
        noise = (new - old.weight).detach()
        assert (noise.std((1, 2)) / old.weight.std()).tolist() == pytest.approx([0.1] * 4, rel=0.15)
        assert not torch.equal(noise[0], noise[1])
    resumed(tmp_path / "out")  # states of experts with rates by load have other shapes: they begin anew


def test_upcycled_weights_that_are_averaged_over_steps(tmp_path: Path) -> None:
    """What is trained gets the factor of w2 that its average gets: the model that goes on is the dense one's."""
    step = make_trained(tmp_path / "run", **DENSE, **{"optimizer.name": "schedule_free_adamw"})
    words = ["--moe.num_experts", "8", "--moe.top_k", "4"]
    upcycle(step, tmp_path / "out", granularity=2, noise=0.0, overrides=words)
    config = read_config(step)
    dense = build_model(config)
    load_checkpoint(step, model=dense, optimizer=build_optimizer(config, dense))
    model, optimizer, _ = resumed(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=0)
    with optimizer.evaluating():
        torch.testing.assert_close(logits(model), logits(load_model(step)[0]), atol=1e-5, rtol=0)


def test_states_of_matrices_cannot_be_upcycled(tmp_path: Path) -> None:
    step = make_trained(tmp_path / "run", **DENSE, **{"optimizer.name": "muon"})
    words = ["--moe.num_experts", "4", "--moe.top_k", "2"]
    with pytest.raises(
        ValueError, match=r"feed_forward\.w.*of an optimizer of matrices.*take the run's export"
    ) as error:
        upcycle(step, tmp_path / "out", granularity=1, noise=0.0, overrides=words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    experts, dense = make_trained(tmp_path / "experts"), make_trained(tmp_path / "dense", **DENSE)
    out = tmp_path / "out"
    cases = [
        ("upcycle", experts, "--num_experts 8", "has experts already (4): use add"),
        ("upcycle", dense, "", "upcycle needs --num_experts"),
        ("upcycle", dense, "--num_experts 8 --granularity 5", "--granularity (5) must divide model.ffn_dim (48)"),
        ("upcycle", dense, "--num_experts 6 --granularity 4 --moe.top_k 4", "must divide moe.num_experts (6)"),
        ("upcycle", dense, "--num_experts 4 --moe.top_k 5", "moe.top_k (5) must be at most moe.num_experts (4)"),
        ("upcycle", dense, "--num_experts 4 --granularity 3 --moe.top_k 3", "--granularity (3) must divide moe.num"),
        ("upcycle", dense, "--num_experts 4 --moe.num_shared_experts 1", "upcycle makes no shared experts"),
        ("upcycle", dense, "--num_experts 4 --model.dim 64", "the configuration asks for another model"),
        ("upcycle", dense, "--num_experts 4 --moe.topk 4", "unknown key; did you mean moe.top_k?"),
        ("upcycle", dense, "--num_experts 4 --moe.num_identity_experts 2", "moe.num_identity_experts = 2: the router"),
        ("prune", dense, "--num_experts 2", "is of a dense model"),
        ("revive", experts, "--num_experts 2", "leave --num_experts out"),
        ("prune", experts, "--num_experts 2 --granularity 2", "--granularity is for upcycle"),
        ("prune", experts, "--num_experts 2 --noise -1", "--noise (-1.0) must be at least 0"),
        ("prune", experts, "--num_experts 2 --data.path nowhere.txt", "nowhere.txt"),
        ("shrink", experts, "", "invalid choice: 'shrink'"),
    ]
    for verb, source, words, message in cases:
        code, err = run(surgery, verb, source, out, *words.split())
        assert (code, err.count("\n")) == (2, 1), (verb, words, err)
        assert message in err
        assert names(tmp_path) == ["dense", "experts"]
    identity = make_trained(tmp_path / "identity", **{"moe.num_identity_experts": 2})
    code, err = run(surgery, "prune", identity, out, "--num_experts", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "moe.num_identity_experts = 2: the router has rows beside" in err
    odd = _with_odd_state(experts, tmp_path)
    with pytest.raises(ValueError, match="has no row for each expert"):
        change_experts(odd, out, lambda tensors: [[keep(0), keep(1)]] * 2, [])
    assert "out" not in names(tmp_path)


def _with_odd_state(step: Path, folder: Path) -> Path:
    from titan_moe.checkpoint.lazy import lazy
    from titan_moe.checkpoint.state import read_common
    from titan_moe.checkpoint.store import save_lazily

    tensors = read_lazily(step) | {"optimizer.state.layers.0.moe.router.weight.left": lazy(torch.eye(3))}
    common = read_common(step)
    files = {"config.toml": (step / "config.toml").read_text()}
    return save_lazily(folder / "odd", 1, tensors, optimizer="AdamW", values=common["optimizer"], extra={}, files=files)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "text.txt"
    path.parent.mkdir()
    path.write_text("the cat sat on the mat and ran far from our big red house\n" * 200)
    return path


@pytest.mark.slow
def test_commands_measure_loads(tmp_path: Path, corpus: Path) -> None:
    """prune takes what the model itself uses least on the files given; the rest of the verbs run as well."""
    from titan_moe.convert.surgery_cli import measure_load

    step = make_trained(tmp_path / "run", **{"data.cache_folder": str(tmp_path / "cache")})
    load = measure_load(step, [str(corpus)], 4)
    assert load.shape == (2, 4)
    assert (load.sum(1) == 4 * 8 * 64 * 2).all()
    words = ["--data.path", str(corpus), "--steps", "4"]
    assert run(surgery, "prune", step, tmp_path / "fewer", "--num_experts", 3, *words)[0] == 0
    old, new = load_model(step)[0], load_model(tmp_path / "fewer")[0]
    for layer in range(2):
        kept = load[layer].argsort(descending=True)[:3].sort().values
        assert torch.equal(new.layers[layer].moe.router.weight, old.layers[layer].moe.router.weight[kept])
    for verb, more in (
        ("add", ["--num_experts", 6]),
        ("merge", ["--num_experts", 2]),
        ("revive", ["--threshold", 0.9]),
    ):
        code, err = run(surgery, verb, step, tmp_path / verb, *more, "--noise", "0.01", *words)
        assert code == 0, err
        resumed(tmp_path / verb)
    code, err = run(surgery, "revive", step, tmp_path / "none", "--threshold", 0, *words)
    assert (code, "nothing to revive" in err) == (2, True)
