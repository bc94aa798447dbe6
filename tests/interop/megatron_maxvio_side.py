"""watch_maxvio on a stock GPTModel, in processes of its own: `python -m tests.interop.megatron_maxvio_side RANK STORE`.

Prints one line of JSON: the reports, and what a plain count of the routers' logits says.
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist

from titan_moe.convert.megatron.maxvio import watch_maxvio
from titan_moe.convert.megatron.model import build, prepare

E, K, LAYERS = 4, 2, 3
ARGUMENTS = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 32,
    "num_moe_experts": E,
    "moe_router_topk": K,
    "moe_layer_freq": [0, 1, 1],
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
    "attention_dropout": 0.0,  # the same numbers in every run
    "hidden_dropout": 0.0,
}


def main(rank: int, store: str) -> None:
    warnings.simplefilter("ignore")
    prepare(rank, 2, dist.FileStore(store, 2))
    model = build(ARGUMENTS, vocab_size=64, tied=False, theta=10000)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    report = watch_maxvio(model)
    expected = {}
    counts = {"batch": torch.zeros(LAYERS, E), "global": torch.zeros(LAYERS, E)}

    def plain(router, args, logits):
        if router.training and not torch.is_grad_enabled():
            return
        chosen = logits.view(-1, E).topk(K).indices.flatten()
        counts["batch" if router.training else "global"][router.layer_number - 1] += torch.bincount(chosen, minlength=E)

    for module in model.modules():
        if type(module).__name__ == "TopKRouter":
            original = module.gating
            module.gating = lambda x, original=original, module=module: _seen(plain, module, original(x))
    tokens = torch.randint(0, 64, (3, 2, 8), generator=torch.Generator().manual_seed(rank))
    future = torch.triu(torch.ones(8, 8), 1).bool()[None, None]
    positions = torch.arange(8)[None].expand(2, -1)
    model.train()
    for micro_batch in tokens[:2]:
        with torch.no_grad():
            model(micro_batch, positions, future)  # what Megatron's recomputation does first
        model(micro_batch, positions, future).logsumexp(-1).sum().backward()
    model.eval()
    with torch.no_grad():
        model(tokens[2], positions, future)
    reports = {kind: report(kind) for kind in ("batch", "global")}
    for kind, load in counts.items():
        dist.all_reduce(load)
        experts = load[1:]  # the first layer is dense
        expected[kind] = (experts.amax(-1) / experts.mean(-1) - 1).tolist()
    again = ""
    try:
        report("batch")
    except ValueError as error:
        again = str(error)
    tokens_seen = counts["batch"].sum(-1).tolist()
    print(json.dumps({"reports": reports, "expected": expected, "again": again, "tokens": tokens_seen}))
    dist.destroy_process_group()


def _seen(note, router, logits):
    note(router, None, logits)
    return logits


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
