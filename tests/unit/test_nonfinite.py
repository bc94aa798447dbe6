"""NaN or infinite router logits stop the run at the next flush, with the layer's name and without a synchronisation."""

from typing import Any

import pytest
import torch

from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.records import flush, moe_layer_names, train_record
from titan_moe.sinks import Sink
from titan_moe.step import train_step


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
    records = [{"step": 1, **good}, {"step": 2, **train_record(model, output, {})}]
    written: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match=r"step 2: NaN or infinite router logits in layers\.2\.moe:"):
        flush(Sink(written.append, lambda: None, "list"), records, moe_layer_names(model))
    assert [record["step"] for record in written] == [1, 2]  # what led there is on record
    assert "nonfinite" not in written[0]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_run_stops_with_what_is_not_finite(name: str, value: float) -> None:
    """Also of a dense model, and where no router shows it yet: gradients overflow before the logits do."""
    model = tiny_model(None, num_experts=0)
    model.init_weights(0)
    output = train_step(model, [batch(0)], adamw_of_dense(model), {}, [], max_norm=1.0)
    output = output._replace(**{name: torch.tensor(value)})
    written: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match=rf"step 1: {name} {value}: the run has diverged .* checkpoint is from before"):
        flush(Sink(written.append, lambda: None, "list"), [{"step": 1, **train_record(model, output, {})}])
    assert [record["step"] for record in written] == [1]


def adamw_of_dense(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


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
