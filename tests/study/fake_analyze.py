"""A stand-in for `titan_moe.analyze`: leaves the scalars of the checkpoint that fake_train.py has left.

A file `broken` in the working folder makes it fail; `analyses` in the run's folder gets a line for each start.
"""

import json
import sys
from pathlib import Path


def main() -> int:
    checkpoint, out = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--checkpoint", "--out"))
    with open(out.parent / "analyses", "a") as file:
        file.write("started\n")
    if Path("broken").exists():
        print("error: the disk is full", file=sys.stderr)
        return 2
    out.mkdir()
    scalars = {"specialisation": 0.5, "router_margin": 0.1, "dead_experts": 3, "output_similarity": None}
    step = int((checkpoint / "step").read_text())
    (out / "analysis.json").write_text(json.dumps({"checkpoint": {"step": step}, "scalars": scalars}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
