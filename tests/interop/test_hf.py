"""Conversion to and from Hugging Face against transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.models import KINDS, make_checkpoint
from tests.unit.data.test_tokenizer import SPECIAL, word_tokenizer
from titan_moe.checkpoint import load_model
from titan_moe.convert.hf.architectures import architecture_of
from titan_moe.convert.hf.convert import from_hf, to_hf
from titan_moe.convert.hf.tensor_map import tensor_map
from titan_moe.convert.verify import compare, hf_forward, our_forward
from titan_moe.data.tokenizer import load_tokenizer, tokenizer_from_files
from titan_moe.generate import generate
from titan_moe.model.multipliers import Multipliers

transformers: Any = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def open_hf(folder: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder)[0].state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_export_agrees_and_comes_back(tmp_path: Path, kind: str) -> None:
    """Logits to 1e-4, the same routing, the same greedy text; the way back restores every bit and the configuration."""
    architecture, changes = KINDS[kind]
    step = make_checkpoint(tmp_path / "run", **changes)
    to_hf(step, tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["model_type"] == architecture
    (model, config), theirs = load_model(step), open_hf(tmp_path / "hf")
    found = compare(our_forward(model), hf_forward(theirs), config.model.vocab_size)
    assert found.logit_difference < 1e-4
    assert found.largest_logit > 2
    assert found.same_routing == 1

    prompt = torch.tensor([[5, 77, 200, 31]])
    new = theirs.generate(prompt, max_new_tokens=12, do_sample=False)
    expected = prompt
    for _ in range(12):
        logits = model(expected)[0][0, -1, :257]
        expected = torch.cat([expected, logits.argmax().view(1, 1)], 1)
    assert torch.equal(new[:, : expected.shape[1]], expected[:, : new.shape[1]])

    from_hf(tmp_path / "hf", tmp_path / "back")
    again, config_again = load_model(tmp_path / "back")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        temperature = config.router.arguments.get("temperature", 1.0) if "router" in name else 1.0
        assert torch.equal(again.state_dict()[name], value / temperature), name
    assert config_again.model == config.model
    assert config_again.moe == config.moe
    assert config_again.balancer == config.balancer
    assert config_again.router.name == config.router.name


def test_a_mask_of_documents_stays_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The check compares the models without it, and the export says so."""
    tokens = torch.tensor([[5, 77, 256, 31, 40]])
    for name, masked in (("plain", False), ("masked", True)):
        step = make_checkpoint(tmp_path / name, **{"data.document_mask": masked})
        caplog.clear()
        to_hf(step, tmp_path / f"{name}-hf")
        assert ("which the export does not know" in caplog.text) == masked
        theirs = hf_forward(open_hf(tmp_path / f"{name}-hf"))(tokens)[0]
        assert torch.allclose(load_model(step)[0](tokens)[0], theirs, atol=1e-4) != masked


@pytest.mark.parametrize("kind", ["dense qk-norm tied", "topk_softmax tied", "softmax_topk shared", "sigmoid plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_of_a_parametrization_are_in_the_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    """transformers, which knows no such factors, computes the same; the export's own check holds in both types."""
    mup = {"parametrization.name": "mup", "parametrization.base_dim": 12, "parametrization.base_num_heads": 4}
    step = make_checkpoint(tmp_path / "run", **{**KINDS[kind][1], **mup, "parametrization.base_num_layers": 1})
    to_hf(step, tmp_path / "hf", dtype=dtype)
    (model, config), theirs = load_model(step), open_hf(tmp_path / "hf")
    assert model.multipliers != Multipliers()
    if dtype == "float32":
        found = compare(our_forward(model), hf_forward(theirs), config.model.vocab_size)
        assert found.logit_difference < 1e-4
        assert found.same_routing == 1


def test_what_balancers_keep_is_left_out_and_begins_anew(tmp_path: Path) -> None:
    trust = {"trust_components": ["examples"]}
    step = make_checkpoint(
        tmp_path / "run", **{"router.name": "sigmoid", "balancer.own.name": "examples.balancer:rprop"}
    )
    to_hf(step, tmp_path / "hf", **trust)
    assert not any("balancer" in name for name in open_hf(tmp_path / "hf").state_dict())
    from_hf(tmp_path / "hf", tmp_path / "back", **trust)
    (model, _), (again, config) = (load_model(folder, **trust) for folder in (step, tmp_path / "back"))
    assert config.balancer["own"]["name"] == "examples.balancer:rprop"
    assert all(torch.equal(a, b) for a, b in zip(model.expert_biases(), again.expert_biases(), strict=True))
    assert not any(sign.any() for sign in again.balancer_states()["own"]["sign"])


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GLM = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    **{"partial_rotary_factor": 1.0, "num_mtp_layers": 0, "routed_scaling_factor": 1.5},
}
# Models that transformers makes and saves by itself. Those called `real` have the keys of models that people download,
# with sizes cut down; numbers that decide something, as a head's width beside hidden_size, keep their ratios.
QWEN3_30B_A3B = {
    **{
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_key_value_heads": 1},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "router_aux_loss_coef": 0.001, "use_sliding_window": False},
    **{"max_window_layers": 48, "sliding_window": None, "tie_word_embeddings": False},
}
QWEN15_MOE_A27B = {
    **{"decoder_sparse_step": 1, "max_window_layers": 21, "moe_intermediate_size": 24, "norm_topk_prob": False},
    **{"num_experts": 6, "num_experts_per_tok": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"shared_expert_intermediate_size": 96, "sliding_window": 32768, "use_sliding_window": False},
}
OLMOE_1B_7B = {
    **{"clip_qkv": None, "norm_topk_prob": False, "num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False},
    **{"router_aux_loss_coef": 0.01, "attention_bias": False},
}
GLM_45 = {
    **{"attention_bias": True, "first_k_dense_replace": 1, "head_dim": 16, "moe_intermediate_size": 24, "n_group": 1},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 3},
    **{"num_nextn_predict_layers": 0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    **{"routed_scaling_factor": 2.5, "topk_group": 1, "use_qk_norm": True, "rope_scaling": None},
}
LLAMA_31_8B = {
    **{"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "rope_scaling": {
        **{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32},
        "rope_type": "llama3",
    },
}
QWEN25 = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False, "max_window_layers": 28}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "real qwen3_moe": ("Qwen3Moe", QWEN3_30B_A3B),
    "real qwen2_moe": ("Qwen2Moe", QWEN15_MOE_A27B),
    "real olmoe": ("Olmoe", OLMOE_1B_7B),
    "real glm4_moe": ("Glm4Moe", GLM_45),
    "real llama": ("Llama", LLAMA_31_8B),
    "real qwen2": ("Qwen2", QWEN25),
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48, "norm_topk_prob": True}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2, "head_dim": 8}),
    "glm4_moe": ("Glm4Moe", {**GLM, "head_dim": 8}),
}


def foreign(folder: Path, kind: str, **changes: Any) -> Path:
    """A model that transformers makes with random weights, norms and biases, saved by itself."""
    name, own = FOREIGN[kind]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **own, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                value.uniform_(0.7, 1.3)
            elif "bias" in key or key.endswith("gate.weight"):
                value.normal_(0.0, 0.3)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_made_by_others(tmp_path: Path, kind: str) -> None:
    """Read from transformers' own files, in shards; written again, every tensor has the bits that it had."""
    source = foreign(tmp_path / "theirs", kind)
    assert len(list(source.glob("*.safetensors"))) > 1
    from_hf(source, tmp_path / "run" / "step-0")
    model, config = load_model(tmp_path / "run" / "step-0")
    found = compare(our_forward(model), hf_forward(open_hf(source)), config.model.vocab_size)
    assert found.logit_difference < 1e-4
    assert found.same_routing == 1
    to_hf(tmp_path / "run" / "step-0", tmp_path / "hf")
    before, after = open_hf(source).state_dict(), open_hf(tmp_path / "hf").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GLM-4.5's files have it as a layer after the last; transformers ignores it as well."""
    from safetensors.torch import save_file

    source = foreign(tmp_path / "theirs", "real glm4_moe")
    tensors = {"model.layers.2.eh_proj.weight": torch.ones(32, 64), "model.layers.2.enorm.weight": torch.ones(32)}
    save_file(tensors, source / "model-further.safetensors")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-further.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no place for: model\.layers\.2\."):
        from_hf(source, tmp_path / "run", verify=False)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    from_hf(source, tmp_path / "run")
    assert "left out: 1 layers after the last, which predict the tokens after the next" in caplog.text
    assert load_model(tmp_path / "run")[1].model.num_layers == 2


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"sliding_window": 16}, "sliding_window = 16 cannot be represented"),
    ("llama", {"attention_bias": True}, "attention_bias = True cannot be represented: of qwen2"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True cannot"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope scaling = 'dynamic' cannot be represented: linear, llama3, yarn can be",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 cannot be represented"),
    ("real olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 cannot"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "use_sliding_window = True"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True cannot"),
    ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 1, "mlp_only_layers": [1]}, "experts would be in"),
    ("mixtral", {"intermediate_size": 20}, "moe.expert_dim (20) must be a multiple of 8"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_represented_is_said(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    source = foreign(tmp_path / "theirs", kind, **changes)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        from_hf(source, tmp_path / "run")
    assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_other_architectures_and_broken_folders(tmp_path: Path) -> None:
    """Each is one line that names the file, and nothing is left behind."""
    good = foreign(tmp_path / "theirs", "mixtral")
    values = json.loads((good / "config.json").read_text())
    index = json.loads((good / "model.safetensors.index.json").read_text())
    shard = good / next(iter(index["weight_map"].values()))

    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            from_hf(good, tmp_path / "run", verify=False)
        assert message in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]

    for changes, message in (
        ({"model_type": "gpt2"}, "model_type = 'gpt2' cannot be read; llama, qwen2, qwen3, mixtral"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"intermediate_size": 56}, "config.json makes it (4, 56, 32)"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "holds tensors that a model of ours has no place for: model.layers.1."),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embeddings, but the two are tied"),
    ):
        (good / "config.json").write_text(json.dumps({**values, **changes}))
        refuse(message)
    (good / "config.json").write_text("{")
    refuse("config.json is not JSON")
    (good / "config.json").unlink()
    refuse("config.json is missing")
    (good / "config.json").write_text(json.dumps(values))
    data = shard.read_bytes()
    shard.write_bytes(data[:-4])
    refuse("(a file cut short?)")
    shard.write_bytes(data[:6])
    refuse("its header does not fit")
    shard.write_bytes(data[:8] + b"[" * (len(data) - 8))
    refuse("its header cannot be read")
    shard.unlink()
    refuse(f"{shard} is missing")
    (good / "model.safetensors.index.json").write_text("[]")
    refuse("cannot be read")
    for path in good.glob("model*"):
        path.unlink()
    refuse("holds no weights: neither model.safetensors nor")
    (good / "pytorch_model.bin").write_bytes(b"")
    refuse("pytorch_model.bin is of another format")


def gradient_of(name: str, theirs: Any) -> torch.Tensor:
    """The gradient of a tensor of the files; transformers has the experts of a layer in one parameter."""
    grads = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    name = name.replace("block_sparse_moe", "mlp")
    if ".experts." not in name:
        return grads[name]
    block, _, rest = name.partition(".experts.")
    expert, matrix, _ = rest.split(".")
    if matrix in ("down_proj", "w2"):
        return grads[f"{block}.experts.down_proj"][int(expert)]
    gate, up = grads[f"{block}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if matrix in ("gate_proj", "w1") else up


@pytest.mark.parametrize("kind", ["mixtral", *(kind for kind in FOREIGN if kind.startswith("real "))])
def test_gradients_of_a_step(tmp_path: Path, kind: str) -> None:
    """One cross-entropy backward: every parameter's gradient as in transformers, to 1e-4."""
    source = foreign(tmp_path / "theirs", kind)
    from_hf(source, tmp_path / "run", verify=False)
    (model, config), theirs = load_model(tmp_path / "run"), open_hf(source)
    tokens = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 1:].flatten()
    torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), labels).backward()
    torch.nn.functional.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), labels).backward()

    table = tensor_map(config, architecture_of(config), has_bias=bool(model.expert_biases()))
    pairs = {pair.ours: pair for pair in table.pairs}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        expected = [gradient_of(other, theirs) for other in pairs[name].theirs]
        whole = torch.stack(expected) if pairs[name].by_row else expected[0]
        assert whole.abs().max() > 1e-5, name
        torch.testing.assert_close(parameter.grad, whole, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_and_shards(tmp_path: Path, dtype: str) -> None:
    """Weights in the type asked for but for the bias, in shards that the library of safetensors reads."""
    from safetensors.torch import load_file

    step = make_checkpoint(tmp_path / "run", **KINDS["sigmoid"][1])
    to_hf(step, tmp_path / "hf", dtype=dtype, shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in part)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 20_000
        tensors |= part
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    kinds = {name: t.dtype for name, t in tensors.items()}
    biases = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert {kinds[name] for name in biases} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - biases} == {getattr(torch, dtype)}
    before = load_model(step)[0].state_dict()
    from_hf(tmp_path / "hf", tmp_path / "back")
    for name, value in weights(tmp_path / "back").items():
        rounded = value if name.endswith("expert_bias") else before[name].to(getattr(torch, dtype)).float()
        assert torch.equal(value, rounded), name


def test_tokenizer_and_generation_config(tmp_path: Path) -> None:
    """The folder is complete: AutoTokenizer gives our ids, generate stops at the end of text and avoids padding ids."""
    step = make_checkpoint(tmp_path / "run")
    to_hf(step, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load_tokenizer(str(step / "tokenizer.json"))
    text = "Größe, naïve\n 12"
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    assert tokenizer.eos_token_id == ours.eot_id
    model = open_hf(tmp_path / "hf")
    assert model.generation_config.eos_token_id == ours.eot_id
    assert model.generation_config.suppress_tokens == list(range(257, 320))


SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False},
    "model_max_length": 1000,
    "clean_up_tokenization_spaces": False,
}
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} <|end|>{% endfor %}"


def foreign_with_tokenizer(folder: Path) -> Path:
    """A model of 96 ids that stops at 2 and 4, with generation settings, a tokenizer and a chat template."""
    source = foreign(folder, "mixtral", eos_token_id=[2, 4], bos_token_id=1)
    content = word_tokenizer(plain=tuple(f"w{i}" for i in range(60)))
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 4], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    (source / "tokenizer.json").write_text(content, encoding="utf-8")
    (source / "tokenizer_config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    (source / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (source / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (source / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return source


def test_tokens_templates_and_settings_of_others_come_back(tmp_path: Path) -> None:
    """From Hugging Face to ours and back: for transformers both folders mean the same, and the files are the same."""
    source, back = foreign_with_tokenizer(tmp_path / "theirs"), tmp_path / "back"
    from_hf(source, tmp_path / "run")
    to_hf(tmp_path / "run", back)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (back / name).read_text() == (source / name).read_text(), name
    for folder in (source, back):
        values = json.loads((folder / "config.json").read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values.get("pad_token_id")) == (1, [2, 4], None)
    before, after = (json.loads((folder / "generation_config.json").read_text()) for folder in (source, back))
    assert after == before | {"suppress_tokens": list(range(65, 96))}  # ids of the model that no token has
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, back)]
    chats = [t.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) for t in tokenizers]
    assert chats == ["<s> w1 <|end|>"] * 2
    assert [(t.bos_token, t.eos_token, t.pad_token) for t in tokenizers] == [("<s>", "</s>", None)] * 2


def test_generation_stops_at_every_end_that_transformers_knows(tmp_path: Path) -> None:
    """Of a model that says one token after another: at </s> and at <|endoftext|>, not at <|end|>."""
    source = foreign_with_tokenizer(tmp_path / "theirs")
    theirs = open_hf(source)
    with torch.no_grad():  # the next id is the one after: the head is the embedding of the id before
        for name, parameter in theirs.named_parameters():
            parameter.copy_(parameter * (0.0 if "o_proj" in name or "experts" in name else 1.0))
        theirs.model.norm.weight.fill_(1.0)
        theirs.model.embed_tokens.weight.copy_(torch.randn(96, 32, generator=torch.Generator().manual_seed(0)))
        theirs.lm_head.weight.copy_(10 * theirs.model.embed_tokens.weight.roll(1, 0))
    theirs.save_pretrained(source, max_shard_size="40KB")
    from_hf(source, tmp_path / "run", verify=False)
    step = next((tmp_path / "run" / "checkpoint").iterdir())
    model, tokenizer = load_model(step)[0], load_tokenizer(str(step / "tokenizer.json"))
    assert (tokenizer.eot_id, tokenizer.eos_ids, tokenizer.bos_id) == (2, (2, 4), 1)
    greedy: dict[str, Any] = {"max_new_tokens": 9, "temperature": 0.0, "top_k": 0, "seed": 0, "context": 64}
    for prompt, ids in (("<s>", [1, 2]), ("<|end|>", [3, 4]), ("w0", list(range(5, 15)))):
        start = torch.tensor([[SPECIAL.index(prompt) if prompt in SPECIAL else 5]])
        assert theirs.generate(start, max_new_tokens=9, do_sample=False)[0].tolist() == ids
        ours = tokenizer._replace(backend=OnlyIds(start.tolist()[0]))
        assert generate(model, ours, [prompt], **greedy) == [prompt + repr(ids[1:])]
    assert tokenizer_from_files(tokenizer.files)[1:] == tokenizer[1:]


class OnlyIds:
    """A tokenizer whose text is the ids, to see which are generated."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids = prompt

    def encode(self, text: str, add_special_tokens: bool = True) -> "OnlyIds":
        return self if text else OnlyIds([])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return repr(ids)


def test_a_folder_whose_end_of_text_is_unknown_is_refused_at_once(tmp_path: Path) -> None:
    source = foreign_with_tokenizer(tmp_path / "theirs")
    (source / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, "eos_token": "<|END_OF_TURN_TOKEN|>"}))
    with pytest.raises(
        ValueError, match=r"tokenizer.json: the files beside it name eos_token '<\|END_OF_TURN_TOKEN\|>', "
    ):
        from_hf(source, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
