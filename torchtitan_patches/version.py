"""Which torchtitan these patches are for."""

from importlib.metadata import PackageNotFoundError, version

TESTED = ("0.3.0",)  # by tests/torchtitan; its seams are "subject to change", so others are added when they have passed


def check_version() -> None:
    """Raise RuntimeError unless a torchtitan is installed with which these patches are tested."""
    # Its interfaces change between releases: an error on the first line is better than a wrong run.
    supported = ", ".join(TESTED)
    try:
        installed = version("torchtitan")
    except PackageNotFoundError:
        raise RuntimeError(
            f"torchtitan_patches needs torchtitan {supported}, found none: pip install 'titan_moe[torchtitan]'"
        ) from None
    if installed not in TESTED:
        raise RuntimeError(
            f"torchtitan_patches supports torchtitan {supported}, found {installed}: "
            f"pip install 'torchtitan=={TESTED[-1]}'"
        )
