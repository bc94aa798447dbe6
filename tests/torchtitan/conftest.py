import importlib.util

import pytest

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed here: run_tests.sh has an environment with it", allow_module_level=True)
