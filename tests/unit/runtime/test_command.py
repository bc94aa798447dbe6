"""How a command ends."""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from titan_moe.runtime import command


@pytest.mark.slow
def test_a_process_ends_before_the_interpreter_is_taken_down() -> None:
    """All is finished that would be, but nothing runs after it: there a thread of gloo would abort the process."""
    program = """
        import atexit, threading, time
        from titan_moe.runtime.command import end_process

        class Late:
            def __del__(self):
                print("interpreter is going down", flush=True)

        def work():
            time.sleep(0.3)
            print("thread ended")

        late = Late()
        atexit.register(print, "exit function ran")
        threading.Thread(target=work).start()
        end_process(3)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (3, "")
    assert ended.stdout.splitlines() == ["thread ended", "exit function ran"]


def ask_gpu() -> None:
    """Fail as a GPU does."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("make", [lambda: torch.empty(2**45, dtype=torch.uint8), lambda: bytearray(2**50), ask_gpu])
def test_memory_that_is_not_there_is_one_line(
    make: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tensor, of Python, of a GPU: what to lower, and exit code 2, whatever the rank."""
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main(_: list[str]) -> int:
        return 0 if make() else 1

    with pytest.raises(SystemExit) as ended:
        command.run_command(main)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.startswith("error: out of memory on rank 1 (")
    assert "lower training.local_batch_size" in err
    assert err.count("\n") == 1
