"""Check token caches against their checksums: `python scripts/verify_data.py [CACHE_FOLDER ...]`."""

from titan_moe import runtime
from titan_moe.data.verify import verify_data

if __name__ == "__main__":
    runtime.run_command(verify_data)
