"""Ten steps of a tiny model in every layout, compiled, and in float8: `python scripts/check_layouts.py [CASE ...]`.

Each is a run of torchrun over gloo. In fp32 the losses of all but float8 have to be those of one process. It prints a
row of a table for each and ends with 1 where one is wrong; what this torch can't do has to be refused in one line.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
STEPS = 10
TOLERANCE = 2e-5  # of losses after some steps of different round-off; seen are 1e-6
PATIENCE = 900  # seconds
COMMON = shlex.split(
    "--data.dataset text --data.tokenizer bytes --data.validation_fraction 0.1 --model.dim 64 --model.num_layers 2 "
    "--model.num_heads 4 --model.ffn_dim 128 --moe.num_experts 8 --moe.expert_dim 64 --moe.first_dense_layers 1 "
    f"--training.seq_len 64 --training.local_batch_size 2 --training.global_batch_size 8 --training.steps {STEPS} "
    "--training.mixed_precision_param float32 --lr_scheduler.warmup_steps 2 --validation.freq 10 --validation.steps 1 "
    "--validation.local_batch_size 2 --checkpoint.interval 10 --metrics.enable_tensorboard false"
)
DEGREE = "--parallelism.{}_parallel_degree 2"
CASES = {  # processes, arguments
    "one process": (1, ""),
    "fsdp2": (2, ""),
    "hsdp2": (2, "--parallelism.data_parallel_replicate_degree 2"),
    "ep2": (2, DEGREE.format("expert")),
    "ep2 x fsdp2": (4, DEGREE.format("expert")),
    "tp2": (2, DEGREE.format("tensor")),
    "cp2": (2, DEGREE.format("context")),
    "compiled": (1, "--compile.enable true"),
    "compiled fsdp2": (2, "--compile.enable true"),
    "compiled ep2": (2, f"--compile.enable true {DEGREE.format('expert')}"),
    "float8, emulated": (
        1,
        "--quantize.converters quantize.linear.float8 quantize.grouped_mm.float8 --quantize.emulate true "
        "--training.mixed_precision_param bfloat16",
    ),
}


def train(folder: Path, processes: int, words: str) -> tuple[float | None, str]:
    """The last loss of a run and an empty text; or None and the line that says what went wrong."""
    # The code of this checkout, whatever is installed; a layout that hangs ends at the limit.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, "-m", "titan_moe.train", *COMMON, *shlex.split(words)]
    command += ["--data.path", str(folder.parent / "text.txt"), "--data.cache_folder", str(folder.parent / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            [*command, "--job.dump_folder", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"not done after {PATIENCE} s"

    # A refusal is one line and enough; of a fault everything is shown, too.
    if ended.returncode:
        lines = ended.stderr.splitlines()
        refused = next((line for line in lines if line.startswith("error: ")), "")
        if not refused:
            print(ended.stderr, file=sys.stderr, flush=True)
        faults = [line for line in lines if re.search(r"Error: |what\(\)", line)]
        return None, refused or (faults or [f"exit code {ended.returncode}"])[-1]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]
    return losses[-1], "" if len(losses) == STEPS else f"{len(losses)} steps"


def verdict(name: str, loss: float | None, text: str, expected: float | None) -> str:
    """`yes`, `refused` where this torch can't do it, or what is wrong."""
    if loss is None:
        return "refused" if "needs torch" in text else f"NO: {text}"
    if text or not math.isfinite(loss):
        return f"NO: {text or loss}"
    if expected is not None and "float8" not in name and abs(loss - expected) > TOLERANCE * expected:
        return f"NO: the loss is {loss}, that of one process {expected}"
    return "yes"


def main() -> int:
    """Run all cases, or those that are named; exit code 1 where one is wrong."""
    chosen = sys.argv[1:] or list(CASES)
    print(f"| torch {torch.__version__} | runs | last loss | seconds |\n|---|---|---|---|", flush=True)
    expected, wrong = None, False

    # The package's own source is a text that every checkout has.
    with tempfile.TemporaryDirectory() as scratch:
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "titan_moe").rglob("*.py")))
        (Path(scratch) / "text.txt").write_text(text, encoding="utf-8")
        for name in chosen:
            begin = time.monotonic()
            loss, fault = train(Path(scratch) / name.replace(" ", "-"), *CASES[name])
            result = verdict(name, loss, fault, expected)
            wrong = wrong or result.startswith("NO")
            expected = loss if name == "one process" else expected
            shown = "" if loss is None else f"{loss:.6f}"
            print(f"| {name} | {result} | {shown} | {time.monotonic() - begin:.0f} |", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
