from pathlib import Path

import pytest
import torch

QUICK = ("unit", "study")  # folders with quick tests; those of others start processes, compile or train


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes four seconds or more; leave them out with -m 'not slow'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] not in QUICK:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
