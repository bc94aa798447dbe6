"""Generate text from a checkpoint: `python -m titan_moe.generate --checkpoint DIR --prompt "..."`."""

import argparse
import sys

import torch
from torch import Tensor, nn

from titan_moe import runtime
from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.commands import Parser
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer


def main(args: list[str]) -> int:
    """Print the prompt and what the model makes of it."""
    options, rt = parse(args), runtime.read_world()
    runtime.init_logging(rt)
    step_folder = resolve_checkpoint(options.checkpoint)
    model, config = load_model(step_folder)
    tokenizer = load_tokenizer(str(step_folder / "tokenizer.json"))
    text = generate(
        model.to(rt.device),
        tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        context=config.training.seq_len,
        seed=options.seed,
    )
    sys.stdout.write(text + "\n")
    return 0


def parse(args: list[str]) -> argparse.Namespace:
    """Read the command line; a mistake in it is a ValueError of one line."""
    parser = Parser("python -m titan_moe.generate", "Generate text from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="step folder, or dump folder (its latest complete step)")
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token (0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k most probable tokens; 0: all (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (0)")
    options = parser.parse_args(args)
    if any("\ud800" <= char <= "\udfff" for char in options.prompt):  # how Python keeps bytes of other encodings
        raise ValueError(f"--prompt ({options.prompt!a}) must be UTF-8 text")
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(options, name) >= least:  # so that nan is refused
            raise ValueError(f"--{name} ({getattr(options, name)}) must be at least {least}")
    return options


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    context: int,
    seed: int,
) -> str:
    """Continue `prompt` by up to `max_new_tokens` tokens, until the end of the text; the prompt included.

    As in the paper (3.1) the whole context is evaluated anew for each token, at most its last `context` tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    start = tokenizer.encode(prompt) or [tokenizer.eot_id]
    tokens = torch.tensor([start], device=device)
    for _ in range(max_new_tokens):
        logits, _ = model(tokens[:, -context:])
        token = sample(logits[0, -1, : tokenizer.vocab_size].float(), temperature, top_k, generator)
        if token == tokenizer.eot_id:
            break
        tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
    return prompt + tokenizer.decode(tokens[0, len(start) :].tolist())


def sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw a token id (a scalar tensor) from softmax(logits / temperature) over the `top_k` largest (0: all)."""
    if temperature == 0:
        return logits_V.argmax()
    if 0 < top_k < logits_V.numel():
        kept = logits_V.topk(top_k)
        choice = torch.multinomial((kept.values / temperature).softmax(-1), 1, generator=generator)
        return kept.indices[choice].squeeze(0)
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator).squeeze(0)


if __name__ == "__main__":
    runtime.run_command(main)
