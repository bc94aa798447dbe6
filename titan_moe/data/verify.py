"""The command line of scripts/verify_data.py."""

from pathlib import Path

from titan_moe.data.cache import META, open_cache
from titan_moe.data.storage import DamagedError, check_file
from titan_moe.runtime.command import Parser
from titan_moe.runtime.machine import user_cache_folder


def verify_data(args: list[str]) -> int:
    """Compare the files of token caches with their checksums: a line for each, ValueError if any is damaged."""
    parser = Parser("verify_data.py", "Check the files of token caches against their checksums, all of them anew.")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="*",
        default=[user_cache_folder()],
        help="folders as data.cache_folder names them, or caches in them; by default %(default)s",
    )

    # All of them are read, so that one run tells of all that is damaged.
    damaged = 0
    for folder in parser.parse_args(args).folder:
        for path in _checked_files(folder):
            try:
                print(_line(path))
            except DamagedError as error:
                damaged += 1
                print(error)
    if damaged:
        raise ValueError(f"{damaged} damaged: the next run that needs one makes it anew, and so does deleting it")
    return 0


def _checked_files(folder: Path) -> list[Path]:
    """Return the meta.json of every cache in a folder, or that is the folder, and the other files with checksums."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    others = [path.with_suffix("") for path in folder.glob("*.crc32")]
    files = sorted([*folder.glob(META), *folder.glob(f"*/{META}"), *filter(Path.exists, others)])
    if not files:
        raise ValueError(f"{folder}: no token cache in it")
    return files


def _line(path: Path) -> str:
    if path.name != META:
        check_file(str(path))
        return f"{path}: {path.stat().st_size / 2**20:.1f} MiB, intact"
    cache = open_cache(path.parent, check=True)
    assert cache is not None  # it has a meta.json
    size = sum(Path(file.path).stat().st_size for file in (cache.train, cache.validation))
    num_tokens = cache.train.num_tokens + cache.validation.num_tokens
    return f"{path.parent}: {num_tokens:,} tokens, {size / 2**20:.1f} MiB, intact"
