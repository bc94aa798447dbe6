"""What torchtitan_patches does before any torchtitan is imported; the rest is in tests/torchtitan."""

import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan_patches import enable, version


@pytest.mark.parametrize("found", ["0.2.2", "0.3", "0.3.1", "0.3.0.dev1", "0.4.0", "0.30.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(version, "version", lambda _: found)
    message = rf"supports torchtitan 0\.3\.0, found {found}: pip install 'torchtitan==0\.3\.0'"
    with pytest.raises(RuntimeError, match=message):
        enable(None, metrics=True)


def test_the_extra_and_the_tests_have_the_supported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    (newest,) = version.TESTED
    monkeypatch.setattr(version, "version", lambda _: newest)
    version.check_version()
    root = Path(__file__).parents[2]
    assert f'"torchtitan=={newest}; ' in (root / "pyproject.toml").read_text()
    assert f"torchtitan=={newest}\n" in (root / "constraints-torchtitan.txt").read_text()


def test_no_torchtitan_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise version.PackageNotFoundError

    monkeypatch.setattr(version, "version", missing)
    with pytest.raises(
        RuntimeError, match=r"needs torchtitan 0\.3\.0, found none: pip install 'titan_moe\[torchtitan\]'"
    ):
        version.check_version()


def test_importing_it_changes_nothing() -> None:
    code = "import sys, torchtitan_patches; assert not {'torch', 'torchtitan', 'titan_moe'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
