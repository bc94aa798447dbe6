"""Documents that lead nowhere: every relative link in a Markdown file is to a file, and to a heading, that exists."""

import importlib
import re
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.unit.test_layers import PACKAGE, layer_of

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")  # [text](target), ![text](target)
ELSEWHERE = re.compile(r"^[a-z]+:")  # https: and the like
CODE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """The Markdown files of the repository, without what other programs have left in the folder."""
    folders = (ROOT, *(path for path in ROOT.iterdir() if path.name in ("docs", "examples", "scripts", "tests")))
    found = [path for folder in folders for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))]
    return sorted(found)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings: words in lower case, joined by hyphens."""
    text = CODE.sub("", document.read_text(encoding="utf-8"))
    names, seen = set(), Counter[str]()
    for heading in re.findall(r"^#+ +(.+?)\s*#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def broken(document: Path) -> list[str]:
    """The links of a document that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", document.read_text(encoding="utf-8"))):
        if ELSEWHERE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / unquote(name)).resolve() if name else document
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (anchor and (target.suffix != ".md" or anchor not in anchors(target)))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    other = tmp_path / "other.md"
    other.write_text("# A `word`, and more\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    good = ["other.md", "other.md#a-word-and-more", "other.md#same-1", "#page", "https://a.b/c#d"]
    bad = ["gone.md", "other.md#no-heading", "other.md#same-2", "#gone", "../outside.md"]
    page.write_text("# Page\n" + "".join(f"[x]({link})\n" for link in good + bad) + "```\n[x](in_code.md)\n```\n")
    assert broken(page) == bad


def test_the_documents_are_those_of_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # an unpacked archive has no git
        assert {str(path.relative_to(ROOT)) for path in documents()} >= set(tracked.stdout.split())


ARCHITECTURE = ROOT / "docs" / "architecture.md"
NAMES = re.compile(r"`([a-z_]+(?:/[a-z_]*|\.[a-z_]+)?)`")


def test_the_map_has_the_layers_of_the_tree() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [layer for layer, _ in rows] == ["3", "2", "1", "0"]
    for layer, rooms in rows:
        for room in NAMES.findall(rooms):
            assert (PACKAGE / room).is_dir() or (PACKAGE / room).with_suffix(".py").exists(), room
            assert layer_of(room.strip("/").replace("/", ".")) == int(layer), room


def test_the_map_names_what_exists() -> None:
    """Folders and modules by a slash (`data/cache`), functions by a dot (`train.run`)."""
    for name in NAMES.findall(ARCHITECTURE.read_text(encoding="utf-8")):
        module, dot, function = name.partition(".")
        if "/" in name:
            assert (PACKAGE / name).is_dir() or (PACKAGE / name).with_suffix(".py").exists(), name
        elif dot and function not in ("py", "toml"):
            assert callable(getattr(importlib.import_module(f"titan_moe.{module}"), function)), name
