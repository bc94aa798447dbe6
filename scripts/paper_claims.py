"""Say which claims hold: `python scripts/paper_claims.py CLAIMS.toml --studies DIR --out DIR`."""

from titan_moe import runtime
from titan_moe.study.claims import claims

if __name__ == "__main__":
    runtime.run_command(claims)
