"""Whether a parametrization keeps activations in size: `python -m titan_moe.coordinate_check --out FOLDER`.

Models that differ in one size alone take a few steps. In each, the activations of a fixed text change by some amount.
If a rate is to be right at every size, that amount must not depend on the size: the exponent e in `change ~ size^e` is
0. Source: Yang et al. (2022, arXiv 2203.03466), appendix D.1, their coordinate check.

Shapes: B batch, S sequence.
"""

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_moe import theme
from titan_moe.build import build_model, build_optimizer
from titan_moe.config import Config, load_config
from titan_moe.runtime import command
from titan_moe.runtime.command import Parser

AXES = ("width", "depth", "experts")
MEASURED = ("residual stream", "attention", "feed-forward", "router logits", "logits")
BATCH, LENGTH = 8, 64  # sequences of a step, bytes of each

# A small model with experts; words of the command line come after these.
MODEL = {
    **{"model.dim": 64, "model.num_heads": 4, "model.ffn_dim": 128, "model.num_layers": 2, "model.vocab_size": 256},
    **{"moe.expert_dim": 64, "moe.num_experts": 8, "moe.top_k": 2, "data.tokenizer": "bytes"},
    **{"training.mixed_precision_param": "float32", "optimizer.lr": 0.004},
}


class Check(NamedTuple):
    """The mean change of each of MEASURED since the start: name -> (seeds, factors, steps)."""

    factors: tuple[int, ...]
    changes: dict[str, Tensor]

    def exponents(self, step: int = -1) -> dict[str, float]:
        """By which power of the size each change grows, fitted over all factors, at the step with this index."""
        return {name: exponent(self.factors, change[:, :, step]) for name, change in self.changes.items()}


def exponent(factors: Sequence[int], change_RF: Tensor) -> float:
    """The slope of log(change) over log(factor), by least squares; (seeds, factors) -> a number."""
    x_F = torch.tensor(factors, dtype=torch.float64).log()
    y_F = change_RF.double().log().mean(0)
    x_F = x_F - x_F.mean()
    return ((x_F * y_F).sum() / (x_F * x_F).sum()).item()


def scaled(axis: str, factor: int, words: Sequence[str], parametrization: str) -> Config:
    """The configuration of MODEL and `words` with one size times `factor`.

    Widths are scaled together, with the number of heads; experts together with top_k. The parametrization is
    `standard`, `mup` from the model at factor 1, or `given`, that of the words.
    """
    base = load_config([*as_words(MODEL), *words])
    model, moe = base.model, base.moe
    widths = {"model.dim": model.dim, "model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads}
    widths |= {"model.ffn_dim": model.ffn_dim, "moe.expert_dim": moe.expert_dim}
    experts = {"moe.num_experts": moe.num_experts, "moe.top_k": moe.top_k}
    sizes = {"width": widths, "depth": {"model.num_layers": model.num_layers}, "experts": experts}[axis]

    # The base is the same along every axis, so that what does not grow is as in it.
    parameters: dict[str, Any] = {}
    if parametrization == "mup":
        parameters = {"name": "mup", "base_dim": model.dim, "base_num_layers": model.num_layers}
        parameters |= {"base_num_experts": moe.num_experts, "base_top_k": moe.top_k} if moe.num_experts else {}
    grown = {key: size * factor for key, size in sizes.items()}
    return load_config(
        [
            *as_words(MODEL),
            *words,
            *as_words(grown),
            *as_words({f"parametrization.{key}": value for key, value in parameters.items()}),
        ]
    )


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Values by their keys as words of a command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def check(axis: str, factors: Sequence[int], words: Sequence[str], name: str, *, steps: int, seeds: int) -> Check:
    """Train a model of each size for `steps` steps, `seeds` times, in a parametrization, and measure what changed."""
    configs = [scaled(axis, factor, words, name) for factor in factors]
    by_seed = [[changes(config, steps, seed) for config in configs] for seed in range(seeds)]
    names = [name for name in MEASURED if name in by_seed[0][0]]
    return Check(
        tuple(factors),
        {name: torch.tensor([[of_size[name] for of_size in of_seed] for of_seed in by_seed]) for name in names},
    )


def changes(config: Config, steps: int, seed: int) -> dict[str, list[float]]:
    """How much each of MEASURED has changed on average since the start, after each step."""
    model = build_model(config)
    model.init_weights(seed)
    optimizer = build_optimizer(config, model)
    *batches, probe_BS = text_batches(steps + 1, seed)
    start = activations(model, probe_BS)

    # The loss is that of training, without balancers: what they add is of the size that their coefficients give it.
    sizes: dict[str, list[float]] = {name: [] for name in start}
    for tokens_BS in batches:
        ce_sum, _ = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (ce_sum / tokens_BS[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        now = activations(model, probe_BS)
        for name, values in sizes.items():
            pairs = zip(now[name], start[name], strict=True)
            values.append(sum((a - b).abs().mean().item() for a, b in pairs) / len(start[name]))
    return sizes


@torch.no_grad()
def activations(model: nn.Module, tokens_BS: Tensor) -> dict[str, list[Tensor]]:
    """Each of MEASURED for these tokens, of every layer that has it; of the residual stream, its end."""
    # Outside of the blocks the model returns all but what a layer adds, which is looked at where it is made.
    parts: dict[str, list[Tensor]] = {"residual stream": [], "attention": [], "feed-forward": []}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: parts[name].append(output[0] if isinstance(output, tuple) else output)

    layers: Any = model.layers
    hooks = [layers[-1].register_forward_hook(keep("residual stream"))]
    for layer in layers:
        hooks.append(layer.attention.register_forward_hook(keep("attention")))
        hooks.append((layer.moe or layer.feed_forward).register_forward_hook(keep("feed-forward")))
    logits_BSV, routings = model(tokens_BS[:, :-1])
    for hook in hooks:
        hook.remove()

    # A dense model has no router.
    if routings:
        parts["router logits"] = [routing.router_logits for routing in routings]
    return {**parts, "logits": [logits_BSV]}


def text_batches(count: int, seed: int) -> list[Tensor]:
    """Batches of bytes of a text that comes with Python, (B, S + 1) each, the same for every size."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - LENGTH, (count, BATCH), generator=generator).tolist()
    return [torch.stack([text[start : start + LENGTH + 1] for start in row]) for row in starts]


def draw(axis: str, base: int, checks: Mapping[str, Check], folder: Path) -> None:
    """Draw each change over the size, a row for each parametrization and a line for each step."""
    names = list(next(iter(checks.values())).changes)
    with theme.style():
        figure = theme.new_figure(2.4 * len(checks) + 0.4, 2.3 * len(names))
        panels = figure.subplots(len(checks), len(names), squeeze=False, sharex=True, sharey="col")
        # one scale for a column, so that a parametrization's lines can be held against the other's
        for row, (title, of_title) in zip(panels, checks.items(), strict=True):
            exponents = of_title.exponents()
            sizes = [base * factor for factor in of_title.factors]
            for panel, name in zip(row, names, strict=True):
                # the mean of logarithms over seeds, as the exponents are fitted to it
                change_FT = of_title.changes[name].log().mean(0).exp()  # (seeds, factors, steps) -> (factors, steps)
                for step, change_F in enumerate(change_FT.unbind(1)):
                    look = {"color": theme.colour(step), "marker": theme.marker(step), "label": f"step {step + 1}"}
                    panel.plot(sizes, change_F.tolist(), **look)
                label_axes(panel, sizes)
                panel.set_title(f"{name}\n{title}, exponent {exponents[name]:+.2f}", fontsize=8.5)
            row[0].set_ylabel("mean change")
        for panel in panels[-1]:
            panel.set_xlabel(axis)
        lines, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        theme.save_figure(figure, folder, f"coordinate_check_{axis}")


def label_axes(panel: Any, sizes: Sequence[int]) -> None:
    """Logarithmic axes with plain numbers: the theme's texts are not read as formulas."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.xaxis.set_minor_formatter("")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")


def main(args: list[str]) -> int:
    """Print and draw how activations change with a size, in the standard parametrization and in another one."""
    parser = Parser(
        "python -m titan_moe.coordinate_check",
        "Measure how the changes of activations depend on a size of the model. Words --section.key VALUE set the "
        "model whose sizes are multiplied, and may set [parametrization]; else standard and mup are compared.",
    )
    parser.add_argument("--axis", choices=AXES, default="width", help="the size that grows (width)")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8], help="it times these (1 2 4 8)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (5)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each size (3)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figure")
    options, words = parser.parse_known_args(args)
    if min(options.factors) < 1 or len(set(options.factors)) < 2 or min(options.steps, options.seeds) < 1:
        raise ValueError("--factors must be two or more different numbers from 1, --steps and --seeds at least 1")

    # A parametrization of one's own is checked alone; else both, which at factor 1 are the same model.
    names = ("given",) if any(word.startswith("--parametrization.") for word in words) else ("standard", "mup")
    checks = {
        name: check(options.axis, options.factors, words, name, steps=options.steps, seeds=options.seeds)
        for name in names
    }
    print(f"Change after the last step ~ {options.axis}^exponent; 0 is right: the same at every size.")
    print(f"{'exponent':<44}" + "".join(f"{title:>14}" for title in checks))
    for name in checks[names[0]].changes:
        print(f"{name:<44}" + "".join(f"{of.exponents()[name]:>+14.2f}" for of in checks.values()))
    options.out.mkdir(parents=True, exist_ok=True)
    config = scaled(options.axis, 1, words, names[0])
    size = {"width": config.model.dim, "depth": config.model.num_layers, "experts": config.moe.num_experts}
    draw(options.axis, size[options.axis], checks, options.out)
    print(f"figure  {options.out / f'coordinate_check_{options.axis}.png'}")
    return 0


if __name__ == "__main__":
    command.run_command(main)
