"""Import arrows point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "titan_moe"

# The layer of each module, by the longest prefix that matches; L0 is pure: torch and the standard library.
LAYERS = {
    "model.routing": 0,
    "model.wrappers": 0,
    "model.multipliers": 0,
    "model.dispatch": 0,
    "model.experts": 0,
    "model.fused": 0,
    "model.triton_kernels": 0,
    "balancer": 0,
    "optimizer.groups": 0,
    "optimizer.load_lr": 0,
    "optimizer.transform": 0,
    "optimizer.kronecker": 0,
    "optimizer.shampoo": 0,
    "optimizer.soap": 0,
    "optimizer.meta_shampoo": 0,
    "optimizer.hyperball": 0,
    "optimizer.muon": 0,
    "optimizer.normuon": 0,
    "optimizer.lion": 0,
    "optimizer.ademamix": 0,
    "optimizer.kernels": 0,
    "optimizer.matrix": 0,
    "optimizer.owners": 0,
    "optimizer.outside": 0,
    "optimizer.schedule_free": 0,
    "optimizer.optimizer": 0,
    "optimizer.expert_stats": 0,
    "optimizer.schedule": 0,
    "optimizer.rounding": 0,
    "metrics": 0,
    "norms": 0,
    "runtime": 0,
    "markdown": 0,
    "theme": 0,
    "model": 1,
    "parametrization": 1,
    "parallelize": 1,
    "optimizer": 1,
    "runtime.command": 1,
    "runtime.machine": 1,
    "runtime.watch": 1,
    "runtime.profiling": 1,
    "config": 2,
    "build": 2,
    "step": 2,
    "tasks": 2,
    "cuda_graph": 2,
    "dry_run": 2,
    "job": 2,
    "divergence": 2,
    "dump_folder": 2,
    "resume": 2,
    "validate": 2,
    "checkpoint": 2,
    "data": 2,
    "sinks": 2,
    "records": 2,
    "diagnostics": 2,
    "estimate.simulate": 2,
    "estimate.step_time": 2,
    "train": 3,
    "generate": 3,
    "evaluate": 3,
    "coordinate_check": 3,
    "study": 3,
    "convert": 3,
    "estimate": 3,
    "analyze": 3,
}


def layer_of(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in LAYERS:
            return LAYERS[name]
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if is_module(name) else str(node.module) for name in names]
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    layer = layer_of(module)
    for imported in imports_of(path):
        if imported.startswith("titan_moe."):
            target = imported.removeprefix("titan_moe.")
            assert layer_of(target) <= layer, f"{module} (L{layer}) imports {target} (L{layer_of(target)})"
        assert not (layer == 0 and imported.split(".")[0] in ("pydantic", "tokenizers", "tensorboard")), imported


def test_only_runtime_reads_the_environment() -> None:
    for path in modules():
        if path.parent.name != "runtime":
            assert "os.environ" not in path.read_text(), path


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_small(path: Path) -> None:
    """Under 60 lines of body, so that each fits a screen; a file may have as many as its subject needs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno is not None
            lines = node.end_lineno - body[0].lineno + 1
            assert lines < 60, f"{path}: {node.name} has {lines} lines: cut it into functions with names"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_bodies_say_why(path: Path) -> None:
    """A body of more than twenty lines has paragraphs, and at least one of them a comment of its own."""
    text = path.read_text()
    comments = {number for number, line in enumerate(text.splitlines(), start=1) if line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno is not None
            lines = range(body[0].lineno, node.end_lineno + 1)
            speaks = len(lines) <= 20 or comments & set(range(node.body[0].lineno, node.end_lineno + 1))
            assert speaks, f"{path}: {node.name} has {len(lines)} lines and no comment: say why it does what it does"


# Words that a reader has to look up, each with one that says what it is.
VAGUE = {"found": "what was found", "made": "what was made", "own": "whose", "kept": "what is kept", "mine": "own_rank"}
VAGUE |= {"here": "current", "there": "saved", "where": "a place", "together": "run_on_all_ranks"}
FIELDS = {"kept"}  # of a Routing: choices that are computed


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_say_what_they_hold(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "arg" if isinstance(node, ast.arg) else "name", None)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if name in VAGUE and name not in FIELDS:
            raise AssertionError(f"{path}:{node.lineno}: {name} says nothing of what it holds ({VAGUE[name]}?)")
