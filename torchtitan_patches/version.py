"""Which torchtitan these patches are for."""

from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.3.0",)  # by tests/torchtitan; its seams are "subject to change", so others are added when they have passed


def check_version() -> None:
    """Raise RuntimeError unless a torchtitan is installed with which these patches are tested."""
    supported = ", ".join(TESTED)
    try:
        found = version("torchtitan")
    except PackageNotFoundError:
        raise RuntimeError(
            f"torchtitan_patches needs torchtitan {supported}, found none: pip install 'titan_moe[torchtitan]'"
        ) from None
    if found not in TESTED:
        raise RuntimeError(
            f"torchtitan_patches supports torchtitan {supported}, found {found}: pip install 'torchtitan=={TESTED[-1]}'"
        )
