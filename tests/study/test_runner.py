"""Running a study: what is skipped, resumed, tried again or refused, and that one run's end is no other's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import Study, Write
from titan_moe.study import cli, runner
from titan_moe.study.grid import Run, runs_of
from titan_moe.study.runs import METRICS, is_going, status
from titan_moe.study.spec import load_study

RUNS = Path("outputs/studies/small/runs")


def tries() -> dict[str, int]:
    """How often each run was started."""
    return {str(p.parent.relative_to(RUNS)): len(p.read_text().splitlines()) for p in RUNS.glob("*/*/tries")}


def state(folder: str) -> str:
    return status(RUNS / folder, 8).state


def steps(folder: str) -> list[int]:
    lines = (RUNS / folder / METRICS).read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]


def test_every_run_once_and_a_new_value_reruns_nothing(write: Write, study: Study, capsys: pytest.CaptureFixture[str]):
    assert study(write(), "--jobs", "2") == 0
    assert tries() == {f"coeff={c}/seed-{s}": 1 for c in ("0", "0.1") for s in (1, 2)}
    assert "4 runs in outputs/studies/small: 4 new" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in RUNS.glob("*/*/metrics.jsonl")}
    assert study(write(axes__coeff__values=[0, 0.1, 0.6], study__seeds=[1, 2, 3]), "--jobs", "2") == 0
    assert tries() == {f"coeff={c}/seed-{s}": 1 for c in ("0", "0.1", "0.6") for s in (1, 2, 3)}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out = capsys.readouterr().out
    assert "4 finished, 5 new" in out
    assert "finished    coeff 0.6, seed 3: validation loss 4." in out


def test_runs_shared_with_another_study_are_copied_not_trained(
    write: Write, study: Study, capsys: pytest.CaptureFixture[str]
):
    assert study(write()) == 0
    other = write("other.toml", axes__coeff=None, axes__weight={"key": "balancer.aux_loss.coeff", "values": [0.1, 0.2]})
    capsys.readouterr()
    assert study(other, "--reuse", "outputs/studies/small") == 0
    assert "2 runs are taken from outputs/studies/small" in (out := capsys.readouterr().out)
    assert "4 runs in outputs/studies/other: 2 finished, 2 new" in out
    theirs, ours = RUNS / "coeff=0.1/seed-2", Path("outputs/studies/other/runs/weight=0.1/seed-2")
    assert (ours / METRICS).read_bytes() == (theirs / METRICS).read_bytes()
    assert (theirs / "checkpoint").exists()
    assert not (ours / "checkpoint").exists()
    assert load_study(other).name in (ours / "point.toml").read_text()
    assert study(other, "--reuse", "outputs/studies/small") == 0  # what is there stays, and is of this study
    assert "0 runs are taken" in capsys.readouterr().out


def test_threads_are_shared_among_the_jobs(write: Write, study: Study):
    assert study(write(study__seeds=[1]), "--jobs", "2") == 0
    share = max(1, (os.cpu_count() or 1) // 2)
    assert {path.read_text().strip() for path in RUNS.glob("*/*/tries")} == {str(share)}


def test_a_failed_run_stops_no_other_and_is_tried_again_when_asked(
    write: Write, study: Study, capsys: pytest.CaptureFixture[str]
):
    path = write(study__seeds=[13, 1])
    assert study(path) == 1
    assert (state("coeff=0/seed-13"), state("coeff=0.1/seed-1")) == ("failed", "finished")
    out = capsys.readouterr().out
    assert "failed       coeff 0.1, seed 13: exit code 2 at step 0 of 8: error: step 3: NaN or infinite" in out
    assert "2 failed, 2 finished" in out
    assert "--resume tries failed runs again" in out
    assert study(path) == 1
    assert tries()["coeff=0/seed-13"] == 1
    assert study(path, "--resume") == 1
    assert (tries()["coeff=0/seed-13"], tries()["coeff=0/seed-1"]) == (2, 1)


def test_a_dead_worker_is_noted_and_goes_on_next_time(write: Write, study: Study, capsys: pytest.CaptureFixture[str]):
    path = write(study__seeds=[9, 1])
    assert study(path, "--jobs", "2") == 1
    assert (state("coeff=0/seed-9"), state("coeff=0.1/seed-1")) == ("interrupted", "finished")
    out = capsys.readouterr().out
    assert "interrupted  coeff 0, seed 9: ended by signal 9 at step 2 of 8 (killed: was it short of memory?)" in out
    assert study(path) == 0
    assert steps("coeff=0/seed-9") == list(range(1, 9))
    assert tries()["coeff=0/seed-1"] == 1


def test_a_signal_stops_trainings_softly_and_the_same_command_goes_on(
    write: Write, study: Study, capsys: pytest.CaptureFixture[str]
):
    path = write(study__seeds=[7, 1])

    def when_it_trains() -> None:
        limit = time.monotonic() + 60
        while not (RUNS / "coeff=0/seed-7" / METRICS).exists() and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=when_it_trains)
    thread.start()
    assert study(path) == 128 + signal.SIGTERM
    thread.join()
    assert "stopped by SIGTERM: the same command goes on from here" in capsys.readouterr().out
    assert state("coeff=0/seed-7") == "interrupted"
    assert tries() == {"coeff=0/seed-7": 1}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    write_again = write(study__seeds=[7, 1], axes__coeff__values=[0])
    assert study(write_again) == 0
    assert steps("coeff=0/seed-7") == list(range(1, 9))


def test_a_changed_base_is_refused_and_force_puts_old_runs_aside(write: Write, study: Study):
    assert study(write()) == 0
    old = (RUNS / "coeff=0/seed-1" / METRICS).read_text()
    changed = write(config__training__steps=12, config__training__seq_len=64)
    with pytest.raises(ValueError, match="trained with another base") as caught:
        study(changed)
    for part in ("4 runs", "training.steps: 8, now 12", "training.seq_len: 512, now 64", "--force"):
        assert part in str(caught.value)
    assert tries()["coeff=0/seed-1"] == 1
    assert study(changed, "--force", "--jobs", "2") == 0
    assert status(RUNS / "coeff=0/seed-1", 12).state == "finished"
    (aside,) = Path("outputs/studies/small/replaced").iterdir()
    assert (aside / "coeff=0/seed-1" / METRICS).read_text() == old
    assert len(list(aside.glob("*/*"))) == 4


def test_a_run_that_never_began_may_change_its_base(write: Write, study: Study):
    assert study(write(study__seeds=[13])) == 1
    assert study(write(study__seeds=[13], config__training__steps=9), "--resume") == 1


def test_folders_of_something_else_are_refused(write: Write, study: Study):
    path = write()
    home = Path("outputs/studies/small")
    home.mkdir(parents=True)
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and not the folder of a study: give another by --dump_folder"):
        study(path)
    assert [p.name for p in home.iterdir()] == ["thesis.tex"]
    (home / "thesis.tex").unlink()
    assert study(path) == 0
    with pytest.raises(ValueError, match="is the folder of the study 'small'"):
        study(write("other.toml"), "--dump_folder", str(home))
    (RUNS / "coeff=0/seed-1/point.toml").unlink()
    with pytest.raises(ValueError, match=r"seed-1 holds a run that is not of this study \(it has no point.toml\)"):
        study(path)


def test_a_run_that_another_process_trains_is_left_to_it(write: Write, study: Study):
    made = load_study(write())
    cli.claim_folder(made)
    runs = runs_of(made)
    sleeper = runner.start_run(
        runs[0], runner.Pool(1), 0, lambda run: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert sleeper is not None
    try:
        sleeper.lock.close()  # as if the study that started it had died: the training still has the lock
        assert is_going(runs[0].folder)
        assert status(runs[0].folder, 8).state == "running"
        assert runner.start_run(runs[0], runner.Pool(1), 0, runner.train_command(1)) is None
        assert study("small.toml") == 0
        assert "coeff=0/seed-1" not in tries()
    finally:
        sleeper.process.kill()
        sleeper.process.wait()
        sleeper.log.close()
    assert not is_going(runs[0].folder)
    assert study("small.toml") == 0
    assert tries()["coeff=0/seed-1"] == 1


def test_checkpoints_of_finished_runs_go_unless_wanted(write: Write, study: Study):
    assert study(write(study__keep_checkpoints=False, study__seeds=[1, 13])) == 1
    assert {str(p.parent.relative_to(RUNS)) for p in RUNS.glob("*/*/checkpoint")} == {
        "coeff=0/seed-13",
        "coeff=0.1/seed-13",
    }


def test_report_alone_trains_nothing(write: Write, study: Study, capsys: pytest.CaptureFixture[str]):
    assert study(write(), "--report") == 0
    assert tries() == {}
    assert "4 new" in capsys.readouterr().out


def test_commands_of_one_and_of_several_processes_and_their_gpus(write: Write, monkeypatch: pytest.MonkeyPatch):
    run = runs_of(load_study(write()))[0]
    assert runner.train_command(1)(run)[1:] == [
        "-m",
        "titan_moe.train",
        "--job.config_file",
        f"{run.folder}/point.toml",
    ]
    assert "--nproc_per_node=4" in runner.train_command(4)(run)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("RANK", "3")
    pool = runner.Pool(jobs=2, nproc=4)
    runner.check_pool(pool)
    made = runner.environment(pool, 1)
    assert made["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert "RANK" not in made
    with pytest.raises(ValueError, match="12 GPUs, but this machine has 8: give --jobs 2"):
        runner.check_pool(runner.Pool(jobs=3, nproc=4))


def test_small_trainings_share_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    pool = runner.Pool(jobs=6, jobs_per_gpu=3)
    runner.check_pool(pool)
    assert [runner.environment(pool, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == list("000111")
    with pytest.raises(ValueError, match="has 2, 3 trainings on each at a time: give --jobs 6"):
        runner.check_pool(runner.Pool(jobs=7, jobs_per_gpu=3))


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "give a study file, or --compare"),
        (["small.toml", "--compare", "x"], "give a study file, or --compare"),
        (["small.toml", "--jobs", "0"], "--jobs (0) must be at least 1"),
        (["small.toml", "--jobs_per_gpu", "0"], "--jobs_per_gpu (0) must be at least 1"),
        (["small.toml", "--jobs", "two"], "--jobs: invalid int value: 'two'"),
        (["small.toml", "--watch", "-1"], "--watch (-1.0) must be above 0"),
        (["small.toml", "--job", "2"], "unrecognized arguments: --job 2"),
        (["gone.toml"], "gone.toml"),
        (["small.toml", "--reuse", "gone"], "--reuse gone: holds no runs of a study"),
        (["--compare", "x", "--training.steps", "2"], "--training.steps: a comparison trains nothing"),
        (["small.toml", "--launcher", "slurm"], "--launcher slurm needs sbatch"),
    ],
)
def test_mistakes_on_the_command_line(write: Write, study: Study, args: list[str], part: str, monkeypatch: Any):
    write()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises((ValueError, OSError)) as caught:
        study(*args)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(write: Write, study: Study, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else name)
    with pytest.raises(ValueError, match=r"a study needs rich: pip install 'titan_moe\[study\]'"):
        study(write())


SBATCH = """#!/bin/sh
[ -n "$REFUSE" ] && { echo "invalid partition" >&2; exit 1; }
for script; do :; done
for task in 0 1 2 3; do SLURM_ARRAY_TASK_ID=$task bash "$script"; done
echo "4711;cluster"
"""


def test_slurm_gets_a_job_array_of_what_is_left(
    write: Write, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """sbatch is a stand-in that runs the tasks of the array at once; the tasks' python trains by the fake."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = Path(__file__).parent / "fake_train.py"
    python = f'#!/bin/sh\nshift 2\nOMP_NUM_THREADS=1 exec {sys.executable} {fake} "$@"\n'
    for name, text in {"sbatch": SBATCH, "python": python, "squeue": '#!/bin/sh\necho "$QUEUED"\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("titan_moe.study.runner.sys.executable", str(programs / "python"))
    path = write(study__sbatch=["--partition=gpu"], study__seeds=[1, 13])
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(ValueError, match=r"sbatch refused .*invalid partition.*study\.sbatch"):
        study(path, "--launcher", "slurm")
    monkeypatch.setenv("REFUSE", "")
    assert study(path, "--launcher", "slurm", "--jobs", "3") == 1
    script = Path("outputs/studies/small/slurm/array.sbatch").read_text()
    for line in ("#SBATCH --array=0-3%3", "#SBATCH --partition=gpu", "#SBATCH --job-name=small"):
        assert line in script.splitlines()
    assert "submitted 4 runs as job array 4711" in capsys.readouterr().out
    assert (state("coeff=0.1/seed-1"), state("coeff=0.1/seed-13")) == ("finished", "failed")
    monkeypatch.setenv("QUEUED", "4711 gpu")
    with pytest.raises(ValueError, match="job array 4711 of this study is still queued or running"):
        study(path, "--launcher", "slurm", "--resume")
    monkeypatch.setenv("QUEUED", "")
    assert study(path, "--launcher", "slurm") == 1
    assert "nothing is left to submit" in capsys.readouterr().out


def test_a_task_of_slurm_passes_a_signal_on_and_notes_the_end(write: Write, tmp_path: Path):
    from titan_moe.study import slurm
    from titan_moe.study.runs import prepare

    study = load_study(write(study__seeds=[7]))
    run: Run = runs_of(study)[0]
    prepare(run)
    script = slurm.write_script(study, [run], 1)
    fake = Path(__file__).parent / "fake_train.py"
    script.write_text(script.read_text().replace("-m titan_moe.train", str(fake)))
    env = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(["bash", str(script)], env=env)
    limit = time.monotonic() + 60
    while not (run.folder / METRICS).exists() and time.monotonic() < limit:
        time.sleep(0.01)
    process.terminate()
    process.wait(60)
    assert (run.folder / "exit_code").read_text().strip() == str(128 + signal.SIGTERM)
    assert status(run.folder, 8).state == "interrupted"
