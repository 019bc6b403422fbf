"""Tensor parallelism: each weight matrix is sharded over t ranks.

                     columns               rows
    rank 0   x --f--> [W1a] ----gelu----> [W2a] --+
                                                  +--g--> y
    rank 1   x --f--> [W1b] ----gelu----> [W2b] --+
          [b,s,h]          [b,s,4h/t]           [b,s,h]

Every rank holds the full x. W1 is split by columns, so each rank computes 1/t of the hidden units,
and the nonlinearity needs no communication. W2 is split by rows, so each rank computes a partial
sum of y. g sums over the ranks: it is an all-reduce in forward and the identity in backward. f is
the identity in forward, and in backward it all-reduces the gradient of x. Attention is split in the
same way, by attention heads. The embedding and the output layer (lm_head) are split by vocabulary.

Sequence parallelism also shards the activations outside attention and MLP, along the sequence:

    [b,s/t,h] --norm--> f: all-gather --> W1, gelu, W2 --> g: reduce-scatter --> [b,s/t,h]

In backward, f is a reduce-scatter and g is an all-gather. Backward also gathers x a second time,
because forward saves only the shard of x. With keep_gathered, forward saves the full x instead.

Symbols: microbatch size b, sequence length s, hidden size h, vocabulary size v. The payload of a
collective is the number of elements of its full tensor. With ring algorithms, each rank sends
2 (t-1)/t times the payload for an all-reduce, and (t-1)/t times the payload for an all-gather or a
reduce-scatter. Saved: activations of a GPT-2 block, in units of b s h elements, without the core of
attention, dropout masks and statistics of norms.

    per block and microbatch   forward            backward           sent per rank     saved
    tensor parallel            2 all-reduce       2 all-reduce        8 (t-1)/t b s h  4 + 12/t
    with sequence parallel     2 all-gather       4 all-gather       10 (t-1)/t b s h  16/t
                               2 reduce-scatter   2 reduce-scatter
    and with keep_gathered     2 all-gather       2 all-gather        8 (t-1)/t b s h  2 + 14/t
                               2 reduce-scatter   2 reduce-scatter

Each rank stores 1/t of the sharded matrices, of their gradients and of their optimizer state.
Norms, the biases of row-parallel layers and the position table are replicated. The collectives in
forward, and g in backward, do not overlap with computation: 2 of the 4 collectives, or with
sequence parallelism 6 of the 10 (of 8 with keep_gathered). So the t ranks should be on one node.

    torchrun --standalone --nproc-per-node 2 tensor_parallel.py

Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3. Sequence parallelism: Korthikanti et
al. 2022 (arXiv 2205.05198), section 4.2, without keep_gathered.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- version 1: the whole idea --------------------------------------------------------------------
# An MLP without biases. mlp(x, w1, w2, group) returns the full y on every rank. x must be equal on
# all ranks. The weights are [out, in], as in nn.Linear, so the columns of W1 are dim 0 of w1. The
# hidden units may be split unevenly, but w1 and w2 must be split in the same way. For example:
#     w1 = nn.Parameter(full_w1.tensor_split(t, dim=0)[rank].detach().clone())
#     w2 = nn.Parameter(full_w2.tensor_split(t, dim=1)[rank].detach().clone())


class CopyToGroup(torch.autograd.Function):
    """f. Every rank computes with x, so the gradient of x is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)  # not x: autograd has special rules for an input that is returned

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone()  # all_reduce overwrites its argument, which belongs to autograd
        dist.all_reduce(grad, group=ctx.group)  # payload: b s h
        return grad, None


class ReduceFromGroup(torch.autograd.Function):
    """g. Sums the ranks' x in place. The gradient of each summand is the gradient of the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)  # tells autograd that x is overwritten
        dist.all_reduce(x, group=group)  # payload: b s h
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def column_parallel(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    return F.linear(CopyToGroup.apply(x, group), weight)  # weight [out/t, in] -> [b, s, out/t]


def row_parallel(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    return ReduceFromGroup.apply(F.linear(x, weight), group)  # weight [out, in/t] -> [b, s, out]


def mlp(x: Tensor, w1: Tensor, w2: Tensor, group: dist.ProcessGroup) -> Tensor:
    return row_parallel(F.gelu(column_parallel(x, w1, group)), w2, group)


# --- the full version -----------------------------------------------------------------------------
# Version 1 is a correct tensor-parallel MLP. The full version handles a complete model. It adds:
#   1. f is fused with its matmul. In backward, the all-reduce of the gradient of x then overlaps
#      with the matmul for the weight gradient.
#   2. Sequence parallelism. Outside attention and MLP, each rank computes the norms, dropouts and
#      residual additions of 1/t of the tokens, and stores the activations of only those tokens. The
#      cost: backward gathers x a second time, or with keep_gathered, the full x is stored.
#   3. parallelize() replaces the layers of a model by parallel layers, according to a plan.
#   4. The embedding and the cross-entropy are split by vocabulary. Logits are never gathered.

# torch 2.13 renamed these two and warns about the old names. torch 2.11 has only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Each start_* function launches a collective and returns a function that waits for it and returns
# the result. ColumnLinear.backward passes async_op=True to overlap the collective with a matmul.
# All other calls are synchronous, so that NCCL runs them on the current CUDA stream, and
# torch.compile can trace them.
#
# all_gather concatenates along dim 0 and reduce_scatter splits dim 0, but the sequence is dim 1 of
# [b, s, h]. So the output of all_gather and the input of reduce_scatter are permuted.


def start_all_reduce(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x: a partial sum [b, s, h], which is overwritten. The result is the sum."""
    handle = dist.all_reduce(x, group=group, async_op=async_op)  # payload: b s h
    return lambda: finish(handle, x)


def start_all_gather(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x: this rank's shard of the sequence, [b, s/t, h]. The result is [b, s, h]."""
    t = group.size()
    stacked = x.new_empty(t * x.size(0), *x.shape[1:])  # [t b, s/t, h]
    handle = all_gather(stacked, x.contiguous(), group=group, async_op=async_op)  # payload: b s h
    # [t b, s/t, h] -> [t, b, s/t, h] -> [b, t, s/t, h] -> [b, s, h]
    return lambda: finish(handle, stacked).unflatten(0, (t, -1)).movedim(0, 1).flatten(1, 2)


def start_reduce_scatter(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x: a partial sum, [b, s, h]. The result is this rank's shard of the sum, [b, s/t, h]."""
    t, (b, s, h) = group.size(), x.shape  # unflatten raises RuntimeError unless t divides s
    stacked = x.unflatten(1, (t, -1)).movedim(1, 0).flatten(0, 1).contiguous()  # [t b, s/t, h]
    shard = x.new_empty(b, s // t, h)
    handle = reduce_scatter(shard, stacked, group=group, async_op=async_op)  # payload: b s h
    return lambda: finish(handle, shard)


def finish(handle: dist.Work | None, output: Tensor) -> Tensor:
    if handle is not None:  # None: the call was synchronous
        handle.wait()
    return output


class ColumnLinear(torch.autograd.Function):
    """f, fused with its matmul. x: [b, s, in], or [b, s/t, in] with sequence parallelism. Returns
    [b, s, out/t]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, group, sequence, keep=False):
        ctx.group, ctx.sequence, ctx.gather_again = group, sequence, sequence and not keep
        full_x = start_all_gather(x, group)() if sequence else x
        # Only the weight gradient needs x. If the weight is frozen, x is not saved.
        saved_x = full_x if keep else x
        ctx.save_for_backward(saved_x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(full_x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Under autocast, grad can have lower precision than the saved tensors.
        x, weight = (a if a is None else a.to(grad.dtype) for a in ctx.saved_tensors)
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        d_weight = None
        if ctx.gather_again and need_weight:
            wait_x = start_all_gather(x, ctx.group, async_op=True)  # overlaps with the next matmul
        d_x = grad @ weight  # [b, s, in], a partial sum over this rank's columns
        start = start_reduce_scatter if ctx.sequence else start_all_reduce
        wait_d_x = start(d_x, ctx.group, async_op=need_weight)  # overlaps with the next matmul
        if need_weight:
            full_x = wait_x() if ctx.gather_again else x
            d_weight = grad.flatten(0, -2).T @ full_x.flatten(0, -2)  # [out/t, in]
        d_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return wait_d_x(), d_weight, d_bias, None, None, None


class ReduceScatterFromGroup(torch.autograd.Function):
    """g with sequence parallelism. x [b, s, h] -> this rank's shard of the sum, [b, s/t, h]."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_reduce_scatter(x, group)()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_all_gather(grad, ctx.group)(), None


def reduce_output(x: Tensor, group: dist.ProcessGroup, sequence: bool) -> Tensor:
    """g. Unlike f, it is not fused with its matmul, which saves tensors for backward. Activation
    checkpointing with early stop ends the recomputation of a block at the last saved tensor, so a g
    after that tensor is not run again."""
    return (ReduceScatterFromGroup if sequence else ReduceFromGroup).apply(x, group)


class Split(NamedTuple):
    """One dimension of a parameter is split over a group. A parameter may hold several fused
    matrices, such as query, key and value. Each matrix is split separately, so that a rank gets the
    query, key and value of the same heads."""

    dim: int
    sizes: tuple[int, ...]  # of the fused matrices along dim; one entry for a single matrix
    group: dist.ProcessGroup

    def slices(self) -> Iterator[tuple[int, int, int]]:
        """For each fused matrix, the slice that this rank holds: (start in the shard, start in the
        full parameter, length)."""
        local = offset = 0
        for n in self.sizes:
            start, stop = bounds(n, self.group.rank(), self.group.size())
            yield local, offset + start, stop - start
            local, offset = local + stop - start, offset + n


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How a parameter is distributed over ranks. parallelize() stores one in the attribute
    `distribution` of every parameter. gpt.init_weights draws the full parameter and keeps the
    shard, checkpoint.py writes it as slices of the full parameter, DDP and ZeRO use `replicas`, and
    train_3d.py counts each element once in the gradient norm."""

    shape: torch.Size  # of the full parameter
    splits: tuple[Split, ...] = ()  # at most one per dimension. Empty: it is replicated
    # Each rank of this group computes only a part of the gradient. all_reduce_partial() adds them.
    partial: dist.ProcessGroup | None = None
    # The data-parallel ranks that hold the same elements. DDP and ZeRO sum the gradient over this
    # group. None: over their own group.
    replicas: dist.ProcessGroup | None = None

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard of a tensor that has the full shape."""
        for split in self.splits:
            slices = [full.narrow(split.dim, start, n) for _, start, n in split.slices()]
            full = torch.cat(slices, split.dim)
        return full

    def is_split_over(self, group: dist.ProcessGroup) -> bool:
        return any(split.group is group for split in self.splits)


def bounds(n: int, rank: int, t: int) -> tuple[int, int]:
    """(start, stop) of a rank's shard of n rows or columns, as in torch.tensor_split: if t does not
    divide n, the first ranks get one more than the others."""
    size, rest = divmod(n, t)
    start = rank * size + min(rank, rest)
    return start, start + size + (rank < rest)


def shard_parameter(p: nn.Parameter, dim: int, fused: tuple[int, ...], group) -> nn.Parameter:
    """A new parameter: this rank's shard of p. fused: the proportions of the fused matrices along
    dim, such as (1, 1, 1), or (8, 2, 2) for 8 query, 2 key and 2 value heads."""
    t, (unit, rest) = group.size(), divmod(p.size(dim), sum(fused))
    sizes = tuple(unit * n for n in fused)
    if rest or min(sizes) < t:
        raise ValueError(
            f"{p.size(dim)} rows or columns cannot be split in the proportions {fused} so that "
            f"each of t = {t} ranks gets some of each matrix: correct the plan, or use a smaller t"
        )
    split, old = Split(dim, sizes, group), distribution_of(p)
    if any(dim == other.dim for other in old.splits):
        raise ValueError(f"dimension {dim} is already split: split another dimension")
    local = Distribution(p.shape, (split,)).shard(p.detach())
    shard = nn.Parameter(local, requires_grad=p.requires_grad)
    new = dataclasses.replace(old, splits=(*old.splits, split))
    shard.__dict__.update(p.__dict__, distribution=new)  # keeps tied_name, set by gpt.py
    return shard


def distribution_of(p: nn.Parameter) -> Distribution:
    """p.distribution. Without this attribute, p is replicated."""
    return getattr(p, "distribution", None) or Distribution(p.shape)


# Styles. A style is a class or a function: style(module, fused, group, sequence) returns the module
# that replaces `module`. Only "column" and "row" use `fused` (see shard_parameter).
#
# Some pipeline schedules compute weight gradients later than input gradients. For these,
# pipeline.defer_weight_gradients replaces multiply() on each column- and row-parallel layer. On a
# column-parallel layer, the replacement calls gather_input() and reduce_input_gradient() for the
# communication of f. A row-parallel layer has no f.


def check_type(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError if the type of `module` is not exactly `kind`, or if it has a padding_idx
    or a max_norm. A style that replaces it would drop what a subclass or these options compute."""
    values = [getattr(module, option, None) for option in ("padding_idx", "max_norm")]
    has_option = any(value is not None for value in values)
    if type(module) is not kind or has_option:
        raise ValueError(
            f"this style replaces a plain nn.{kind.__name__}, not {module}: name the plain layer "
            "inside it, or add a style to STYLES"
        )


class ColumnParallelLinear(nn.Module):
    """x [b, s, in], or with `sequence` [b, s/t, in] -> this rank's columns, [b, s, out/t].

    Fuse matrices with the same input, so that they share one f. The split ignores heads: the model
    must check that each rank gets complete heads. gpt.Attention also requires the same number of
    heads on every rank. A model with fewer key/value heads than ranks needs a style that gives the
    same head to several ranks, which this file does not have."""

    def __init__(self, linear: nn.Linear, fused: tuple[int, ...], group, sequence: bool):
        super().__init__()
        check_type(linear, nn.Linear)
        self.group, self.sequence, self.keep_gathered = group, sequence, False  # see parallelize()
        self.weight = shard_parameter(linear.weight, 0, fused, group)  # [out/t, in]
        bias = linear.bias
        self.bias = None if bias is None else shard_parameter(bias, 0, fused, group)  # [out/t]

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        more = self.group, self.sequence, self.keep_gathered
        return ColumnLinear.apply(x, self.weight, bias, *more)

    def gather_input(self, x: Tensor) -> Tensor:
        return start_all_gather(x, self.group)() if self.sequence else x

    def reduce_input_gradient(self, d_x: Tensor) -> Tensor:
        return (start_reduce_scatter if self.sequence else start_all_reduce)(d_x, self.group)()


class RowParallelLinear(nn.Module):
    """This rank's input features [b, s, in/t] -> [b, s, out], or with `sequence` [b, s/t, out]."""

    def __init__(self, linear: nn.Linear, fused: tuple[int, ...], group, sequence: bool):
        super().__init__()
        check_type(linear, nn.Linear)
        self.group, self.sequence = group, sequence
        self.weight = shard_parameter(linear.weight, 1, fused, group)  # [out, in/t]
        self.bias = linear.bias  # [out], replicated. It is added after g, so that it is added once.

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_output(self.multiply(x, None), self.group, self.sequence)
        return y if self.bias is None else y.add_(self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:  # as in ColumnParallelLinear
        return F.linear(x, self.weight, bias)


class VocabParallelEmbedding(nn.Module):
    """tokens [b, s] -> [b, s, h], or with `sequence` [b, s/t, h]. Each rank looks up the tokens in
    its vocabulary shard and outputs 0 for all other tokens. g sums over the ranks."""

    def __init__(self, embedding: nn.Embedding, fused: tuple[int, ...], group, sequence: bool):
        super().__init__()
        check_type(embedding, nn.Embedding)
        self.group, self.sequence = group, sequence
        self.weight = shard_parameter(embedding.weight, 0, (1,), group)  # [v/t, h]
        self.v = embedding.num_embeddings
        self.start, _ = bounds(self.v, group.rank(), group.size())

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        outside = (local < 0) | (local >= self.weight.size(0))
        # An invalid token keeps an out-of-range index, so that F.embedding raises.
        valid = (tokens >= 0) & (tokens < self.v)
        x = F.embedding(local.masked_fill(outside & valid, 0), self.weight)
        x = x.masked_fill(outside.unsqueeze(-1), 0.0)
        return reduce_output(x, self.group, self.sequence)


def shard_heads(module: nn.Module, fused: tuple, group, sequence: bool) -> nn.Module:
    """For gpt.Core, which draws another dropout mask for each head: sets which heads this rank
    has."""
    return hold_chunk(module, "heads", group)


def shard_tokens(module: nn.Module, fused: tuple, group, sequence: bool) -> nn.Module:
    """For gpt.Dropout and gpt.PositionEmbedding. With `sequence`, they get [b, s/t, h], and this
    sets which tokens the rank has. Without it, they do not change. The position table is
    replicated."""
    return hold_chunk(module, "tokens", group) if sequence else module


def hold_chunk(module: nn.Module, name: str, group) -> nn.Module:
    """Reduces module.tokens or module.heads, a gpt.Subset, to this rank's chunk of it."""
    if not hasattr(module, name):
        raise ValueError(f"this style sets `{name}`, which {module} does not have: see gpt.Subset")
    setattr(module, name, getattr(module, name).chunk(group.rank(), group.size()))
    return module


def replicate(module: nn.Module, fused: tuple, group, sequence: bool) -> nn.Module:
    """For a module outside attention and MLP, such as a norm. With `sequence` it gets [b, s/t, h].
    Without `sequence`, an nn.Dropout needs random generators in the same state on all ranks. With
    it, in different states, because the ranks hold different tokens."""
    return module


def mark_partial(module: nn.Module, fused: tuple, group, sequence: bool) -> nn.Module:
    """For a module between a column- and a row-parallel layer, such as the norm of each query and
    key head in Qwen3. Each rank applies it to its own heads only, so its gradient is a partial sum.
    A norm over all heads (OLMo 2) needs another style, because its forward must communicate."""
    for p in module.parameters(recurse=False):
        p.distribution = dataclasses.replace(distribution_of(p), partial=group)
    return module


STYLES = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "vocab": VocabParallelEmbedding,
    "heads": shard_heads,
    "tokens": shard_tokens,
    "replicated": replicate,
    "partial": mark_partial,
}

# A plan maps patterns of module names to a style or to (style, fused). Each model needs its own:
# gpt.PLAN is that of GPT-2.


def parallelize(
    model: nn.Module, plan: dict, group, sequence: bool = False, keep_gathered: bool = False
) -> nn.Module:
    """Replaces modules of `model` in place, according to `plan`, and returns the model. The first
    pattern that matches a module's name applies. The plan must name every module that holds
    parameters. The model may be on the meta device. Tied weights stay tied. Raises ValueError if
    the plan does not fit the model. With t = 1, the plan is not checked, and the modules do not
    change.

    All ranks must start from equal parameters and call the model with the same tokens. Neither is
    checked here. check_same_parameters() in ddp.py compares parameters.

    The attention of the model must take the number of heads and the sequence length from the shape
    of its queries. Weights may be split unevenly. With `sequence`, t must divide the sequence
    length. `keep_gathered` has an effect only with `sequence`: column-parallel layers save the
    gathered input.

    Every parameter gets the attribute `distribution`. If the model has set one, the new split or
    `partial` is added to it. Do not use clip_grad_norm_, which would scale the gradients
    differently on each rank. Compute the norm from all shards, counting replicas once, as
    train_3d.py does."""
    if group.size() == 1:
        for p in model.parameters():
            p.distribution = distribution_of(p)
        return model
    modules = dict(model.named_modules(remove_duplicate=False))
    for pattern in plan:
        if not any(fnmatch(name, pattern) for name in modules):
            raise ValueError(f"the plan names {pattern!r}, but the model has no such module")
    # {old: new}. The first module that holds a parameter makes the new one. Modules that are tied
    # to it get the same one.
    new_parameter: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in modules.items():
        entry = next((plan[pattern] for pattern in plan if fnmatch(name, pattern)), None)
        style, fused = entry if isinstance(entry, tuple) else (entry, (1,))
        check_style(name, module, style)
        # nn.Identity: in place of a layer of another pipeline stage.
        if style is None or isinstance(module, nn.Identity):
            continue
        old = dict(module.named_parameters(recurse=False))
        try:
            new = STYLES[style](module, fused, group, sequence)
        except ValueError as error:
            raise ValueError(f"{name}, style {style!r}: {error}") from None
        if isinstance(new, ColumnParallelLinear):
            new.keep_gathered = keep_gathered
        for key, p in old.items():
            own = getattr(new, key)
            shared = new_parameter.setdefault(p, own)
            if distribution_of(shared) != distribution_of(own):
                raise ValueError(
                    f"{name}.{key} is tied to a parameter that the plan shards differently: give "
                    "both modules the same style, or untie the weights"
                )
            setattr(new, key, shared)
        if new is not module:
            model.set_submodule(name, new)
    for p in model.parameters():
        p.distribution = distribution_of(p)
        # Each rank applies such a parameter to its tokens only, so its gradient is partial.
        if sequence and not p.distribution.is_split_over(group):
            p.distribution = dataclasses.replace(p.distribution, partial=group)
    return model


def check_style(name: str, module: nn.Module, style: str | None) -> None:
    """Raises ValueError if the plan needs another style for this module. Dropout in a function
    call, as in scaled_dot_product_attention, is not detected."""
    if style is None and list(module.parameters(recurse=False)):
        raise ValueError(
            f"{name} has parameters, but the plan does not name it. Give it 'column', 'row' or "
            "'vocab' to shard it, 'partial' if it is between a column- and a row-parallel layer, "
            "'replicated' if it is outside attention and MLP"
        )
    if style is not None and style not in STYLES:
        raise ValueError(f"{name}: unknown style {style!r}; use one of {', '.join(STYLES)}")
    if isinstance(module, nn.Dropout) and module.p > 0 and style != "replicated":
        raise ValueError(
            f"{name}: {module} draws its mask from this rank's random generator: set p to 0, or "
            "use gpt.Dropout. For a replicated activation you can also keep the generators of all "
            "ranks in the same state and use style 'replicated'"
        )


def all_reduce_partial(gradients: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
    """All-reduces, in place, the gradients of the partial parameters among these (parameter,
    gradient) pairs. Each rank has computed them from its own tokens (sequence parallelism) or its
    own heads (the style "partial"). Other replicated parameters have equal gradients on all ranks.
    Call it once per step, after the last backward. A gradient that is None must be None on all
    ranks."""
    partial: dict[dist.ProcessGroup, list[Tensor]] = {}
    for p, gradient in gradients:
        if p.distribution.partial is not None and gradient is not None:
            partial.setdefault(p.distribution.partial, []).append(gradient)
    for group, members in partial.items():
        flat = torch.cat([g.flatten() for g in members])
        dist.all_reduce(flat, group=group)  # payload: the partial parameters
        for g, total in zip(members, flat.split([g.numel() for g in members]), strict=True):
            g.copy_(total.view_as(g))


class VocabParallelCrossEntropy(torch.autograd.Function):
    """The sum of -log softmax(logits)[target] over the valid targets. For each token, the ranks
    all-reduce three numbers: the maximum, the sum of exponentials and the logit of the target."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, start: int, v: int, group) -> Tensor:
        highest = logits.amax(dim=-1)  # [b, s]
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)  # payload: b s
        shifted = logits - highest.unsqueeze(-1)  # [b, s, v/t]
        local = targets - start
        outside = (local < 0) | (local >= logits.size(-1))  # on another rank, or ignored
        # A target >= v keeps an out-of-range index, so that gather raises.
        local = local.masked_fill(outside & (targets < v), 0).unsqueeze(-1)
        at_target = shifted.gather(-1, local).squeeze(-1).masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), at_target])  # [2, b, s]
        dist.all_reduce(sums, group=group)  # payload: 2 b s
        valid = targets >= 0
        probabilities = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(probabilities, local, outside, valid)
        return ((sums[0].log() - sums[1]) * valid).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, outside, valid = ctx.saved_tensors
        here = (~outside).to(probabilities.dtype).unsqueeze(-1)  # 1 if this rank has the target
        d_logits = probabilities.scatter_add(-1, local, -here)  # p - 1 at the target, else p
        return d_logits.mul_(valid.unsqueeze(-1) * grad), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, head: nn.Module, group: dist.ProcessGroup
) -> Tensor:
    """The cross-entropy summed over the targets: a scalar, equal on all ranks. logits [b, s, v/t]:
    the output of the column-parallel layer `head`. targets [b, s]: 0 to v-1, or negative to be
    ignored. Computed in fp32, or in float64 for float64 logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group.size() == 1:  # F.cross_entropy reads and writes the logits fewer times
        # clamp() maps negative targets to -1. It also copies them: autograd saves the copy, so the
        # caller may overwrite `targets` before backward.
        flat = targets.flatten().clamp(min=-1)
        return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="sum")
    v = head.weight.distribution.shape[0]
    start, _ = bounds(v, group.rank(), group.size())
    return VocabParallelCrossEntropy.apply(logits, targets, start, v, group)


# --- cost -----------------------------------------------------------------------------------------


def predicted_collectives(
    n_layer: int, b: int, s: int, h: int, m: int = 1, sequence: bool = False,
    first: bool = True, last: bool = True, keep_gathered: bool = False,
) -> dict[tuple[str, str], tuple[int, int]]:  # fmt: skip
    """(phase, operation) -> (calls, payload in elements) per rank and step of m microbatches, for a
    pipeline stage with n_layer blocks. first: the stage has the embedding. last: it has lm_head and
    the loss. Not included: all_reduce_partial, and what activation checkpointing repeats."""
    f = 2 * n_layer + last  # attention and MLP of each block, and lm_head
    g = 2 * n_layer + first  # attention and MLP of each block, and the embedding
    if sequence:
        calls = {("forward", "all_gather"): f, ("forward", "reduce_scatter"): g,
                 ("backward", "all_gather"): g if keep_gathered else f + g,
                 ("backward", "reduce_scatter"): f, ("forward", "all_reduce"): 0}  # fmt: skip
    else:
        calls = {("forward", "all_reduce"): g, ("backward", "all_reduce"): f}
    costs = {key: (m * n, m * n * b * s * h) for key, n in calls.items()}
    if last:  # the loss of each microbatch all-reduces [b, s] and [2, b, s]
        n, payload = costs["forward", "all_reduce"]
        costs["forward", "all_reduce"] = n + 2 * m, payload + 3 * m * b * s
    return costs


# --- demo -----------------------------------------------------------------------------------------
# Each train_* function returns (losses, parameters). With one rank, the model is not sharded.

N_LAYER, B, S, H, STEPS = 2, 4, 36, 48, 3


def train_mlp(group: dist.ProcessGroup) -> tuple[list[Tensor], dict[str, nn.Parameter]]:
    """One forward and backward of version 1. The 37 hidden units are split unevenly."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 6, 8), (37, 8), (8, 37))
    x, w1, w2 = (nn.Parameter(torch.randn(n, generator=generator).double()) for n in shapes)
    if group.size() == 1:
        y = F.linear(F.gelu(F.linear(x, w1)), w2)
    else:
        w1, w2 = shard_parameter(w1, 0, (1,), group), shard_parameter(w2, 1, (1,), group)
        y = mlp(x, w1, w2, group)
    loss = y.square().mean()
    loss.backward()
    return [loss.detach()], {"x": x, "w1": w1, "w2": w2}


def train_gpt(
    group: dist.ProcessGroup, sequence: bool, keep_gathered: bool
) -> tuple[list[Tensor], dict[str, nn.Parameter]]:
    """The full version, trained with SGD. All ranks use the same B rows in each step."""
    import data
    import gpt

    config = gpt.GPTConfig(N_LAYER, n_head=12, n_embd=H, vocab_size=257, seq_len=S)
    model = gpt.build(config, seed=0, dtype=torch.float64)
    parallelize(model, gpt.PLAN, group, sequence, keep_gathered)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, tokens = [], data.example()
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = data.batch(tokens, step, range(B), S, seed=0)
        loss = vocab_parallel_cross_entropy(model(x), y, model.lm_head, group) / y.numel()
        loss.backward()
        all_reduce_partial((p, p.grad) for p in model.parameters())
        losses.append(loss.detach())
        optimizer.step()
    return losses, dict(gpt.named_parameters(model))


def main() -> None:
    import measure

    with measure.Report("tensor_parallel.py") as report:
        one_rank, _ = dist.new_subgroups(1)

        def compare(name: str, train: Callable, *options):
            """Trains on one rank and on all ranks. Returns the collectives and the parameters."""
            expected_losses, full = train(one_rank, *options)
            with measure.Collectives({"tp": report.group}) as seen:
                losses, local = train(report.group, *options)
            report.losses(name, losses, expected_losses)
            actual = {n: p.grad for n, p in local.items()}
            expected = {n: distribution_of(p).shard(full[n].grad) for n, p in local.items()}
            report.close(f"{name} max |d gradient|", actual, expected)
            return seen, local

        seen, local = compare("version 1", train_mlp)
        f_and_g = (2, 2 * local["x"].numel())  # (calls, payload)
        report.equal("version 1 all_reduce", f_and_g, tuple(seen.total("tp", "all_reduce")))
        for name in ("TP", "TP+SP", "TP+SP keep"):
            sequence, keep = "SP" in name, "keep" in name
            seen, local = compare(name, train_gpt, sequence, keep)
            # `seen` covers all steps, each with one microbatch: as many as one step of m = STEPS.
            costs = predicted_collectives(N_LAYER, B, S, H, STEPS, sequence, keep_gathered=keep)
            if sequence:  # add all_reduce_partial, which is called once per step, after backward.
                # `seen` counts all calls outside of backward as "forward".
                calls, payload = costs["forward", "all_reduce"]
                partial = sum(p.numel() for p in local.values() if p.distribution.partial)
                costs["forward", "all_reduce"] = calls + STEPS, payload + STEPS * partial
            for (phase, operation), predicted in costs.items():
                measured = tuple(seen.total("tp", operation, phase))
                report.equal(f"{name} {phase} {operation}", predicted, measured)


if __name__ == "__main__":
    main()
