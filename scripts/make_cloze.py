"""Make a task from text: `python scripts/make_cloze.py OUT.jsonl FILE ...`."""

from titan_moe.data.cloze import make_cloze
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(make_cloze)
