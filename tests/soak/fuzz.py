"""Try bad and odd values on every key of the configuration: `python -m tests.soak.fuzz [--seed S] [--cases N]`.

Each case is a small run in a process of its own, with one key changed in the file or on the command line. It must end
with exit 0, or with exit 2 and one `error:` line; a run that is still training at the time limit must stop at SIGTERM.
Anything else (a traceback, a signal, a hang, a value that is silently another) is a fault, and printed.
"""

import argparse
import atexit
import collections
import contextlib
import copy
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tomli_w
import torch
from tqdm import tqdm

from tests.e2e.harness import TINY, write_text
from titan_moe import train
from titan_moe.config.schema import bare_type, parameters_of
from titan_moe.config.sections import KINDS, LOAD_LR, SECTIONS
from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.runtime import command

PATIENCE = 20.0  # seconds of a case
MEMORY = 2 << 30  # what a case may take beyond what Python and torch have, bytes of address space

INTS = (-1, 0, 1, 2, 3, 7, 1000, 100000, 2**31, 2**63 - 1, -(2**63), 2**63, 10**30)
FLOATS = (-1.0, 0.0, 5e-324, 1e-30, 0.5, 1.0, 1.1, 1e19, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "none", "true", "a\0b", "x" * 5000, "../..", "/proc/self/mem", "/dev/null", "~", "*", "[", "{}", "%s",
         "é\u202e\n", "bytes", "bpe:4096", "bpe:0", "bpe:-1", "bpe:99999999999", "bpe:x", "os:system", "os:nothing",
         "nowhere.module:fn", ":", "a:b:c", "os:path")  # fmt: skip
OTHERS = (True, False, [], [[]], [1, "a", {}], {}, {"a": {"b": {"c": 1}}}, ["a", "a"])
WORDS = ("", "1", "-1", "1e3", "1_000", "0x10", "inf", "nan", "true", "yes", "a b", "\u0664", "[1]", "1" * 5000)
FILES = {
    "nested arrays": "[training]\nsteps = " + "[" * 3000 + "]" * 3000,
    "nested tables": "[" + ".".join("a" * 3000) + "]\nb = 1\n",
    "nested inline tables": "a = " + "{a = " * 3000 + "1" + "}" * 3000,
    "an endless number": "[training]\nsteps = " + "9" * 6000,
    "a NUL": "[training]\nsteps = 1\0\n",
    "a mark at the beginning": "\ufeff[training]\nsteps = 1\n",
    "a base that is missing": 'base = "nowhere.toml"\n',
    "a base that is itself": 'base = "config.toml"\n',
    "a base with a NUL": 'base = "a\\u0000b"\n',
    "a base that is a folder": 'base = "/"\n',
    "a section that is a value": "training = 1\n",
    "a value that is a date": "[training]\nsteps = 1979-05-27T07:32:00Z\n",
    "nothing": "",
}


FILE = "the file"  # a key of its own: the whole of it


class Case(NamedTuple):
    """One change: a dotted key, and its value in the file, or its words on the command line."""

    key: str
    value: Any
    words: tuple[str, ...] | None = None
    base: tuple[tuple[str, Any], ...] = ()  # what the key needs beside it

    def __str__(self) -> str:
        text = f"--{self.key} {' '.join(self.words)}" if self.words is not None else f"{self.key} = {self.value!r}"
        return (text if len(text) < 120 else text[:90] + "..." + text[-20:]) + (f"  with {self.base}" * bool(self.base))


UNCHANGED = Case("training.steps", 2)  # must run, or the others say nothing


def keys() -> Iterator[tuple[str, Any, tuple[tuple[str, Any], ...]]]:
    """Every key with its type, and what must be set for it to be read."""
    for section, hint in SECTIONS.items():
        if section in KINDS:
            continue
        for name, annotation in get_type_hints(hint, include_extras=True).items():
            yield f"{section}.{name}", annotation, ()
    for section, kind in KINDS.items():
        yield f"{section}.name", str, ()
        for name in kind.registry:
            prefix = f"balancer.{name}" if section == "balancer" else section
            base = () if section == "balancer" else ((f"{section}.name", name),)
            for argument, (annotation, _) in parameters_of(kind, name, "fuzz", section).items():
                yield f"{prefix}.{argument}", annotation, base
                if section == "optimizer":
                    yield from ((f"optimizer.{group}.{argument}", annotation, base) for group in GROUP_PATTERNS)
    for argument, (annotation, _) in LOAD_LR.items():
        for choice in ("batch_fraction", "ideal_normalized"):
            yield f"optimizer.expert.{argument}", annotation, (("optimizer.expert.load_lr", choice),)


def cases() -> Iterator[Case]:
    """Every value of every key, and a few files that are odd as a whole."""
    for key, annotation, base in keys():
        if key == "job.config_file":
            continue
        bare = bare_type(annotation)
        choices = get_args(bare) if get_origin(bare) is Literal else ()
        for value in (*choices, *INTS, *FLOATS, *TEXTS, *OTHERS):
            yield Case(key, value, None, base)
        for word in (*map(str, choices), *WORDS, *map(str, INTS), *map(str, FLOATS), *TEXTS):
            yield Case(key, None, (word,), base)
        yield from (Case(key, None, words, base) for words in ((), ("1", "2"), ("a", "b", "c")))
        yield Case(f"{key}s", 1, None, base)
    yield from (Case(FILE, name) for name in FILES)
    yield from (Case("job.config_file", None, (word,)) for word in (*WORDS, *TEXTS))


def document(case: Case, folder: Path, text: Path) -> str:
    """The configuration file of a case."""
    tables: dict[str, Any] = copy.deepcopy(TINY)
    if case.key == FILE:
        return FILES[case.value]
    tables["training"] |= {"steps": 2, "global_batch_size": 2}
    tables["validation"] = {"freq": 2, "steps": 1}
    tables["data"] |= {"path": str(text), "cache_folder": str(text.parent / "cache")}
    tables["job"] = {"dump_folder": str(folder / "run")}
    changes = [*case.base, *([(case.key, case.value)] if case.words is None else [])]
    for key, value in changes:
        *parents, last = key.split(".")
        table = tables
        for name in parents:
            table = table.setdefault(name, {})
        table[last] = value
    return tomli_w.dumps(tables)


def child(arguments: list[str], log: Path) -> None:
    """Be the command, in a process that was just forked."""
    os.setpgrp()
    atexit._clear()  # the folders of the one who forked it are not for it to remove
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(out, 2)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(log.parent)
    sys.argv = ["train.py", *arguments]
    try:
        command.run_command(train.main)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python itself would say it
        os._exit(1)


class Running(NamedTuple):
    """A case under way."""

    case: Case
    pid: int
    folder: Path
    began: float


def start(case: Case, folder: Path, text: Path) -> Running | None:
    """Fork the run of a case; None for a value that TOML cannot say."""
    folder.mkdir()
    try:
        config = document(case, folder, text)
    except (TypeError, ValueError):
        return None
    file = folder / "config.toml"
    file.write_text(config, encoding="utf-8", errors="surrogatepass")
    arguments = ["--job.config_file", str(file)]
    if case.key == FILE:  # what it says is a run that nobody can wait for, where it can be read at all
        arguments += ["--training.steps", "1", "--model.dim", "16", "--data.path", str(text), "--data.dataset", "text"]
    if case.words is not None:
        arguments += [f"--{case.key}", *case.words]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(arguments, folder / "log")
    return Running(case, pid, folder, time.monotonic())


def poll(run: Running) -> tuple[str, str] | None:
    """What came of a run ('ran', 'refused', 'stopped', or 'FAULT ...') and its stderr; None while it goes on."""
    age, patience = time.monotonic() - run.began, PATIENCE * (10 if run.case.key == "compile.enable" else 1)
    ended, status = os.waitpid(run.pid, os.WNOHANG)
    if not ended and age < 2 * patience:
        if age > patience:  # a long run is fine, if it can be stopped
            os.kill(run.pid, signal.SIGTERM)
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    log = run.folder / "log"
    err = log.read_text(errors="replace") if log.exists() else ""
    if not ended:
        os.waitpid(run.pid, 0)
        return "FAULT: it hangs", err
    return judge(os.waitstatus_to_exitcode(status), age > patience, err)


def judge(code: int, stopped: bool, err: str) -> tuple[str, str]:
    """What an exit code and standard error mean."""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if "Traceback" in err:
        return "FAULT: traceback", err
    if stopped:
        return ("stopped" if code in (128 + signal.SIGTERM, -signal.SIGTERM) else f"FAULT: slow, {code}"), err
    if code == 0:
        return "ran", err
    if code == 2 and len(errors) == 1 and err.splitlines()[-1] == errors[0]:
        return "refused", err
    return f"FAULT: exit {code}, {len(errors)} error lines", err


def work(chosen: list[Case], text: Path, jobs: int) -> Iterator[tuple[Case, str, str]]:
    """Run the cases, `jobs` at a time."""
    running: list[Running] = []
    waiting = list(enumerate(chosen))
    with tempfile.TemporaryDirectory() as made:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, case = waiting.pop()
                begun = start(case, Path(made) / str(number), text)
                if begun is None:
                    yield case, "not TOML", ""
                else:
                    running.append(begun)
            for run in list(running):
                result = poll(run)
                if result is not None:
                    running.remove(run)
                    shutil.rmtree(run.folder, ignore_errors=True)
                    yield run.case, *(result if run.case != UNCHANGED or result[0] == "ran" else control(result))
            time.sleep(0.002)


def control(result: tuple[str, str]) -> tuple[str, str]:
    """What to say when the configuration that nothing was changed in did not run."""
    return f"FAULT: unchanged, but {result[0]}", result[1]


def main() -> int:
    """Run the cases and count; exit 1 where there were faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=0, help="so many, drawn at random (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="keys that contain this")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [case for case in cases() if options.only in case.key]
    chosen = random.Random(options.seed).sample(every, min(options.cases or len(every), len(every)))
    chosen = [each for i, case in enumerate(chosen) for each in ([case] if i % 100 else [UNCHANGED, case])]
    counts: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as made:
        text = write_text(Path(made) / "text.jsonl", 40)
        for case, what, err in tqdm(work(chosen, text, options.jobs), total=len(chosen), smoothing=0):
            counts[what] += 1
            last = err.strip().splitlines()[-1:] or [""]
            signature = f"{what} {case.key} {last[0][:60]}"
            if what.startswith("FAULT") and signature not in seen:
                seen.add(signature)
                tqdm.write(f"{what}\n  {case}\n  {last[0][:300]}", file=sys.stdout)
                sys.stdout.flush()
    keys_tried = len({case.key for case in chosen} & {FILE, *(key for key, *_ in keys())})  # not the misspelt ones
    print(f"{len(chosen)} cases of {keys_tried} keys: {dict(sorted(counts.items()))}")
    return int(any(what.startswith("FAULT") for what in counts))


if __name__ == "__main__":
    sys.exit(main())
