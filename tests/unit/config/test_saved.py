"""Files of strangers: no checkpoint, model folder or run may bring code in, or reach files outside of its folder.

The payloads are harmless: they write the file `ran`.
"""

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tomli_w
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from tests.interop.models import configure, fill, make_checkpoint
from titan_moe import evaluate, generate
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, load_model, save_checkpoint
from titan_moe.checkpoint.folder import MANIFEST, entries
from titan_moe.checkpoint.metadata import METADATA, read_metadata
from titan_moe.config import load_config, load_saved, read_saved, to_toml
from titan_moe.config.layers import tomllib
from titan_moe.config.saved import PLAIN_KEYS, outside_components
from titan_moe.config.sections import DATA_TABLES, KINDS, SECTIONS
from titan_moe.convert.cli import convert_from_hf, convert_from_megatron, convert_to_hf, convert_to_megatron
from titan_moe.convert.hf.convert import OUR_CONFIG, from_hf, to_hf
from titan_moe.convert.hf.safetensors import INDEX
from titan_moe.convert.megatron.convert import from_megatron, to_megatron
from titan_moe.convert.megatron.model import tensors_alone
from titan_moe.convert.surgery_cli import surgery
from titan_moe.convert.verify import weights_alone
from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.runtime.errors import describe
from titan_moe.runtime.files import crc32_of_json
from titan_moe.study.grid import Run
from titan_moe.study.report.compare import compare
from titan_moe.study.reuse import reuse
from titan_moe.study.runs import POINT, changes

MODULE = "titan_moe_payload"
CODE = """
from pathlib import Path
Path({ran!r}).touch()
from titan_moe.model.experts_backend import EXPERTS_BACKENDS
from titan_moe.model.routing import ROUTERS
from titan_moe.balancer import BALANCERS
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.schedule import SCHEDULES
router, loss, optimizer, schedule = (
    ROUTERS["topk_softmax"], BALANCERS["aux_loss"], OPTIMIZERS["adamw"], SCHEDULES["constant"]
)
backend = EXPERTS_BACKENDS["grouped_mm"]
"""


class Touch:
    """Its pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that payloads write; there is a module that writes it when it is imported."""
    path = tmp_path / "ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / f"{MODULE}.py").write_text(CODE.format(ran=str(path)))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield path
    sys.modules.pop(MODULE, None)


def reseal(step: Path) -> None:
    """Write the manifest anew, as who changed the files of a checkpoint would."""
    body = json.loads((step / MANIFEST).read_text())["body"]
    names = [path.name for path in step.iterdir() if path.name != MANIFEST]
    body["files"] = entries(step, names)
    (step / MANIFEST).write_text(json.dumps({"crc32": crc32_of_json(body), "body": body}))


def rewrite(step: Path, **sections: Any) -> None:
    """Put tables into the configuration of a checkpoint."""
    file = step / "config.toml"
    file.write_text(tomli_w.dumps({**tomllib.loads(file.read_text()), **sections}))
    reseal(step)


def test_metadata_that_call_a_function(tmp_path: Path, ran: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    megatron = tmp_path / "megatron"
    to_megatron(step, megatron, verify=False)
    for folder in (step, megatron):
        (folder / METADATA).write_bytes(pickle.dumps(Touch(ran)))
    reseal(step)
    for read in (
        lambda: load_model(step),
        lambda: to_hf(step, tmp_path / "out", verify=False),
        lambda: from_megatron(megatron, tmp_path / "out", verify=False),
    ):
        with pytest.raises(ValueError, match=r"\.metadata names \w+\.open, which no checkpoint needs"):
            read()
    assert not ran.exists()


def test_metadata_that_hide_an_object_in_a_scalar(tmp_path: Path, ran: Path) -> None:
    """What is not a tensor torch would read by an unrestricted pickle, and a step count has no shape to differ in."""
    config = configure()
    model = fill(build_model(config).to_empty(device="cpu"))
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    nothing: dict[str, Any] = {"extra": {}, "files": {}, "keep_latest_k": 0}
    step = save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer, **nothing)
    found = pickle.loads((step / METADATA).read_bytes())
    name = next(name for name in found.state_dict_metadata if name.endswith(".step"))
    torch.save(Touch(ran), step / "__9_0.distcp")
    found.state_dict_metadata[name] = BytesStorageMetadata()
    found.storage_data[MetadataIndex(name)] = _StorageInfo("__9_0.distcp", 0, (step / "__9_0.distcp").stat().st_size)
    (step / METADATA).write_bytes(pickle.dumps(found))
    reseal(step)
    with pytest.raises(ValueError, match=f"holds another optimizer: only here: {name}"):
        load_checkpoint(step, model=model, optimizer=optimizer)
    assert not ran.exists()


def test_metadata_change_no_class_and_name_no_other_folder(tmp_path: Path) -> None:
    """A pickle can set attributes of the classes that it names."""
    step = make_checkpoint(tmp_path / "run")
    good = (step / METADATA).read_bytes()
    name = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    (step / METADATA).write_bytes(b"\x80\x04" + name + b"N}\x8c\x05ownedK\x01s\x86b.")
    with pytest.raises(ValueError, match=r"\.metadata cannot be read \(TypeError\)"):
        read_metadata(step)
    assert not hasattr(TensorStorageMetadata, "owned")
    (step / METADATA).write_bytes(good.replace(b"\x8c\x0c__0_0.distcp", b"\x8c\x0c../00.distcp"))
    with pytest.raises(ValueError, match=r"names the file '\.\./00\.distcp': only files in the same folder"):
        read_metadata(step)
    for cut in (0, 1, len(good) // 2, len(good) - 1):
        (step / METADATA).write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
            read_metadata(step)


def test_names_of_files_stay_in_their_folder(tmp_path: Path) -> None:
    step, hf = make_checkpoint(tmp_path / "run"), tmp_path / "hf"
    to_hf(step, hf, verify=False, shard_bytes=20_000)
    index = json.loads((hf / INDEX).read_text())
    for bad in ("../model.safetensors", "/etc/hostname", "..", "a/b", "a\\b"):
        first = next(iter(index["weight_map"]))
        (hf / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], first: bad}}))
        with pytest.raises(ValueError, match=r"names the file .*: only files in the same folder are read"):
            from_hf(hf, tmp_path / "out", verify=False)
    body = json.loads((step / MANIFEST).read_text())["body"]
    body["files"]["../run/checkpoint"] = {"size": 0, "crc32": ""}
    (step / MANIFEST).write_text(json.dumps({"crc32": crc32_of_json(body), "body": body}))
    with pytest.raises(ValueError, match=r"names the file '\.\./run/checkpoint', which is not in its folder"):
        load_model(step)


def test_a_link_in_a_folder_of_hugging_face_brings_no_secret_along(tmp_path: Path) -> None:
    hf, secret = tmp_path / "hf", tmp_path / "secret.json"
    to_hf(make_checkpoint(tmp_path / "run"), hf, verify=False)
    secret.write_text('{"token": "secret"}')
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"not a tokenizer\.json that `tokenizers` reads"):
        from_hf(hf, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_other_libraries_get_tensors_and_a_plain_configuration_alone(tmp_path: Path, ran: Path) -> None:
    """Both would run more of a folder than its tensors: pickles, adapters, code that config.json names."""
    step, hf, megatron = make_checkpoint(tmp_path / "run"), tmp_path / "hf", tmp_path / "megatron"
    to_hf(step, hf, verify=False, shard_bytes=20_000)
    values = json.loads((hf / "config.json").read_text())
    names = {"auto_map": {"AutoConfig": "evil.py"}, "attn_implementation": "evil/kernel", "transformers_weights": "x"}
    (hf / "config.json").write_text(json.dumps({**values, **names, "_experts_implementation": "evil/kernel"}))
    (hf / "adapter_config.json").write_text("{}")
    torch.save(Touch(ran), hf / "pytorch_model.bin")
    with weights_alone(hf) as folder:
        assert json.loads((folder / "config.json").read_text()) == values
        shards = {path.name for path in hf.glob("*.safetensors")}
        assert {path.name for path in folder.iterdir()} == {"config.json", INDEX, *shards}
    to_megatron(step, megatron, verify=False)
    torch.save(Touch(ran), megatron / "common.pt")
    with tensors_alone(megatron, read_metadata(megatron)) as folder:
        shards = {path.name for path in megatron.glob("*.distcp")}
        assert {path.name for path in folder.iterdir()} == {METADATA, "common.pt", "metadata.json", *shards}
        assert torch.load(folder / "common.pt", weights_only=True) == {"checkpoint_version": 3.0, "iteration": 0}
        assert pickle.loads((folder / METADATA).read_bytes()) == read_metadata(megatron)


def test_a_configuration_that_names_a_function_of_python(tmp_path: Path, ran: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    rewrite(step, balancer={"os:system": {"command": f"touch {ran}"}})
    message = r"balancer\.os:system = 'os:system': is code from outside of titan_moe: add --trust_components os if you"
    with pytest.raises(ValueError, match=message):
        load_model(step)
    assert not ran.exists()


def test_an_error_shows_what_a_terminal_would_obey(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    rewrite(step, balancer={"a:\x1b]0;title\x07\nerror: b": {}})
    with pytest.raises(ValueError, match=r"is code from outside") as found:
        load_model(step)
    shown = describe(found.value)
    assert shown.isprintable()
    assert r"balancer.a:\x1b]0;title\x07 error: b = " in shown


def doors(tmp_path: Path, step: Path) -> dict[str, Callable[[list[str]], Any]]:
    """Commands that build from the configuration of a stranger, each with further words."""
    hf, megatron, text = tmp_path / "hf", tmp_path / "megatron", tmp_path / "text.txt"
    to_hf(step, hf, verify=False)
    to_megatron(step, megatron, verify=False)
    text.write_text("some text of a file " * 200)
    own = ["--data.path", str(text), "--data.cache_folder", str(tmp_path / "cache")]
    start = ["--checkpoint", str(step)]
    new = iter(range(100))

    def out() -> str:
        return str(tmp_path / f"out{next(new)}")

    rewrite(step, lr_scheduler={"name": f"{MODULE}:schedule"})
    for folder in (hf, megatron):
        (folder / OUR_CONFIG).write_bytes((step / "config.toml").read_bytes())
    return {
        "evaluate": lambda words: evaluate.main([*start, *own, *words]),
        "generate": lambda words: generate.main([*start, "--max_new_tokens", "1", *words]),
        "to_hf": lambda words: convert_to_hf([str(step), out(), "--no_verify", *words]),
        "from_hf": lambda words: convert_from_hf([str(hf), out(), "--no_verify", *words]),
        "to_megatron": lambda words: convert_to_megatron([str(step), out(), "--no_verify", *words]),
        "from_megatron": lambda words: convert_from_megatron([str(megatron), out(), "--no_verify", *words]),
        "surgery": lambda words: surgery(["add", str(step), out(), "--num_experts", "9", *own[:2], *words]),
    }


def test_commands_import_what_the_user_names_and_nothing_else(
    tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("titan_moe.runtime.command.init_logging", lambda world: None)
    step = make_checkpoint(tmp_path / "run")
    for name, command in doors(tmp_path, step).items():
        before = sorted(tmp_path.iterdir())
        message = rf"lr_scheduler\.name = '{MODULE}:schedule': is code .* --trust_components {MODULE} if"
        for words in ([], ["--trust_components", f"{MODULE}_other", f"{MODULE}.inner"]):
            with pytest.raises(ValueError, match=message):
                command(words)
            assert not ran.exists(), name
            assert sorted(tmp_path.iterdir()) == before, name
        assert command(["--trust_components", "other", MODULE]) == 0
        assert ran.exists(), name
        ran.unlink()
        sys.modules.pop(MODULE)


def test_trust_in_python(tmp_path: Path, ran: Path) -> None:
    """A package vouches for its modules; a file of the user's own needs no word."""
    step = make_checkpoint(tmp_path / "run")
    rewrite(step, router={"name": f"{MODULE}:router", "temperature": 2.0})
    assert load_model(step, trust_components=[MODULE])[1].router.arguments["temperature"] == 2.0
    with pytest.raises(ValueError, match=rf"add --trust_components {MODULE} if"):
        load_model(step)
    package = tmp_path / "code" / "titan_moe_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(f"from {MODULE} import router\n")
    rewrite(step, router={"name": "titan_moe_package.inner:router"})
    assert load_model(step, trust_components="titan_moe_package")[1].router.arguments["temperature"] == 1.0
    with pytest.raises(ValueError, match=r"add --trust_components titan_moe_package\.inner if"):
        load_model(step, trust_components=["titan_moe"])
    assert load_config(["--job.config_file", str(step / "config.toml")]).router.name.startswith("titan_moe_package")


def every_key() -> dict[str, dict[str, Any]]:
    """A configuration for each key that takes text, with the payload there, and for each place of a component."""
    name, found = f"{MODULE}:router", {}
    for section, hint in SECTIONS.items():
        if section in KINDS:
            found[section] = {section: {name: {}} if section == "balancer" else {"name": name}}
            continue
        for field in dataclasses.fields(hint):
            if "str" in repr(get_type_hints(hint)[field.name]) or "Literal" in repr(get_type_hints(hint)[field.name]):
                found[f"{section}.{field.name}"] = {section: {field.name: name}}
    for kind in DATA_TABLES:
        section, _, key = kind.partition(".")
        found[kind] = {section: {key: {"a": {"dataset": name}}}}
    for group in GROUP_PATTERNS:
        found[f"optimizer.{group}"] = {"optimizer": {group: {"name": name}}}
    return found


def test_no_key_of_a_saved_configuration_imports(tmp_path: Path, ran: Path) -> None:
    """A key that comes to take components must be refused here, too: PLAIN_KEYS lists those outside of KINDS."""
    keys, refused = every_key(), set()
    assert {"data.dataset", "moe.experts_backend", "optimizer.expert", "balancer", "job.description"} <= set(keys)
    for key, table in keys.items():
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps(table))
        data = {"data.dataset", *DATA_TABLES}
        read_saved(file) if key in {*KINDS, *PLAIN_KEYS, *data} else None
        if key in data:
            assert load_saved(file, with_data=False) == read_saved(file)
        try:
            load_saved(file)
        except ValueError as error:
            refused |= {key} if "--trust_components" in str(error) else set()
        assert not ran.exists(), key
    assert {*KINDS, *PLAIN_KEYS, *data, *(f"optimizer.{group}" for group in GROUP_PATTERNS)} == refused
    file.write_text('base = "/etc/hosts"')
    with pytest.raises(ValueError, match="base = '/etc/hosts': is not for the configuration of a checkpoint"):
        load_saved(file)
    file.write_text("")
    with pytest.raises(ValueError, match=r"--job\.config_file: the configuration is the checkpoint's"):
        load_saved(file, ["--job.config_file", "x"])


def test_reading_a_configuration_keeps_what_it_does_not_import(tmp_path: Path, ran: Path) -> None:
    """With every kind of component from outside, what is read is what was written."""
    words = [f"--router.name={MODULE}:router", "--router.temperature=2.0", f"--moe.experts_backend={MODULE}:backend"]
    words += [
        f"--balancer.{MODULE}:loss.coeff=0.5",
        "--balancer.z_loss.coeff=0.1",
        f"--optimizer.name={MODULE}:optimizer",
    ]
    words += ["--optimizer.expert.lr=0.5", f"--lr_scheduler.name={MODULE}:schedule", "--optimizer.norm=false"]
    words += [f"--optimizer.embedding.name={MODULE}:optimizer"]
    file = tmp_path / "config.toml"
    written = to_toml(load_config(words))
    file.write_text(written)
    sys.modules.pop(MODULE)
    ran.unlink()
    assert to_toml(read_saved(file)) == written
    assert not ran.exists()
    assert len(list(outside_components(tomllib.loads(written)))) == 6
    file.write_text(to_toml(configure()))
    assert read_saved(file) == load_config(["--job.config_file", str(file)])


def test_studies_look_at_runs_without_their_code(tmp_path: Path, ran: Path) -> None:
    """--compare, --reuse and the comparison with a run that is there import nothing."""
    runs = []
    for name, rate in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / "study" / "runs" / name / "seed-42"
        folder.mkdir(parents=True)
        file = {"training": {"steps": 1}, "router": {"name": f"{MODULE}:router", "temperature": rate}}
        for config in ("config.toml", POINT):
            (folder / config).write_text(tomli_w.dumps(file))
        lines = [{"step": 1, "kind": kind, "loss": rate} for kind in ("train", "validation")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(Run({"run": name}, 42, folder, read_saved(folder / POINT)))
    assert compare([str(tmp_path / "study")], tmp_path / "out", None) == 0
    assert "temperature" in (tmp_path / "out" / "table.md").read_text()
    assert [changes(run) for run in runs] == [[], []]
    again = [run._replace(folder=tmp_path / "again" / run.point["run"]) for run in runs]
    for run in again:
        run.folder.parent.mkdir(exist_ok=True)
    assert reuse(again, [str(tmp_path / "study")]) == 2
    assert not ran.exists()


def test_a_saved_configuration_may_have_a_key_that_is_gone(tmp_path: Path) -> None:
    file, config = tmp_path / "config.toml", load_config(["--moe.top_k", "1"])
    file.write_text(to_toml(config).replace("[moe]\n", '[moe]\ndispatcher = "auto"\n'), "utf-8")
    assert "dispatcher" in file.read_text("utf-8")
    assert to_toml(load_saved(file)) == to_toml(read_saved(file)) == to_toml(config)
    with pytest.raises(ValueError, match=r"command line: --moe\.dispatcher = auto: is no key any more: leave it out"):
        load_saved(file, ["--moe.dispatcher", "auto"])
