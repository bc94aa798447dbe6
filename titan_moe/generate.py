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
# With these a token's experts depend on it alone; with the others on tokens that no cache keeps.
CACHEABLE_ROUTERS = tuple(name for name in ROUTERS if name not in ("expert_choice", "causal_bias", "emo"))


def main(args: list[str]) -> int:
    """Print each prompt and what the model makes of it; return the exit code."""
    options, rt = parse(args), world.read_world()
    command.init_logging(rt)

    # In the type that training computed in, which is the one that the weights have learned with.
    step_folder = resolve_checkpoint(options.checkpoint)
    model, config = load_model(step_folder, options.trust_components)
    tokenizer = load_tokenizer(str(step_folder / "tokenizer.json"))
    move_for_inference(model, rt.device, DTYPES[config.training.mixed_precision_param])

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

    # What argparse can't check; a mistake is told before a model is loaded.
    for prompt in options.prompt or ():
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # how Python keeps bytes of other encodings
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
    """Continue each prompt by up to `max_new_tokens` tokens, until an end of the text; prompts included.

    A token is the model's answer to the last `context` tokens, evaluated as a whole (the paper, 3.1). Keys and values
    are kept between tokens with `use_cache`, which gives the same, as long as a text fits into the context; then, and
    for routers that look at other tokens, too, the whole context is evaluated anew. Texts do not depend on each other:
    prompt i draws by `seed` + i.
    """
    # A generator for each text: what one draws does not depend on how many others there are.
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    starts = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    texts = [list(start) for start in starts]

    # Memory for the longest text, and never for more than a context, as that is all that the model looks at.
    cache_length = min(context, max(map(len, starts)) + max_new_tokens)
    cache = empty_cache(model, len(prompts), cache_length) if use_cache else None
    cached = [0] * len(prompts)  # tokens of each text that the cache has

    # A text that ends leaves the batch; the others go on.
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        for i, logits_V in zip(running, _next_logits(model, cache, texts, cached, running, context), strict=True):
            token = int(sample(logits_V[: tokenizer.vocab_size].float(), temperature, top_k, generators[i]))
            texts[i].append(token)
        running = [i for i in running if texts[i][-1] not in tokenizer.eos_ids]
        if not running:
            break

    # The prompt is given back as it was written: its tokens may decode to another spelling of it.
    return [
        prompt + tokenizer.decode(text[len(start) :])
        for prompt, start, text in zip(prompts, starts, texts, strict=True)
    ]


def _next_logits(
    model: Transformer, cache: Cache | None, texts: list[list[int]], cached: list[int], running: list[int], context: int
) -> list[Tensor]:
    """Logits (V,) of the next token of each running text; `cached` says how many of its tokens are in the cache.

    The cache and `cached` are brought up to date with what this has computed.
    """
    device = next(model.parameters()).device
    logits: dict[int, Tensor] = {}  # by the number of the text, (V,) each

    # With the cache only new tokens are computed: all texts that have one new token in one batch, and others, which are
    # prompts of any length, one by one.
    if cache is not None:
        fitting = [i for i in running if len(texts[i]) <= context]
        with_one_new = [i for i in fitting if len(texts[i]) == cached[i] + 1]
        for batch in [[i] for i in fitting if i not in with_one_new] + ([with_one_new] if with_one_new else []):
            tokens = torch.tensor([texts[i][cached[i] :] for i in batch], device=device)  # (B, T)
            positions = torch.tensor([cached[i] for i in batch], device=device)  # (B,) of the first new token of each
            rows = torch.tensor(batch, device=device)  # (B,) of the cache
            logits |= dict(zip(batch, extend(model, cache, tokens, positions, rows), strict=True))
            for i in batch:
                cached[i] = len(texts[i])

    # The rest is computed anew: all texts where there is no cache, and those longer than a context, whose tokens have
    # other positions at each step, so that no cached key is right.
    for i in (i for i in running if i not in logits):
        logits[i] = model(torch.tensor([texts[i][-context:]], device=device))[0][0, -1]
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
