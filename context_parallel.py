"""Context parallelism: the tokens of each row are sharded over c ranks, in all layers.

    chunks of a row      0   1   2   3   4   5          c = 3 ranks, 2 c chunks
    rank                 0   1   2   2   1   0          a zigzag

All layers except attention process each token separately, so a rank computes them for its tokens
only. In attention, a query needs the keys and values of all earlier tokens. Most of these are on
other ranks. There are three methods:

    gathered   Each rank all-gathers the keys and values of all tokens.
    ring       In c steps, a rank computes attention to the keys and values of one rank per step.
               Meanwhile it sends them to the next rank. For backward, it saves only its own.
    ulysses    All-to-alls turn the shard of the tokens into a shard of the query heads, with all
               tokens. Another one turns the result back. c must divide the number of these heads.

A late token attends to more keys than an early one. With s/c consecutive tokens per rank, the last
rank of the ring would compute 2 - 1/c times as many scores as the mean. So rank r holds chunks r
and 2 c - 1 - r of 2 c. Then all ranks compute equally many. The other methods are balanced with any
assignment of the tokens.

The c ranks hold equal weights. Each divides the summed loss of its tokens by the number of tokens
of the global batch, so gradients are summed over the c ranks. DDP and ZeRO in this repository do
this, with a group of all c d ranks. d is the number of data-parallel ranks.

Symbols: microbatch size b, sequence length s, query heads a, key/value heads a', head size n. KV:
elements of the keys and values of all tokens, 2 b a' n s. Q: those of the queries, b a n s.

    elements sent per rank, layer and microbatch
               forward                    backward
    gathered   (c-1)/c KV                 (c-1)/c KV
    ring       (c-1)/c KV                 (c-1)/c KV, and KV in fp32
    ulysses    (c-1)/c (2 Q + KV) / c     (c-1)/c (2 Q + KV) / c, if c divides a'

A rank stores 1/c of the activations of a single process. "gathered" also stores KV, and a mask of
s^2/c entries. The ring overlaps sending with attention. Attention takes a time proportional to
s^2/c, and sending one proportional to s. With long rows, attention therefore hides the sends,
except the last one of backward.

    torchrun --standalone --nproc-per-node 4 context_parallel.py

Ring: Liu et al. 2023 (arXiv 2310.01889). Gathered keys and values, two chunks per rank: Llama 3
(arXiv 2407.21783), section 3.3.2. Ulysses: Jacobs et al. 2023 (arXiv 2309.14509).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
METHODS = ("ring", "gathered", "ulysses")

# torch 2.13 renamed these two and warns about the old names. torch 2.11 has only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- version 1: the whole idea --------------------------------------------------------------------
# Gathered attention. The other layers need no change, except those whose result depends on the
# position of a token: a position embedding must use positions(s, c, [rank]).


def zigzag(c: int, rank: int) -> tuple[int, int]:
    """The chunks of each row that a rank holds, of 2 c chunks."""
    return rank, 2 * c - 1 - rank


def positions(s: int, c: int, ranks: Iterable[int], device=None) -> Tensor:
    """The positions of the tokens that these ranks hold, rank by rank."""
    if s % (2 * c):
        raise ValueError(f"{s} tokens are not divisible into 2 x {c} chunks: change one of them")
    chunks = torch.arange(s, device=device).chunk(2 * c)
    return torch.cat([chunks[i] for rank in ranks for i in zigzag(c, rank)])


class GatherSequence(torch.autograd.Function):
    """All-gathers the tokens: x [b, a', s/c, n] -> [b, a', s, n], in the order of the ranks. Every
    rank computes with the result, so the gradient of x is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, c = group, group.size()
        stacked = x.new_empty(c * x.size(0), *x.shape[1:])  # [c b, a', s/c, n]
        all_gather(stacked, x.contiguous(), group=group)  # payload: b a' s n
        return stacked.unflatten(0, (c, -1)).movedim(0, 2).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad: Tensor):
        c = ctx.group.size()
        stacked = grad.unflatten(2, (c, -1)).movedim(2, 0).flatten(0, 1).contiguous()
        shard = grad.new_empty(grad.size(0), *stacked.shape[1:])
        reduce_scatter(shard, stacked, group=ctx.group)  # payload: b a' s n
        return shard, None


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Causal attention. q [b, a, s/c, n] and k, v [b, a', s/c, n] hold the tokens of this rank's
    chunks. (ContextParallelCore does the same with the attention core of the model.)"""
    c, s = group.size(), group.size() * q.size(2)
    k, v = GatherSequence.apply(k, group), GatherSequence.apply(v, group)
    mine = positions(s, c, [group.rank()], q.device).unsqueeze(1)
    mask = positions(s, c, range(c), q.device) <= mine  # [s/c, s]
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


# --- the full version: ring attention -------------------------------------------------------------
# Version 1 stores the keys and values of all tokens, waits for them before it computes, and
# computes scores that the mask removes. Ring attention stores only 1/c of the keys and values,
# sends while it computes, and skips the blocks of scores that the mask would remove.
#
# A rank computes attention to the keys of one source rank at a time, and adds up the results. The
# softmax of such a result is normalized over the keys of this source only. The log-sum-exp (lse) of
# its scores tells how much weight it has in the total, see merge(). In backward, the softmax
# weights of one source's keys are exp(scores - lse), with the lse over all keys. So sources can be
# processed one by one again.


def visible(rank: int, source: int, length: int) -> tuple[slice, slice, bool]:
    """Which queries of `rank` attend to which keys of `source`: (queries, keys, whether attention
    is causal). If it is not, each of these queries attends to each of these keys. length: the
    number of tokens per rank, s/c. The first half of them is the earlier chunk."""
    early, late, both = slice(0, length // 2), slice(length // 2, length), slice(0, length)
    if source == rank:
        return both, both, True
    if source < rank:  # its early chunk is before both chunks of `rank`, its late chunk after both
        return both, early, False
    return late, both, False  # both of its chunks are between the chunks of `rank`


def exchange(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts to send x to the next rank of the ring. Returns a function that waits and returns the
    tensor of the previous rank."""
    received, rank, c = torch.empty_like(x), group.rank(), group.size()
    send = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % c)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % c)
    handles = dist.batch_isend_irecv([send, receive])  # payload: x

    # The default value keeps x alive until it is sent, even if the caller has dropped it.
    def wait(sent: Tensor = x) -> Tensor:
        for handle in handles:
            handle.wait()
        return received

    return wait


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges the attention over other keys, (other, other_lse), into (out [b, a, queries, n], lse
    [b, a, queries]), in place. Each is weighted by its fraction of the sum of exponentials over the
    keys of both."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp().unsqueeze(-1))
    out.add_(other * (other_lse - total).exp().unsqueeze(-1))
    lse.copy_(total)


class RingAttention(torch.autograd.Function):
    """q [b, a, s/c, n]; k, v [b, a', s/c, n] -> [b, a, s/c, n]. Results and gradients are summed
    over the sources in fp32, or in float64 if q is float64.

    fused: use PyTorch's flash attention. Otherwise scores are computed by separate matmuls.
    keep: the dropout mask divided by 1 - p, [b, a, s/c, s], with the keys in the order of the
        ranks. Requires fused=False.
    starts: the position of the first token of each query's document, [b, s/c]. Requires
        fused=False."""

    @staticmethod
    def forward(ctx, q, k, v, group, fused: bool, keep: Tensor | None, starts=None):
        rank, c, kv = group.rank(), group.size(), torch.stack([k, v])
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(q, dtype=wide)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
        for step in range(c):
            source = (rank - step) % c
            if step < c - 1:
                wait_kv = exchange(kv, group)  # payload: 2 b a' n s/c
            queries, keys, causal = visible(rank, source, q.size(2))
            masks = masks_of_block(keep, starts, source, queries, keys, c)
            result = attend(q[:, :, queries], *kv[:, :, :, keys], causal, fused, *masks)
            merge(out[:, :, queries], lse[:, :, queries], *result)
            if step < c - 1:
                kv = wait_kv()
        out = out.to(q.dtype)
        ctx.how = group, fused
        ctx.save_for_backward(q, k, v, out, lse, keep, starts)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse, keep, starts = ctx.saved_tensors
        group, fused = ctx.how
        rank, c, kv = group.rank(), group.size(), torch.stack([k, v])
        d_q, wait_d_kv = torch.zeros_like(q, dtype=lse.dtype), None
        for step in range(c):
            source = (rank - step) % c
            if step < c - 1:
                wait_kv = exchange(kv, group)  # payload: 2 b a' n s/c
            queries, keys, causal = visible(rank, source, q.size(2))
            masks = masks_of_block(keep, starts, source, queries, keys, c)
            rows = [x[:, :, queries] for x in (grad, q, out, lse)]
            gradients = attend_backward(*rows, *kv[:, :, :, keys], causal, fused, *masks)
            d_q[:, :, queries] += gradients[0]
            # The gradient of the source's keys and values. The previous rank had the same source
            # one step before, and sends the sum so far. After c steps, it is back at the source.
            d_kv = torch.zeros_like(kv, dtype=lse.dtype)
            d_kv[:, :, :, keys] = torch.stack(gradients[1:]).to(lse.dtype)
            if wait_d_kv:
                d_kv += wait_d_kv()
            if c > 1:
                wait_d_kv = exchange(d_kv, group)  # payload: 2 b a' n s/c, in fp32
            if step < c - 1:
                kv = wait_kv()
        if c > 1:
            d_kv = wait_d_kv()
        return d_q.to(q.dtype), *d_kv.to(k.dtype), None, None, None, None


def masks_of_block(keep, starts, source: int, queries: slice, keys: slice, c: int) -> tuple:
    """For these queries and these keys of the source: the slice of the dropout mask, and whether
    the key is in an earlier document than the query, [b, 1, queries, keys]."""
    if keep is not None:
        keep = keep[:, :, queries].chunk(c, 3)[source][..., keys]
    if starts is None:
        return keep, None
    position = positions(c * starts.size(1), c, [source], starts.device)[keys]
    return keep, (position < starts[:, queries, None]).unsqueeze(1)


def attend(q, k, v, causal: bool, fused: bool, keep, earlier) -> tuple[Tensor, Tensor]:
    """(attention of these queries to these keys, the lse of their scores)."""
    k, v = repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    if fused and q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    if fused:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    scores = scores_of(q, k, causal, earlier)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp_()
    weights = weights if keep is None else weights * keep
    return weights.to(v.dtype) @ v, lse


def attend_backward(grad, q, out, lse, k, v, causal, fused, keep, earlier) -> tuple[Tensor, ...]:
    """The gradients of q, k and v. out and lse are those over all keys, not only these keys."""
    heads, k, v = k.size(1), repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    if fused:
        args = grad.contiguous(), q, k, v, out.contiguous(), lse.contiguous()
    if fused and q.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        d_q, d_k, d_v = flash(*args, 0.0, causal)
    elif fused:
        state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of dropout, unused
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_backward(
            *args, None, None, q.size(2), k.size(2), 0.0, causal, state, state[:0]
        )
    else:
        weights = (scores_of(q, k, causal, earlier) - lse.unsqueeze(-1)).exp_()
        d_weights = (grad @ v.transpose(-2, -1)).to(lse.dtype)
        dropped = weights
        if keep is not None:
            d_weights, dropped = d_weights * keep, weights * keep
        d_v = dropped.to(grad.dtype).transpose(-2, -1) @ grad
        # Softmax: d_scores = weights * (d_weights - sum(weights * d_weights)). For each query, the
        # sum over all keys equals the dot product of the output and its gradient.
        delta = (grad * out).to(lse.dtype).sum(-1, keepdim=True)
        d_qk = (weights * (d_weights - delta) / math.sqrt(q.size(-1))).to(q.dtype)
        d_q, d_k = d_qk @ k, d_qk.transpose(-2, -1) @ q
    # Several query heads may share a key/value head: sum their gradients.
    return d_q, *(x.unflatten(1, (heads, -1)).sum(2) for x in (d_k, d_v))


def scores_of(q: Tensor, k: Tensor, causal: bool, earlier: Tensor | None) -> Tensor:
    """[b, a, queries, keys]. bf16 scores are rounded to bf16 by the matmul, then promoted."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) / math.sqrt(q.size(-1))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if earlier is not None:  # not -inf: the softmax of a query without any key here would be nan
        scores = scores.masked_fill(earlier, torch.finfo(wide).min)
    return scores


def repeat_heads(x: Tensor, a: int) -> Tensor:
    """[b, a', tokens, n] -> [b, a, tokens, n]: each head is repeated a / a' times."""
    return x if x.size(1) == a else x.repeat_interleave(a // x.size(1), dim=1)


# --- the full version: all-to-all over heads (Ulysses) --------------------------------------------
# Ulysses has all-to-alls of q, k and v before attention, and one of the result after it. They do
# not overlap with attention, but send less than the ring if c is large. Any attention kernel can be
# used. c is at most the number of query heads.


class AllToAll(torch.autograd.Function):
    """x [c, ...]: sends x[r] to rank r. Row r of the result was sent by rank r. The backward of an
    all-to-all is an all-to-all."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, received = group, torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)  # payload: x
        return received

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, ctx.group), None


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, group, core: Callable) -> Tensor:
    """core(q, k, v): causal attention of one process to all tokens, for 1/c of the heads. If c does
    not divide the number of key/value heads, they are repeated."""
    c, s = group.size(), group.size() * q.size(2)
    k, v = (repeat_heads(x, math.lcm(x.size(1), c)) for x in (k, v))
    if q.size(1) % c:
        raise ValueError(
            f"{q.size(1)} heads cannot be divided over {c} ranks: use the ring, or a number of "
            "ranks that divides the number of heads"
        )
    order = positions(s, c, range(c), q.device)
    by_position = order.argsort()

    def to_heads(x: Tensor) -> Tensor:  # [b, a, s/c, n] -> [b, a/c, s, n], sorted by position
        x = AllToAll.apply(x.unflatten(1, (c, -1)).movedim(1, 0), group)  # [c, b, a/c, s/c, n]
        return x.movedim(0, 2).flatten(2, 3)[:, :, by_position]

    def to_tokens(x: Tensor) -> Tensor:
        x = x[:, :, order].unflatten(2, (c, -1)).movedim(2, 0)  # [c, b, a/c, s/c, n]
        return AllToAll.apply(x, group).movedim(0, 1).flatten(1, 2)

    return to_tokens(core(to_heads(q), to_heads(k), to_heads(v)))


# --- attention of a model -------------------------------------------------------------------------


class ContextParallelCore(nn.Module):
    """Replaces a gpt.Core, the attention core of a model. A gpt.Subset says which chunks of a
    dimension a process holds: `held`, of `count`. `core` takes its causal mask from core.tokens,
    and its part of the dropout mask from core.tokens and core.heads. So all ranks together drop
    what one process drops."""

    def __init__(self, core: nn.Module, group: dist.ProcessGroup, method: str):
        super().__init__()
        self.core, self.group, self.method = core, group, method
        c, subset = group.size(), core.tokens
        # The tokens of the gathered keys: those of all ranks, in the order of the ranks.
        held = [chunk for rank in range(c) for chunk in zigzag(c, rank)]
        self.keys = dataclasses.replace(subset, held=tuple(held), count=2 * c)
        if method == "ulysses":
            core.tokens = dataclasses.replace(subset, held=(0,), count=1)  # all, in order
            core.heads = core.heads.chunk(group.rank(), c)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        core, group = self.core, self.group
        if self.method == "gathered":
            k, v = GatherSequence.apply(k, group), GatherSequence.apply(v, group)
            return core(q, k, v, self.keys)
        if self.method == "ulysses":
            return ulysses_attention(q, k, v, group, core)
        keep, starts = None, core.draws.starts
        if core.training and core.drop.p > 0:
            # With dropout, core.explicit is True: core does not use flash attention. Dropout of
            # ones gives the mask / (1 - p).
            ones = q.new_ones(*q.shape[:3], group.size() * k.size(2))
            keep = core.drop(ones, core.heads, core.tokens, self.keys)
        if starts is not None:
            starts = core.tokens.take(starts, 1)
        fused = not core.explicit and starts is None
        if q.device.type == "cuda":  # flash attention: 16 bits, head size a multiple of 8
            fused &= q.dtype.itemsize == 2 and q.size(-1) % 8 == 0
        return RingAttention.apply(q, k, v, group, fused, keep, starts)


def parallelize_attention(model: nn.Module, group: dist.ProcessGroup, method: str) -> None:
    """Replaces each submodule named `core`, the attention cores of the model. Before calling this,
    set the attribute `tokens` of all modules that have it to gpt.Subset(zigzag(c, rank), 2 * c).
    Raises ValueError if the model has no such submodule."""
    if group.size() == 1:
        return
    owners = [m for m in model.modules() if isinstance(getattr(m, "core", None), nn.Module)]
    if not owners:
        raise ValueError("--cp: the model has no submodule named core: see Attention in gpt.py")
    for owner in owners:
        owner.core = ContextParallelCore(owner.core, group, method)


# --- cost -----------------------------------------------------------------------------------------


def predicted_payload(
    method: str, b: int, s: int, a: int, kv_heads: int, n: int, c: int
) -> dict[tuple[str, str], tuple[int, int]]:
    """(phase, operation) -> (calls, payload in elements) per rank, for one attention layer and one
    microbatch. The payload of a send is the tensor that is sent. The payload of the others is the
    full tensor of an all-gather or a reduce-scatter, or the input of an all-to-all. A rank sends
    (c-1)/c of it. Before an all-to-all, the key/value heads are repeated until c divides them."""
    if method == "ulysses":
        kv_heads = math.lcm(kv_heads, c)
    kv, q = 2 * b * kv_heads * n * s, b * a * n * s
    if c == 1:
        return {}
    if method == "gathered":
        return {("forward", "all_gather"): (2, kv), ("backward", "reduce_scatter"): (2, kv)}
    if method == "ring":
        forward, backward = (c - 1, (c - 1) * kv // c), (2 * c - 1, (2 * c - 1) * kv // c)
        return {("forward", "send"): forward, ("backward", "send"): backward}
    return {(phase, "all_to_all"): (4, (kv + 2 * q) // c) for phase in ("forward", "backward")}


def imbalance(s: int, c: int, is_zigzag: bool = True) -> float:
    """The largest number of scores on any rank of the ring, divided by the mean. A query at
    position i attends to i + 1 keys."""
    shards = torch.arange(s).chunk(c)
    if is_zigzag:
        shards = [positions(s, c, [rank]) for rank in range(c)]
    scores = torch.stack([(shard + 1).sum() for shard in shards]).double()
    return (scores.max() / scores.mean()).item()


# --- demo -----------------------------------------------------------------------------------------


def train(group: dist.ProcessGroup, method: str, config, steps: int = 3):
    """Train a GPT with SGD in float64. All ranks of `group` use the same rows, and each its own
    tokens. Returns (losses, gradients of the last step, the collectives of attention)."""
    import data
    import gpt
    import measure

    c = group.size()
    model = gpt.build(config, seed=0, dtype=torch.float64)
    tokens = gpt.Subset(zigzag(c, group.rank()), 2 * c) if c > 1 else gpt.ALL
    for module in model.modules():
        if hasattr(module, "tokens"):  # its result depends on positions
            module.tokens = tokens
    parallelize_attention(model, group, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, seen = torch.zeros(steps, dtype=torch.float64), measure.Collectives({"cp": group})
    for step in range(steps):
        optimizer.zero_grad()
        x, y = data.batch(data.example(), step, range(4), config.seq_len, seed=0)
        with seen:
            loss = gpt.cross_entropy(model(tokens.take(x, 1)), tokens.take(y, 1)) / y.numel()
            loss.backward()
        for p in model.parameters():  # the DDP or ZeRO of this repository do this, too
            dist.all_reduce(p.grad, group=group)  # payload: p.numel()
        losses[step] = loss.detach()
        optimizer.step()
    dist.all_reduce(losses, group=group)
    return losses, {name: p.grad for name, p in model.named_parameters()}, seen


def main() -> None:
    """Compare each method with one process that has all tokens."""
    import gpt
    import measure

    with measure.Report("context_parallel.py", ranks=4) as report:
        c, (one_rank, _) = report.group.size(), dist.new_subgroups(1)
        n_head, s = 3 * c, 12 * c  # multiples of c and 2 c, for any number of ranks
        config = gpt.GPTConfig(2, n_head, n_embd=4 * n_head, vocab_size=257, seq_len=s)
        expected_losses, expected, _ = train(one_rank, "ring", config)
        for method in ("gathered", "ring", "ulysses"):
            losses, gradients, seen = train(report.group, method, config)
            report.losses(method, [*losses], [*expected_losses])
            report.close(f"{method} max |d gradient|", gradients, expected)
            costs = predicted_payload(method, b=4, s=s, a=n_head, kv_heads=n_head, n=4, c=c)
            for (phase, operation), predicted in costs.items():
                of_all = tuple(2 * len(losses) * x for x in predicted)  # 2 layers
                measured = tuple(seen.total("cp", operation, phase))
                report.equal(f"{method} {phase} {operation}", of_all, measured)
        report.equal("zigzag: most scores / mean", "1.00", f"{imbalance(s, c):.2f}")
        report.rows.append(f"  with consecutive tokens: {imbalance(s, c, False):.2f}")


if __name__ == "__main__":
    main()
