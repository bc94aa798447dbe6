"""docs/python.md: its blocks, one after the other, on what a tiny run left."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tests.e2e.harness import Ended

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_page_runs(train: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").mkdir()
    ended = train("outputs/debug_moe")
    assert ended.code == 0, ended.err
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```") // 2 == 6

    names: dict[str, Any] = {}
    for block in blocks:
        line = page[: block.start(1)].count("\n")  # a traceback gives the page's own line
        exec(compile("\n" * line + block[1], "docs/python.md", "exec"), names)
    assert names["losses"][0] > names["losses"][-1]
    assert len(names["train"]) == 6
    assert Path("loss.png").stat().st_size > 0
