from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from titan_moe.config import load_config
from titan_moe.metrics import to_numbers
from titan_moe.records import Record, flops_of_token, speed_record, write_record
from titan_moe.runtime import machine, profiling
from titan_moe.runtime.profiling import start_timer
from titan_moe.runtime.world import Runtime
from titan_moe.sinks.sink import Sink

CUDA = torch.device("cuda", 0)


class Event:
    """An event of a device that works for a second a note; asked before the device is done, it notes the wait."""

    noted: int = 0  # moments that the device has been given
    waits: int = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.noted += 1
        self.second = Event.noted**2

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.second - self.second)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "noted", 0)
    monkeypatch.setattr(Event, "waits", 0)
    return Event


def test_a_gpu_is_timed_by_its_own_events(events: type[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked of the device before the records are written; speed and MFU go by what it says then."""
    monkeypatch.setattr(machine, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(machine, "peak_memory_gib", lambda device: 1.5)
    config, model, rt = load_config([]), tiny_model(), Runtime(0, 2, 0, CUDA)
    pending: list[Record] = []
    for step in range(3):
        stop = start_timer(rt.device)
        line = {"step": step, "kind": "train", "loss": torch.tensor(2.0)}
        pending.append({**line, **speed_record(config, model, rt, 600, stop())})
    assert events.noted == 6
    assert events.waits == 0

    written: list[dict[str, Any]] = []
    for record in to_numbers(pending):
        write_record(Sink(written.append, lambda: None, "list"), record)
    assert [record["step_seconds"] for record in written] == [3.0, 7.0, 11.0]
    assert [record["tokens_per_second"] for record in written] == [200.0, 600 / 7, 600 / 11]
    assert all(record["mfu"] * record["step_seconds"] == pytest.approx(3 * written[0]["mfu"]) for record in written)


def test_a_cpu_is_timed_by_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.5, 9.0])
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(moments))
    seconds = start_timer(torch.device("cpu"))()
    assert seconds() == seconds() == 2.5


def test_mfu_leaves_out_attention_in_documents() -> None:
    """How much of it there is depends on the data; without a mask it is PaLM's share."""
    plain, masked = (load_config(["--data.document_mask", value]) for value in ("false", "true"))
    shapes = plain.model.num_layers * plain.model.dim * plain.training.seq_len
    assert flops_of_token(masked, 1000) == 6000
    assert flops_of_token(plain, 1000) == 6000 + 6 * shapes
