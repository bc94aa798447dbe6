"""How a command ends."""

import subprocess
import sys
import textwrap


def test_a_process_ends_before_the_interpreter_is_taken_down() -> None:
    """All is finished that would be, but nothing runs after it: there a thread of gloo would abort the process."""
    program = """
        import atexit, threading, time
        from titan_moe.runtime import end_process

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
