"""torch_dist there and back by ourselves, and against megatron-core where it can be imported."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.models import KINDS, configure, make_checkpoint
from titan_moe.checkpoint import load_model
from titan_moe.checkpoint.lazy import read_lazily, write_lazily
from titan_moe.config import to_toml
from titan_moe.convert.megatron import convert
from titan_moe.convert.megatron.convert import from_megatron, to_megatron, transformer_config

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (the interop extra has it)"
)
WITHOUT = {  # and what is said of it
    "sigmoid plain": "norm_topk = False",  # Megatron normalises sigmoid scores whenever top_k > 1
    "dense llama3": "model.rope_scaling = llama3 can't be converted",
    "topk_softmax yarn": "model.rope_scaling = yarn can't be converted",
    "topk_softmax linear": "model.rope_scaling = linear can't be converted",
    "topk_softmax gate": "moe.shared_expert_gate = true can't be converted",
    "softmax_topk full": "model.qk_norm = full can't be converted",
    "topk_softmax full": "model.qk_norm = full can't be converted",
    "sigmoid rotary": "model.partial_rotary_factor = 0.5 can't be converted",
}
EXPORTED = {name: changes for name, (_, changes) in KINDS.items() if name not in WITHOUT}
LOADED = [
    ("dense qk-norm tied", "local"),
    ("topk_softmax", "te"),
    ("softmax_topk shared", "te"),
    ("sigmoid shared", "local"),
    ("sigmoid groups", "te"),
    ("sigmoid tied", "te"),
    ("topk_softmax biases", "te"),
    ("dense biases", "local"),
]


@pytest.mark.parametrize("kind", WITHOUT)
def test_what_megatron_computes_otherwise_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=WITHOUT[kind]):
        transformer_config(configure(**KINDS[kind][1]))


def megatron_saves(configs: dict[Path, Any]) -> dict[Path, torch.Tensor]:
    """Save a Megatron model to each folder; their logits on tokens of their vocabularies."""
    tokens = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(2))
    for folder, config in configs.items():
        folder.mkdir()
        (folder / "transformer_config.json").write_text(json.dumps(transformer_config(config)))
        model = config.model
        sizes = {"vocab_size": model.vocab_size, "tied": model.tie_embeddings, "theta": model.rope_theta}
        torch.save({"tokens": tokens, **sizes}, folder.with_suffix(".pt"))
    command = [sys.executable, "-m", "tests.interop.megatron_side", *map(str, configs)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {folder: torch.load(folder.with_suffix(".pt"))["logits"] for folder in configs}


def our_logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return load_model(folder)[0](tokens)[0]


def checked(caplog: pytest.LogCaptureFixture) -> None:
    """The conversion said that it compared the models, and that they are the same."""
    (found,) = re.findall(
        r"checked: largest logit difference to Megatron-core (\S+) \(largest logit (\S+)\), identical routing "
        r"decisions 100\.00 %",
        caplog.text,
    )
    assert float(found[0]) < 1e-4
    assert float(found[1]) > 2


@pytest.mark.parametrize(
    ("kind", "spec"), [*((kind, "te") for kind in EXPORTED), ("topk_softmax", "local"), ("sigmoid tied", "local")]
)
def test_there_and_back(tmp_path: Path, kind: str, spec: str) -> None:
    """Every bit comes back, by either name of the norm, and the configuration with it."""
    step = make_checkpoint(tmp_path / "run", **EXPORTED[kind])
    to_megatron(step, tmp_path / "out", spec=spec, verify=False)
    names = read_lazily(tmp_path / "out").keys()
    model, config = load_model(step)
    if config.moe.num_experts:
        assert any(name.endswith("pre_mlp_layernorm.weight") for name in names) == (spec == "te")
    from_megatron(tmp_path / "out", tmp_path / "back", verify=False)
    again, config_again = load_model(tmp_path / "back")
    for name, value in model.state_dict().items():
        temperature = config.router.arguments.get("temperature", 1.0) if "router" in name else 1.0
        assert torch.equal(again.state_dict()[name], value / temperature), name
    assert (config_again.model, config_again.moe) == (config.model, config.moe)


@needs_megatron
@pytest.mark.parametrize(("kind", "spec"), LOADED)
def test_megatron_loads_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, spec: str) -> None:
    """By its own loader, whichever layers the folder is for."""
    step = make_checkpoint(tmp_path / "run", **EXPORTED[kind])
    with caplog.at_level(logging.INFO):
        to_megatron(step, tmp_path / "out", spec=spec)
    checked(caplog)


@needs_megatron
def test_we_load_megatrons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders that Megatron saved, which say nothing about the model: our file does."""
    kinds = ("topk_softmax shared", "topk_softmax some layers", "sigmoid")
    configs = {tmp_path / kind.replace(" ", "-"): configure(**EXPORTED[kind]) for kind in kinds}
    for folder, theirs in megatron_saves(configs).items():
        (tmp_path / "model.toml").write_text(to_toml(configs[folder]))
        run, by_itself = tmp_path / f"{folder.name}-run", folder.name == "sigmoid"
        with caplog.at_level(logging.INFO):
            from_megatron(folder, run, config_file=str(tmp_path / "model.toml"), verify=by_itself)
        if by_itself:
            checked(caplog)
        ours = our_logits(run)
        assert ours.abs().max() > 2
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@needs_megatron
def test_a_wrong_conversion_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order of softmax there, and a model that does not run: one line, and nothing is left."""
    step = make_checkpoint(tmp_path / "run")
    wrong = {"moe_router_pre_softmax": True}
    monkeypatch.setattr(convert, "transformer_config", lambda config: {**transformer_config(config), **wrong})
    with pytest.raises(ValueError, match=r"^the check of the conversion failed: largest logit difference to Megatron"):
        to_megatron(step, tmp_path / "out")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"failed: Megatron-core: exit code 1; --no_verify leaves it out$"):
        to_megatron(step, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refusals(tmp_path: Path) -> None:
    """One line that says what is wrong, and nothing is left behind."""
    step = make_checkpoint(tmp_path / "run", **{"balancer.loss_free": True})
    with pytest.raises(ValueError, match=r"expert_bias is not 0: Megatron-core has a selection bias only with router"):
        to_megatron(step, tmp_path / "out")
    for changes, message in (
        ({"router.name": "expert_choice"}, "router.name = 'expert_choice'"),
        ({"router.name": "sigmoid", "router.norm_topk": False}, "norm_topk = False has no counterpart"),
        ({"moe.num_identity_experts": 2}, "moe.num_identity_experts = 2 has no counterpart"),
        ({"moe.top_k": 1}, "router.name = 'topk_softmax' with moe.top_k = 1 has no counterpart"),
    ):
        with pytest.raises(ValueError, match="has no counterpart in Megatron-core") as error:
            transformer_config(configure(**changes))
        assert message in str(error.value)

    good = make_checkpoint(tmp_path / "good")
    to_megatron(good, tmp_path / "out", verify=False)
    tensors = read_lazily(tmp_path / "out")
    file = tmp_path / "model.toml"

    def refuse(message: str, *, config: dict[str, Any], without: str = "") -> None:
        folder = tmp_path / "changed"
        write_lazily(folder, {name: t for name, t in tensors.items() if name != without})
        file.write_text(to_toml(configure(**config)))
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            from_megatron(folder, tmp_path / "back", config_file=str(file))
        assert message in str(error.value)
        assert not (tmp_path / "back").exists()
        for path in folder.iterdir():
            path.unlink()

    refuse("lacks decoder.final_layernorm.weight", config={}, without="decoder.final_layernorm.weight")
    refuse("lacks decoder.layers.mlp.router.weight", config={}, without="decoder.layers.mlp.router.weight")
    refuse("is of 2 layers, model.num_layers is 3", config={"model.num_layers": 3})
    refuse("no place for: output_layer.weight", config={"model.tie_embeddings": True})
    refuse("(8, 24, 32) there, (8, 32, 32) in the configuration", config={"moe.expert_dim": 32})
    with pytest.raises(ValueError, match="does not say which model it holds"):
        from_megatron(tmp_path / "changed", tmp_path / "back")
    with pytest.raises(ValueError, match=r"has no \.metadata"):
        from_megatron(tmp_path / "changed", tmp_path / "back", config_file=str(file))
