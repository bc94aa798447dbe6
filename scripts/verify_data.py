"""Check token caches against their checksums: `python scripts/verify_data.py [CACHE_FOLDER ...]`."""

from titan_moe.data.verify import verify_data
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(verify_data)
