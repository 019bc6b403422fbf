"""GPT-2 (Radford et al. 2019) as published, on one process; no word about parallelism.

    wte -> wpe -> h.0 -> h.1 -> ... -> ln_f -> lm_head        tokens [b, s] -> logits [b, s, v]

The model is a chain of layers, each of which maps [b, s, h] to [b, s, h]. `forward` runs down the
chain, so a layer may be replaced (by a shard of itself, or by nn.Identity where another process
holds it) and the model does not notice. Parameter names are GPT-2's.

    python gpt.py          trains a small one for 30 steps, alone
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. `vocab_size` 256 means bytes; `attention` is "sdpa" (torch's fused kernel) or
    "explicit" (matmul, mask, softmax, dropout, matmul: the one that theory papers count); with
    dropout it is explicit in any case, since the fused kernel takes no mask of ours."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    vocab_size: int = 256
    seq_len: int = 128
    attention: str = "sdpa"
    tied: bool = True
    dropout: float = 0.0


# nano trains on bytes in minutes on a laptop; then GPT-2's four (its table 2); from gpt-1.7b on
# Narayanan et al. 2021 (arXiv 2104.04473), table 1, and GPT-3 of their table 2.
MODELS = {
    "nano": GPTConfig(),
    "gpt2": GPTConfig(12, 12, 768, 50257, 1024),
    "gpt2-medium": GPTConfig(24, 16, 1024, 50257, 1024),
    "gpt2-large": GPTConfig(36, 20, 1280, 50257, 1024),
    "gpt2-xl": GPTConfig(48, 25, 1600, 50257, 1024),
    "gpt-1.7b": GPTConfig(24, 24, 2304, 51200, 2048),
    "gpt-3.6b": GPTConfig(30, 32, 3072, 51200, 2048),
    "gpt-7.5b": GPTConfig(36, 32, 4096, 51200, 2048),
    "gpt-18b": GPTConfig(40, 48, 6144, 51200, 2048),
    "gpt-39b": GPTConfig(48, 64, 8192, 51200, 2048),
    "gpt-76b": GPTConfig(60, 80, 10240, 51200, 2048),
    "gpt-145b": GPTConfig(80, 96, 12288, 51200, 2048),
    "gpt-175b": GPTConfig(96, 96, 12288, 51200, 2048),
    "gpt-310b": GPTConfig(96, 128, 16384, 51200, 2048),
    "gpt-530b": GPTConfig(105, 128, 20480, 51200, 2048),
    "gpt-1t": GPTConfig(128, 160, 25600, 51200, 2048),
}


class Draws:
    """Where the run is: what a dropout mask depends on, besides its place in the model. Whoever
    runs the model sets step and rows (numbers in the global batch) before each forward."""

    def __init__(self) -> None:
        self.seed, self.step, self.rows = 0, 0, ()

    def at(self, step: int, rows: Sequence[int]) -> None:
        self.step, self.rows = step, rows

    def save(self) -> Callable[[], contextlib.AbstractContextManager]:
        """What opens a context in which masks are drawn as they would be now."""
        then = self.step, self.rows

        @contextlib.contextmanager
        def again():
            now = self.step, self.rows
            self.at(*then)
            try:
                yield
            finally:
                self.at(*now)

        return again


class Dropout(nn.Module):
    """A mask is a function of (seed, step, row, site) and of the device type: all CPUs draw equal
    masks, and so do all GPUs of one model. Each row's mask is drawn in full on the device and then
    sliced, so a process that holds a shard of the row drops the same entries as one that holds all
    of it. On a CPU this costs about 6 ns per element on one core."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.site, self.draws = p, "", None
        self.shard, self.shards = 0, 1  # of a row's first dim: tokens of [s, h], heads of [a, s, s]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        draws, (n, *rest) = self.draws, x.shape[1:]
        assert len(draws.rows) == len(x), f"{len(x)} rows, and draws.at() named {len(draws.rows)}"
        masks, generator = [], torch.Generator("cpu" if x.is_meta else x.device)
        for row in draws.rows:
            name = f"{draws.seed} {draws.step} {row} {self.site}"
            generator.manual_seed(zlib.crc32(name.encode()))
            full = torch.rand(n * self.shards, *rest, generator=generator, device=x.device)
            masks.append(full[self.shard * n :][:n] >= self.p)
        return x * torch.stack(masks) / (1.0 - self.p)


class Core(nn.Module):
    """What of attention has no weights: q, k, v [b, a, s, h/a] -> the same shape."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.explicit = config.attention == "explicit" or config.dropout > 0
        self.drop = Dropout(config.dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # [b, a, s, s]
        s = scores.size(-1)
        future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return self.drop(weights.to(q.dtype)) @ v


class Attention(nn.Module):
    """Causal self-attention. The number of heads and of tokens is read off what c_attn returns,
    never off the configuration or x: a process that holds some of them runs the same lines."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v, fused
        self.core = Core(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(x)  # [b, s, 3 h]
        b, s, columns = qkv.shape
        full = 3 * self.n_head * self.head_size
        if columns % (3 * self.head_size) or full % columns:
            raise ValueError(
                f"n_head {self.n_head} cannot be split evenly: c_attn has {columns} of {full} "
                f"columns here, for heads of {self.head_size}. Choose an n_head that is divisible "
                "by the number of processes that share c_attn"
            )
        q, k, v = (
            part.view(b, s, -1, self.head_size).transpose(1, 2)  # [b, a, s, h/a]
            for part in qkv.chunk(3, dim=-1)
        )
        return self.c_proj(self.core(q, k, v).transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop_1, self.drop_2 = Dropout(config.dropout), Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        x = x + self.drop_1(self.attn(self.ln_1(x)))
        return x + self.drop_2(self.mlp(self.ln_2(x)))


class PositionEmbedding(nn.Embedding):
    """Adds row i to position i: a layer of the chain like any other."""

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        return x + self.weight[: x.size(1)]


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(
                f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}: "
                "change --n-embd or --n-head"
            )
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = PositionEmbedding(config.seq_len, config.n_embd)
        self.drop = Dropout(config.dropout)
        # A dict and not a list: a part of the model keeps its blocks under their own numbers.
        self.h = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layer)})
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
            self.wte.weight.tied_name = "wte.weight"  # its name, also where only lm_head is held
        self.draws = Draws()
        for name, module in self.named_modules():
            if isinstance(module, Dropout):
                module.site, module.draws = name, self.draws

    def forward(self, x: Tensor) -> Tensor:  # tokens [b, s] -> logits [b, s, v]
        x = self.drop(self.wpe(self.wte(x)))
        for block in self.h.values():
            x = block(x)
        return self.lm_head(self.ln_f(x))


def flops_per_token(config: GPTConfig) -> tuple[int, int, int]:
    """Of a forward: (embedding, a block, head). 2 for each multiply-add of a matmul; of the
    embedding the sum of token and position alone, since looking up is no arithmetic."""
    h, s, v = config.n_embd, config.seq_len, config.vocab_size
    return h, 24 * h * h + 4 * s * h, 2 * h * v


def forward_flops_per_token(config: GPTConfig) -> int:
    """Of the whole model; forward and backward take three times as many."""
    embedding, block, head = flops_per_token(config)
    return embedding + config.n_layer * block + head


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum (not mean) of -log p(target) over valid tokens: targets < 0 (-1, -100) are ignored.
    logits [b, s, v], targets [b, s] -> scalar, in fp32 if the logits are in bf16. Divide by the
    count of valid tokens of the whole batch, and the parts of a batch add up to its mean, however
    unevenly the valid ones lie."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten().clamp(min=-1)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def learning_rate(step: int, steps: int, warmup: int | None, peak: float) -> float:
    """Linear warmup (default: a tenth of the steps), never 0. Then cosine decay to a tenth. Later
    steps keep that value."""
    warmup = max(1, steps // 10) if warmup is None else warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Like model.named_parameters(), but a tied matrix has one name wherever it is held."""
    for name, parameter in model.named_parameters():
        yield getattr(parameter, "tied_name", name), parameter


def gpt2_draw(name: str, shape: torch.Size, generator: torch.Generator, n_layer: int) -> Tensor:
    """GPT-2's initialisation of the whole tensor `name`, in float64 on the CPU: N(0, 0.02), with
    1/sqrt(2 l) on the two matrices that write to the residual stream; biases 0, norm weights 1."""
    if len(shape) == 1:
        from_phases = 1.0 if name.endswith("weight") else 0.0
        return torch.full(shape, from_phases, dtype=torch.float64)
    std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std


def init_weights(
    model: nn.Module, seed: int, dtype: torch.dtype, device: torch.device | str, draw: Callable
) -> None:
    """Fill a model that was built on the meta device. `draw(name, whole_shape, generator)` gives a
    whole tensor; the generator depends on (seed, name) and on nothing else, so a part of a model
    starts from the same numbers as the same part of the whole. A parameter that holds a part of
    its tensor has an attribute `sharding`, with `.shape` (of the full tensor) and `.shard(full)`.
    One whole tensor is alive at a time."""
    new: dict[int, nn.Parameter] = {}  # a tied matrix is drawn once and stays tied
    for module_name, module in model.named_modules():
        for key, old in module.named_parameters(recurse=False):
            if id(old) not in new:
                name = getattr(old, "tied_name", f"{module_name}.{key}".lstrip("."))
                sharding = getattr(old, "sharding", None)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                whole = draw(name, sharding.shape if sharding else old.shape, generator)
                part = (sharding.shard(whole) if sharding else whole).to(device, dtype, copy=True)
                new[id(old)] = nn.Parameter(part.contiguous(), requires_grad=old.requires_grad)
                new[id(old)].__dict__.update(old.__dict__)
            setattr(module, key, new[id(old)])


def build(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """The whole model on the CPU, initialised."""
    with torch.device("meta"):
        model = GPT(config)
    init_weights(model, seed, dtype, "cpu", lambda *a: gpt2_draw(*a, n_layer=config.n_layer))
    return model


def main() -> None:
    import data

    config = MODELS["nano"]
    model, tokens = build(config), data.load(None)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(30):
        x, y = data.batch(tokens, step, range(8), config.seq_len, seed=0)
        loss = cross_entropy(model(x), y) / (y >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1:3d}  loss {loss.item():.3f} nats per byte")


if __name__ == "__main__":
    main()
