"""Tensor parallelism: every matrix is cut over t ranks, so that two matmuls need one all-reduce.

        x ---f--->  [ W1a ]  --gelu-->  [ W2a ] ---+            rank 0: half of the columns of W1,
   [b,s,h]                                        (+) g --> y           the matching rows of W2
        x ---f--->  [ W1b ]  --gelu-->  [ W2b ] ---+            rank 1: the other halves
                   column       [b,s,4h/t]    row

Cut W1 by columns and each rank has some of the hidden units, whole: the nonlinearity needs no
other. Cut W2 by rows and each rank has a partial sum of y: one all-reduce (g) completes it. In
backward the roles swap: f, which did nothing forward, sums the gradient of x. Attention is the same
with heads for hidden units. The vocabulary is cut as well, and the logits are never gathered.

Sequence parallelism cuts what is left whole, the residual stream and the norms, over the sequence:

    [b,s/t,h] --norm--> all-gather --> W1 ... W2 --> reduce-scatter --> [b,s/t,h] + residual

g's all-reduce comes apart into its halves, and the norm between them works on 1/t of the tokens.
Backward mirrors it, and gathers the input of W1 again instead of keeping it whole.

    per rank, a block and microbatch    forward             backward            wire of [b,s,h]
    tensor parallel                     2 all-reduce        2 all-reduce         8 (t-1)/t
    with sequence parallel              2 all-gather        4 all-gather        10 (t-1)/t
                                        2 reduce-scatter    2 reduce-scatter
    besides: the embedding, one g; the head, one f; the loss, all-reduces of [b,s] and [2,b,s]; with
    sequence parallel once a step an all-reduce of the gradients of norms, row biases and wpe
    parameters, gradients, optimizer: 1/t of the matrices; norms, row biases and wpe whole
    activations: 1/t inside attention and MLP; residual stream and norms whole, or 1/t

The sum of an input's gradient travels while the weight's gradient is computed, and the second
gather of an input while its gradient is; everything else waits for what it asks, so t stays inside
one machine.

    torchrun --standalone --nproc-per-node 2 tensor_parallel.py

Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3; Korthikanti et al. 2022
(arXiv 2205.05198), section 4.2, on sequence parallelism.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# Conjugates: what one does forward, the other does backward.
#
#     name            forward         backward         stands where
#     ColumnLinear    identity        all-reduce       f: one x enters t different matmuls
#     SumOverGroup    all-reduce      identity         g: t partial sums leave as one y
#   with sequence parallelism, where x and y are shards of the sequence:
#     ColumnLinear    all-gather      reduce-scatter   f
#     SumOverGroup    reduce-scatter  all-gather       g
#
# f is one with its matmul, since its collective runs beside half of that in backward. g stands by
# itself, behind the rows of a linear layer or of an embedding, so that who computes a block again
# for what its matmuls keep (activation_ckpt.py) need not go through the last sum.
# A group of one has nothing to say: the functions return what they were given.
# torch 2.13 renamed the two and warns at the old names; 2.11 has the old.
# async_op only where a matmul overlaps it, so never with deferred weight gradients. A synchronous
# NCCL call (torch 2.8) runs on the current stream: no events between two streams, and torch.compile
# can trace it.

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start_sum(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x [b, s, h], a partial sum, is overwritten. Returns a function that gives the sum; with
    async_op it waits first."""
    if group.size() == 1:
        return lambda: x
    handle = dist.all_reduce(x, group=group, async_op=async_op)  # payload: b s h

    def finish() -> Tensor:
        if async_op:
            handle.wait()
        return x

    return finish


def start_gather(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x [b, s/t, h]. Returns a function that gives [b, s, h], as start_sum does."""
    if group.size() == 1:
        return lambda: x
    parts = x.new_empty(group.size() * x.size(0), *x.shape[1:])
    handle = all_gather(parts, x.contiguous(), group=group, async_op=async_op)  # payload: b s h

    def finish() -> Tensor:
        if async_op:
            handle.wait()
        return parts.unflatten(0, (group.size(), -1)).movedim(0, 1).flatten(1, 2)

    return finish


def start_scatter(x: Tensor, group, async_op: bool = False) -> Callable[[], Tensor]:
    """x [b, s, h], a partial sum. Returns a function that gives my shard of the sum, [b, s/t, h],
    as start_sum does."""
    if group.size() == 1:
        return lambda: x
    if x.size(1) % group.size():
        raise ValueError(
            f"sequence parallelism shards the sequence, and {x.size(1)} tokens are not divisible "
            f"by t = {group.size()}: pad the sequence, or change t"
        )
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).flatten(0, 1).contiguous()
    mine = x.new_empty(x.size(0), x.size(1) // group.size(), x.size(2))
    handle = reduce_scatter(mine, parts, group=group, async_op=async_op)  # payload: b s h

    def finish() -> Tensor:
        if async_op:
            handle.wait()
        return mine

    return finish


def to_dtype(dtype: torch.dtype, tensors: tuple) -> list:
    """For a backward: under autocast the gradient may have a lower dtype than the saved tensors."""
    return [None if t is None else t.to(dtype) for t in tensors]


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in]


class ColumnLinear(torch.autograd.Function):
    """x [b, s, in] (or [b, s/t, in], if `sequence`) -> [b, s, out/t]. What is kept is x as it came:
    a shard is gathered again in backward, while the gradient of the gathered x is computed."""

    @staticmethod
    def forward(ctx, x, weight, bias, group, sequence: bool):
        ctx.group, ctx.sequence = group, sequence
        # Only the weight's gradient needs x, so a frozen weight does not save it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(start_gather(x, group)() if sequence else x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = to_dtype(grad.dtype, ctx.saved_tensors)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        whole_x = start_gather(x, ctx.group, need_x) if ctx.sequence and need_weight else lambda: x
        d_x = grad @ weight if need_x else None  # a partial sum: of my columns
        x, arrived = whole_x(), lambda: None
        if need_x:
            arrived = (start_scatter if ctx.sequence else start_sum)(d_x, ctx.group, need_weight)
        d_weight = weight_gradient(x, grad) if need_weight else None  # while d_x travels
        d_bias = grad.flatten(0, -2).sum(0) if need_bias else None
        return arrived(), d_weight, d_bias, None, None


class SumOverGroup(torch.autograd.Function):
    """x [b, s, h], a partial sum -> the sum, whole, in its place, or if `sequence` my shard
    [b, s/t, h] of it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, sequence: bool) -> Tensor:
        ctx.group, ctx.sequence = group, sequence and group.size() > 1
        if ctx.sequence:
            return start_scatter(x, group)()
        ctx.mark_dirty(x)
        if group.size() > 1:
            dist.all_reduce(x, group=group)  # payload: b s h
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return start_gather(grad, ctx.group)() if ctx.sequence else grad, None, None


def all_reduce_partial(gradients: list[Tensor | None], group: dist.ProcessGroup) -> None:
    """With sequence parallelism: each rank has seen some of the tokens, so a parameter that is not
    cut (`partial` says so) has some of its gradient. Call once a step, with all of them, rather
    than in each backward: one message for l blocks and m microbatches. Without sequence parallelism
    only the parameters that the plan calls "partial" need it. Gradients that are None are skipped,
    and must be None on all ranks."""
    gradients = [g for g in gradients if g is not None]
    if gradients and group.size() > 1:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=group)  # payload: norms, row biases, wpe
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(summed.view_as(g))


# --- strategy -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a parameter was cut; it hangs on the parameter as `.cut`, and everyone who must relate
    the part to the whole (initialisation, gradient norm, checkpoints, tests) reads it there.

    shape: of the whole. dim: the one that is cut. sizes: sizes along it of the matrices fused in
    one (q, k, v), each of which is cut by itself. rank, size: of the tensor-parallel group."""

    shape: torch.Size
    dim: int
    sizes: tuple[int, ...]
    rank: int
    size: int

    def shard(self, full: Tensor) -> Tensor:
        """This rank's shard of the full tensor."""
        return torch.cat([full.narrow(self.dim, i, n) for _, i, n in self.slices()], self.dim)

    def slices(self) -> Iterator[tuple[int, int, int]]:
        """Of each fused matrix: where its part begins here, and in the whole, and how long it is.
        Chunks as torch.chunk's: as long as the first, but for the last."""
        here = there = 0
        for n in self.sizes:
            start, stop = self.bounds(n)
            yield here, there + start, stop - start
            here, there = here + stop - start, there + n

    def bounds(self, n: int) -> tuple[int, int]:
        chunk = -(-n // self.size)
        return min(n, self.rank * chunk), min(n, (self.rank + 1) * chunk)


def shard_parameter(p: nn.Parameter, dim: int, parts: int | tuple[int, ...], group) -> nn.Parameter:
    """A new parameter with this rank's part of p. `parts`: how many equal matrices are fused along
    dim, or their sizes (query, key and value of grouped-query attention differ)."""
    if isinstance(parts, int):
        parts = (p.size(dim) // parts,) * parts
    if sum(parts) != p.size(dim):
        raise ValueError(
            f"the plan's parts {parts} add up to {sum(parts)}, and the matrix has {p.size(dim)} "
            f"{('rows', 'columns')[dim]}: correct the parts in the plan"
        )
    sharding = Sharding(p.shape, dim, parts, group.rank(), group.size())
    new = nn.Parameter(sharding.shard(p.detach()), requires_grad=p.requires_grad)
    new.__dict__.update(p.__dict__, sharding=sharding)
    return new


# pipeline.defer_weight_gradients splits the backward of these layers: a weight gradient is then
# computed later than the input gradient. It replaces multiply(x, bias) on the instance. A layer
# whose input is communicated also has gather_input(x), applied before the matmul, and
# reduce_input_gradient(d_x), applied to the input gradient of the matmul.


class ColumnParallelLinear(nn.Module):
    """x [b, s, in] -> this rank's columns [b, s, out/t]. Matrices that read the same x are best
    fused into one, with `parts`: one f, so one all-reduce in backward and not one for each. It
    splits columns and does not know which of them form a head: a model must check that itself."""

    def __init__(self, linear: nn.Linear, parts: int | tuple[int, ...], group, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = shard_parameter(linear.weight, 0, parts, group)  # [out/t, in]
        bias = linear.bias
        self.bias = None if bias is None else shard_parameter(bias, 0, parts, group)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.group.size() == 1:
            return F.linear(x, self.weight, bias)  # torch's, which is quicker to dispatch
        return ColumnLinear.apply(x, self.weight, bias, self.group, self.sequence)

    def gather_input(self, x: Tensor) -> Tensor:
        """f in forward: x [b, s, in], or [b, s/t, in] if `sequence` -> [b, s, in]."""
        return start_gather(x, self.group)() if self.sequence else x

    def reduce_input_gradient(self, d_x: Tensor) -> Tensor:
        """f in backward: d_x [b, s, in], a partial sum that may be overwritten -> the sum, or if
        `sequence` this rank's shard of it, [b, s/t, in]."""
        return (start_scatter if self.sequence else start_sum)(d_x, self.group)()


class RowParallelLinear(nn.Module):
    """This rank's columns [b, s, in/t] -> y [b, s, out], the same on every rank, or a shard."""

    def __init__(self, linear: nn.Linear, parts: int | tuple[int, ...], group, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = shard_parameter(linear.weight, 1, parts, group)  # [out, in/t]
        self.bias = linear.bias  # whole, and added once: after the sum

    def forward(self, x: Tensor) -> Tensor:
        if self.group.size() == 1:
            return self.multiply(x, self.bias)
        y = SumOverGroup.apply(self.multiply(x, None), self.group, self.sequence)
        return y if self.bias is None else y.add_(self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


class VocabParallelEmbedding(nn.Module):
    """tokens [b, s] -> [b, s, h] or a shard: each rank looks up the tokens it has rows of, 0 for
    others."""

    def __init__(self, embedding: nn.Embedding, parts: int, group, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence
        self.weight = shard_parameter(embedding.weight, 0, 1, group)  # [v/t, h]
        self.v = embedding.num_embeddings
        self.start, _ = self.weight.sharding.bounds(self.v)

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        outside = (local < 0) | (local >= self.weight.size(0))
        known = (tokens >= 0) & (tokens < self.v)  # the others stay as they are: F.embedding raises
        x = F.embedding(local.masked_fill(outside & known, 0), self.weight)
        x = x.masked_fill(outside.unsqueeze(-1), 0.0)
        return SumOverGroup.apply(x, self.group, self.sequence)


class PositionShard(nn.Module):
    """x [b, s/t, h] -> x + the positions of my shard of the sequence. The table is whole."""

    def __init__(self, embedding: nn.Embedding, parts: int, group, sequence: bool):
        super().__init__()
        self.rank = group.rank() if sequence else 0
        self.weight = embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        start = self.rank * x.size(1)
        return x + self.weight[start : start + x.size(1)]


def shard_heads(dropout: nn.Module, parts: int, group, sequence: bool) -> nn.Module:
    """A mask on [b, a/t, s, s]: gpt.Dropout draws [a, s, s] a row and takes this part."""
    dropout.shard, dropout.shards = group.rank(), group.size()
    return dropout


def shard_tokens(dropout: nn.Module, parts: int, group, sequence: bool) -> nn.Module:
    """A mask on [b, s/t, h]; on [b, s, h], without `sequence`, the same on every rank."""
    return shard_heads(dropout, parts, group, sequence) if sequence else dropout


def mark_partial(module: nn.Module, parts: int, group, sequence: bool) -> nn.Module:
    """For a module between a column- and a row-parallel layer, e.g. a norm per head (Qwen3). It
    sees this rank's heads only, so each rank computes a part of its gradient: call
    all_reduce_partial once per step. A norm over all heads (OLMo 2) needs an all-reduce of its sum
    of squares in forward too: write a style for it."""
    for p in module.parameters():
        p.partial = True
    return module


def leave(module: nn.Module, parts: int, group, sequence: bool) -> nn.Module:
    """For a module that is the same on every rank, e.g. a norm on the residual stream."""
    return module


STYLES = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "vocab": VocabParallelEmbedding,
    "position": PositionShard,
    "heads": shard_heads,
    "tokens": shard_tokens,
    "partial": mark_partial,
    "replicated": leave,
}

# How GPT-2 is cut. Another model needs another plan; see the Llama-like one in tests/test_forks.py.
GPT_PLAN = {
    "wte": "vocab",
    "wpe": "position",
    "drop": "tokens",
    "h.*.drop_?": "tokens",
    "h.*.attn.core.drop": "heads",
    "h.*.attn.c_attn": ("column", 3),  # q, k and v: whole heads to each rank, if t divides a
    "h.*.attn.c_proj": "row",
    "h.*.mlp.c_fc": "column",
    "h.*.mlp.c_proj": "row",
    "lm_head": "column",  # the logits stay cut: see VocabParallelCrossEntropy
}


def parallelize(
    model: nn.Module, plan: dict, group: dist.ProcessGroup, sequence: bool = False
) -> nn.Module:
    """Replace each module whose name matches a pattern of `plan` (style, or (style, parts); the
    first that matches) by its parallel kind, in place. Works on the meta device too. A tied weight
    stays tied. Attention must read its number of heads and its length off what a column returned.
    `sequence`: everything between the parallel modules sees a shard of the sequence, [b, s/t, h];
    parameters that are whole are marked `partial`, see all_reduce_partial; a style may mark more.
    Sum the gradient norm over the ranks, as train_3d.py does: clip_grad_norm_ would scale by a
    different factor on each rank, and replicas would drift apart. Raises ValueError for an unknown
    style, a pattern that matches nothing (a misspelt one would leave its matrices whole, and slow),
    a matrix that leaves a rank without a row, and what the checks below find."""
    tied: dict[int, tuple[str, nn.Parameter]] = {}  # id of a full weight -> (owner, its shard)
    styled: set[nn.Parameter] = set()
    modules = list(model.named_modules())
    check_same_values(model, group)
    for pattern in plan:
        if not any(fnmatch(name, pattern) for name, _ in modules):
            raise ValueError(f"{pattern}: the plan names a module that the model does not have")
    for name, module in modules:
        pattern = next((pattern for pattern in plan if fnmatch(name, pattern)), None)
        style = plan.get(pattern)
        style, parts = (style, 1) if style is None or isinstance(style, str) else style
        if isinstance(module, nn.Identity):
            continue
        check_module(name, module, style, sequence)
        if style is None:
            continue
        if style not in STYLES:
            raise ValueError(f"{pattern}: style {style!r} is none of {', '.join(STYLES)}")
        new = STYLES[style](module, parts, group, sequence)
        if hasattr(new, "weight") and new is not module:
            sharding = getattr(new.weight, "sharding", None)
            for n in sharding.sizes if sharding else ():
                check_width(name, n, group.size())
            first, weight = tied.setdefault(id(module.weight), (name, new.weight))
            if getattr(weight, "sharding", None) != sharding:
                raise ValueError(
                    f"{name}.weight is tied to {first}.weight, whose style shards it differently: "
                    "give both the same style, or untie them"
                )
            new.weight = weight
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
        styled.update(new.parameters())
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in tied and tied[id(p)][1] is not p:
            raise ValueError(
                f"{name} is tied to {tied[id(p)][0]}.weight, which the plan shards: give both a "
                "style that shards or untie them"
            )
    check_between(model, styled)
    for name, p in model.named_parameters():
        if getattr(p, "partial", False) and hasattr(p, "sharding"):
            raise ValueError(f"{name} is sharded, so it cannot be 'partial': drop that style")
        p.partial = getattr(p, "partial", False) or (sequence and not hasattr(p, "sharding"))
        p.partial = p.partial and group.size() > 1  # with one rank it is complete
    return model


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over valid tokens, from logits that no rank has whole. Only numbers of
    size [b, s] travel: the maximum, then the sum of exponentials and the target's own logit."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, start: int, v: int, group) -> Tensor:
        highest = logits.amax(dim=-1)  # [b, s]
        if group.size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)  # payload: b s
        shifted = logits - highest.unsqueeze(-1)  # [b, s, v/t]
        local = targets - start
        outside = (local < 0) | (local >= logits.size(-1))  # on another rank, or ignored
        local = local.masked_fill(outside & (targets < v), 0).unsqueeze(-1)  # >= v: gather raises
        at_target = shifted.gather(-1, local).squeeze(-1).masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), at_target])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)  # payload: 2 b s
        valid = targets >= 0
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, outside, valid)
        return ((sums[0].log() - sums[1]) * valid).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, outside, valid = ctx.saved_tensors
        one = (~outside).to(probabilities.dtype).unsqueeze(-1)
        d_logits = probabilities.scatter_add(-1, local, -one)  # p - 1 at the target, else p
        return d_logits.mul_(valid.unsqueeze(-1) * grad), None, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, head: nn.Module, group: dist.ProcessGroup
) -> Tensor:
    """logits [b, s, v/t] of a column-parallel head, targets [b, s] in 0..v-1 or < 0 (ignored) ->
    scalar, the same on every rank: gpt.cross_entropy of the whole logits, so at least in fp32."""
    sharding = head.weight.sharding
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if group.size() == 1:  # torch's, which reads and writes the logits less often
        flat = targets.flatten().clamp(min=-1)  # a copy: autograd keeps it
        return F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1, reduction="sum")
    v = sharding.shape[0]
    start, _ = sharding.bounds(v)
    return VocabParallelCrossEntropy.apply(logits, targets, start, v, group)


# --- checks ---------------------------------------------------------------------------------------
# Mistakes that would otherwise train the wrong thing silently.


def check_same_values(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Raises ValueError, on every rank, if a parameter differs between the ranks: replicas would
    stay different. Meta parameters are skipped."""
    mine = [(name, p.shape, p.detach().flatten().view(torch.uint8).sum().item())
            for name, p in model.named_parameters() if not p.is_meta]  # fmt: skip
    everyone = [mine] * group.size()
    if mine and group.size() > 1:
        dist.all_gather_object(everyone, mine, group=group)
    for on_each_rank in itertools.zip_longest(*everyone, fillvalue=("a missing parameter",)):
        if len(set(on_each_rank)) > 1:
            raise ValueError(f"{on_each_rank[0][0]} differs between the ranks: set one seed on all "
                             "of them before building the model, or load one file")  # fmt: skip


def check_module(name: str, module: nn.Module, style: str | None, sequence: bool) -> None:
    """Raises ValueError if the module does not fit its style (None: the plan does not name it).
    Dropout in a function call (scaled_dot_product_attention's) is not seen."""
    draws = isinstance(module, nn.Dropout) and style != "replicated" or style in ("heads", "tokens")
    safe = hasattr(module, "shards") or getattr(module, "p", None) == 0  # shards: as gpt.Dropout's
    if draws and not safe:
        raise ValueError(
            f"{name}: {module} draws its mask from the generator of this rank, so replicas would "
            "get different masks: set p to 0, or use a dropout that draws by row and site "
            "(gpt.Dropout). If the generators of all ranks are in one state, name it 'replicated'"
        )
    kind = {"column": nn.Linear, "row": nn.Linear, "vocab": nn.Embedding}.get(style)
    options = dict(padding_idx=None, max_norm=None, scale_grad_by_freq=False, sparse=False)
    if kind and (
        getattr(module.forward, "__func__", None) is not kind.forward
        or {n for n, _ in module.named_parameters()} - {"weight", "bias"}
        or any(getattr(module, option, off) is not off for option, off in options.items())
    ):
        raise ValueError(
            f"{name}: style {style!r} replaces a plain nn.{kind.__name__}, and this "
            f"{type(module).__name__} is not one: name the plain layer inside it, drop its options "
            "(padding_idx, ...), or add a style to STYLES"
        )
    if style is None and sequence and isinstance(module, nn.Embedding):
        raise ValueError(f"{name}: sequence parallelism needs a style that gives each rank a shard "
                         "of the sequence: 'vocab', 'position', or one of yours")  # fmt: skip


def check_between(model: nn.Module, styled: set[nn.Parameter]) -> None:
    """Raises ValueError for a trainable parameter that the plan does not name, in a module with one
    child whose parallel layers are all column-parallel and another whose are all row-parallel. It
    may lie between them, where its gradient is partial."""
    both = {ColumnParallelLinear, RowParallelLinear}
    for path, module in model.named_modules():
        kinds = {n: both & set(map(type, child.modules())) for n, child in module.named_children()}
        if not all({kind} in kinds.values() for kind in both):
            continue
        for name, p in module.named_parameters():
            decided = p in styled or hasattr(p, "partial") or kinds.get(name.split(".")[0]) == both
            if p.requires_grad and not decided:
                raise ValueError(
                    f"{f'{path}.{name}'.lstrip('.')} has a column- and a row-parallel layer as "
                    "siblings. If it lies between them, each rank has a part of its gradient: name "
                    "its module 'partial' in the plan. If it reads the residual stream, name it "
                    "'replicated'. (If it is a bare nn.Parameter, set its .partial instead.)"
                )


def check_width(name: str, n: int, t: int) -> None:
    """Raises ValueError if n rows or columns, cut into chunks, leave one of t ranks with none."""
    if -(-n // t) * (t - 1) >= n:
        raise ValueError(
            f"{name}: {n} rows or columns in chunks of {-(-n // t)} leave one of t = {t} ranks "
            "with none: lower --tp or widen the model"
        )


# --- cost -----------------------------------------------------------------------------------------


def predicted_collectives(
    n_layer: int, b: int, s: int, h: int, m: int = 1, sequence: bool = False,
    first: bool = True, last: bool = True,
) -> dict[tuple[str, str], tuple[int, int]]:  # fmt: skip
    """(phase, operation) -> (calls, payload in elements) per rank and step, of a stage with
    `n_layer` blocks; `first` holds the embedding, `last` the head and the loss. Without the one
    all_reduce_partial of a step. Megatron-LM, section 3, and Korthikanti et al., section 4.2.2."""
    f, g = 2 * n_layer + last, 2 * n_layer + first  # of each, in a forward
    loss = (2 * m * last, 3 * m * b * s * last)
    if sequence:
        calls = {("forward", "all_gather"): f, ("forward", "reduce_scatter"): g,
                 ("backward", "all_gather"): f + g, ("backward", "reduce_scatter"): f}  # fmt: skip
    else:
        calls = {("forward", "all_reduce"): g, ("backward", "all_reduce"): f}
    costs = {key: (m * n, m * n * b * s * h) for key, n in calls.items()}
    calls, payload = costs.get(("forward", "all_reduce"), (0, 0))
    return costs | {("forward", "all_reduce"): (calls + loss[0], payload + loss[1])}


def predicted_wire_bytes(
    n_layer: int, b: int, s: int, h: int, t: int, itemsize: int, m: int = 1, sequence: bool = False
) -> float:
    """Bytes that a ring sends per rank and step: 2 (t-1)/t of an all-reduce's payload, (t-1)/t of
    the others'. In a block of the plain kind 8 (t-1)/t b s h; with sequence parallelism two
    all-gathers more, of the inputs that were not kept."""
    costs = predicted_collectives(n_layer, b, s, h, m, sequence)
    payload = sum(n * (1 + (op == "all_reduce")) for (_, op), (_, n) in costs.items())
    return (t - 1) / t * payload * itemsize


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, steps = gpt.GPTConfig(2, 12, 48, 257, 36), 3  # a vocabulary that no t divides
    b, s, h = 4, config.seq_len, config.n_embd
    with measure.Report("tensor_parallel.py") as report:
        group = report.group
        tokens = data.example()

        def train(parallel: bool, sequence: bool = False):
            """Every rank reads the same rows; they differ in what they hold of each matrix."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            if parallel:
                parallelize(model, GPT_PLAN, group, sequence)
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
            for step in range(steps):
                optimizer.zero_grad()
                x, y = data.batch(tokens, step, range(b), s, seed=0)
                logits = model(x)
                if parallel:
                    loss = vocab_parallel_cross_entropy(logits, y, model.lm_head, group) / (b * s)
                else:
                    loss = gpt.cross_entropy(logits, y) / (b * s)
                loss.backward()
                if sequence:
                    all_reduce_partial([p.grad for p in model.parameters() if p.partial], group)
                losses.append(loss.detach())
                optimizer.step()
            return losses, dict(gpt.named_parameters(model))

        losses, whole = train(parallel=False)
        for what, sequence in (("TP", False), ("TP+SP", True)):
            with measure.Collectives({"tp": group}) as seen:
                mine, parts = train(True, sequence)
            report.losses(f"{what}, t={group.size()}", mine, losses)
            of_mine = {n: p.sharding.shard if hasattr(p, "sharding") else (lambda w: w)
                       for n, p in parts.items()}  # fmt: skip
            gradients = {n: shard(whole[n].grad) for n, shard in of_mine.items()}
            report.close(f"{what} max |d gradient|", {n: p.grad for n, p in parts.items()},
                        gradients)  # fmt: skip
            report.close(f"{what} max |d parameter|", parts,
                        {n: shard(whole[n]) for n, shard in of_mine.items()})  # fmt: skip
            costs = predicted_collectives(config.n_layer, b, s, h, steps, sequence)
            if sequence:  # once a step
                calls, payload = costs["forward", "all_reduce"]
                partial = sum(p.numel() for p in parts.values() if p.partial)
                costs["forward", "all_reduce"] = calls + steps, payload + steps * partial
            for (phase, operation), predicted in costs.items():
                measured = tuple(seen.total("tp", operation, phase))
                report.equal(f"{what} {phase} {operation}", predicted, measured)
            hidden = tuple(seen.total("tp", phase="backward", hidden=True))
            behind = costs["backward", "reduce_scatter" if sequence else "all_reduce"]
            if sequence:  # and the gathers of what f did not keep
                behind = (2 * behind[0], 2 * behind[1])
            report.equal(f"{what} behind a matmul in backward", behind, hidden)


if __name__ == "__main__":
    main()
