"""Say which claims hold: `python scripts/paper_claims.py CLAIMS.toml --studies DIR --out DIR`."""

from titan_moe.runtime import command
from titan_moe.study.report.claims import claims

if __name__ == "__main__":
    command.run_command(claims)
