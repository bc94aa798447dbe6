import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes ten seconds or more; leave them out with -m 'not slow'")


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
