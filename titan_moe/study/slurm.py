"""The SLURM launcher: a job array, of which each task trains one of the runs that are left."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from titan_moe.runtime.files import write_atomic
from titan_moe.study.grid import Run
from titan_moe.study.runner import launch
from titan_moe.study.runs import EXIT_CODE, LOCK, LOG, POINT, analysis_words, prepare
from titan_moe.study.spec import Study

SCRIPT, LIST, ANALYSES, JOB = "array.sbatch", "runs.txt", "analyses.txt", "job_id"
TEMPLATE = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --output={folder}/task-%a.log
#SBATCH --signal=B:TERM@120
{lines}
# One task trains the run in the line of its number; a SIGTERM lets the training save, and the study goes on from there.
mapfile -t runs < {list}
run=${{runs[$SLURM_ARRAY_TASK_ID]}}
exec 9>> "$run/{lock}"
flock -n 9
[ $? -eq 1 ] && {{ echo "another process trains $run"; exit 0; }}
cd {here}
{command} --job.config_file "$run/{point}" >> "$run/{log}" 2>&1 &
training=$!
trap 'kill -TERM $training' TERM
wait $training
code=$?
trap '' TERM
wait $training 2> /dev/null && code=0
{analysis}echo "$code" > "$run/{exit_code}"
"""
ANALYSIS = """\
mapfile -t analyses < {list}
eval "words=(${{analyses[$SLURM_ARRAY_TASK_ID]}})"
[ "$code" = 0 ] && {command} "${{words[@]}}" >> "$run/{log}" 2>&1
"""


def submit(study: Study, runs: Sequence[Run], jobs: int = 1) -> None:
    """Write the job array of the runs, at most `jobs` of them at a time, and submit it.

    ValueError where there is no sbatch, where it refuses, or where an array of this study is still queued or running.
    """
    # A task reads the list of runs when it starts, so no list may be replaced whose array is still queued.
    folder = study.folder / "slurm"
    if not runs:
        print("nothing is left to submit")
        return
    if shutil.which("sbatch") is None:
        raise ValueError("--launcher slurm needs sbatch, which is not here: run it on a login node, or leave it out")
    check_idle(folder)

    # What a task reads is on the disk before SLURM knows of it: a task may start at once.
    for run in runs:
        prepare(run)
    script = write_script(study, runs, jobs)
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refused {script}: {' '.join(done.stderr.split())}: see study.sbatch in {study.path}")

    # Its number is kept for `check_idle`; with several clusters sbatch prints NUMBER;CLUSTER.
    job = done.stdout.strip().partition(";")[0]
    write_atomic(folder / JOB, job + "\n")
    print(f"submitted {len(runs)} runs as job array {job}; --report --watch shows how they go")


def check_idle(folder: Path) -> None:
    """Raise ValueError where SLURM still has the array that was submitted last; `folder` is the study's for SLURM."""
    try:
        job = (folder / JOB).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return
    asked = subprocess.run(["squeue", "--noheader", "--job", job], capture_output=True, text=True, check=False)
    if asked.returncode == 0 and asked.stdout.strip():
        raise ValueError(
            f"job array {job} of this study is still queued or running: --report --watch shows how it goes"
        )


def write_script(study: Study, runs: Sequence[Run], jobs: int) -> Path:
    """Write the list of runs and the script whose tasks each train one of them; the script's path."""
    # Paths are absolute, and tasks go to the folder that this command runs in: data may be named relative to it.
    folder = study.folder.absolute() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / LIST, "".join(f"{run.folder.absolute()}\n" for run in runs))
    nproc, analysis = study.section.nproc, ""

    # What an analysis reads and which code it may run is each run's own, whose configuration may name any folder.
    if study.section.analyze:
        write_atomic(folder / ANALYSES, "".join(f"{shlex.join(analysis_words(run))}\n" for run in runs))
        command, words = shlex.join(launch("titan_moe.analyze", nproc)), shlex.quote(str(folder / ANALYSES))
        analysis = ANALYSIS.format(list=words, command=command, log=LOG)
    text = TEMPLATE.format(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", study.name),
        last=len(runs) - 1,
        jobs=jobs,
        folder=folder,
        lines="\n".join(f"#SBATCH {line}" for line in study.section.sbatch),
        list=shlex.quote(str(folder / LIST)),
        here=shlex.quote(str(Path.cwd())),
        command=shlex.join(launch("titan_moe.train", nproc)),
        analysis=analysis,
        point=POINT,
        log=LOG,
        lock=LOCK,
        exit_code=EXIT_CODE,
    )
    write_atomic(folder / SCRIPT, text)
    return folder / SCRIPT
