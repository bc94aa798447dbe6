"""Float8, emulated: the numbers that a GPU with float8 products would make; tests/gpu has the products themselves."""

import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.model.experts import PRODUCTS, float8_grouped_mm, quantize_rows
from titan_moe.model.moe import expert_swiglu
from titan_moe.parallelize.float8 import check_quantize, quantize
from titan_moe.step import train_step

BOTH = ("quantize.linear.float8", "quantize.grouped_mm.float8")
COUNTS = torch.tensor([3, 0, 12, 1])


def offsets() -> Tensor:
    return COUNTS.cumsum(0, dtype=torch.int32)


def test_rows_keep_four_significant_bits() -> None:
    x = torch.randn(64, 32) * torch.logspace(-6, 6, 64).unsqueeze(-1)
    x[5] = 0
    x8, factor = quantize_rows(x)
    assert torch.equal(factor.log2(), factor.log2().round())
    large = x.abs() > x.abs().amax(-1, keepdim=True) / 64
    error = (x8.float() * factor - x).abs() / x.abs().clamp(min=1e-30)
    assert error[large].max() <= 1 / 16
    assert error[large].max() > 1 / 64  # it does round
    assert (x8[5].float() == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_as_torchao_rounds_them(dtype: torch.dtype) -> None:
    utils = pytest.importorskip("torchao.float8.float8_utils")
    axiswise = pytest.importorskip("torchao.float8.config").ScalingGranularity.AXISWISE
    x = torch.randn(64, 32, dtype=dtype) * torch.logspace(-6, 6, 64, dtype=dtype).unsqueeze(-1)
    options = {"scaling_granularity": axiswise, "axiswise_dim": -1, "round_scales_to_power_of_2": True}
    scale = utils.tensor_to_scale(x, torch.float8_e4m3fn, **options)
    x8, factor = quantize_rows(x)
    assert torch.equal(factor, 1 / scale)
    assert torch.equal(x8.float(), utils.to_fp8_saturated(x.float() * scale, torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 32, dtype=dtype), torch.randn(4, 32, 16, dtype=dtype)
    got = float8_grouped_mm(a, b, offsets(), emulate=True)
    a8, scale_a = quantize_rows(a)
    bt8, scale_b = quantize_rows(b.transpose(1, 2))
    rounded_a, rounded_b = a8.double() * scale_a, (bt8.double() * scale_b).transpose(1, 2)
    parts = [part @ matrix for part, matrix in zip(rounded_a.split(COUNTS.tolist()), rounded_b, strict=True)]
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), torch.cat(parts), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )
    assert not torch.allclose(got, PRODUCTS["high"](a, b, offsets()), rtol=1e-2)


def test_experts_gradients_are_close_and_weights_of_full_precision() -> None:
    """Forward and the gradient of x are in float8; each weight's gradient is the product of unrounded tensors."""
    w1, w3, w2 = torch.randn(4, 32, 16), torch.randn(4, 32, 16), torch.randn(4, 16, 32)
    results = []
    for precision in ("high", "float8_emulated"):
        leaves = [
            t.clone().requires_grad_()
            for t in (torch.randn(16, 16, generator=torch.Generator().manual_seed(1)), w1, w2, w3)
        ]
        y = expert_swiglu(*leaves, COUNTS, precision)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for high, low in zip(*results, strict=True):
        assert F.cosine_similarity(high.flatten(), low.flatten(), dim=0) > 0.995
        assert not torch.equal(high, low)


def train(converters: tuple[str, ...], recipe: str = "rowwise") -> tuple[Any, list[Tensor]]:
    model = tiny_model(device="meta", num_kv_heads=2, num_shared_experts=1, first_dense_layers=1)
    quantize(model, converters=converters, recipe_name=recipe, emulate=True)
    model.to_empty(device="cpu")
    model.init_weights(0)
    optimizer, losses = adamw(model), []
    for step in range(12):
        output = train_step(model, [batch(step)], optimizer, balancers(), model.expert_biases(), max_norm=1.0)
        losses.append(output.loss)
    return model, losses


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_training_in_float8_follows_training_without(recipe: str) -> None:
    pytest.importorskip("torchao")
    plain, expected = train(())
    model, losses = train(BOTH, recipe)
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    layer = model.layers[1].moe
    assert type(layer.router) is torch.nn.Linear
    assert type(layer.shared_experts.w1) is type(model.layers[0].attention.wq) is type(model.layers[0].feed_forward.w2)
    assert type(layer.shared_experts.w1).__name__ == "Float8Linear"
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=0.03, atol=0)
    assert losses[-1] < losses[0] - 0.2
    assert losses[-1] != expected[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_experts_compile_to_one_graph() -> None:
    layer = tiny_model(num_layers=1).layers[0]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer.moe.experts.precision = "float8_emulated"
    x = torch.randn(2, 8, 16)
    expected = layer.moe(x)[0]
    got = torch.compile(layer.moe, fullgraph=True, backend="aot_eager")(x)[0]
    got.sum().backward()
    torch.testing.assert_close(got, expected)


def refusal(**changes: Any) -> str:
    device, bf16 = torch.device("cpu"), torch.bfloat16
    arguments = {"converters": BOTH, "emulate": False, "device": device, "param_dtype": bf16, **changes}
    with pytest.raises(ValueError, match=r"quantize\.converters") as caught:
        check_quantize(**arguments)
    return str(caught.value)


def test_refusals() -> None:
    pytest.importorskip("torchao")
    check_quantize(converters=(), emulate=False, device=torch.device("cpu"), param_dtype=torch.float32)
    assert "this is a CPU" in refusal()
    cuda = torch.device("cuda", 0)
    with (
        mock.patch("torch.cuda.get_device_name", return_value="A100"),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
    ):
        assert "this is A100" in refusal(device=cuda)
    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        check_quantize(converters=BOTH, emulate=False, device=cuda, param_dtype=torch.bfloat16)
        assert "mixed_precision_param" in refusal(device=cuda, param_dtype=torch.float32)
    with mock.patch.dict(sys.modules, {"torchao": None}), mock.patch("importlib.util.find_spec", return_value=None):
        assert "pip install 'titan_moe[float8]'" in refusal(emulate=True)
    model = tiny_model(device="meta", num_kv_heads=2, ffn_dim=40, first_dense_layers=1)
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w1 is 40 x 16: change"):
        quantize(model, converters=BOTH, recipe_name="rowwise", emulate=True)
