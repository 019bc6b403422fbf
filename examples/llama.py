"""A Llama-like model in one file, trained with tensor, pipeline and data parallelism.

The model has RMSNorm, rotary position embedding (RoPE), SwiGLU, grouped-query attention with two
query heads per key/value head, and no biases. The model itself does not communicate. PLAN tells
tensor parallelism how to shard each layer over the tp ranks. No other file changes.

    torchrun --standalone --nproc-per-node 4 -m examples.llama
    torchrun --standalone --nproc-per-node 8 -m examples.llama --tp 2 --pp 2 --zero 3

The second command gives flags of train_3d.py, and trains with that layout only.

What to look at: Block.heads(), which takes the number of heads from the output of qkv, so that the
same code runs on a shard; PLAN, where qkv is three fused matrices with rows in the proportions 2, 1
and 1; and the losses, which are equal to those of one process in every layout. train_3d.Trainer
requires the attributes h, a ModuleDict of blocks, and lm_head.
"""

import functools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import gpt
import measure
import options
import train_3d
from examples.compare import compare


def rotate(x: Tensor) -> Tensor:  # [b, heads, s, size]
    """RoPE (Su et al. 2021, arXiv 2104.09864) of queries or keys."""
    how = dict(dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    rates = 10_000.0 ** -(torch.arange(0, x.size(-1), 2, **how) / x.size(-1))
    angles = torch.outer(torch.arange(x.size(-2), **how), rates)  # [s, size/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, config: gpt.GPTConfig):
        super().__init__()
        h, self.size = config.n_embd, config.n_embd // config.n_head
        hidden = 8 * h // 3
        self.norm_1, self.norm_2 = nn.RMSNorm(h, eps=1e-5), nn.RMSNorm(h, eps=1e-5)
        self.qkv = nn.Linear(h, 2 * h, bias=False)  # as many rows for q as for k and v together
        self.out = nn.Linear(h, h, bias=False)
        self.gate_up = nn.Linear(h, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, h, bias=False)

    def heads(self, x: Tensor) -> Sequence[Tensor]:
        """The q, k and v of this rank, [b, heads, s, size]."""
        qkv = self.qkv(x)
        kv, rest = divmod(qkv.size(-1), 4 * self.size)  # per kv head: 2 q, 1 k and 1 v
        if rest:
            raise ValueError("a kv head cannot be split: lower --tp to a divisor of --n-head / 2, "
                             "or use the block of examples/shared_kv.py")  # fmt: skip
        heads = qkv.unflatten(-1, (-1, self.size)).transpose(1, 2)
        return heads.split([2 * kv, kv, kv], dim=1)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        q, k, v = self.heads(self.norm_1(x))
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, config: gpt.GPTConfig, block: type[Block] = Block):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleDict({str(i): block(config) for i in range(config.n_layer)})
        self.ln_f = nn.RMSNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # tokens [b, s] -> logits [b, s, v]
        x = self.wte(x)
        for block in self.h.values():
            x = block(x)
        return self.lm_head(self.ln_f(x))


PLAN = {
    "wte": "vocab",
    "h.*.norm_?": "replicated",
    "h.*.qkv": ("column", (2, 1, 1)),
    "h.*.out": "row",
    "h.*.gate_up": ("column", (1, 1)),
    "h.*.down": "row",
    "ln_f": "replicated",
    "lm_head": "column",
}
# 3 layers on 2 stages, 251 words and 85 hidden units on 2 tp ranks: no split is even.
FLAGS = ("--n-layer 3 --n-head 4 --n-embd 32 --vocab-size 251 --seq-len 16 --steps 2 --lr 0.01 "
         "--warmup-steps 1 --weight-decay 0 --global-batch-size 4 --micro-batch-size 1 "
         "--dtype float64 --device cpu")  # fmt: skip
LAYOUTS = {
    "TP, PP": "--tp 2 --pp 2",
    "TP, SP, ZeRO-3": "--tp 2 --sequence-parallel --zero 3",
    "PP, ZeRO-1": "--pp 2 --schedule zb-h1 --zero 1",
}


def run(report: measure.Report, name: str, layout: list[str], block=Block, plan=PLAN) -> None:
    """Train in this layout, flags of train_3d.py, and compare with one process."""
    args = options.parser().parse_args([*FLAGS.split(), *layout])
    try:
        config = options.check(args, report.group.size())
    except ValueError as error:
        options.parser().error(str(error))
    read = functools.partial(data.batch, data.example(), seq_len=config.seq_len, seed=0)
    model = functools.partial(Llama, config, block)
    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"), model=model, plan=plan)
    compare(report, name, trainer, model)


def main() -> None:
    with measure.Report("examples.llama", ranks=4) as report:
        for name, layout in ({"given": ""} if sys.argv[1:] else LAYOUTS).items():
            run(report, name, sys.argv[1:] or layout.split())


if __name__ == "__main__":
    main()
