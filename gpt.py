"""GPT-2 (Radford et al. 2019) for one process. The model itself does not communicate.

    tokens [b, s] -> wte -> wpe -> drop -> h.0 -> h.1 -> ... -> ln_f -> lm_head -> logits [b, s, v]

b batch size, s sequence length (seq_len), h hidden size (n_embd), a attention heads (n_head),
v vocabulary size.

Between wte and lm_head, every layer maps [b, s, h] to [b, s, h], so other files can change single
layers. Tensor parallelism replaces a layer by a shard of it. A pipeline stage removes the blocks
that other stages hold, and replaces its other missing layers by nn.Identity. `GPT.forward` does not
change. Parameters have the names of Hugging Face's GPT-2 checkpoints, which store the matrices of
attention and MLP transposed.

    python gpt.py          trains a small model for 30 steps

To read only the model, start at Core and stop at the end of GPT. Draws and Subset matter only for
dropout and for parallelism.

train_3d.py can train other models, such as examples/llama.py. --arch names the module of the model,
which must define these names, as this file does:

    Config               a frozen dataclass with at least the fields of `Config` here, except
                         attention, tied and dropout, which are optional. Each of these has a
                         command-line option. --config sets any other field
    MODELS               {name: Config}, for --model; the first one is the default
    Model(config)        called on the meta device. Its layers are h (a dict of blocks, as in GPT),
                         lm_head, and others that pipeline.FIRST or LAST list. A block has attn.core
                         for context parallelism and --recompute selective
    plan(config, t)      how layers are sharded over t processes, see PLAN; may raise ValueError
    draw(name, shape, generator, config)     the initial value of a parameter
    flops_per_token(config)                  FLOPs of the embedding, a block and the head
"""

import contextlib
import dataclasses
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. vocab_size: 256 if tokens are bytes. tied: lm_head and wte share one matrix.

    attention: "sdpa" is torch's fused kernel. "explicit" is matmul, causal mask, softmax, dropout,
    matmul; papers count the costs of this form. With dropout > 0, attention is always explicit,
    because the fused kernel does not accept a given dropout mask."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    vocab_size: int = 256
    seq_len: int = 128
    attention: str = "sdpa"
    tied: bool = True
    dropout: float = 0.0


Config = GPTConfig

# nano trains on bytes in minutes on a laptop. gpt2 to gpt2-xl: table 2 of the GPT-2 paper. gpt-1.7b
# and larger: Narayanan et al. 2021 (arXiv 2104.04473), table 1; gpt-175b (GPT-3) is in its table 2.
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
    """What dropout masks are drawn from: seed, step, and the number of each row in the global
    batch. Also the documents in these rows, which attention masks depend on. The training loop sets
    the seed once, and calls at() before each forward."""

    def __init__(self) -> None:
        self.seed, self.step, self.rows, self.starts = 0, 0, (), None

    def at(self, step: int, rows: Sequence[int], starts: Tensor | None = None) -> None:
        """Set the step, the rows (one number per row of the next input) and the starts of their
        documents, see document_starts()."""
        self.step, self.rows, self.starts = step, rows, starts

    def save(self) -> Callable[[], contextlib.AbstractContextManager]:
        """Save what at() has set, for recomputation (activation_ckpt.py). Returns a function that
        opens a context in which masks are those of the saved values."""
        saved = self.step, self.rows, self.starts

        @contextlib.contextmanager
        def restore():
            current = self.step, self.rows, self.starts
            self.at(*saved)
            try:
                yield
            finally:
                self.at(*current)

        return restore


def document_starts(x: Tensor, end: int | None) -> Tensor | None:
    """The position of the first token of each token's document, for the tokens x [b, s] of full
    rows. Token `end` is the last one of its document. None: attention does not use documents."""
    if end is None:
        return None
    after = torch.arange(1, x.size(1) + 1, device=x.device) * (x == end)
    return F.pad(after[:, :-1], (1, 0)).cummax(1).values


@dataclasses.dataclass(frozen=True)
class Subset:
    """Which entries of a dimension a process holds: which tokens of a row, or heads of a block. The
    dimension is divided into `count` equal chunks. The process holds those whose indices are in
    `held`, in this order.

        Subset()                     all entries
        Subset().chunk(i, t)         chunk i of t: the tokens of a rank with sequence parallelism
        Subset((i, 2*c-1-i), 2*c)    two chunks of 2 c: the zigzag of context parallelism

    A module whose result depends on positions has an attribute `tokens`, the tokens of its input.
    tensor_parallel.py and train_3d.py set it. With context parallelism, a process reads only its
    tokens of each row."""

    held: tuple[int, ...] = (0,)
    count: int = 1

    def chunk(self, index: int, count: int) -> "Subset":
        """Chunk `index` of `count` equal chunks of these entries. For example,
        Subset((0, 3), 4).chunk(1, 4) is Subset((1,), 8), the second half of the first chunk."""
        # Split each chunk into so many parts that `count` divides the total number of parts.
        parts = count // math.gcd(len(self.held), count)
        finer = [parts * i + j for i in self.held for j in range(parts)]
        n = len(finer) // count
        return Subset(tuple(finer[index * n :][:n]), parts * self.count)

    def total(self, n: int) -> int:
        """The size of the full dimension, of which this subset has n entries."""
        return n * self.count // len(self.held)

    def take(self, full: Tensor, dim: int) -> Tensor:
        """This subset of a tensor that has the full dimension."""
        if self.count == 1:
            return full
        chunks = full.unflatten(dim, (self.count, -1)).unbind(dim)
        return torch.cat([chunks[i] for i in self.held], dim)

    def positions(self, n: int, device: torch.device | None = None) -> Tensor:
        """The positions in the full dimension of the n entries of this subset."""
        return self.take(torch.arange(self.total(n), device=device), 0)


ALL = Subset()


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, row, site) and of the device type.

    `site` is the name of this module in the model. draws_of() sets both.
    The mask of the full row is drawn on the device. A process that holds a subset of the row takes
    this subset of the mask, so all processes together drop the same entries as one process.
    Different device types draw different masks.

    forward(x, *subsets): subsets[i] is what x has of dimension 1 + i. Default: dimension 1 has the
    subset `tokens`, and later dimensions are complete."""

    tokens = ALL

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.site, self.draws = "", None

    def forward(self, x: Tensor, *subsets: Subset) -> Tensor:  # [b, ...] -> the same shape
        if not self.training or self.p == 0.0:
            return x
        draws, subsets, shape = self.draws, subsets or (self.tokens,), [*x.shape[1:]]
        if len(draws.rows) != len(x):
            raise ValueError(
                f"dropout: the input has {len(x)} rows, but draws.at() was called with "
                f"{len(draws.rows)}: call it before each forward, with one number per row"
            )
        for dim, subset in enumerate(subsets):
            shape[dim] = subset.total(shape[dim])
        masks, generator = [], torch.Generator("cpu" if x.is_meta else x.device)
        for row in draws.rows:
            key = f"{draws.seed} {draws.step} {row} {self.site}"
            generator.manual_seed(zlib.crc32(key.encode()))
            mask = torch.rand(shape, generator=generator, device=x.device)
            for dim, subset in enumerate(subsets):
                mask = subset.take(mask, dim)
            masks.append(mask >= self.p)
        return x * torch.stack(masks) / (1.0 - self.p)


class Core(nn.Module):
    """The core of attention, without parameters: softmax(q k^T / sqrt(h/a)) v with a causal mask.
    q and the output have the shape [b, a, s, h/a]. k and v have it, too, or fewer heads, each for
    several consecutive heads of q. `heads` and `tokens`: those of q. The keys may have other
    tokens."""

    tokens = heads = ALL

    def __init__(self, config: GPTConfig):
        super().__init__()
        dropout = getattr(config, "dropout", 0.0)
        self.explicit = config.attention == "explicit" or dropout > 0
        self.drop = Dropout(dropout)
        self.draws = Draws()  # draws_of() replaces it

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Subset | None = None) -> Tensor:
        """keys: the tokens of k and v. Default: those of q."""
        keys = keys or self.tokens
        if k.size(1) < q.size(1):
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        starts = self.draws.starts
        complete = self.tokens.count == keys.count == 1  # all tokens, in order
        if complete and starts is None and not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        position_q, position_k = (
            subset.positions(x.size(-2), x.device) for subset, x in ((self.tokens, q), (keys, k))
        )
        hidden = position_k > position_q.unsqueeze(1)  # [s, s]: keys of later tokens
        if starts is not None:  # and keys of earlier documents
            earlier = position_k < self.tokens.take(starts, 1).unsqueeze(2)  # [b, s, s]
            hidden = (hidden | earlier).unsqueeze(1)
        if not self.explicit:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # [b, a, s, s]
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
        return self.drop(weights.to(q.dtype), self.heads, self.tokens, keys) @ v


def draws_of(model: nn.Module) -> Draws:
    """The model's attribute `draws`, or a new one. Each Dropout and Core of the model gets it."""
    draws = getattr(model, "draws", Draws())
    for name, module in model.named_modules():
        if isinstance(module, (Dropout, Core)):
            module.site, module.draws = name, draws
    return draws


class Attention(nn.Module):
    """Causal self-attention. The numbers of heads and tokens come from the shape of c_attn's
    output, not from the configuration. So the same code runs on a shard of the heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.head_size = config.n_head, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v, fused
        self.core = Core(config)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        qkv = self.c_attn(x)  # [b, s, 3 h]
        b, s, columns = qkv.shape
        full = 3 * self.n_head * self.head_size
        if columns % (3 * self.head_size) or full % columns:
            raise ValueError(
                f"n_head {self.n_head} cannot be split evenly: c_attn has {columns} of {full} "
                f"columns here, and each head needs 3 x {self.head_size}. Choose an n_head that is "
                "divisible by the number of processes that share c_attn"
            )
        q, k, v = (
            matrix.view(b, s, -1, self.head_size).transpose(1, 2)  # [b, a, s, h/a]
            for matrix in qkv.chunk(3, dim=-1)
        )
        return self.c_proj(self.core(q, k, v).transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
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
    """Adds row i of its weight [seq_len, h] to the vector of the token at position i."""

    tokens = ALL

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, h]
        return x + self.tokens.take(self.weight[: self.tokens.total(x.size(1))], 0)


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
        # A dict, not a list: blocks keep their numbers in a pipeline stage that has only some.
        self.h = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layer)})
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.wte.weight
            # A pipeline stage may hold lm_head without wte. See named_parameters().
            self.wte.weight.tied_name = "wte.weight"
        self.draws = draws_of(self)

    def forward(self, x: Tensor) -> Tensor:  # tokens [b, s] -> logits [b, s, v]
        x = self.drop(self.wpe(self.wte(x)))
        for block in self.h.values():
            x = block(x)
        return self.lm_head(self.ln_f(x))


Model = GPT


# How layers are sharded over t processes: {pattern of module names: style or (style, proportions of
# the fused matrices)}. tensor_parallel.py explains the styles.
PLAN = {
    "wte": "vocab",
    "wpe": "tokens",
    "drop": "tokens",
    "h.*.ln_?": "replicated",
    "h.*.attn.c_attn": ("column", (1, 1, 1)),  # query, key and value
    "h.*.attn.core": "heads",
    "h.*.attn.c_proj": "row",
    "h.*.mlp.c_fc": "column",
    "h.*.mlp.c_proj": "row",
    "h.*.drop_?": "tokens",
    "ln_f": "replicated",
    "lm_head": "column",  # sharded logits, for vocab_parallel_cross_entropy
}


def plan(config: GPTConfig, t: int) -> dict:
    """The same for every t. Attention raises an error if t does not divide n_head."""
    return PLAN


def flops_per_token(config: GPTConfig) -> tuple[int, int, int]:
    """FLOPs per token in forward: (embedding, one block, head). The counts of a block and the head
    include only matmuls, with 2 FLOPs per multiply-add. The embedding has h additions."""
    h, s, v = config.n_embd, config.seq_len, config.vocab_size
    return h, 24 * h * h + 4 * s * h, 2 * h * v


def module_of(config: Config) -> types.ModuleType:
    """The module that defines the class of `config`, and with it the model."""
    return sys.modules[type(config).__module__]


def forward_flops_per_token(config: Config) -> int:
    """FLOPs per token in forward, all layers. Forward and backward together need three times as
    many. As in build(), `config` may be that of another module."""
    embedding, block, head = module_of(config).flops_per_token(config)
    return embedding + config.n_layer * block + head


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum (not mean) of -log p(target) over valid tokens: those with a target >= 0.
    logits [b, s, v], targets [b, s] -> scalar, in fp32 if the logits are bf16.

    The caller divides by the number of valid tokens in the global batch. The losses of microbatches
    and ranks then add up to the mean over the batch, even if their numbers of valid tokens
    differ."""
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten().clamp(min=-1)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


def default_warmup(steps: int) -> int:
    """A tenth of the steps, but at least 10: with fewer, the loss of a short run jumps."""
    return max(10, steps // 10)


def learning_rate(step: int, steps: int, warmup: int | None, peak: float) -> float:
    """Linear warmup to `peak` over `warmup` steps (default: default_warmup(steps)), starting at
    peak / warmup. Then cosine decay to peak / 10 at step `steps`. Constant after that."""
    warmup = default_warmup(steps) if warmup is None else warmup
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Like model.named_parameters(), but a tied matrix is always called "wte.weight", also in a
    pipeline stage that holds only lm_head."""
    for name, parameter in model.named_parameters():
        yield getattr(parameter, "tied_name", name), parameter


def draw(name: str, shape: torch.Size, generator: torch.Generator, config: GPTConfig) -> Tensor:
    """Initial value of the full tensor `name`, in float64 on the CPU. Biases are 0, and weights of
    layer norms are 1. Matrices are normal with standard deviation 0.02; the two c_proj matrices of
    a block, which write to the residual stream, are scaled by 1/sqrt(2 n_layer)."""
    if len(shape) == 1:
        value = 1.0 if name.endswith("weight") else 0.0
        return torch.full(shape, value, dtype=torch.float64)
    std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
    return torch.randn(shape, generator=generator, dtype=torch.float64) * std


def init_weights(
    model: nn.Module, seed: int, dtype: torch.dtype, device: torch.device | str, draw: Callable
) -> None:
    """Allocate and initialise the parameters of a model that was built on the meta device.

    draw(name, shape, generator) returns the full tensor of that name and shape. The generator is
    seeded from (seed, name) only, so initial values do not depend on how the model is split. A
    parameter that may be a shard has an attribute `distribution` with `shape`, that of the full
    tensor, and `shard(full)`, which returns this process's shard. One full tensor is in memory at a
    time.

    A module with buffers needs a method init_buffers(), which registers them. Its __init__ calls
    it, and this function calls it again, on the device. Checkpoints do not contain buffers."""
    new: dict[int, nn.Parameter] = {}  # by id of the old parameter, so that tied ones stay tied
    for module_name, module in model.named_modules():
        for key, old in module.named_parameters(recurse=False):
            if id(old) not in new:
                name = getattr(old, "tied_name", f"{module_name}.{key}".lstrip("."))
                how = getattr(old, "distribution", None)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                full = draw(name, how.shape if how else old.shape, generator)
                local = (how.shard(full) if how else full).to(device, dtype, copy=True)
                new[id(old)] = nn.Parameter(local.contiguous(), requires_grad=old.requires_grad)
                new[id(old)].__dict__.update(old.__dict__)  # tied_name, distribution
            setattr(module, key, new[id(old)])
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            if not hasattr(module, "init_buffers"):
                raise ValueError(f"{module_name}: {type(module).__name__} has buffers, which have "
                                 "no values on meta: give it a method init_buffers()")  # fmt: skip
            with torch.device(device):
                module.init_buffers()


def build(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An initialised model on the CPU. The module that defines the class of `config` builds it."""
    module = module_of(config)
    with torch.device("meta"):
        model = module.Model(config)
    init_weights(model, seed, dtype, "cpu", lambda *a: module.draw(*a, config))
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
