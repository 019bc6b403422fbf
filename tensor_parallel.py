"""Tensor parallelism: every matrix is cut over t ranks, so that two matmuls need one all-reduce.

        x ---f--->  [ W1a ]  --gelu-->  [ W2a ] ---+            rank 0: half of the columns of W1,
   [b,s,h]                                        (+) g --> y           the matching rows of W2
        x ---f--->  [ W1b ]  --gelu-->  [ W2b ] ---+            rank 1: the other halves
                   column       [b,s,4h/t]    row

Cut W1 by columns and each rank has some of the hidden units, whole: the nonlinearity needs no
other. Cut W2 by rows and each rank has a partial sum of y: one all-reduce (g) completes it. In
backward the roles swap: f, which did nothing forward, sums the gradient of x. Attention is the same
with heads for hidden units. The vocabulary is cut as well, and the logits are never gathered.

    per rank and step, l blocks, m microbatches         forward                backward
    all-reduces of [b,s,h]                              m (2 l + 1 embedding)  m (2 l + 1 head)
    all-reduces of the loss: [b,s] max, [2,b,s] sums    2 m                    none
    parameters, gradients, optimizer: 1/t of the matrices; norms, row biases and wpe whole
    activations: 1/t inside attention and MLP; the residual stream and norms whole

Everything waits for these all-reduces, so t stays inside one machine.

    torchrun --standalone --nproc-per-node 2 tensor_parallel.py

Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053), section 3.
"""

import dataclasses
from fnmatch import fnmatch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# Conjugates: what is the identity forward is a sum backward, and the other way round.
#
#     name            forward       backward      stands where
#     CopyToGroup     identity      all-reduce    f: one x enters t different matmuls
#     SumOverGroup    all-reduce    identity      g: t partial sums leave as one y


class CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # A copy: autograd may hand this very tensor to others too (the residual, say).
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)  # payload: b s h
        return grad, None


class SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)  # payload: b s h
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


# --- strategy -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter was cut; it hangs on the parameter as `.cut`, and everyone who must relate
    the part to the whole (initialisation, gradient norm, checkpoints, tests) reads it there.

    shape: of the whole. dim: the one that is cut. parts: sizes along it of the matrices fused in
    one (q, k, v), each of which is cut by itself. rank, size: of the tensor-parallel group."""

    shape: torch.Size
    dim: int
    parts: tuple[int, ...]
    rank: int
    size: int

    def __call__(self, whole: Tensor) -> Tensor:
        """This rank's part. Chunks as torch.chunk's: as long as the first, but for the last."""
        pieces = []
        for part in whole.split(self.parts, self.dim):
            start, stop = self.range(part.size(self.dim))
            pieces.append(part.narrow(self.dim, start, stop - start))
        return torch.cat(pieces, self.dim)

    def range(self, n: int) -> tuple[int, int]:
        chunk = -(-n // self.size)
        return min(n, self.rank * chunk), min(n, (self.rank + 1) * chunk)


def cut_parameter(p: nn.Parameter, dim: int, parts: int | tuple[int, ...], group) -> nn.Parameter:
    """A new parameter with this rank's part of p. `parts`: how many equal matrices are fused along
    dim, or their sizes (query, key and value of grouped-query attention differ)."""
    if isinstance(parts, int):
        parts = (p.size(dim) // parts,) * parts
    cut = Cut(p.shape, dim, parts, group.rank(), group.size())
    new = nn.Parameter(cut(p.detach()).clone(), requires_grad=p.requires_grad)
    new.__dict__.update(p.__dict__, cut=cut)
    return new


class ColumnParallelLinear(nn.Module):
    """x [b, s, in] -> this rank's columns [b, s, out/t]. Matrices that read the same x are best
    fused into one, with `parts`: one f, so one all-reduce in backward and not one for each."""

    def __init__(self, linear: nn.Linear, parts: int | tuple[int, ...], group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.weight = cut_parameter(linear.weight, 0, parts, group)  # [out/t, in]
        bias = linear.bias
        self.bias = None if bias is None else cut_parameter(bias, 0, parts, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(CopyToGroup.apply(x, self.group), self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """This rank's columns [b, s, in/t] -> y [b, s, out], the same on every rank."""

    def __init__(self, linear: nn.Linear, parts: int | tuple[int, ...], group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.weight = cut_parameter(linear.weight, 1, parts, group)  # [out, in/t]
        self.bias = linear.bias  # whole, and added once: after the sum

    def forward(self, x: Tensor) -> Tensor:
        y = SumOverGroup.apply(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """tokens [b, s] -> [b, s, h]: each rank looks up the tokens it has rows of, 0 for others."""

    def __init__(self, embedding: nn.Embedding, parts: int, group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.weight = cut_parameter(embedding.weight, 0, 1, group)  # [v/t, h]
        self.start, _ = self.weight.cut.range(embedding.num_embeddings)

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.start
        outside = (local < 0) | (local >= self.weight.size(0))
        x = F.embedding(local.masked_fill(outside, 0), self.weight)
        return SumOverGroup.apply(x.masked_fill(outside.unsqueeze(-1), 0.0), self.group)


STYLES = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "vocab": VocabParallelEmbedding,
}

# How GPT-2 is cut. Another model needs another plan; see the Llama-like one in tests/test_forks.py.
GPT_PLAN = {
    "wte": "vocab",
    "h.*.attn.c_attn": ("column", 3),  # q, k and v: whole heads to each rank, if t divides a
    "h.*.attn.c_proj": "row",
    "h.*.mlp.c_fc": "column",
    "h.*.mlp.c_proj": "row",
    "lm_head": "column",  # the logits stay cut: see VocabParallelCrossEntropy
}


def parallelize(model: nn.Module, plan: dict, group: dist.ProcessGroup) -> nn.Module:
    """Replace each module whose name matches a pattern of `plan` (style, or (style, parts)) by its
    parallel kind, in place. Works on the meta device too. A tied weight stays tied. Raises
    ValueError for an unknown style, a pattern that matches nothing (a misspelt one would leave its
    matrices whole, and slow), or a matrix with fewer rows than ranks."""
    tied: dict[int, nn.Parameter] = {}  # whole weight -> its part, for weights with two owners
    modules = list(model.named_modules())
    for pattern in plan:
        if not any(fnmatch(name, pattern) for name, _ in modules):
            raise ValueError(f"{pattern}: the plan names a module that the model does not have")
    for name, module in modules:
        for pattern, style in plan.items():
            if not fnmatch(name, pattern) or isinstance(module, nn.Identity):
                continue
            style, parts = (style, 1) if isinstance(style, str) else style
            if style not in STYLES:
                raise ValueError(f"{pattern}: style {style!r} is none of {', '.join(STYLES)}")
            new = STYLES[style](module, parts, group)
            for n in new.weight.cut.parts:
                check_width(name, n, group.size())
            new.weight = tied.setdefault(id(module.weight), new.weight)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
            break
    return model


def check_width(name: str, n: int, t: int) -> None:
    """Raises ValueError if n rows or columns, cut into chunks, leave one of t ranks with none."""
    if -(-n // t) * (t - 1) >= n:
        raise ValueError(
            f"{name}: {n} rows or columns in chunks of {-(-n // t)} leave one of t = {t} ranks "
            "with none: lower --tp or widen the model"
        )


class VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum of -log p(target) over valid tokens, from logits that no rank has whole. Only numbers of
    size [b, s] travel: the maximum, then the sum of exponentials and the target's own logit."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, start: int, group) -> Tensor:
        highest = logits.amax(dim=-1)  # [b, s]
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)  # payload: b s
        shifted = logits - highest.unsqueeze(-1)  # [b, s, v/t]
        local = targets - start
        outside = (local < 0) | (local >= logits.size(-1))  # of another rank, or ignored (-1)
        local = local.masked_fill(outside, 0).unsqueeze(-1)
        at_target = shifted.gather(-1, local).squeeze(-1).masked_fill(outside, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), at_target])
        dist.all_reduce(sums, group=group)  # payload: 2 b s
        valid = targets >= 0
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, outside, valid)
        return ((sums[0].log() - sums[1]) * valid).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, local, outside, valid = ctx.saved_tensors
        one = (~outside).to(probabilities.dtype).unsqueeze(-1)
        d_logits = probabilities.scatter_add(-1, local, -one)  # p - 1 at the target, else p
        return d_logits.mul_(valid.unsqueeze(-1) * grad), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, head: nn.Module, group: dist.ProcessGroup
) -> Tensor:
    """logits [b, s, v/t] of a column-parallel head, targets [b, s] in 0..v-1 or -1 (ignored) ->
    scalar, the same on every rank: gpt.cross_entropy of the whole logits, so at least in fp32."""
    cut, logits = head.weight.cut, logits.to(torch.promote_types(logits.dtype, torch.float32))
    return VocabParallelCrossEntropy.apply(logits, targets, cut.range(cut.shape[0])[0], group)


# --- cost -----------------------------------------------------------------------------------------


def predicted_all_reduces(
    n_layer: int, b: int, s: int, h: int, m: int = 1, first: bool = True, last: bool = True
) -> dict[str, tuple[int, int]]:
    """(calls, payload in elements) per rank and step, by phase, of a stage with `n_layer` blocks;
    `first` holds the embedding, `last` the head and the loss. Megatron-LM, section 3: 2 forward and
    2 backward in each block."""
    forward = (m * (2 * n_layer + first + 2 * last),
               m * ((2 * n_layer + first) * b * s * h + last * 3 * b * s))  # fmt: skip
    backward = (m * (2 * n_layer + last), m * (2 * n_layer + last) * b * s * h)
    return {"forward": forward, "backward": backward}


def predicted_wire_bytes(
    n_layer: int, b: int, s: int, h: int, t: int, itemsize: int, m: int = 1
) -> float:
    """Bytes that a ring sends per rank and step: 2 (t-1)/t of the payload."""
    payload = sum(p for _, p in predicted_all_reduces(n_layer, b, s, h, m).values())
    return 2 * (t - 1) / t * payload * itemsize


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, steps = gpt.GPTConfig(2, 12, 48, 257, 32), 3  # a vocabulary that no t divides
    b, s, h = 4, config.seq_len, config.n_embd
    with measure.Proof("tensor_parallel.py") as proof:
        group = proof.group
        tokens, _ = data.load(__file__, s)

        def train(parallel: bool):
            """Every rank reads the same rows; they differ in what they hold of each matrix."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            if parallel:
                parallelize(model, GPT_PLAN, group)
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
                losses.append(loss.detach())
                optimizer.step()
            return losses, dict(gpt.named_parameters(model))

        losses, whole = train(parallel=False)
        with measure.Collectives({"tp": group}) as seen:
            mine, parts = train(parallel=True)
        proof.losses(f"t={group.size()}", mine, losses)

        def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: p.cut(tensors[n]) if hasattr(p, "cut") else tensors[n]
                    for n, p in parts.items()}  # fmt: skip

        gradients = cut({n: p.grad for n, p in whole.items()})
        proof.close("max |d gradient|", {n: p.grad for n, p in parts.items()}, gradients)
        proof.close("max |d parameter|", parts, cut(whole))
        costs = predicted_all_reduces(config.n_layer, b, s, h, m=steps)
        for phase, predicted in costs.items():
            measured = tuple(seen.total("tp", "all_reduce", phase))
            proof.equal(f"{phase} all-reduces, elements", predicted, measured)


if __name__ == "__main__":
    main()
