"""A step with a NaN or an infinity changes nothing, with any optimizer; a run ends after it, or after so many in a row.

What it was is known once the step's numbers are on the host, without a synchronisation in the step.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import AVERAGING, OPTIMIZER_NAMES
from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.divergence import (
    DivergedError,
    SkippedSteps,
    moe_layer_names,
    stop_if_diverged,
    stop_if_weights_diverged,
)
from titan_moe.metrics import to_numbers
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, combine
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.records import Record, train_record, write_record
from titan_moe.sinks.sink import Sink
from titan_moe.step import train_step

BY_LOAD = expand_load_lr({"load_lr": "ideal_normalized", "load_lr_ema": 0.5, "load_lr_decay": False}, top_k=2)
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch.SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "torch.SGD, fused": functools.partial(torch.optim.SGD, momentum=0.9, fused=True),
    "torch.Adam, fused": functools.partial(torch.optim.Adam, fused=True),
    "torch.RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.9),
}


def build(model: Any, name: str, of_experts: dict[str, Any], *, others: str | None = None) -> Optimizer:
    """An optimizer of the registry or of torch, built as a configuration builds it; with roots and bases at once."""

    def build_one(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        builder = OPTIMIZERS.get(name) or TORCH[name]
        taken = inspect.signature(builder).parameters
        soon = {"precondition_frequency": 2, "start_preconditioning_step": 2, "statistics_every": 1}
        return builder(groups, lr=1e-2, weight_decay=0.1, **{key: soon[key] for key in soon if key in taken})

    groups = parameter_groups(model.named_parameters(), {"expert": of_experts} if of_experts else {})
    return combine(groups, {g["name"]: others or name for g in groups} | {"expert": name}, build_one)


OWN = {
    f"{name}{', by load' if by_load else ''}": (
        name,
        by_load | ({"load_lr_decay": True} if by_load and name in AVERAGING else {}),
    )
    for name in OPTIMIZER_NAMES
    for by_load in ({}, BY_LOAD)
}
CASES: dict[str, Callable[[Any], Optimizer]] = {
    **{text: functools.partial(build, name=name, of_experts=by_load) for text, (name, by_load) in OWN.items()},
    **{name: functools.partial(build, name=name, of_experts={}) for name in TORCH},
    "torch.Adam, fused, by load": functools.partial(build, name="torch.Adam, fused", of_experts=BY_LOAD),
    "muon and adamw": functools.partial(build, name="muon", of_experts=BY_LOAD, others="adamw"),
    "adamw and torch.Adam, fused": functools.partial(build, name="adamw", of_experts={}, others="torch.Adam, fused"),
}


def good(model: Any, optimizer: torch.optim.Optimizer, number: int) -> Any:
    micro = list(zip(*(part.chunk(2) for part in batch(number)), strict=True))
    return train_step(model, micro, optimizer, balancers(), model.expert_biases(), max_norm=0.1)


def with_gradient(model: Any, optimizer: torch.optim.Optimizer, value: float = torch.nan) -> Any:
    """A step in which one element of one expert's gradient is not finite."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[1, 2, 3] = value
        return gradient

    handle = model.layers[1].moe.experts.w2.register_hook(poison)
    output = good(model, optimizer, 3)
    handle.remove()
    assert output.nonfinite_gradients() == ["layers.1.moe.experts.w2"]
    return output


def without_labels(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A step in which no label counts: its loss is 0 / 0."""
    tokens, labels = batch(3)
    micro = [(tokens, torch.full_like(labels, IGNORE))]
    output = train_step(model, micro, optimizer, balancers(), model.expert_biases(), max_norm=0.1)
    assert output.loss.isnan()
    return output


def all_state(model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Weights, biases and the optimizer's state of every parameter."""
    weights = [value.detach().clone() for value in model.state_dict().values()]
    return [weights, [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in model.parameters()]]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_changes_nothing(case: str) -> None:
    """Neither the first nor a later one: all that follows is, to the bit, as if it had not been."""
    results = []
    bad: dict[int, Callable[..., Any]] = {0: without_labels, 3: with_gradient}
    for bad_steps in ({}, bad):
        model = tiny_model()
        model.init_weights(0)
        optimizer = CASES[case](model)
        for number in range(5):
            if number in bad_steps:
                before = all_state(model, optimizer)
                output = bad_steps[number](model, optimizer)
                assert output.skipped
                assert output.load_factors is None or not output.load_factors.any()
                if number:
                    torch.testing.assert_close(all_state(model, optimizer), before, rtol=0, atol=0)
            assert not good(model, optimizer, number).skipped
        results.append(all_state(model, optimizer))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(weight.isfinite().all() for weight in results[0][0])


def test_an_infinity_is_as_bad() -> None:
    model = tiny_model()
    model.init_weights(0)
    optimizer = adamw(model)
    good(model, optimizer, 0)
    before = all_state(model, optimizer)
    assert with_gradient(model, optimizer, -torch.inf).skipped
    torch.testing.assert_close(all_state(model, optimizer), before, rtol=0, atol=0)


def test_fused_optimizers_are_not_waited_for() -> None:
    """The flag stays on the device for them; it is read for others, and for torch's SGD, which can't be trusted."""
    waiting = {name: make(tiny_model()).waits() for name, make in CASES.items() if " and " not in name}
    by_kernel = {*BY_ELEMENT, *(f"{name}, by load" for name in BY_ELEMENT)}
    assert {name for name, waits in waiting.items() if not waits} == {*by_kernel, "torch.Adam, fused"}
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], momentum=0.9, fused=True)
    weight.grad, optimizer.found_inf = torch.ones(2), torch.ones(())  # pyrefly: ignore[missing-attribute]
    optimizer.step()
    assert "momentum_buffer" in optimizer.state[weight]  # torch.empty_like: once this fails, trust it


def step(model: Any) -> Any:
    return train_step(model, [batch(0)], adamw(model), balancers(), model.expert_biases(), max_norm=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_run_stops_with_the_layers_name(value: float) -> None:
    model = tiny_model(num_layers=3, first_dense_layers=1)
    model.init_weights(0)
    good = train_record(model, step(model), {})
    with torch.no_grad():
        model.layers[2].moe.router.weight[1, 0] = value
    output = step(model)
    assert output.nonfinite is not None
    assert output.nonfinite.tolist() == [0, 1]
    first, second = to_numbers([{"step": 1, **good}, {"step": 2, **train_record(model, output, {})}])
    stop_if_diverged(first, SkippedSteps().count(first), moe_layers=moe_layer_names(model))
    with pytest.raises(DivergedError, match=r"step 2: NaN or infinite router logits in layers\.2\.moe, loss nan"):
        stop_if_diverged(second, SkippedSteps().count(second), moe_layers=moe_layer_names(model))


def test_what_only_divergence_is_judged_by_is_not_written() -> None:
    model = tiny_model()
    model.init_weights(0)
    (record,) = to_numbers([{"step": 1, **train_record(model, step(model), {})}])
    assert {"skipped", "nonfinite", "nonfinite_gradients"} <= set(record)
    written: list[dict[str, Any]] = []
    write_record(Sink(written.append, lambda: None, "list"), record)
    assert record.keys() - written[0].keys() == {"skipped", "nonfinite", "nonfinite_gradients"}


@pytest.mark.parametrize("kind", ["train", "validation"])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(kind: str, loss: float) -> None:
    """Of a validation, which skips nothing, and of a step that no optimizer could skip."""
    stop_if_diverged({"step": 7, "kind": kind, "loss": 3.0}, SkippedSteps())
    with pytest.raises(DivergedError, match=rf"step 7: {kind} loss {loss}: the run has diverged and stops: lower"):
        stop_if_diverged({"step": 7, "kind": kind, "loss": loss}, SkippedSteps(), allowed=5)


def test_router_logits_alone_are_enough() -> None:
    """A router's scores may be finite where its logits are not: the choices mean nothing all the same."""
    model = tiny_model()
    model.init_weights(0)
    optimizer, own = adamw(model), {"loss_free": balancers()["loss_free"]}
    layer = model.layers[0].moe
    route = layer.route
    layer.route = lambda logits, bias: route(logits, bias)._replace(router_logits=logits + torch.inf)
    before = all_state(model, optimizer)[0]
    output = train_step(model, [batch(0)], optimizer, own, model.expert_biases(), max_norm=1.0)
    assert output.loss.isfinite()
    assert output.grad_norm.isfinite()
    assert output.skipped
    torch.testing.assert_close(all_state(model, optimizer)[0], before, rtol=0, atol=0)


def test_the_run_stops_with_the_parameters_name_of_a_dense_model() -> None:
    """Where no router shows it, by the gradient that is nearest to the loss; wrappers are left out of names."""
    model = tiny_model(None, num_experts=0)
    model.init_weights(0)
    for name in ("wo", "wq"):
        getattr(model.layers[1].attention, name).weight.register_hook(lambda gradient: gradient * torch.nan)
    micro = [batch(0)]
    output = train_step(model, micro, Optimizer.around(torch.optim.AdamW(model.parameters())), {}, [], max_norm=1.0)
    (record,) = to_numbers([{"step": 1, **train_record(model, output, {})}])
    names = [name.replace("layers.1.", "layers.1._orig_mod.") for name in record["nonfinite_gradients"]()]
    want = (
        r"step 1: grad_norm nan, NaN or infinite gradient of layers\.1\.attention\.wo\.weight and of 1 before it: "
        r"the step was skipped and changed nothing; the run has diverged and stops: lower optimizer.lr, warm up longer"
    )
    with pytest.raises(DivergedError, match=want):
        stop_if_diverged({**record, "nonfinite_gradients": lambda: names}, SkippedSteps(1, 1))


def test_weights_that_are_not_finite_are_found() -> None:
    model = tiny_model()
    model.init_weights(0)
    stop_if_weights_diverged(model, 3)
    with torch.no_grad():
        model.layers[1].moe.experts.w1[0, 0, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"step 3: a parameter is NaN or infinite: .* this step is not saved"):
        stop_if_weights_diverged(model, 3)


def test_a_bias_or_a_state_that_is_not_finite_is_not_saved() -> None:
    model = tiny_model(balancer_inits={"mine": lambda n: {"mean": torch.zeros(n)}}, expert_bias=True)
    model.init_weights(0)
    for name, buffer in model.named_buffers():
        stop_if_weights_diverged(model, 3)
        buffer[0] = torch.nan
        with pytest.raises(
            DivergedError, match=rf"step 3: {name} is NaN or infinite, which the post step .* not saved"
        ):
            stop_if_weights_diverged(model, 3)
        buffer[0] = 0.0


def skip_record(step: int, skipped: bool) -> Record:
    loss = float("nan") if skipped else 1.0
    return {"step": step, "kind": "train", "skipped": skipped, "loss": loss, "total_loss": loss, "grad_norm": loss}


def end_of(pattern: list[bool], allowed: int, skipped: SkippedSteps) -> tuple[DivergedError | None, list[SkippedSteps]]:
    """Go through steps that were skipped or not; what ended the run, and the counts after each step until then."""
    counts = []
    for number, was_skipped in enumerate(pattern, start=1):
        record = skip_record(number, was_skipped)
        skipped = skipped.count(record)
        counts.append(skipped)
        try:
            stop_if_diverged(record, skipped, allowed=allowed)
        except DivergedError as error:
            return error, counts
    return None, counts


def test_so_many_in_a_row_may_be_skipped() -> None:
    pattern = [False, True, True, False, True, False, True, True, True, True, False, True]
    error, counts = end_of(pattern, 3, SkippedSteps())
    assert error is not None
    assert error.step == 10
    assert str(error).startswith("step 10: loss nan, total_loss nan, grad_norm nan: the step was skipped")
    assert "as 4 in a row were, and training.skip_nonfinite_steps allows 3; the run has diverged" in str(error)
    assert [count.total for count in counts] == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    assert [count.in_a_row for count in counts] == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert end_of(pattern, 4, SkippedSteps())[0] is None


def test_a_run_goes_on_counting_where_it_was() -> None:
    error, counts = end_of([True], 1, SkippedSteps(total=5, in_a_row=1))
    assert error is not None
    assert counts == [SkippedSteps(total=6, in_a_row=2)]
    assert end_of([True], 1, SkippedSteps(total=5, in_a_row=0))[0] is None


def test_names_of_wrapped_layers() -> None:
    model = tiny_model()
    parallelize(
        model,
        mesh=None,
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        checkpoint_mode="full",
        compile_blocks=True,
    )
    assert moe_layer_names(model) == ["layers.0.moe", "layers.1.moe"]
