"""The configuration: precedence, inheritance, strictness, one clear line for every mistake, round trips, help."""

import dataclasses
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from titan_moe.config import cautions, find_component, help_text, load_config, to_toml
from titan_moe.config.schema import check_value, document
from titan_moe.config.sections import ARGUMENTS, KINDS, NAMED_TABLES, SECTIONS, Config, ValidationSet

TRAIN_CONFIGS = sorted(glob.glob(str(Path(__file__).parents[3] / "train_configs" / "*.toml")))
MODELS = sorted(glob.glob(str(Path(__file__).parents[3] / "train_configs" / "models" / "*.toml")))
Write = Callable[..., str]


def outside_router(top_k: int, *, power: float, names: tuple[str, ...] = ("a", "b")) -> tuple[Any, ...]:
    return (top_k, power, names)


def outside_balancer(strength: float = 0.5) -> float:
    return strength


def outside_schedule(steps: int, warmup_steps: float = 0.5) -> float:
    return warmup_steps / steps


not_a_function = 3


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str | bytes, name: str = "x.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write_file


def load(*args: str, file: str | None = None) -> Config:
    return load_config([*(["--job.config_file", file] if file else []), *args])


def error_of(*args: str, file: str | None = None) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load(*args, file=file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers_table_1():
    config = load()
    assert (config.model.num_layers, config.model.dim, config.model.num_heads, config.model.ffn_dim) == (
        24,
        768,
        12,
        2048,
    )
    assert (config.moe.num_experts, config.moe.top_k, config.moe.expert_dim) == (8, 2, 2048)
    assert (config.training.seq_len, config.training.steps, config.training.global_batch_size) == (512, 50000, 40)
    assert config.training.max_norm == 1.0
    assert config.optimizer.name == "adamw"
    of_steps = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    assert config.optimizer.arguments == {**of_steps, "state_dtype": "float32"}
    assert config.optimizer.groups == {"norm": {"weight_decay": 0.0}}
    assert (config.lr_scheduler.name, config.lr_scheduler.arguments["warmup_steps"]) == ("cosine", 300)
    assert (config.router.name, config.router.arguments["temperature"]) == ("topk_softmax", 1.0)
    assert config.router.arguments["capacity_factor"] == 0  # dropless
    assert config.balancer == {}


@pytest.mark.parametrize(
    ("args", "caution"),
    [
        (["--router.name", "expert_choice"], "sees the future, in training and in evaluation"),
        (["--router.name", "sinkhorn"], "sees the future there"),
        (["--router.capacity_factor", "1", "--router.drop_policy", "score"], "drop_policy = 'position' does not"),
        (["--router.capacity_factor", "1"], ""),
        (["--moe.num_experts", "0", "--router.name", "expert_choice"], ""),
        (["--training.steps", "60"], "warmup_steps (300) is not below training.steps (60): learning rates rise until"),
        (["--training.steps", "60", "--moe.num_experts", "0"], "to 0.2 of what is set"),
        (["--training.steps", "60", "--lr_scheduler.warmup_steps", "59"], ""),
        (["--optimizer.expert.name", "schedule_free_adamw"], "'cosine' lets it fall as well: set it to 'constant'"),
        (["--optimizer.name", "schedule_free_adamw", "--lr_scheduler.name", "constant"], ""),
        ([], ""),
    ],
)
def test_cautions(args: list[str], caution: str):
    found = cautions(load(*args))
    assert len(found) == bool(caution)
    assert all(caution in text for text in found)


def test_defaults_have_their_own_types():
    for section, hint in SECTIONS.items():
        if section not in KINDS:
            for name, annotation in get_type_hints(hint, include_extras=True).items():
                default = getattr(getattr(Config(), section), name)
                assert check_value(annotation, default, "defaults", f"{section}.{name}") == default


def test_command_line_over_file_over_base_over_defaults(write: Write):
    write("[training]\nsteps = 1\nseed = 1\nseq_len = 64\n[optimizer]\nlr = 0.5\nbeta1 = 0.5\n", "base.toml")
    file = write('base = "base.toml"\n[training]\nsteps = 2\nseed = 2\n[optimizer]\nlr = 0.25\n')
    config = load("--training.steps", "3", "--optimizer.beta2=0.75", file=file)
    assert (config.training.steps, config.training.seed, config.training.seq_len) == (3, 2, 64)
    assert config.training.global_batch_size == 40
    arguments = config.optimizer.arguments
    assert (arguments["lr"], arguments["beta1"], arguments["beta2"], arguments["eps"]) == (0.25, 0.5, 0.75, 1e-8)


def test_a_list_of_bases_is_merged_in_order_and_each_is_relative_to_its_file(write: Write):
    write("[training]\nsteps = 1\nseed = 1\n[moe]\ntop_k = 1\n", "shared/root.toml")
    write('base = "root.toml"\n[training]\nsteps = 2\nseed = 2\n', "shared/a.toml")
    write('base = "../shared/root.toml"\n[training]\nsteps = 3\n', "b/b.toml")
    config = load(file=write('base = ["shared/a.toml", "b/b.toml"]\n'))
    # root is read again as b's base, after a: b comes later, with all that it inherits
    assert (config.training.steps, config.training.seed, config.moe.top_k) == (3, 1, 1)


def test_a_cycle_of_bases_is_an_error(write: Write):
    write('base = "x.toml"\n', "y.toml")
    message = error_of(file=write('base = "y.toml"\n'))
    assert "y.toml: base" in message
    assert "cycle" in message


def test_command_line_forms():
    config = load(
        *("--compile.enable", "--training.steps=7", "--data.path", "a.txt", "b=c.txt", "--data.validation_path", "v"),
        *("--optimizer.expert.lr", "5e-4", "--balancer.loss_free.rate", "0.01", "--router.norm_topk", "false"),
        *("--router.name", "sigmoid", "--job.description=a = b", "--training.seed", "1", "--training.seed", "2"),
        *("--data.dataset", "text", "--balancer.z_loss"),
    )
    assert config.compile.enable is True
    assert (config.training.steps, config.training.seed) == (7, 2)
    assert (config.data.path, config.data.validation_path) == (["a.txt", "b=c.txt"], ["v"])
    assert config.optimizer.groups == {"expert": {"lr": 5e-4}, "norm": {"weight_decay": 0.0}}
    assert config.balancer["z_loss"] == {"coeff": 0.001}
    assert config.balancer["loss_free"].items() >= {"rate": 0.01, "rule": "sign"}.items()
    assert list(config.balancer) == ["loss_free", "z_loss"]
    assert (config.router.name, config.router.arguments["norm_topk"]) == ("sigmoid", False)
    assert config.job.description == "a = b"


def test_a_path_may_be_one_string(write: Write):
    assert load(file=write('[data]\ndataset = "text"\npath = "a.txt"\n')).data.path == ["a.txt"]


def test_validation_sets_merge_by_name_and_come_back_the_same(write: Write):
    write("[validation.sets.code]\npath = 'c/*.py.txt'\n[validation.sets.law]\npath = ['a', 'b']", "base.toml")
    file = write("base = 'base.toml'\n[validation.sets]\nlaw = false\n[validation.sets.python]\ndataset = 'stdlib'")
    config = load("--validation.sets.code.path", "x.txt", "y.txt", file=file)
    code = ValidationSet(path=["x.txt", "y.txt"], dataset="text")
    assert config.validation.sets == {"code": code, "python": ValidationSet(dataset="stdlib")}
    assert load(file=write(to_toml(config), "again.toml")) == config
    assert load("--validation.sets.python", "false", file=file).validation.sets.keys() == {"code"}

    # without sets a configuration is written as it was before there were any
    assert "sets" not in to_toml(load())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[validation.sets.'a/b']\npath = 'x'", ["x.toml: validation.sets.a/b: ", "letters, digits and _"]),
        ("[validation.sets.1st]\npath = 'x'", ["validation.sets.1st: ", "does not begin with a digit"]),
        ("[validation.sets.'ö']\npath = 'x'", ["validation.sets.ö: ", "letters, digits and _"]),
        ("[validation.sets]\ncode = 'x.txt'", ["sets.code = 'x.txt': ", "must be a table: [validation.sets.code]"]),
        ("[validation.sets]\ncode = 0", ["validation.sets.code = 0: must be a table: [validation.sets.code]"]),
        ("[validation]\nsets = 3", ["validation.sets = 3: must have tables: [validation.sets.NAME]"]),
        ("[validation.sets.code]\npth = 'x'", ["validation.sets.code.pth", "did you mean validation.sets.code.path?"]),
        ("[validation.sets.code]\ndataset = 'txt'", ["validation.sets.code.dataset = 'txt'", "'stdlib'"]),
        ("[validation.sets.code]", ["validation.sets.code has no data", "validation.sets.code.path"]),
        ("[validation.sets.code]\ndataset = 'hf'", ["validation.sets.code has no data"]),
        ("[validation.sets.code]\ndataset = 'stdlib'\npath = 'x'", ["path (x) has no use", "'stdlib'"]),
    ],
)
def test_mistakes_in_validation_sets(write: Write, text: str, parts: list[str]):
    message = error_of(file=write(text))
    assert all(part in message for part in parts), message


def test_integers_are_accepted_for_floats(write: Write):
    lr = load(file=write("[optimizer]\nlr = 1\n")).optimizer.arguments["lr"]
    assert (lr, type(lr)) == (1.0, float)


@pytest.mark.parametrize("off", ["file", "command line"])
def test_false_switches_off_an_inherited_balancer_and_group(write: Write, off: str):
    write("[balancer.aux_loss]\n[balancer.z_loss]\ncoeff = 0.5\n[optimizer.expert]\nlr = 0.5\n", "base.toml")
    text = "[balancer]\naux_loss = false\n[optimizer]\nexpert = false\n" if off == "file" else ""
    args = ["--balancer.aux_loss", "false", "--optimizer.expert", "false"] if off == "command line" else []
    config = load(*args, file=write('base = "base.toml"\n' + text))
    assert config.balancer == {"z_loss": {"coeff": 0.5}}
    assert config.optimizer.groups == {"norm": {"weight_decay": 0.0}}


def test_a_new_name_drops_only_inherited_arguments_of_the_old_component(write: Write):
    base = '[router]\nname = "sigmoid"\ntemperature = 2.0\nscore_scale = 3.0\n'
    write(base, "base.toml")
    config = load(file=write('base = "base.toml"\n[router]\nname = "softmax_topk"\n'))
    assert config.router.arguments["temperature"] == 2.0
    assert "score_scale" not in config.router.arguments
    message = error_of(file=write('base = "base.toml"\n[router]\nname = "softmax_topk"\nscore_scale = 3.0\n'))
    assert "x.toml: router.score_scale" in message


def test_an_inherited_argument_must_fit_unless_its_layer_sets_it(write: Write):
    write(f'[lr_scheduler]\nname = "{__name__}:outside_schedule"\nwarmup_steps = 2.5\n', "base.toml")
    text = 'base = "base.toml"\n[lr_scheduler]\nname = "cosine"\n'
    message = error_of(file=write(text))
    assert "x.toml (inherited): lr_scheduler.warmup_steps = 2.5: must be a valid integer" in message
    assert load(file=write(text + "warmup_steps = 3\n")).lr_scheduler.arguments["warmup_steps"] == 3


def test_a_group_without_a_name_goes_by_the_optimizers(write: Write):
    groups = '[optimizer.dense]\neps = 0.5\n[optimizer.expert]\nname = "adamw"\neps = 0.5\n'
    write(f'[optimizer]\nname = "soap"\n{groups}', "base.toml")
    config = load("--optimizer.name", "torch.optim:SGD", file=write('base = "base.toml"\n'))
    kept = {"name": "adamw", "eps": 0.5}
    assert config.optimizer.groups == {"expert": kept, "norm": {"weight_decay": 0.0}}
    config = load("--optimizer.expert.name", "torch.optim:SGD", file=write('base = "base.toml"\n'))
    named = {"name": "torch.optim:SGD"}
    assert config.optimizer.groups == {"expert": named, "norm": {"weight_decay": 0.0}, "dense": {"eps": 0.5}}


@pytest.mark.parametrize(
    ("below", "above", "part"),
    [
        ('[training]\nsteps = "x"\n', "[training]\nsteps = 1\n", "training.steps = 'x': must be a valid integer"),
        ('[router]\nname = "sigmod"\n', '[router]\nname = "sigmoid"\n', "router.name = 'sigmod': unknown component"),
        ("[router]\ntemprature = 1.0\n", '[router]\nname = "sigmoid"\n', "router.temprature: unknown argument"),
        ("[balancer.z_loss]\nrate = 1.0\n", "[balancer]\nz_loss = false\n", "balancer.z_loss.rate: unknown argument"),
        ("[balancer]\nz_los = false\n", "[balancer.z_loss]\n", "balancer.z_los: unknown component"),
        ("[optimizer.expert]\nlr = -1.0\n", "[optimizer]\nexpert = false\n", "optimizer.expert.lr = -1.0: must be"),
    ],
)
def test_a_mistake_that_a_later_layer_covers_is_one(write: Write, below: str, above: str, part: str):
    write(below, "base.toml")
    assert f"base.toml: {part}" in error_of(file=write(f'base = "base.toml"\n{above}'))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[trainin]\nsteps = 1", ["trainin: unknown section", "did you mean training?"]),
        ("steps = 1", ["steps: unknown section", "training.steps"]),
        ("[training]\nstep = 1", ["training.step: unknown key", "did you mean training.steps?"]),
        ("[training]\nlr = 1.0", ["training.lr: unknown key", "did you mean optimizer.lr?"]),
        ("[compile]\nzzz = 1", ["compile.zzz: unknown key", "valid: enable"]),
        ('[router]\nname = "topk_sofmax"', ["router.name = 'topk_sofmax'", "did you mean 'topk_softmax'?"]),
        ("[router]\ntemprature = 1.0", ["router.temprature: unknown argument", "did you mean router.temperature?"]),
        ("[router]\ntop_k = 1", ["router.top_k = 1", "comes from moe.top_k"]),
        ("[lr_scheduler]\nsteps = 1", ["lr_scheduler.steps = 1", "comes from training.steps"]),
        ("[lr_scheduler]\ndecay_ratio = 0.5", ["lr_scheduler.decay_ratio: unknown argument"]),
        ("[balancer.aux_los]\n", ["balancer.aux_los", "did you mean 'aux_loss'?"]),
        ("[balancer.aux_loss]\ncoef = 1.0", ["balancer.aux_loss.coef", "did you mean balancer.aux_loss.coeff?"]),
        ('[data]\npath = "a\\u0000b"', ["data.path = ", "must not have a NUL character"]),
        ("[training]\nsteps = 9223372036854775808", ["training.steps = 9223372036854775808", "fit into 64 bits"]),
        ("[model]\nrope_theta = 1e300", ["model.rope_theta = 1e+300", "at most 3.4e+38, the largest number of fp32"]),
        ("[data]\nnum_workers = 100000", ["data.num_workers = 100000", "less than or equal to 256"]),
        (
            "[comm]\ninit_timeout_seconds = 1000000000000",
            ["comm.init_timeout_seconds", "less than or equal to 100000000"],
        ),
        ("a = " + "[" * 3000 + "]" * 3000, ["x.toml: is not a configuration", "nested hundreds of levels deep"]),
        ("a = " + "{a = " * 3000 + "1" + "}" * 3000, ["x.toml: is not a configuration", "nested hundreds of levels"]),
        ("[balancer]\naux_loss = 0.1", ["balancer.aux_loss = 0.1", "must be a valid boolean"]),
        ('[balancer.loss_free]\nrule = "sing"', ["balancer.loss_free.rule = 'sing'", "must be 'sign'"]),
        ("[optimizer.experts]\nlr = 1.0", ["optimizer.experts: unknown argument", "did you mean optimizer.expert?"]),
        ("[router]\nnam = 1", ["router.nam: unknown argument", "did you mean router.name?"]),
        ("[optimizer.expert]\nrate = 1.0", ["optimizer.expert.rate: unknown argument"]),
        ('[optimizer.expert]\nlr = "big"', ["optimizer.expert.lr = 'big'", "must be a valid number"]),
        ("[training]\nsteps = 2.5", ["training.steps = 2.5", "must be a valid integer"]),
        ('[training]\nsteps = "3"', ["training.steps = '3'", "must be a valid integer"]),
        ("[training]\nsteps = true", ["training.steps = True", "must be a valid integer"]),
        ("[training]\nsteps = 0", ["training.steps = 0", "must be greater than 0"]),
        ("[training]\ndeterministic = 1", ["training.deterministic = 1", "must be a valid boolean"]),
        ("[training]\nmax_norm = true", ["training.max_norm = True", "must be a valid number"]),
        ("[training]\nglobal_batch_size = 0", ["training.global_batch_size = 0", "must be -1 or greater than 0"]),
        ("[training]\nlocal_batch_size = 0", ["training.local_batch_size = 0", "must be -1 or greater than 0"]),
        ('[training]\ndtype = "float16"', ["training.dtype = 'float16'", "must be 'float32' or 'bfloat16'"]),
        ("[data]\nvalidation_fraction = 1.0", ["data.validation_fraction = 1.0", "must be less than 1"]),
        ('[data]\npath = ["a", 2]', ["data.path", "item 2 must be a valid string"]),
        ("[optimizer]\nlr = -1.0", ["optimizer.lr = -1.0", "must be greater than or equal to 0"]),
        ("[optimizer]\nlr = nan", ["optimizer.lr = nan", "must be"]),
        ("[optimizer]\nbeta2 = 1.0", ["optimizer.beta2 = 1.0", "must be less than 1"]),
        ("training = 3", ["training = 3", "must be a table: [training]"]),
        ("base = 3", ["base = 3", "must be a file name or a list"]),
        ('base = "gone.toml"', ["base = ", "gone.toml", "No such file"]),
        ('[job]\nconfig_file = "y"', ["job.config_file = 'y'", "base ="]),
        ("[training]\nsteps = \n", ["not valid TOML", "line 2"]),
        ("[training]\nsteps = 1\nsteps = 2\n", ["not valid TOML", "line 3"]),
        (b"[job]\ndescription = '\xff'", ["not UTF-8", "0xff", "line 2, column 16"]),
        (b"\xef\xbb\xbf[\xff", ["not UTF-8", "0xff", "line 1, column 2"]),
        (
            '[router]\nname = "no_such_pkg.mod:fn"',
            ["router.name = 'no_such_pkg.mod:fn'", "cannot be imported", "on PYTHONPATH, or install it"],
        ),
        ('[router]\nname = "math:no_such"', ["router.name = 'math:no_such'", "cannot be imported"]),
        ('[router]\nname = "builtins:sorted"', ["router.name = 'builtins:sorted'", "must take top_k"]),
        ('[balancer."math:sqrt"]', ["balancer.math:sqrt", "by position only"]),
        ('[router]\nname = "math:pi"', ["router.name = 'math:pi'", "is a float, not a function"]),
    ],
)
def test_a_mistake_in_a_file_names_file_key_value_and_remedy(write: Write, text: str | bytes, parts: list[str]):
    message = error_of(file=write(text))
    for part in ["x.toml", *parts]:
        assert part in message


def test_a_byte_order_mark_before_a_file_is_no_part_of_it(write: Write):
    write("\ufeff[training]\nsteps = 7\n", "base.toml")
    assert load(file=write('\ufeffbase = "base.toml"\n')).training.steps == 7


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--training.step", "5"], ["--training.step: unknown key", "did you mean training.steps?"]),
        (["--trainin.steps", "5"], ["--trainin: unknown section", "did you mean training?"]),
        (["--steps", "5"], ["--steps", "--section.key value"]),
        (["--training", "5"], ["--training", "--section.key value"]),
        (["steps", "5"], ["steps: unexpected word"]),
        (["-x"], ["-x: unexpected word"]),
        (["--training.steps", "many"], ["--training.steps = many", "must be a valid integer"]),
        (["--training.steps", "2.5"], ["--training.steps = 2.5", "must be a valid integer"]),
        (["--training.steps"], ["--training.steps", "takes one value, got 0"]),
        (["--training.steps", "1", "2"], ["--training.steps = 1 2", "takes one value, got 2"]),
        (["--training.steps.x", "1"], ["--training.steps.x", "training.steps is a value"]),
        (["--data.path"], ["--data.path", "takes one value"]),
        (["--data.validation_fraction", "-1"], ["--data.validation_fraction = -1", "greater than or equal to 0"]),
        (["--compile.enable", "perhaps"], ["--compile.enable = perhaps", "must be a valid boolean"]),
        (["--router.name", "sigmod"], ["--router.name = 'sigmod'", "did you mean 'sigmoid'?"]),
        (["--balancer.loss_free.rat", "1"], ["--balancer.loss_free.rat", "did you mean balancer.loss_free.rate?"]),
        (["--optimizer.expert.lr", "x"], ["--optimizer.expert.lr = x", "must be a valid number"]),
        (
            ["--balancer.z_loss", "false", "--balancer.z_loss.coeff", "1"],
            ["--balancer.z_loss.coeff", "is a table here"],
        ),
        (["--balancer.z_loss.coeff", "1", "--balancer.z_loss", "false"], ["--balancer.z_loss = false", "a value here"]),
        (["--job.config_file", "gone.toml"], ["--job.config_file = 'gone.toml'", "No such file"]),
        (["--job.config_file", "/"], ["--job.config_file = '/'", "Is a directory"]),
        (["--job.config_file"], ["--job.config_file", "takes one value, got 0"]),
    ],
)
def test_a_mistake_on_the_command_line_names_the_argument(args: list[str], parts: list[str]):
    message = error_of(*args)
    for part in ["command line: ", *parts]:
        assert part in message


def test_a_key_that_is_gone_is_named_with_what_to_do():
    message = error_of("--moe.dispatcher", "auto")
    assert "moe.dispatcher = auto: is no key any more: leave it out" in message
    assert "parallelism.expert_parallel_degree" in message


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--moe.top_k", "9"], ["moe.top_k (9)", "moe.num_experts (8)"]),
        (["--model.num_heads", "7"], ["model.num_heads (7) must divide model.dim (768)"]),
        (["--model.num_heads", "256"], ["768 / 256 = 3", "must be even"]),
        (["--model.num_kv_heads", "5"], ["model.num_kv_heads (5) must divide model.num_heads (12)"]),
        (["--training.local_batch_size", "7"], ["training.local_batch_size (7) must divide", "(40)"]),
        (["--training.local_batch_size", "-1", "--training.global_batch_size", "-1"], ["are both -1", "a number"]),
        (["--moe.first_dense_layers", "24"], ["moe.first_dense_layers (24)", "model.num_layers (24)"]),
        (["--moe.num_experts", "0", "--balancer.aux_loss"], ["dense model", "aux_loss = false"]),
        (["--moe.num_experts", "0", "--optimizer.expert.lr", "1"], ["dense model", "[optimizer.expert]"]),
        (["--moe.num_experts", "0", "--debug.force_balanced_routing"], ["debug.force_balanced_routing", "experts"]),
        (["--data.validation_fraction", "0"], ["validation.enable = true", "data.validation_fraction"]),
        (["--data.dataset", "text"], ["data.dataset = 'text'", "data.path"]),
        (["--optimizer.lr", "0"], ["optimizer.lr = 0"]),
        (["--router.name", "switch"], ["router.name = 'switch'", "moe.top_k (2) must be 1"]),
        (
            ["--router.num_groups", "3", "--router.topk_groups", "1"],
            ["router.num_groups (3) must divide moe.num_experts (8)"],
        ),
        (["--router.num_groups", "8", "--router.topk_groups", "1"], ["hold 1 experts", "moe.top_k (2)"]),
        (["--router.topk_groups", "2"], ["router.topk_groups (2) must be from 1 to router.num_groups (1)"]),
        (
            ["--router.name", "expert_choice", "--balancer.loss_free"],
            ["'expert_choice' has no selection bias", "turn off the balancers that move one (loss_free, "],
        ),
        (
            ["--router.name", "sinkhorn", "--balancer.loss_free"],
            ["'sinkhorn' has no selection bias", "turn off the balancers that move one (loss_free, "],
        ),
        (
            ["--router.name", "base", "--moe.top_k", "1", "--balancer.loss_free"],
            ["'base' has no selection bias", "turn off the balancers that move one (loss_free, "],
        ),
        (
            ["--router.name", "expert_choice", "--balancer.aux_loss"],
            ["balancer.aux_loss has no effect with router.name = 'expert_choice'", "aux_loss = false"],
        ),
        (
            ["--router.name", "sigmoid", "--router.capacity_factor", "1"],
            ["--router.capacity_factor", "it belongs to topk_softmax, softmax_topk, switch, expert_choice"],
        ),
        (
            ["--router.jitter", "0.1", "--balancer.aux_loss.scope", "global_batch_exact"],
            ["routes every token twice", "router.jitter"],
        ),
        (
            ["--router.num_groups", "2", "--router.topk_groups", "1", "--balancer.loss_free.rule", "quantile"],
            ['rule = "quantile"', "router.num_groups (2)"],
        ),
        (["--router.name", "expert_choice", "--debug.force_balanced_routing"], ["even by construction"]),
        (["--model.dim", str(2**40)], ["model.dim x model.dim = 1.21e+24 elements", "lower these keys"]),
        (["--moe.num_experts", str(2**30)], ["moe.num_experts x model.dim x moe.expert_dim", "lower these keys"]),
        (
            ["--training.local_batch_size", str(2**40), "--training.global_batch_size", "-1"],
            ["training.local_batch_size x training.seq_len x model.dim", "lower these keys"],
        ),
    ],
)
def test_constraints_between_keys(args: list[str], parts: list[str]):
    message = error_of(*args)
    for part in parts:
        assert part in message


def test_a_group_may_be_frozen_and_a_dense_model_takes_an_inherited_recipe():
    assert load("--optimizer.router.lr", "0").optimizer.groups["router"] == {"lr": 0.0}
    dense = load(file=next(path for path in TRAIN_CONFIGS if path.endswith("dense.toml")))
    assert (dense.moe.num_experts, dense.balancer) == (0, {})


def test_a_component_from_outside(write: Write):
    name = f"{__name__}:outside_router"
    config = load(file=write(f'[router]\nname = "{name}"\npower = 2\nnames = ["c"]\n'))
    assert config.router.arguments == {"power": 2.0, "names": ("c",)}
    built = find_component(KINDS["router"].registry, config.router.name)(config.moe.top_k, **config.router.arguments)
    assert built == (2, 2.0, ("c",))
    assert load_config(["--job.config_file", write(to_toml(config), "again.toml")]) == config
    message = error_of("--router.name", name)
    assert "router.power" in message
    assert "is missing" in message
    assert "not a function" in error_of("--router.name", f"{__name__}:not_a_function")


def test_a_balancer_and_an_optimizer_from_outside(write: Write):
    balancer = f"{__name__}:outside_balancer"
    args = [f"--balancer.{balancer}.strength", "2", "--optimizer.name", "torch.optim:AdamW"]
    config = load(*args, "--optimizer.betas", "0.5", "0.75", "--optimizer.norm.betas", "0.5", "0.5")
    assert config.balancer == {balancer: {"strength": 2.0}}
    assert config.optimizer.arguments["betas"] == (0.5, 0.75)
    assert "beta1" not in config.optimizer.arguments
    assert config.optimizer.groups == {"norm": {"weight_decay": 0.0, "betas": (0.5, 0.5)}}
    assert load_config(["--job.config_file", write(to_toml(config))]) == config
    assert find_component(KINDS["balancer"].registry, balancer)(**config.balancer[balancer]) == 2.0


def test_an_inherited_argument_must_fit_the_new_component(write: Write):
    write("[optimizer]\nweight_decay = 0.5\neps = 1e-6\n", "base.toml")
    config = load("--optimizer.name", "torch.optim:SGD", file=write('base = "base.toml"\n'))
    assert config.optimizer.arguments["weight_decay"] == 0.5
    assert "eps" not in config.optimizer.arguments
    assert config.optimizer.arguments["momentum"] == 0


@pytest.mark.parametrize("path", TRAIN_CONFIGS + MODELS, ids=os.path.basename)
def test_train_configs_load_and_come_back_the_same(path: str, write: Write):
    config = load(file=path)
    resolved = write(to_toml(config))
    again = load(file=resolved)
    assert again == config
    assert to_toml(again) == to_toml(config)


def test_a_removed_default_group_comes_back_removed(write: Write):
    config = load("--optimizer.norm", "false")
    assert config.optimizer.groups == {}
    assert load(file=write(to_toml(config))) == config


def test_train_configs_are_the_ones_promised():
    by_name = {os.path.basename(path).removesuffix(".toml"): load(file=path) for path in TRAIN_CONFIGS}
    assert set(by_name) == {"base", "moe8x", "moe8x_shampoo", "moe16x", "moe128x", "dense", "debug_moe"}
    expert = {"name": "shampoo", "precondition_frequency": 100}
    assert by_name.pop("moe8x_shampoo").optimizer.groups == {"expert": expert, "norm": {"weight_decay": 0.0}}
    for name, config in by_name.items():
        if name != "debug_moe":
            assert (config.data.dataset, config.data.tokenizer) == ("fineweb_edu", "openai-community/gpt2")
            assert config.optimizer == load().optimizer
            assert (config.training.seq_len, config.training.global_batch_size) == (512, 40)
    balancer = {"aux_loss": {"coeff": 0.1, "scope": "micro_batch"}, "z_loss": {"coeff": 0.001}}
    assert by_name["moe8x"].balancer == balancer
    sizes = {name: (c.moe.num_experts, c.moe.top_k, c.moe.expert_dim, c.model.num_heads) for name, c in by_name.items()}
    assert sizes["moe8x"] == (8, 2, 2048, 12)
    assert sizes["moe16x"] == (16, 2, 2048, 12)
    assert sizes["moe128x"] == (128, 2, 1024, 12)
    assert by_name["moe8x"] == dataclasses.replace(by_name["base"], job=by_name["moe8x"].job)


# Parameters of a model and of a token, in billions, as its authors say.
PUBLISHED = {
    "olmoe_1b_7b": (6.92, 1.28),  # arXiv 2409.02060: 6.9 and 1.3, with the vocabulary
    "qwen3_30b_a3b": (30.5, 3.3),  # its model card
    "mixtral_8x7b": (46.7, 12.9),  # arXiv 2401.04088
    "deepseekmoe_16b": (16.4, 2.8),  # arXiv 2401.06066
}


def test_models_of_others_have_the_size_that_they_had():
    import torch

    from titan_moe.build import build_model
    from titan_moe.records import size_record

    names = {os.path.basename(path).removesuffix(".toml") for path in MODELS}
    assert names == {"debug", *PUBLISHED, *(f"{name}_debug" for name in PUBLISHED)}
    for path in MODELS:
        name = os.path.basename(path).removesuffix(".toml")
        if name in PUBLISHED:
            config = load(file=path)
            with torch.device("meta"):
                model = build_model(config)
            size = size_record(config, model)
            vocabulary = config.model.vocab_size * config.model.dim  # the look-up, which ours leaves out
            billions = (size["parameters"] / 1e9, (size["active_parameters"] + vocabulary) / 1e9)
            assert billions == pytest.approx(PUBLISHED[name], rel=0.02), name


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().training.steps = 3  # pyrefly: ignore


def test_help_lists_every_key_and_component_within_100_columns():
    text = help_text()
    assert max(map(len, text.splitlines())) <= 100
    for section, hint in SECTIONS.items():
        block = text.partition(f"\n[{section}]")[2].partition("\n[")[0]
        assert block, section
        if section in KINDS:
            for name, builder in KINDS[section].registry.items():
                assert f"{name}" in block
                assert " ".join((builder.__doc__ or "").split())[:30] in " ".join(block.split())
        else:
            for name, annotation in get_type_hints(hint, include_extras=True).items():
                if name == ARGUMENTS:  # of a function outside, whose keys are its own
                    continue
                assert f"\n  {name} = " in block or f"\n[{section}.{name}.NAME]" in text
                assert document(annotation), f"{section}.{name} has no sentence"
                assert f"{section}.{name}" in NAMED_TABLES or document(annotation) in " ".join(block.split())
    for path, table in NAMED_TABLES.items():
        block = text.partition(f"\n[{path}.NAME]")[2].partition("\n[")[0]
        for name, annotation in get_type_hints(table, include_extras=True).items():
            if name == ARGUMENTS:
                continue
            assert f"\n  {name} = " in block
            assert document(annotation) in " ".join(block.split())
    assert "warmup_steps = 300" in text
    assert "(none | selective | full)" in text
