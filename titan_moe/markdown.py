"""Text that others wrote, inside of a page of Markdown: it stays text, whatever is in it."""

import re

_SPECIAL = re.compile(r"[\\`*\[<&|]")


def plain(text: str) -> str:
    """One line of running text or of a table's cell, without emphasis, links and HTML."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def code(text: str) -> str:
    """One line in backticks, also fit for a table's cell; a backtick in it becomes an apostrophe."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
