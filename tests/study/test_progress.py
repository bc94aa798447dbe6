"""The table of a study under way."""

import io
import json

from rich.console import Console

from tests.study.conftest import Write
from titan_moe.runtime.progress import clock
from titan_moe.study.grid import runs_of
from titan_moe.study.progress import counts, seconds_left, statuses, table
from titan_moe.study.runs import EXIT_CODE, METRICS, prepare
from titan_moe.study.spec import load_study


def test_the_table_shows_what_goes_on_first_and_fits_the_screen(write: Write):
    names = {f"name [{number}]": {"balancer": {"aux_loss": {"coeff": number / 100}}} for number in range(12)}
    runs = runs_of(load_study(write(axes={"method": {"options": names}}, study__seeds=[3])))
    for run, steps in ((runs[2], 8), (runs[5], 4)):
        prepare(run)
        lines = [{"step": s, "kind": "train", "loss": 5.25, "step_seconds": 2.0} for s in range(1, steps + 1)]
        lines.append({"step": steps, "kind": "validation", "loss": 4.125})
        (run.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs[5].folder / EXIT_CODE).write_text("1\n")
    found = statuses(runs)
    assert counts(found) == "1 failed, 1 finished, 10 new"
    assert seconds_left(runs, found, jobs=2) == 10 * 8 * 2.0 / 2
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(table("Names in [brackets]", runs, found, 2, height=6))
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert "Names in [brackets]" in text
    assert len(rows) == 6
    assert "method name [5]" in rows[0]
    assert [word in rows[0] for word in ("failed", "4/8", "5.2500", "4.1250")] == [True] * 4
    assert "finished" in rows[1]
    assert "and 7 more" in rows[-1]
    assert f"about {clock(80)} left" in text
