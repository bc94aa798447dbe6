"""Generate text from a checkpoint: `python -m titan_moe.generate --checkpoint DIR --prompt "..."`."""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer
from titan_moe.model.kv_cache import Cache, empty_cache, extend
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.parallelize import move_for_inference
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.dtypes import DTYPES

SEPARATOR = "\n---\n\n"  # between texts
CACHEABLE_ROUTERS = tuple(name for name in ROUTERS if name != "expert_choice")  # a token's experts depend on it alone


def main(args: list[str]) -> int:
    """Print each prompt with the model's continuation; return the exit code 0."""
    options, rt = parse(args), world.read_world()
    command.init_logging(rt)

    # A checkpoint brings its own configuration and tokenizer along; nothing of them is asked for again.
    step_folder = resolve_checkpoint(options.checkpoint)
    model, config = load_model(step_folder, options.trust_components)
    tokenizer = load_tokenizer(str(step_folder / "tokenizer.json"))
    move_for_inference(model, rt.device, DTYPES[config.training.mixed_precision_param])

    # The context is what the model was trained on: positions after it are unknown to it.
    texts = generate(
        model,
        tokenizer,
        options.prompt or [""],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        context=config.training.seq_len,
        seed=options.seed,
        use_cache=not options.no_cache and config.router.name in CACHEABLE_ROUTERS,
    )
    sys.stdout.write(SEPARATOR.join(text + "\n" for text in texts))
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    """Read the command line; a mistake in it is a ValueError of one line."""
    parser = Parser("python -m titan_moe.generate", "Generate text from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="step folder, or dump folder (its latest complete step)")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to go on from (default: the start of a document); several are generated together, each as if alone",
    )
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token (0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k most probable tokens; 0: all (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (0)")
    parser.add_argument("--no_cache", action="store_true", help="compute the whole context anew for each token")
    parser.add_trust()
    options = parser.parse_args(args)

    # Python keeps bytes that are not UTF-8 as halves of surrogate pairs, which no tokenizer takes.
    for prompt in options.prompt or ():
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise ValueError(f"--prompt ({prompt!a}) must be UTF-8 text")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(options, name) >= least:  # so that nan is refused
            raise ValueError(f"--{name} ({getattr(options, name)}) must be at least {least}")
    return options


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    context: int,
    seed: int,
    use_cache: bool = True,
) -> list[str]:
    """Return each prompt with its continuation: up to `max_new_tokens` tokens, or until the text ends.

    Each token is drawn from the model's logits after the last `context` tokens (the paper, 3.1). With `use_cache` keys
    and values are kept between tokens as long as a text fits into the context, which gives the same logits; after that
    the whole context is evaluated for each token. A router that looks at all tokens at once needs `use_cache` off.
    Texts do not depend on each other: prompt i draws by `seed` + i.
    """
    # A generator for each prompt, so that a text is the same alone and among others.
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    starts = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    texts = [list(start) for start in starts]

    # The cache has room for the longest text, and never for more than the context, beyond which it is of no use.
    room = min(context, max(map(len, starts)) + max_new_tokens)
    cache = empty_cache(model, len(prompts), room) if use_cache else None
    known = [0] * len(prompts)  # tokens of each text that the cache has

    # Texts that have ended leave; the others go on without them.
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        for i, logits_V in zip(running, _next_logits(model, cache, texts, known, running, context), strict=True):
            token = int(sample(logits_V[: tokenizer.vocab_size].float(), temperature, top_k, generators[i]))
            texts[i].append(token)
        running = [i for i in running if texts[i][-1] not in tokenizer.eos_ids]
        if not running:
            break

    # The prompt is given back as it was, because decoding its tokens may change it.
    return [
        prompt + tokenizer.decode(text[len(start) :])
        for prompt, start, text in zip(prompts, starts, texts, strict=True)
    ]


def _next_logits(
    model: Transformer, cache: Cache | None, texts: list[list[int]], known: list[int], running: list[int], context: int
) -> list[Tensor]:
    """Logits (V,) of the next token of each running text; brings the cache and `known` up to date."""
    device = next(model.parameters()).device
    logits: dict[int, Tensor] = {}

    # Texts that lack one token in the cache are evaluated as one batch. Others lack a whole prompt, each of its own
    # length, and come one by one.
    if cache is not None:
        fitting = [i for i in running if len(texts[i]) <= context]
        single = [i for i in fitting if len(texts[i]) == known[i] + 1]
        for rows in [[i] for i in fitting if i not in single] + ([single] if single else []):
            new = torch.tensor([texts[i][known[i] :] for i in rows], device=device)
            start = torch.tensor([known[i] for i in rows], device=device)
            logits |= dict(zip(rows, extend(model, cache, new, start, torch.tensor(rows, device=device)), strict=True))
            for i in rows:
                known[i] = len(texts[i])

    # Once a text is longer than the context its first tokens fall away and all positions shift: nothing that was kept
    # is of use any more.
    for i in (i for i in running if i not in logits):
        logits[i] = model(torch.tensor([texts[i][-context:]], device=device))[0][0, -1]  # (1, S, V) -> (V,)
    return [logits[i] for i in running]


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw a token id (a scalar tensor) from softmax(logits / temperature) over the `top_k` largest (0: all)."""
    if temperature == 0:
        return logits_V.argmax()
    if 0 < top_k < logits_V.numel():
        largest = logits_V.topk(top_k)
        choice = torch.multinomial((largest.values / temperature).softmax(-1), 1, generator=generator)
        return largest.indices[choice].squeeze(0)
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator).squeeze(0)


if __name__ == "__main__":
    command.run_command(main)
