"""What torchtitan_patches does before any torchtitan is imported; the rest is in tests/torchtitan."""

import subprocess
import sys

import pytest

from torchtitan_patches import enable, version


@pytest.mark.parametrize("found", ["0.2.2", "0.4.0", "1.0.0", "0.30.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(version, "version", lambda _: found)
    with pytest.raises(RuntimeError, match=rf"supports torchtitan 0\.3\.\*, found {found}: pip install"):
        enable(None, metrics=True)


@pytest.mark.parametrize("found", ["0.3.0", "0.3.1.dev1"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(version, "version", lambda _: found)
    version.check_version()


def test_no_torchtitan_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise version.PackageNotFoundError

    monkeypatch.setattr(version, "version", missing)
    with pytest.raises(
        RuntimeError, match=r"needs torchtitan 0\.3\.\*, found none: pip install 'titan_moe\[torchtitan\]'"
    ):
        version.check_version()


def test_importing_it_changes_nothing() -> None:
    code = "import sys, torchtitan_patches; assert not {'torch', 'torchtitan', 'titan_moe'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
