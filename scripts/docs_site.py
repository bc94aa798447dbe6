"""A hook of mkdocs (mkdocs.yml) that adds to docs/ README and the like, a page for each module, and linked files.

On GitHub the pages of docs/ link to files outside of that folder. On the site such a link goes to a page for the file:
of a module its functions and docstrings, of another file its text.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("titan_moe", "torchtitan_patches")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(\]\()([^()\s#:]+)((?:#[^()\s]*)?\))")
FENCES = {".py": "python", ".toml": "toml", ".sh": "bash", "": "text"}


def slug(heading: str, separator: str) -> str:
    """GitHub's anchor of a heading, so that a link holds here and there."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each module, and for each file outside of docs/ that a page links to."""
    # Of each module a page with its docstrings, and one page that lists them all.
    modules = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    for path in modules:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        files.append(File.generated(config, page_of(path), content=f"# {name}\n\n::: {name}\n"))
    listed = "\n".join(f"- [{path.relative_to(ROOT)}]({page_of(path)[4:]})" for path in modules)
    files.append(File.generated(config, "api/index.md", content=f"# Modules\n\n{listed}\n"))

    # Pages that stand in the repository's root.
    pages = {uri: ROOT / name for name, uri in PAGES.items()}
    for uri, path in pages.items():
        files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))

    # Other files get a page only where a page links to them.
    for page in [*pages.values(), *(ROOT / "docs").rglob("*.md")]:
        for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
            target = target_of(page, link)
            if target is not None and page_of(target).startswith("files/"):
                uri = page_of(target)
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, content=text_of(target)))
    return files


def target_of(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of a page is to, None where there is none; of a folder its README."""
    target = Path(os.path.normpath(page.parent / link))
    if (target / "README.md").exists():
        target /= "README.md"
    return target if target.exists() and target.is_relative_to(ROOT) else None


def page_of(path: Path) -> str:
    """The page of the site that stands for a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if path.is_file() and name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"api/{name}.md" if name.startswith(PACKAGES) and path.suffix == ".py" else f"files/{name}.md"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links to their pages."""
    uri = page.file.src_uri
    if uri.startswith(("api/", "files/")):
        return markdown

    # A link is relative to the file that has it, which for some pages is not in docs/.
    sources = {page_uri: ROOT / name for name, page_uri in PAGES.items()}
    source = sources.get(uri, ROOT / "docs" / uri)

    def turn(match: re.Match[str]) -> str:
        target = target_of(source, match[2])
        if target is None:
            return match[0]  # left to mkdocs, which ends with a warning
        return f"{match[1]}{posixpath.relpath(page_of(target), posixpath.dirname(uri) or '.')}{match[3]}"

    return LINK.sub(turn, markdown)


def text_of(path: Path) -> str:
    """A page with the text of a file, or the names in a folder."""
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.is_dir():
        return title + "".join(f"- `{entry.name}`\n" for entry in sorted(path.iterdir()) if entry.name[0] not in "._")
    return f"{title}````{FENCES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n````\n"
