"""examples/, by the commands and by what each says that it computes: docs/extending.md is written around them."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from examples.balancer import importance, tolerant
from examples.data import sums, walks
from examples.optimizer import Signum, lars
from examples.router import softplus
from examples.schedule import inverse_sqrt
from tests.e2e.harness import TINY, Ended, command, end_two, records, start_two
from titan_moe.balancer import Balancer, keep_bias
from titan_moe.build import build_model, with_vocab_size
from titan_moe.checkpoint import load_model
from titan_moe.config import load_config, to_toml
from titan_moe.model.routing import ROUTERS, Router, Routing, make_routing
from titan_moe.study.grid import runs_of
from titan_moe.study.spec import load_study

Train = Callable[..., Ended]
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_router(train: Train, tmp_path: Path) -> None:
    ended = train(router__name="examples.router:softplus", router__power=0.4, training__steps=3)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "run")[0] != records_of(train, tmp_path, "softmax", router__name="softmax_topk")[0]

    start = ["--checkpoint", str(tmp_path / "run")]
    refused = command("generate", start)
    assert refused.code == 2
    assert "add --trust_components examples.router if you trust it" in refused.err
    assert command("generate", [*start, "--max_new_tokens", "1", "--trust_components", "examples"]).code == 0
    _, config = load_model(tmp_path / "run", trust_components=["examples"])
    assert config.router.arguments == {"power": 0.4}


def test_a_router_that_may_mislead_is_told_at_the_start(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line; the run goes on, for it may be meant so."""

    def sigmoids(*, top_k: int) -> Router:
        def route(logits_TE: torch.Tensor, bias_E: torch.Tensor | None) -> Routing:
            experts_TK = logits_TE.topk(top_k).indices
            return make_routing(logits_TE, logits_TE.sigmoid(), logits_TE.sigmoid().gather(-1, experts_TK), experts_TK)

        return route

    module = ModuleType("my_moe")
    module.sigmoids = sigmoids  # pyrefly: ignore
    monkeypatch.setitem(sys.modules, "my_moe", module)
    ended = train(router__name="my_moe:sigmoids", training__steps=1, balancer={"aux_loss": {"coeff": 0.1}})
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.err.splitlines() if "scores of a token" in line]
    assert line.startswith("warning: router my_moe:sigmoids: the scores of a token sum to ")
    assert "scores of a token" not in train("ours", training__steps=1).err


def test_router_formula() -> None:
    logits, bias = torch.randn(32, 8), torch.zeros(8)
    free = softplus(top_k=2)(logits, None)
    assert torch.equal(free.topk_experts, logits.topk(2).indices)
    assert_close(free.topk_scores.sum(-1), torch.ones(32))
    assert_close(free.scores.sum(-1), torch.ones(32))
    first, second = torch.log1p(logits.topk(2).values.exp()).sqrt().unbind(-1)
    assert_close(free.topk_scores[:, 0] / free.topk_scores[:, 1], first / second)

    bias[3] = 1e6
    biased = softplus(top_k=2)(logits, bias)
    assert (biased.topk_experts[:, 0] == 3).all()
    assert torch.equal(biased.scores, free.scores)
    assert_close(biased.topk_scores.sum(-1), torch.ones(32))


def test_balancers(train: Train, tmp_path: Path) -> None:
    loss = {"balancer": {"examples.balancer:importance": {"coeff": 0.5}}}
    [first, *_] = records_of(train, tmp_path, "loss", training__steps=2, **loss)
    assert first["total_loss"] == pytest.approx(first["loss"] + 0.5 * first["examples.balancer:importance"], rel=1e-6)

    bias = {"balancer": {"examples.balancer:tolerant": {"rate": 0.25, "tolerance": 0.0}}}
    records_of(train, tmp_path, "bias", training__steps=2, **bias)
    model, _ = load_model(tmp_path / "bias", trust_components=["examples"])
    moved = torch.stack(model.expert_biases())
    assert moved.any()
    assert ((moved / 0.25) % 1 == 0).all()


OWN = {
    "router": {"name": "examples.router:nearest", "latent_dim": 8},
    "balancer": {"examples.balancer:rprop": {"rate": 0.05}},
    "lr_scheduler__name": "constant",
}


def test_own_parameters_and_states_resume(train: Train, tmp_path: Path) -> None:
    """A resumed run is the run that was never stopped; commands that take a checkpoint take one with them."""
    whole = records_of(train, tmp_path, "whole", training__steps=6, **OWN)
    records_of(train, tmp_path, "cut", training__steps=3, **OWN)
    assert records_of(train, tmp_path, "cut", training__steps=6, **OWN) == whole
    one, two = (load_model(tmp_path / name, trust_components=["examples"])[0] for name in ("whole", "cut"))
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    [(name, state)] = one.balancer_states().items()
    assert name == "examples.balancer:rprop"
    assert all(sign.any() for sign in state["sign"])

    for verb, words in (("evaluate", []), ("generate", ["--max_new_tokens", "1"])):
        ended = command(verb, ["--checkpoint", str(tmp_path / "cut"), "--trust_components", "examples", *words])
        assert ended.code == 0, ended.err


def test_own_parts_resume_on_two_ranks(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """With expert parallelism: the second half of a run is that of one that did not stop, and one rank can go on."""
    layout = {"parallelism__expert_parallel_degree": 2, **OWN}
    for name, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        (tmp_path / name).mkdir(exist_ok=True)
        words = arguments(name, training__steps=steps, **layout)
        assert end_two(start_two(words, tmp_path / f"log-{name}-{steps}")) == [0, 0]
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    one, two = (load_model(tmp_path / name, trust_components=["examples"])[0] for name in ("whole", "cut"))
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)

    ended = command("train", arguments("cut", training__steps=7, **OWN))
    assert ended.code == 0, ended.err
    assert records(tmp_path / "cut")[:6] == records(tmp_path / "whole")
    assert records(tmp_path / "cut")[6]["loss"] < records(tmp_path / "whole")[0]["loss"]


def test_a_run_does_not_take_up_a_state_midway(train: Train, tmp_path: Path) -> None:
    """But a new run begins with the weights of one without."""
    off = {"balancer": {"loss_free": {"rate": 0.05}}, "training__steps": 2}
    records_of(train, tmp_path, "run", **off)
    on = {"balancer": {"examples.balancer:rprop": {"rate": 0.05}}, "training__steps": 2}
    refused = train("run", **{**on, "training__steps": 4}, job__allow_config_change=True)
    assert refused.code == 2
    assert "is of another model: balancer." in refused.err
    ended = train("new", **on, checkpoint__initial_load_path=str(tmp_path / "run"))
    assert ended.code == 0, ended.err
    assert "this run keeps its initial layers.0.moe.balancer_state.examples/balancer:rprop/rate" in ended.err


def test_a_wrong_part_is_named_before_data_is_read(train: Train, tmp_path: Path) -> None:
    ended = train(balancer={f"{__name__}:unfinished": {}}, data__path=[str(tmp_path / "nowhere")])
    assert ended.code == 2
    assert ended.err.splitlines()[-1].endswith(
        f"balancer {__name__}:unfinished: loss must return a scalar tensor, gave (4,) float32"
    )
    assert not (tmp_path / "run").exists()


def unfinished() -> Balancer:
    return Balancer(lambda routing, load, num_tokens: routing.scores.mean(0), keep_bias)


def test_balancer_formulas() -> None:
    routing = ROUTERS["topk_softmax"](top_k=2)(torch.randn(32, 8), None)
    mean = routing.scores.mean(0)
    expected = 0.3 * mean.std(correction=0) ** 2 / (1 / 8) ** 2
    assert_close(importance(0.3).loss(routing, routing.tokens_per_expert, 64), expected / 2)

    load, bias = torch.tensor([[80, 104, 96, 120], [100, 100, 100, 100]]), torch.zeros(2, 4)
    change = tolerant(rate=0.5, tolerance=0.05).post_step(load, bias)
    assert change.tolist() == [[0.5, 0.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0]]


def test_optimizer(train: Train, tmp_path: Path) -> None:
    """A resumed run is the run that was never stopped: the checkpoint has the state of an optimizer from outside."""
    signum = {"optimizer": {"name": "examples.optimizer:Signum", "lr": 1e-3, "expert": {"lr": 2e-3}}}
    whole = records_of(train, tmp_path, "whole", training__steps=6, lr_scheduler__name="constant", **signum)
    records_of(train, tmp_path, "cut", training__steps=4, lr_scheduler__name="constant", **signum)
    ended = train("cut", training__steps=6, lr_scheduler__name="constant", **signum)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "cut") == whole
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert whole[-1]["lr/expert"] == 2 * whole[-1]["lr/dense"]


def test_optimizer_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Signum([weight], lr=0.1, beta1=0.5, weight_decay=0.5)
    for gradient in ([1.0, -1.0], [-2.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    # momentum 0.5, -0.5 after the first step, -0.75 both after the second
    assert_close(weight.detach(), torch.tensor([(1 * 0.95 - 0.1) * 0.95 + 0.1, (-2 * 0.95 + 0.1) * 0.95 + 0.1]))
    assert_close(optimizer.state[weight]["momentum"], torch.tensor([-0.75, -0.75]))


@pytest.mark.parametrize("by_load", [False, True])
def test_transform(train: Train, tmp_path: Path, by_load: bool) -> None:
    """It has the rest of an optimizer from us: rates by load, AdamW for vectors, checkpoints."""
    rates = {"expert": {"load_lr": "ideal_normalized"}} if by_load else {}
    own = {"optimizer": {"name": "examples.optimizer:lars", "lr": 1e-2, "smallest_norm": 0.01, **rates}}
    whole = records_of(train, tmp_path, "whole", training__steps=4, lr_scheduler__name="constant", **own)
    records_of(train, tmp_path, "cut", training__steps=2, lr_scheduler__name="constant", **own)
    ended = train("cut", training__steps=4, lr_scheduler__name="constant", **own)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "cut") == whole
    assert whole[-1]["loss"] < whole[0]["loss"]


def test_transform_formula() -> None:
    """Each expert moves by the rate times its own norm, along its momentum; a vector as AdamW moves it."""
    stack, matrix, vector = torch.randn(3, 4, 5), torch.randn(4, 5), torch.ones(2)
    weights = [torch.nn.Parameter(value.clone()) for value in (stack, matrix, vector)]
    optimizer = lars([{"params": weights}], lr=0.1, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight, before in zip(weights[:2], (stack, matrix), strict=True):
        assert weight.grad is not None
        direction = weight.grad / torch.linalg.matrix_norm(weight.grad, keepdim=True)
        assert_close(weight.detach(), before - 0.1 * direction * torch.linalg.matrix_norm(before, keepdim=True))
    assert weights[2].grad is not None
    assert_close(weights[2].detach(), vector - 0.1 * weights[2].grad.sign())


def test_schedule(train: Train, tmp_path: Path) -> None:
    rule = {"name": "examples.schedule:inverse_sqrt", "warmup_steps": 2, "cooldown_ratio": 0.34}
    found = records_of(train, tmp_path, "run", training__steps=6, lr_scheduler=rule)
    expected = [0.5, 1.0, (2 / 3) ** 0.5, 0.5**0.5, 0.5 * (2 / 5) ** 0.5, 0.0]
    lr = TINY["optimizer"]["lr"]
    assert [record["lr/dense"] for record in found] == pytest.approx([lr * factor for factor in expected])
    assert inverse_sqrt(steps=0, warmup_steps=0)(1) <= 1


def test_schedule_by_group(train: Train, tmp_path: Path) -> None:
    """Experts warm up more slowly than the rest, and metrics show the rates that were taken."""
    rule = {"name": "examples.schedule:slow_experts", "warmup_steps": 2, "expert_warmup_steps": 4}
    found = records_of(train, tmp_path, "run", training__steps=5, lr_scheduler=rule)
    lr = TINY["optimizer"]["lr"]
    assert [record["lr/router"] for record in found] == pytest.approx([lr / 2, lr, lr, lr, lr])
    assert [record["lr/expert"] for record in found] == pytest.approx([lr / 4, lr / 2, 3 * lr / 4, lr, lr])


def test_data(train: Train, tmp_path: Path) -> None:
    """Documents by index and a stream; who reads none of them need not trust them, who does must."""
    for name, length in (("sums", {}), ("walks", {"length": 12})):
        data = {"data": {**TINY["data"], "dataset": f"examples.data:{name}", **length}, "data__path": None}
        data["validation__steps"] = 2
        whole = records_of(train, tmp_path, name, training__steps=4, lr_scheduler__name="constant", **data)
        records_of(train, tmp_path, f"{name}-cut", training__steps=2, lr_scheduler__name="constant", **data)
        ended = train(f"{name}-cut", training__steps=4, lr_scheduler__name="constant", **data)
        assert ended.code == 0, ended.err
        assert records(tmp_path / f"{name}-cut") == whole

        assert "--trust_components" not in ended.out  # in the command that it ends with

        start = ["--checkpoint", str(tmp_path / name)]
        assert command("generate", [*start, "--max_new_tokens", "1"]).code == 0
        refused = command("evaluate", start)
        assert refused.code == 2
        assert f"data.dataset = 'examples.data:{name}': is code from outside of titan_moe" in refused.err
        assert command("evaluate", [*start, "--trust_components", "examples"]).code == 0
        _, config = load_model(tmp_path / name)
        assert config.data.arguments["length" if length else "count"] == (12 if length else 2000)

    # a set of its own to validate on, by its name
    walks = {"validation__sets": {"walks": {"dataset": "examples.data:walks", "seed": 7}}, "validation__steps": 2}
    records_of(train, tmp_path, "run", training__steps=2, **walks)
    assert records(tmp_path / "run", "validation")[-1]["validation/walks/num_tokens"] > 0
    words = ["--checkpoint", str(tmp_path / "run"), "--data.path", str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text("north east south west " * 50)
    ended = command("evaluate", words)  # of files alone
    assert ended.code == 0, ended.err


def test_data_formulas() -> None:
    assert [*sums(count=2, digits=1)] == ["6 + 6 = 12", "0 + 4 = 4"]
    first = walks(length=3, seed=1)
    documents = [*itertools.islice(first, 4)]
    again = walks(length=3, seed=1)
    again.load_state_dict(first.state_dict())
    assert next(iter(again)) not in documents
    assert [*itertools.islice(walks(length=3, seed=1), 5)] == [*documents, next(iter(first))]
    assert set(" ".join(documents).split()) <= {"north", "east", "south", "west"}


def test_study(shared: Path, tmp_path: Path) -> None:
    """Each of its points trains, one after the other, at the size of the other tests."""
    tiny = {key: TINY["model"][key] for key in ("dim", "num_layers", "num_heads", "ffn_dim")}
    words = [f"--model.{key}={value}" for key, value in tiny.items()]
    words += ["--training.steps=2", "--training.seq_len=16", "--training.global_batch_size=4"]
    words += ["--training.local_batch_size=2", "--data.dataset=text", "--data.tokenizer=bytes"]
    words += [f"--data.path={shared / 'text.jsonl'}", f"--data.cache_folder={shared / 'cache'}"]
    study = load_study(str(EXAMPLES / "study.toml"), words, str(tmp_path / "study"))
    runs = [run for run in runs_of(study) if run.seed == study.section.seeds[0]]
    assert [run.config.router.name for run in runs] == ["topk_softmax"] * 2 + ["examples.router:softplus"] * 2
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "point.toml").write_text(to_toml(run.config))
        ended = command("train", ["--job.config_file", str(run.folder / "point.toml")])
        assert ended.code == 0, ended.err
        assert ("examples.balancer:importance" in records(run.folder)[0]) == (run.point["balancing"] == "importance")


ERRORS = [
    ["--router.name=examples.routers:softplus"],
    ["--router.name=examples.router:softplsu"],
    ["--router.name=examples.router:softplus", "--router.powr=0.4"],
    ["--router.name=examples.router:softplus", "--router.power=hi"],
    ["--router.name=examples.schedule:inverse_sqrt"],
    ["--router.name=examples.router:softplus", "--router.power=-1"],
]


@pytest.mark.parametrize("words", ERRORS, ids=lambda words: words[-1])
def test_errors_are_those_of_the_page(words: list[str]) -> None:
    page = (EXAMPLES.parent / "docs" / "extending.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"router\.") as found:
        build_model(with_vocab_size(load_config(words), 64))
    assert str(found.value).removeprefix("command line: ") in page.splitlines()


def records_of(train: Train, tmp_path: Path, name: str, **changes: object) -> list[dict[str, float]]:
    """The lines of a run that ended well."""
    ended = train(name, **changes)
    assert ended.code == 0, ended.err
    return records(tmp_path / name)
