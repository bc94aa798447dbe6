"""The files of a tokenizer, under Hugging Face's names: tokenizer.json, and beside it what begins and ends a text.

A checkpoint, a folder of Hugging Face and a hub repository hold the same files. All are text and are kept as they
were; of config.json, which is the model's, only the ids of special tokens are kept.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION, MODEL = "generation_config.json", "config.json"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, MODEL, "chat_template.jinja")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Files = Mapping[str, str]  # name -> content


def read_text(path: Path) -> str:
    """Return the content of a file. Errors of one line that names it: it can't be read, it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """Return the tokenizer's files of a folder by name. Errors of one line: not UTF-8, not JSON, a link out of it."""
    # By a link a stranger's folder could get any file of this machine into a checkpoint. tokenizer.json can't be used
    # so: it has to be a tokenizer. In the hub's cache all files are links, to `blobs` two folders above.
    home = folder.resolve()

    def read(name: str) -> str | None:
        path = folder / name
        target = path.resolve()
        if name != TOKENIZER and not any(target.is_relative_to(near) for near in (home, home.parent.parent / "blobs")):
            raise ValueError(f"{path} is a link out of its folder: put the file itself there, or take the link away")
        return read_text(path) if path.is_file() else None

    return collect_files(read, str(folder))


def collect_files(read: Callable[[str], str | None], origin: str) -> dict[str, str]:
    """Return a tokenizer's files by name; `read(name)` gives the content of one, None where it is not there.

    Errors: ValueError where one of them is not a JSON object.
    """
    files = {name: content for name in TOKENIZER_FILES if (content := read(name)) is not None}
    for name in set(files) & {TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION, MODEL}:
        try:
            table(files, name)
        except ValueError as error:
            raise ValueError(f"{origin}/{error}") from error

    # The rest of config.json is about a model that may not be the one that is trained here.
    ids = {key: value for key, value in table(files, MODEL).items() if key in SPECIAL_IDS}
    files.pop(MODEL, None)
    return files | ({MODEL: to_text(ids)} if ids else {})


def table(files: Files, name: str) -> dict[str, Any]:
    """Return the JSON object in one of the files, empty where there is no such file."""
    try:
        value = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError) as error:  # numbers of 5000 digits raise a bare ValueError
        raise ValueError(f"{name} is not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def to_text(value: dict[str, Any]) -> str:
    """Write a JSON object as these files are written."""
    return json.dumps(value, indent=2) + "\n"


def named_token(files: Files, kind: str) -> str | None:
    """Return the token that the tokenizer's own settings name as its `kind` (eos, bos), None where they name none."""
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        token = table(files, name).get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token  # with the flags of an added token
        if isinstance(token, str) and token:
            return token
    return None


def listed_ids(files: Files, kind: str) -> list[int]:
    """Return the ids that the model's settings list for `kind` (eos, bos); config.json is asked last."""
    for name in (GENERATION, MODEL):
        value = table(files, name).get(f"{kind}_token_id")
        ids = [id_ for id_ in (value if isinstance(value, list) else [value]) if type(id_) is int]
        if ids:
            return ids
    return []


def with_end_of_text(files: Files, token: str, token_id: int, *, chosen: bool) -> dict[str, str]:
    """Return the files with `token` as their end of text; unchanged where they say so already.

    A token that the user has `chosen` goes into the lists of ids as well, so that generation stops there.
    """
    # tokenizer_config.json is made where it is missing: there the name is always written down.
    changed = dict(files)
    told = {
        name: named_token({name: files[name]}, "eos") for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS) if name in files
    }
    for name, named in {TOKENIZER_CONFIG: None, **told}.items():
        if named != token:
            changed[name] = to_text({**table(files, name), "eos_token": token})

    # The ids that are listed stay: a chat model may end its texts with others, too.
    for name in (GENERATION, MODEL):
        ids = listed_ids({name: files[name]}, "eos") if name in files else []
        if chosen and ids and token_id not in ids:
            changed[name] = to_text({**table(files, name), "eos_token_id": [token_id, *ids]})
    return changed
