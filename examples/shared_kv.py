"""A tensor-parallel style of your own: more tp ranks than key/value heads.

The fused qkv of examples/llama.py is split by heads, so each rank needs at least one key/value
head. Here the keys and values have a separate matrix, which every rank holds in full. A rank uses
only the key/value heads that its query heads attend to, so several ranks can share a head.

A style is a class or function that replaces a module, see tensor_parallel.STYLES. This one keeps
the weight and marks it as partial: its gradient on each rank is only the contribution of this
rank's heads, and is summed over the tp ranks once per step.

    make train NPROC=4 TP=4 PP=1 ARGS="--arch examples.shared_kv"
    torchrun --standalone --nproc-per-node 4 -m examples.shared_kv

The second command compares with one process.

What to look at: SharedKV; the plan, which names it; and the losses of 4 tp ranks that share 2
key/value heads, which are equal to those of one process. The cost: each rank stores the full
key/value matrix, its gradient and its optimizer state, and all-reduces the gradient.
"""

import dataclasses

import torch.distributed as dist
from torch import Tensor, nn

import tensor_parallel
from examples import llama
from examples.llama import draw, flops_per_token  # noqa: F401


class Config(llama.Config):
    """That of examples/llama.py."""


MODELS = {"nano": Config()}


class Attention(llama.Attention):
    def __init__(self, config: Config):
        super().__init__(config)
        h, n = config.n_embd, config.n_kv_head
        self.qkv = nn.Identity()
        self.q, self.kv = (nn.Linear(h, k * self.size, bias=False) for k in (config.n_head, 2 * n))
        self.kv.n_head, self.kv.n_kv_head = config.n_head, n  # for SharedKV

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, kv = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in (self.q(x), self.kv(x)))
        return q, *kv.chunk(2, dim=1)


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config)
        for block in self.h.values():
            block.attn = Attention(config)


class SharedKV(nn.Module):
    """Returns the keys and values of the heads that this rank's queries attend to."""

    def __init__(self, linear: nn.Linear, fused: tuple, group: dist.ProcessGroup, sequence: bool):
        super().__init__()
        self.group, self.sequence, self.weight = group, sequence, linear.weight  # [2 kv size, h]
        how = tensor_parallel.distribution_of(self.weight)
        self.weight.distribution = dataclasses.replace(how, partial=group)
        self.n_kv_head, queries = linear.n_kv_head, linear.n_head // group.size()
        per_kv = linear.n_head // linear.n_kv_head  # queries per key/value head
        first, last = group.rank() * queries, (group.rank() + 1) * queries - 1
        self.mine = slice(first // per_kv, last // per_kv + 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (2, self.n_kv_head, -1))[:, self.mine].flatten(0, 2)
        return tensor_parallel.ColumnLinear.apply(x, weight, None, self.group, self.sequence)


tensor_parallel.STYLES["shared kv"] = SharedKV


def plan(config: Config, t: int) -> dict:
    if (n := config.n_kv_head) % t and t % n:  # the heads of a rank would share unevenly
        raise ValueError(
            f"--tp {t}: it is neither a divisor nor a multiple of n_kv_head {n}: change one of them"
        )
    styles = {name: style for name, style in llama.plan(config, 1).items() if "qkv" not in name}
    return styles | {"h.*.attn.q": "column", "h.*.attn.kv": "shared kv"}


LAYOUTS = {
    "TP 4": "--tp 4",
    "TP 4, SP": "--tp 4 --sequence-parallel",
}


def main() -> None:
    llama.main("examples.shared_kv", LAYOUTS)


if __name__ == "__main__":
    main()
