"""The Hugging Face hub, an optional extra: whether it can be reached, its files, its data sets.

Before its libraries are asked for anything, a request with a time limit tells whether there is a hub to ask.
"""

import hashlib
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

HUB_ENDPOINT = "https://huggingface.co"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
USE_FILES = "use local files instead: --data.dataset text --data.path FILES"
INSTALL = "pip install titan_moe[hub]"
FORGETFUL = ("5.0.0",)  # versions of datasets whose streams begin anew when they are resumed twice
log = logging.getLogger(__name__)


def check_hub(endpoint: str, advice: str, timeout: float = 6.0) -> None:
    """Raise an `OSError` of one line that ends in `advice` unless `endpoint` answers at all within `timeout` seconds.

    Goes through the proxies that are set.
    """
    # The thread replaces this by what it learns; it stays when the thread is not done in time.
    failures: list[str] = [f"no answer in {timeout:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
                failures.clear()
        except urllib.error.HTTPError as error:
            error.close()
            failures.clear()  # an error of the server is an answer, too
        except (OSError, ValueError) as error:
            failures[:] = [str(getattr(error, "reason", error))]

    # In a thread, because looking a name up has no time limit of its own; a daemon, so that it can be left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    if failures:
        raise OSError(f"the Hugging Face hub ({endpoint}) can't be reached ({failures[0]}): {advice}")


def download_file(repo: str, name: str, endpoint: str, advice: str) -> str:
    """Return the path of the local copy of a hub repository's file, which is downloaded unless the hub's cache has it.

    Errors of one line that end in `advice`: the extra is not installed, the hub can't be reached, it has no such file.
    """
    if find_spec("huggingface_hub") is None:
        raise ValueError(f"{repo} is no local file, and the hub needs `{INSTALL}`; or {advice}")
    import huggingface_hub

    # The cache is asked first: what it has needs no network.
    cached = huggingface_hub.try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return cached
    check_hub(endpoint, f"{repo} is no local file; {advice}")
    try:
        return huggingface_hub.hf_hub_download(repo, name, endpoint=endpoint, etag_timeout=10)
    except (OSError, ValueError) as error:  # all of the library's errors are one or the other
        raise OSError(f"{repo}: {_first_line(error)}; {advice}") from error


def find_files(repo: str, names: Sequence[str], endpoint: str) -> dict[str, str]:
    """Return the paths of the local copies of those of `names` that a hub repository has, by name.

    Where the hub can't be reached, the files that its cache does not have are left out, with a warning.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    # The cache gives a path, or None where it knows nothing, or a mark of its own for a file that does not exist.
    known = {name: huggingface_hub.try_to_load_from_cache(repo, name) for name in names}
    paths = {name: path for name, path in known.items() if isinstance(path, str)}
    unknown = [name for name, path in known.items() if path is None]

    # These files are optional, so without a network the run goes on; but it says what it may miss.
    if unknown:
        try:
            check_hub(endpoint, f"{repo} is used without {', '.join(unknown)}, if it has them")
        except OSError as error:
            log.warning("%s", error)
            return paths
    for name in unknown:
        try:
            paths[name] = huggingface_hub.hf_hub_download(repo, name, endpoint=endpoint, etag_timeout=10)
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise OSError(f"{repo}: {name}: {_first_line(error)}") from error
    return paths


class HubDataset(NamedTuple):
    """A streamed data set: a hub repository pinned to a revision, or a local folder with one made of its files."""

    path: str
    config: str | None
    revision: str

    @property
    def place(self) -> str:
        """What errors begin with."""
        return f"data.path ({self.path})"

    @property
    def facts(self) -> list[object]:
        """All that says what its documents are."""
        return [*self]

    @property
    def position_name(self) -> str:
        """All that says whether a position in it is one in the same data set; revisions are its owner's."""
        return f"{self.path}:{self.config or ''}"

    def state_of(self, stream: Any) -> dict[str, Any]:
        """The state of an opened stream after what was read of it."""
        return stream.state_dict()

    def open(self, state: dict[str, Any] | None = None) -> Any:
        """Return the `datasets` stream of split `train`, going on at `state` without reading what lies before it.

        Errors: ValueError of one line where there is no such data set or it can't be read.
        """
        from datasets import load_dataset

        # A folder's revision is a hash of its files, which `datasets` knows nothing of.
        revision = None if os.path.isabs(self.path) else self.revision
        try:
            stream = load_dataset(self.path, self.config, split="train", streaming=True, revision=revision)
        except (OSError, ValueError) as error:  # no such data set, configuration or split, no files in it
            raise ValueError(f"data.path ({self.path}): {_first_line(error)}; or {USE_FILES}") from error
        except Exception as error:  # opening reads the first rows: anything that reading may raise
            raise self._unreadable(error) from error
        if state:
            stream.load_state_dict(state)
        return stream

    def texts(self, stream: Any) -> Iterator[str]:
        """Yield the column `text` of an opened stream; rows with null there are left out, with warnings that count.

        Errors: no such column, values of another type, data that `datasets` can't read.
        """
        nulls = 0
        for row in self._rows(stream):
            # Without a column `text` this is the row, which is no string: one error for both.
            text = row.get("text", row)

            # A stream has no end at which to tell their number, so it is told at 1, 2, 4, ... of them.
            if text is None:
                nulls += 1
                if nulls.bit_count() == 1:
                    log.warning("data.path (%s): rows without a text (null) left out so far: %d", self.path, nulls)
                continue
            if not isinstance(text, str):
                raise ValueError(f"data.path ({self.path}): no strings in a column 'text' (columns: {', '.join(row)})")
            yield text

    def _rows(self, stream: Any) -> Iterator[dict[str, Any]]:
        """Yield the rows; whatever the libraries raise while they read and unpack files becomes one line."""
        rows = iter(stream)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise self._unreadable(error) from error
            if row is None:
                return
            yield row

    def _unreadable(self, error: Exception) -> ValueError:
        why = f"{type(error).__name__}: {_first_line(error)}"
        return ValueError(f"data.path ({self.path}): cannot be streamed ({why}); or {USE_FILES}")


def find_dataset(path: str, endpoint: str = HUB_ENDPOINT) -> HubDataset:
    """Return the data set of `name[:config]` at its newest revision, or that of a local folder.

    Errors, within seconds: `datasets` is not installed, the hub can't be reached, there is no such data set.
    """
    # Both are told before the stream is opened: a resumption would fail long after the run began.
    if find_spec("datasets") is None:
        raise ValueError(f"data.dataset: streaming {path} needs `{INSTALL}`; or {USE_FILES}")
    if (version := metadata.version("datasets")) in FORGETFUL:
        raise ValueError(
            f"data.dataset: datasets {version} loses its place in a stream at the second resume: install another "
            f"version ({INSTALL}); or {USE_FILES}"
        )

    # A folder has no revision. Its files' names, sizes and times stand for one, so that a change of them is noticed.
    if os.path.isdir(path):
        stats = [(file.name, file.stat()) for file in sorted(os.scandir(path), key=lambda file: file.name)]
        content = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return HubDataset(os.path.abspath(path), None, hashlib.sha256(content.encode()).hexdigest()[:16])

    # A name of the hub is asked about there; anything else is more likely a folder that does not exist.
    name, _, config = path.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"data.path ({path}): data.dataset hf needs a data set of the hub, as {FINEWEB_EDU}, or a folder"
        )
    check_hub(endpoint, USE_FILES)
    import huggingface_hub

    # The revision is pinned, so that a run that is resumed reads the same rows.
    try:
        revision = huggingface_hub.HfApi(endpoint=endpoint).dataset_info(name, timeout=10).sha
    except (OSError, ValueError) as error:
        raise OSError(f"data.path ({name}): {_first_line(error)}; or {USE_FILES}") from error
    return HubDataset(name, config or None, revision or "main")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
