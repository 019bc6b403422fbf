"""A Llama in one file, which train_3d.py trains in every layout.

The model has RMSNorm, rotary position embedding (RoPE), SwiGLU, grouped-query attention, optional
norms of queries and keys, and no biases. The model itself does not communicate. plan() tells tensor
parallelism how to shard each layer. No other file changes: gpt.py lists what such a file defines.

    make train ARGS="--arch examples.llama"
    make train ARGS="--arch examples.llama --config n_kv_head=4 qk_norm=true --zero 3"
    torchrun --standalone --nproc-per-node 4 -m examples.llama
    torchrun --standalone --nproc-per-node 8 -m examples.llama --tp 2 --pp 2 --zero 3

The last two commands compare with one process in float64: in three layouts, and in that of the
given flags.

What to look at: Attention, which takes the numbers of heads from the output of qkv, so that the
same code runs on a shard; `tokens`, which gives the positions for the rotation; init_buffers();
plan(), where qkv is three fused matrices.
"""

import dataclasses
import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt


@dataclasses.dataclass(frozen=True)
class Config:
    """n_kv_head: key/value heads; each serves n_head / n_kv_head query heads. n_hidden: hidden
    units of the MLP. qk_norm: normalise queries and keys, as Qwen3 does. See gpt.GPTConfig."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    vocab_size: int = 256
    seq_len: int = 128
    n_kv_head: int = 2
    n_hidden: int = 341
    qk_norm: bool = False
    theta: float = 10_000.0  # of the rotation
    eps: float = 1e-5  # of the norms
    attention: str = "sdpa"
    tied: bool = False

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}: change "
                "--n-head or --config n_kv_head"
            )
        if self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by 2 x n_head {self.n_head}: a head needs "
                "an even size, change --n-embd or --n-head"
            )


MODELS = {
    "nano": Config(),
    "llama-2-7b": Config(32, 32, 4096, 32000, 4096, 32, 11008),
    "llama-3-8b": Config(32, 32, 4096, 128256, 8192, 8, 14336, theta=500_000.0),
}


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE (Su et al. 2021, arXiv 2104.09864) of x [b, heads, s, size]: turns each pair of entries
    by an angle. angles: [s, size/2], proportional to the position."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    tokens = gpt.ALL

    def __init__(self, config: Config):
        super().__init__()
        h, self.size, self.theta = config.n_embd, config.n_embd // config.n_head, config.theta
        self.split = [config.n_head, config.n_kv_head, config.n_kv_head]  # of q, k and v
        self.qkv = nn.Linear(h, sum(self.split) * self.size, bias=False)
        norm = functools.partial(nn.RMSNorm, self.size, config.eps)
        self.q_norm, self.k_norm = (norm() if config.qk_norm else nn.Identity() for _ in "qk")
        self.core = gpt.Core(config)
        self.out = nn.Linear(h, h, bias=False)
        self.init_buffers()

    def init_buffers(self) -> None:
        rates = self.theta ** -(torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        self.register_buffer("rates", rates, persistent=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """The q, k and v of this rank's heads, [b, heads, s, size]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
        return heads.split([n * heads.size(1) // sum(self.split) for n in self.split], dim=1)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        q, k, v = self.project(x)
        positions = self.tokens.positions(q.size(2), q.device)
        angles = torch.outer(positions.to(self.rates.dtype), self.rates)
        q, k = rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles)
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm_1, self.attn = nn.RMSNorm(config.n_embd, config.eps), Attention(config)
        self.norm_2, self.mlp = nn.RMSNorm(config.n_embd, config.eps), MLP(config)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layer)})
        self.ln_f = nn.RMSNorm(config.n_embd, config.eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:  # as in gpt.GPT
            self.lm_head.weight = self.wte.weight
            self.wte.weight.tied_name = "wte.weight"

    def forward(self, x: Tensor) -> Tensor:  # tokens [b, s] -> logits [b, s, v]
        x = self.wte(x)
        for block in self.h.values():
            x = block(x)
        return self.lm_head(self.ln_f(x))


def plan(config: Config, t: int) -> dict:
    if config.n_kv_head % t:
        raise ValueError(
            f"--tp {t}: n_kv_head {config.n_kv_head} cannot be split: lower --tp to a divisor, or "
            "use --arch examples.shared_kv"
        )
    per_kv = config.n_head // config.n_kv_head
    return {
        "wte": "vocab",
        "h.*.norm_?": "replicated",
        "h.*.attn.qkv": ("column", (per_kv, 1, 1)),
        "h.*.attn.?_norm": "partial",  # a rank has the gradient of its own heads only
        "h.*.attn.out": "row",
        "h.*.mlp.gate_up": ("column", (1, 1)),
        "h.*.mlp.down": "row",
        "ln_f": "replicated",
        "lm_head": "column",
    }


def draw(name: str, shape: torch.Size, generator: torch.Generator, config: Config) -> Tensor:
    """Norms are 1, matrices normal with standard deviation 0.02."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02


def flops_per_token(config: Config) -> tuple[int, int, int]:
    """FLOPs of the matmuls per token in forward: (embedding, one block, head)."""
    h, size = config.n_embd, config.n_embd // config.n_head
    attention = 2 * h * (h + 2 * config.n_kv_head * size) + 2 * h * h + 4 * config.seq_len * h
    return 0, attention + 6 * h * config.n_hidden, 2 * h * config.vocab_size


# --- demo -----------------------------------------------------------------------------------------
# 3 layers on 2 stages, 251 words and 85 hidden units on 2 tp ranks: no split is even.

FLAGS = ("--n-layer 3 --n-head 4 --n-embd 32 --vocab-size 251 --seq-len 16 --steps 2 --lr 0.01 "
         "--warmup-steps 1 --weight-decay 0 --global-batch-size 4 --micro-batch-size 1 "
         "--dtype float64 --device cpu --config n_hidden=85 qk_norm=true")  # fmt: skip
LAYOUTS = {
    "TP, PP": "--tp 2 --pp 2",
    "TP, SP, ZeRO-3": "--tp 2 --sequence-parallel --zero 3",
    "PP, ZeRO-1": "--pp 2 --schedule zb-h1 --zero 1",
}


def main(arch: str = "examples.llama", layouts: dict[str, str] = LAYOUTS) -> None:
    import measure
    from examples.compare import compare_layout

    with measure.Report(arch, ranks=4) as report:
        given = {"given": " ".join(sys.argv[1:])}
        for name, layout in (given if sys.argv[1:] else layouts).items():
            compare_layout(report, name, f"--arch {arch} {FLAGS} {layout}".split())


if __name__ == "__main__":
    main()
