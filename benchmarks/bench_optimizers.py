"""Cost of expert optimizers: whole steps against the same steps with fused AdamW, one thread, interleaved.

    python benchmarks/bench_optimizers.py                        # ratios at 2048 and 8192 tokens an update
    python benchmarks/bench_optimizers.py --mode jitter          # a whole period of steps: the slowest over the median
    python benchmarks/bench_optimizers.py --model moe8x          # the paper's shapes, in one layer
    python benchmarks/bench_optimizers.py --model moe8x --device cuda
    python benchmarks/bench_optimizers.py --base muon --variants "muon, load_lr"   # against muon without it

A step is `train_step`: forward, losses, backward, clipping, update. The named optimizer has the experts, AdamW the
rest. Its steps are of three kinds: plain, with statistics, with roots. The ratio of whole steps is measured on steps
without roots, in turn with AdamW's, on the same fresh random batches; what the roots of all tensors take is measured
by itself and added in proportion to the frequency, so that no measurement has to last for hundreds of steps. The other
ratio takes the updates of these steps alone, and with them the rest of AdamW's step for both: less noise. A plain
step applies what is there: Shampoo's roots, SOAP's bases (whose turns count as roots), Muon's iterations. Statistics of
Meta's package, which takes part where it can be imported, are in its plain step, as are others taken at every step.
Time is processor time: on one thread the wall time, less what other programs took. With `--device cuda` it is wall
time, the device waited for; the model is in fp32 there too, so that updates are what to look at, not whole steps.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from titan_moe.balancer import BALANCERS
from titan_moe.model.routing.token_choice import topk_softmax
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import combine
from titan_moe.step import train_step

TOP_K, VOCAB, SEQ, MICRO_BATCH = 2, 2048, 512, 4
# dim, layers, heads, experts, width of an expert; `moe8x` has one layer of the paper's shapes, `study` those of
# train_configs/studies/shampoo_mini.toml, `tiny` tries the script
MODELS = {
    "bench": (256, 4, 4, 8, 512),
    "moe8x": (768, 1, 12, 8, 2048),
    "study": (256, 4, 4, 8, 384),
    "tiny": (64, 1, 2, 4, 64),
}
BALANCE = {name: (0.01, BALANCERS[name](coeff=1.0)) for name in ("aux_loss", "z_loss")}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "shampoo (paper)": ("shampoo", {}),
    "shampoo, frequency 10": ("shampoo", {"precondition_frequency": 10}),
    "shampoo, blocks of 128": ("shampoo", {"max_preconditioner_dim": 128}),
    "shampoo, statistics every 10": ("shampoo", {"statistics_every": 10}),
    "shampoo, one side": ("shampoo", {"one_sided": True}),
    "shampoo_fast": ("shampoo_fast", {}),
    "shampoo_fast, fp32": ("shampoo_fast", {"matmul_dtype": "float32"}),
    "distributed_shampoo (Meta)": ("distributed_shampoo", {}),
    "soap": ("soap", {}),
    "soap, one side, statistics every 10": ("soap", {"one_sided": True, "statistics_every": 10}),
    "muon": ("muon", {}),
    "muon, fp32": ("muon", {"matmul_dtype": "float32"}),
    "muon, fp32, polar_express": ("muon", {"matmul_dtype": "float32", "coefficients": "polar_express"}),
    "normuon, fp32": ("normuon", {"matmul_dtype": "float32"}),
    "muonh, fp32": ("muonh", {"matmul_dtype": "float32"}),
    "adamh": ("adamh", {}),
    "ademamix": ("ademamix", {}),
    "lion": ("lion", {}),
}
COMPARED = list(VARIANTS)
# what each of these costs is best seen against the same optimizer without it (--base)
for optimizer in ("adamw", "shampoo", "shampoo_fast", "soap", "muon"):
    VARIANTS[f"{optimizer}, load_lr"] = (optimizer, expand_load_lr({"load_lr": "ideal_normalized"}, top_k=TOP_K))
    VARIANTS[f"{optimizer}, bf16 states"] = (optimizer, {"state_dtype": "bfloat16"})
VARIANTS["shampoo"] = VARIANTS["shampoo (paper)"]


class Side:
    """A model with an optimizer for its experts; the optimizer's clock is moved by hand."""

    def __init__(self, model: str, variant: str, device: torch.device) -> None:
        # All sides have the same weights, so that they route alike and do the same products.
        dim, layers, heads, num_experts, expert_dim = MODELS[model]
        self.model = Transformer(
            vocab_size=VOCAB,
            dim=dim,
            num_layers=layers,
            num_heads=heads,
            num_experts=num_experts,
            expert_dim=expert_dim,
            router=topk_softmax(top_k=TOP_K),
        ).to(device)
        self.model.init_weights(0)

        # The variant has the experts alone; what AdamW does to the rest is the same for all.
        self.device = device
        self.name, self.arguments = VARIANTS[variant]
        groups = parameter_groups(self.model.named_parameters(), {"expert": self.arguments})
        names = {group["name"]: "adamw" for group in groups} | {"expert": self.name}
        self.optimizer = combine(groups, names, lambda name, chosen: OPTIMIZERS[name](chosen, lr=1e-4))
        self.marks: list[float] = []  # time before and after the last update
        for register in (self.optimizer.register_step_pre_hook, self.optimizer.register_step_post_hook):
            register(lambda *_: self.marks.append(clock(device)))
        self.group = next(group for group in self.optimizer.param_groups if group["name"] == "expert")

    def step(self, tokens: Tensor) -> tuple[float, float]:
        """Seconds of a whole step on (B, SEQ + 1) tokens, cut into micro-batches, and of its update."""
        micro = [(part[:, :-1], part[:, 1:]) for part in tokens.split(MICRO_BATCH)]
        self.marks.clear()
        whole = seconds(lambda: train_step(self.model, micro, self.optimizer, BALANCE, [], max_norm=1.0), self.device)
        return whole, self.marks[1] - self.marks[0]

    def update(self, gradients: list[Tensor]) -> float:
        """Seconds of the optimizer's step alone, on gradients known to be finite, as in training."""
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        spent = seconds(lambda: self.optimizer.step(finite=finite), self.device)
        self.optimizer.zero_grad()
        return spent

    def set(self, offset: int | None = None, **settings: Any) -> None:
        """Change settings of the experts' group, and give all tensors the same offset."""
        self.group.update(settings)
        before = self.optimizer._matrices
        self.optimizer._prepare()
        for parameter, matrix in self.optimizer._matrices.items():
            kept = before[parameter].offset if offset is None else offset
            self.optimizer._matrices[parameter] = matrix._replace(offset=kept)

    def skip_to(self, *, observing: bool, rooting: bool, before: int = 0) -> None:
        """Move to a late step that takes statistics or not, and computes roots or not, or to so many steps before."""
        # With staggered roots each tensor has an offset of its own, and a step computes roots if any tensor is due.
        every, frequency = self.group.get("statistics_every", 1), self.group.get("precondition_frequency", 1)
        count = len(self.group["params"])
        offsets = {frequency * i // count if self.group.get("stagger_roots") else 0 for i in range(count)}

        def fits(step: int) -> bool:
            has_roots = any((step - offset) % frequency == 0 for offset in offsets)
            return ((step - 1) % every == 0) == (observing or every == 1) and has_roots == (rooting or frequency == 1)

        # After some periods nothing is done for the first time.
        step = next(filter(fits, range(4 * frequency, 10**6)))
        for parameter in self.group["params"]:
            if "clock" in self.optimizer.state[parameter]:
                self.optimizer.state[parameter]["clock"].fill_(step - 1 - before)

    def shares(self) -> tuple[float, float]:
        """Parts of steps that take statistics, and tensors' roots a step over all tensors."""
        frequency = self.group.get("precondition_frequency")
        return 1 / self.group.get("statistics_every", 1), 1 / frequency if frequency else 0.0


def clock(device: torch.device) -> float:
    """Processor time, or wall time at which a GPU has done what it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(task: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    start = clock(device)
    task()
    return clock(device) - start


def batch_of(tokens: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random sequences, (B, SEQ + 1), of so many tokens."""
    return torch.randint(0, VOCAB, (tokens // SEQ, SEQ + 1), generator=generator).to(device)


def parts(side: Side, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of statistics and roots, and bytes of the states over those of the parameters."""
    # A first update makes the states.
    gradients = [1e-3 * torch.randn_like(p) for p in side.model.parameters()]
    side.update(gradients)
    settings, is_metas = dict(side.group), side.name == "distributed_shampoo"
    # prime numbers, so that what is due can be had in any combination
    wanted = {"stagger_roots": False, "precondition_frequency": 101}

    def at(*, observing: bool, rooting: bool = False) -> float:
        periods = {**wanted, "statistics_every": 1 if observing else 997}
        times = []
        for _ in range(repeats):
            side.set(0, **{name: value for name, value in periods.items() if name in settings})
            side.skip_to(observing=observing, rooting=rooting, before=int(is_metas))
            if is_metas:
                side.update(gradients)  # takes over the count of steps, and counts by itself from here on
            times.append(1000 * side.update(gradients))
        return statistics.median(times)

    # Statistics and roots cost what a step with them takes more than a plain one.
    plain = at(observing=False)
    costs = {"statistics": 0.0, "roots": 0.0}
    if "statistics_every" in settings:
        costs["statistics"] = at(observing=True) - plain
    if "precondition_frequency" in settings:
        costs["roots"] = at(observing=False, rooting=True) - plain
    side.set(**settings)
    states = [v for p in side.model.parameters() for v in side.optimizer.state[p].values()]
    costs["state"] = sum(v.nbytes for v in states) / sum(p.nbytes for p in side.model.parameters())
    return costs


def missing_of(side: Side, cost: dict[str, float]) -> float:
    """Seconds of an average step that a plain one lacks; statistics that are taken at every step it has."""
    often, rooting = side.shares()
    return (cost["roots"] * rooting + (cost["statistics"] * often if often < 1 else 0.0)) / 1000


def ratios(model: str, base: str, variants: list[str], tokens: int, rounds: int, device: torch.device) -> None:
    """Print whole steps of each variant over those of `base`, measured without roots, whose share is added to both."""
    sides = {name: Side(model, name, device) for name in [base, *variants]}
    generator = torch.Generator().manual_seed(0)
    # a whole step first: what it allocates decides how much freed memory the process keeps, as in training
    sides[base].step(batch_of(tokens, generator, device))
    costs = {name: parts(side) for name, side in sides.items()}

    # Each step is compared with the two of the base around it, on the same batch: what else the machine does hits all.
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    quotients: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        batch = batch_of(tokens, generator, device)
        sides[base].skip_to(observing=False, rooting=False)
        before = sides[base].step(batch)
        for name in variants:
            sides[name].skip_to(observing=False, rooting=False)
            times = sides[name].step(batch)
            sides[base].skip_to(observing=False, rooting=False)
            after = sides[base].step(batch)
            if number:  # the first round warms up
                steps[name].append(times)
                steps[base].append(after)
                quotients[name].append(times[0] / ((before[0] + after[0]) / 2))
            before = after

    step, update = (statistics.median(times) for times in zip(*steps[base], strict=True))
    print(f"\n{model}, {tokens} tokens an update: a step of {base} takes {step:.3f} s, its update")
    print(f"{1000 * update:.0f} ms. State over parameters {costs[base]['state']:.2f}.\n")
    print("| experts | whole steps | by updates | plain, ms | statistics | roots | shares of these, % | state |")
    print("|---|---|---|---|---|---|---|---|")
    base_missing = missing_of(sides[base], costs[base])
    step, update = step + base_missing, update + base_missing
    for name in variants:
        often, rooting = sides[name].shares()
        cost = costs[name]
        missing = missing_of(sides[name], cost)
        plain = statistics.median(update_seconds for _, update_seconds in steps[name])
        whole = statistics.median(quotients[name]) * (step - base_missing) + missing
        cells = [f"{whole / step:.3f}"]
        cells += [f"{1 + (plain + missing - update) / step:.3f}"]
        plain -= cost["statistics"] / 1000 if often == 1 else 0.0
        spent = [1000 * plain, cost["statistics"] * often, cost["roots"] * rooting]
        cells += [f"{1000 * plain:.0f}", f"{cost['statistics']:.0f}", f"{cost['roots']:.0f}"]
        cells += [" + ".join(f"{100 * part / sum(spent):.0f}" for part in spent), f"{cost['state']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def jitter(model: str, variants: list[str], tokens: int, device: torch.device) -> None:
    """Print the slowest step of a period over the median, from the update's time of every step and a plain step's."""
    # All but the update is the same in every step and for every variant, so it is measured once, without its noise.
    base = Side(model, "adamw", device)
    generator = torch.Generator().manual_seed(0)
    batches = [batch_of(tokens, generator, device) for _ in range(4)]
    gradients = [1e-3 * torch.randn_like(p) for p in base.model.parameters()]
    rest = statistics.median([base.step(batch)[0] for batch in batches][1:]) - base.update(gradients)
    print(f"\n{model}, {tokens} tokens an update, {1000 * rest:.0f} ms without the update\n")

    # A whole period has every kind of step; it begins late, where all roots have been computed before.
    print("| experts | median step, ms | slowest | ratio |\n|---|---|---|---|")
    for name in variants:
        side = Side(model, name, device)
        side.update(gradients)
        period = side.group.get("precondition_frequency", 10)
        for parameter in side.group["params"]:
            side.optimizer.state[parameter]["clock"].fill_(4 * period)
        steps = [rest + side.update(gradients) for _ in range(period)]
        middle, slowest = statistics.median(steps), max(steps)
        print(f"| {name} | {1000 * middle:.0f} | {1000 * slowest:.0f} | {slowest / middle:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("ratios", "jitter"), default="ratios")
    parser.add_argument("--model", choices=MODELS, default="bench")
    parser.add_argument("--base", choices=VARIANTS, default="adamw", help="what the ratios are to")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[v for v in COMPARED if v != "adamw" and (find_spec("distributed_shampoo") or "Meta" not in v)],
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    arguments = parser.parse_args()

    # The command and the machine stand above the numbers, so that a table copied elsewhere can be repeated.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "a CPU" if arguments.device.type == "cpu" else torch.cuda.get_device_name(arguments.device)
    print(f"`python {' '.join(sys.argv)}`, {os.cpu_count()} cores, one thread, Python {platform.python_version()},")
    print(f"{device}, torch {torch.__version__}, medians of {arguments.rounds} rounds")
    for tokens in arguments.tokens:
        if arguments.mode == "jitter":
            jitter(arguments.model, arguments.variants, tokens, arguments.device)
        else:
            ratios(arguments.model, arguments.base, arguments.variants, tokens, arguments.rounds, arguments.device)


if __name__ == "__main__":
    main()
