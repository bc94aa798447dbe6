"""Tokenizer, special tokens, chat template and generation settings of a Hugging Face folder.

A checkpoint carries these files as they were in the folder that its tokenizer came from, and an export writes them back
unchanged. Where the tokenizer came from no such folder they are made from it.
"""

from pathlib import Path
from typing import Any

from titan_moe.config import Config
from titan_moe.data.tokenizer import Tokenizer, tokenizer_from_files
from titan_moe.data.tokenizer_files import (
    GENERATION,
    MODEL,
    SPECIAL_IDS,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Files,
    read_tokenizer_files,
    table,
    to_text,
)
from titan_moe.runtime.command import logger

OTHER_TEMPLATES = "additional_chat_templates"


def imported_files(source: Path) -> dict[str, str]:
    """The tokenizer's files of a Hugging Face folder; ValueError where generate and evaluate could not use them."""
    files = read_tokenizer_files(source)
    if TOKENIZER in files:
        tokenizer_from_files(files, str(source / TOKENIZER))
    else:
        logger.warning("%s has no tokenizer.json: the checkpoint cannot be used by generate and evaluate", source)
    if (source / OTHER_TEMPLATES).exists():
        logger.warning("%s: only the chat template of chat_template.jinja comes along", source / OTHER_TEMPLATES)
    return files


def exported_files(step_folder: Path, config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    """The files beside the weights of an exported checkpoint, and what its config.json says of special tokens."""
    files = read_tokenizer_files(step_folder)
    tokenizer = None
    if TOKENIZER in files:
        tokenizer = tokenizer_from_files(files, str(step_folder / TOKENIZER))
    else:
        logger.warning("%s has no tokenizer.json: none is exported", step_folder)

    # Which tokens begin, end and pad texts: as the folder's config.json said, else its generation_config.json, else the
    # tokenizer.
    generation, ids = table(files, GENERATION), table(files, MODEL)
    ids = ids or {key: generation[key] for key in SPECIAL_IDS if key in generation} or _ids(tokenizer)
    generation = generation or {key: value for key, value in ids.items() if value is not None}

    # The embedding may have more rows than there are tokens: generation must not choose one of those.
    if tokenizer is not None:
        padding = set(range(tokenizer.vocab_size, config.model.vocab_size))  # ids that no token has
        suppressed = padding | set(generation.get("suppress_tokens") or ())
        generation |= {"suppress_tokens": sorted(suppressed)} if suppressed else {}
        files |= _default_settings(files, tokenizer, config.training.seq_len)

    # The caller writes config.json, with these ids in it.
    exported = {name: content for name, content in files.items() if name != MODEL}
    return exported | {GENERATION: to_text(generation)}, ids


def _ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return dict.fromkeys(SPECIAL_IDS)
    eos = list(tokenizer.eos_ids)
    return dict(zip(SPECIAL_IDS, (tokenizer.bos_id, eos if eos[1:] else eos[0], tokenizer.eot_id), strict=True))


def _default_settings(files: Files, tokenizer: Tokenizer, seq_len: int) -> dict[str, str]:
    """The settings that transformers needs of a tokenizer; none if the files have them, which then name a class."""
    settings = table(files, TOKENIZER_CONFIG)
    if "tokenizer_class" in settings:
        return {}
    bos, eot = map(tokenizer.backend.id_to_token, (tokenizer.bos_id, tokenizer.eot_id))
    special = {"bos_token": bos, "eos_token": eot, "pad_token": eot}
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len, **special}
    defaults |= {"clean_up_tokenization_spaces": False, **settings}
    return {TOKENIZER_CONFIG: to_text(defaults), SPECIAL_TOKENS: files.get(SPECIAL_TOKENS) or to_text(special)}
