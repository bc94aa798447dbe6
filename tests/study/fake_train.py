"""A stand-in for `titan_moe.train` that takes milliseconds: reads --job.config_file, leaves what a training leaves.

`training.seed` 13 fails with an error, 9 dies of SIGKILL in the middle the first time, 7 waits for a signal at its
second step; `job.dump_folder` gets a line in `tries` for each start.
"""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def records(config: dict, first: int, last: int) -> list[dict]:
    """The lines of metrics.jsonl for these steps: losses with a best coefficient and expert rate, and noise by seed."""
    training, steps = config["training"], config["training"]["steps"]
    draw = random.Random(training["seed"])
    offset = draw.gauss(0, 0.01)
    coeff = config.get("balancer", {}).get("aux_loss", {}).get("coeff", 0.0)
    rate = config["optimizer"].get("expert", {}).get("lr", config["optimizer"].get("lr", 1e-3))
    hill = 0.05 * math.log10(rate / 5e-4) ** 2 + 0.02 * abs(math.log10((coeff + 0.005) / 0.1)) + offset
    layers, experts = config["model"]["num_layers"], max(1, config["moe"]["num_experts"])
    found = []
    for step in range(first, last + 1):
        loss = 4.0 + hill + 5.0 * math.exp(-4 * step / steps)
        vio = (1.5 / (1 + 30 * coeff)) * (1 + 0.2 * draw.random())
        found.append(
            {
                **{"step": step, "kind": "train", "loss": loss + draw.gauss(0, 0.03), "param_norm": 20 + step / 50},
                **{"maxvio_batch": vio, "load_entropy": 1 - vio / 10, "grad_norm": 1.0, "aux_loss": 0.25 + vio / 10},
                **{"step_seconds": 0.4 + 0.01 * draw.random(), "tokens_per_second": 5000.0, "peak_memory_gib": 0.9},
                **{"num_tokens": 2048 * step, "lr/dense": 1e-3},
            }
        )
        if step % config["validation"]["freq"] == 0 or step == steps:
            record = {"step": step, "kind": "validation", "loss": loss, "perplexity": math.exp(loss)}
            record |= {"accuracy": 0.5 - loss / 20, "maxvio_global": vio / 2, "aux_loss": 0.25, "z_loss": 2.0}
            for name in config["validation"].get("sets", {}):
                numbers = {"loss": loss + len(name), "bits_per_byte": loss / 2, "num_tokens": 640}
                record |= {f"validation/{name}/{key}": value for key, value in numbers.items()}
                record[f"validation/{name}/maxvio_global/layer_0"] = vio
            for name in config["validation"].get("tasks", {}):
                record |= {f"validation/{name}/acc": 1 / loss, f"validation/{name}/num_questions": 30}
            for layer in range(layers):
                for expert in range(experts):
                    record[f"load/layer_{layer}/expert_{expert}"] = int(1000 * (1 + vio * draw.uniform(-0.7, 0.7)))
            found.append(record)
    return found


def write(folder: Path, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def done_before(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.exists() else 0


def main() -> int:
    text = Path(sys.argv[sys.argv.index("--job.config_file") + 1]).read_text()
    config = tomllib.loads(text)
    folder, seed, steps = Path(config["job"]["dump_folder"]), config["training"]["seed"], config["training"]["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tries", "a") as file:
        file.write(f"{os.environ['OMP_NUM_THREADS']}\n")
    (folder / "config.toml").write_text(text)
    (folder / "run.json").write_text(json.dumps({"git_commit": "0" * 40, "device": "a test"}))
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "step").write_text(str(steps))
    first = done_before(folder) + 1
    if seed == 13:
        print("error: step 3: NaN or infinite router logits: the run has diverged and stops", file=sys.stderr)
        return 2
    if seed == 9 and first == 1:
        write(folder, records(config, 1, 2))
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 7 and first == 1:
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        write(folder, records(config, 1, 2))
        limit = time.monotonic() + 60
        while not stopped and time.monotonic() < limit:
            time.sleep(0.01)
        return 128 + signal.SIGTERM
    write(folder, records(config, first, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
