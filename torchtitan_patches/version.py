"""Which torchtitan these patches are for."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = "0.3"  # tested with 0.3.0; others of 0.3 may differ from it by fixes only


def check_version() -> None:
    """Raise RuntimeError unless a torchtitan is installed whose parts these patches fit."""
    try:
        found = version("torchtitan")
    except PackageNotFoundError:
        raise RuntimeError(
            f"torchtitan_patches needs torchtitan {SUPPORTED}.*, found none: pip install 'titan_moe[torchtitan]'"
        ) from None
    if found != SUPPORTED and not found.startswith(f"{SUPPORTED}."):
        raise RuntimeError(
            f"torchtitan_patches supports torchtitan {SUPPORTED}.*, found {found}: "
            f"pip install 'torchtitan=={SUPPORTED}.*'"
        )
