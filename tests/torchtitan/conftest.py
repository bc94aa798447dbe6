import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchtitan") is None:
        skip = pytest.mark.skip(reason="no torchtitan here: run_tests.sh runs these in scripts/setup_torchtitan.sh's")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)
