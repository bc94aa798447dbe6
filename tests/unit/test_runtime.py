import pytest
import torch

from titan_moe import runtime
from titan_moe.runtime import Runtime


def test_more_processes_than_gpus_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(4):
        with pytest.raises(
            ValueError, match=r"^4 processes for the 2 GPU\(s\) that torch sees: set --nproc_per_node 2$"
        ):
            runtime.init_process_group(Runtime(rank, 4, rank, torch.device("cuda", rank)), 1)
