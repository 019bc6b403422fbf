"""Layouts in bf16 against one process that does the same operations in the same order: bit by bit.

The one process holds the shards of all t ranks and uses torch's functions alone. A sum over t ranks
is a sum of t tensors in bf16. t is at most 2: two numbers have one sum. So is the number of ranks
in each sum over data parallel ranks. tests/test_zero.py tests these without the trainer.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gpt
import measure
import options
from tools.plan import dry_run
from tools.verify import oracle
from tools.verify.oracle import Case, launch

BF16 = torch.bfloat16


def is_whole(name: str) -> bool:
    """Whether tensor parallelism leaves this parameter uncut."""
    return any(part in name for part in ("ln_", "wpe", "c_proj.bias"))


def cut(name: str, whole: Tensor, rank: int, t: int) -> Tensor:
    """The shard of a rank: rows or columns of a matrix. q, k and v are split one by one."""
    if is_whole(name):
        return whole
    fused, dim = (3 if "c_attn" in name else 1), int("c_proj" in name)
    return torch.cat([part.chunk(t, dim)[rank] for part in whole.chunk(fused)], dim)


class OneProcess:
    """GPT from the shards of t ranks. held: the leaves, by rank and name. With sequence parallelism
    each rank has a leaf of each parameter that is not cut; without it they share one. The
    two ends of a pipeline have a leaf each of a tied matrix."""

    def __init__(self, case: Case, masters: list[dict[str, Tensor]]):
        self.case, self.t = case, case.t
        self.shards = case.t if case.sequence else 1  # of the sequence
        self.fused = case.t == 1  # matmul and bias of a row-parallel layer in one call
        self.held: list[dict[str, Tensor]] = []
        self.sums: dict[Tensor, Tensor] = {}  # the gradient of a leaf, summed over dp ranks
        for mine in masters:
            leaves = {name: self.leaf(master) for name, master in mine.items()}
            if self.held and not case.sequence:
                leaves |= {n: p for n, p in self.held[0].items() if is_whole(n)}
            if case.tied:
                wte = "wte.weight"
                leaves["lm_head.weight"] = leaves[wte] if case.p == 1 else self.leaf(mine[wte])
            self.held.append(leaves)

    def leaf(self, master: Tensor) -> Tensor:
        p = master.detach().to(BF16).requires_grad_()
        # Gradients are added over microbatches here; under ZeRO-2 and 3, after the sum over ranks.
        p.grad_dtype = grad_dtype(self.case) if self.case.zero < 2 else BF16
        return p

    def leaves(self) -> list[Tensor]:
        return list(dict.fromkeys(p for leaves in self.held for p in leaves.values()))

    def of(self, rank: int, name: str) -> list[Tensor]:
        return [self.held[rank].get(f"{name}.{kind}") for kind in ("weight", "bias")]

    def norm(self, name: str) -> Tensor:
        """Of each shard of the sequence; then the shards are gathered."""
        shape = (self.case.n_embd,)
        parts = [F.layer_norm(x, shape, *self.of(rank, name)) for rank, x in enumerate(self.x)]
        return torch.cat(parts, 1)

    def columns(self, name: str, x: Tensor) -> list[Tensor]:
        return [F.linear(x, *self.of(rank, name)) for rank in range(self.t)]

    def add_rows(self, name: str, inputs: list[Tensor]) -> None:
        """To the residual stream; the bias is added to the sum over ranks."""
        weights, biases = zip(*(self.of(rank, name) for rank in range(self.t)), strict=True)
        if self.fused:
            self.x = [self.x[0] + F.linear(*inputs, *weights, *biases)]
            return
        y = sum(F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True))
        added = [y + b for y, b in zip(y.chunk(self.shards, 1), biases, strict=False)]
        self.x = [x + y for x, y in zip(self.x, added, strict=True)]

    def embedding(self, tokens: Tensor) -> Tensor:
        total, start = 0, 0
        for leaves in self.held:
            table, local = leaves["wte.weight"], tokens - start
            outside, start = (local < 0) | (local >= len(table)), start + len(table)
            rows = F.embedding(local.masked_fill(outside, 0), table)
            total = total + rows.masked_fill(outside.unsqueeze(-1), 0.0)
        return total

    def logits(self, tokens: Tensor) -> list[Tensor]:
        """By rank: of its words."""
        s, head = tokens.size(1) // self.shards, self.case.n_embd // self.case.n_head
        parts = enumerate(self.embedding(tokens).chunk(self.shards, 1))
        self.x = [x + self.held[r]["wpe.weight"][r * s : (r + 1) * s] for r, x in parts]
        for i in range(self.case.n_layer):
            heads = []
            for qkv in self.columns(f"h.{i}.attn.c_attn", self.norm(f"h.{i}.ln_1")):
                q, k, v = (z.unflatten(-1, (-1, head)).transpose(1, 2) for z in qkv.chunk(3, -1))
                core = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                heads.append(core.transpose(1, 2).flatten(2))
            self.add_rows(f"h.{i}.attn.c_proj", heads)
            hidden = self.columns(f"h.{i}.mlp.c_fc", self.norm(f"h.{i}.ln_2"))
            self.add_rows(f"h.{i}.mlp.c_proj", [F.gelu(x, approximate="tanh") for x in hidden])
        return self.columns("lm_head", self.norm("ln_f"))

    def microbatch(self, tokens: Tensor, targets: Tensor, count: Tensor) -> Tensor:
        """Its share of the loss; its gradients are added to those of the leaves."""
        logits = self.logits(tokens)
        if self.t == 1:
            loss = gpt.cross_entropy(*logits, targets) / count
            loss.backward()
            return loss.detach()
        sizes, wide = [z.size(-1) for z in logits], torch.cat(logits, -1).detach().float()
        valid, words = targets >= 0, targets.clamp(min=0).unsqueeze(-1)
        shifted = wide - wide.amax(-1, keepdim=True)
        sums = sum(part.sum(-1) for part in shifted.exp().split(sizes, -1))
        losses = sums.log() - shifted.gather(-1, words).squeeze(-1)
        p = shifted.exp() / sums.unsqueeze(-1)
        d = p.scatter_add(-1, words, torch.full_like(words, -1.0, dtype=p.dtype))
        d *= (valid * (torch.ones(()) / count)).unsqueeze(-1)
        torch.autograd.backward(logits, [z.to(BF16) for z in d.split(sizes, -1)])
        return (losses * valid).sum() / count

    def gradients(self, name: str) -> list[Tensor]:
        """By rank, summed over the leaves of one parameter: in fp32."""
        by_rank = [self.sums[leaves[name]].float() for leaves in self.held]
        if is_whole(name) and self.case.sequence:
            by_rank = [sum(by_rank)] * self.t
        if name == "wte.weight" and self.case.tied and self.case.p > 1:
            ends = zip(by_rank, self.gradients("lm_head.weight"), strict=True)
            by_rank = [lookup + head for lookup, head in ends]
        return by_rank


def grad_dtype(case: Case) -> torch.dtype:
    return options.DTYPES[case.grad_dtype or "float32"]


def reduce_dtype(case: Case) -> torch.dtype:
    return options.DTYPES[case.reduce_dtype or "bf16"]


def sum_over_ranks(models: list[OneProcess]) -> None:
    """Sums the gradients of these dp ranks, and adds them to the first model's `sums`. Those of a
    host are summed first, if there are several hosts."""
    case, n = models[0].case, len(models) // models[0].case.nodes
    for leaves in zip(*(model.leaves() for model in models), strict=True):
        parts = [p.grad.to(reduce_dtype(case)) if case.d > 1 else p.grad for p in leaves]
        total = sum(sum(parts[i : i + n]) for i in range(0, len(parts), n))
        before = models[0].sums.get(leaves[0], 0.0)
        models[0].sums[leaves[0]] = (before + total.float()).to(grad_dtype(case))
        for p in leaves:
            p.grad = None


def sum_over_replicas(models: list[OneProcess]) -> None:
    """Sums the first model's `sums` with those of the others, which share no state with it."""
    for leaves in zip(*(model.leaves() for model in models), strict=True):
        parts = zip(models, leaves, strict=True)
        total = sum(model.sums[p].to(reduce_dtype(model.case)) for model, p in parts)
        models[0].sums[leaves[0]] = total.to(grad_dtype(models[0].case))


def emulate(case: Case) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """(losses, the fp32 parameters with the last gradients, by rank and name)."""
    args = options.parser().parse_args(case.arguments())
    with torch.device("meta"):
        whole = gpt.GPT(options.check(args, case.world_size))
    gpt.init_weights(whole, case.seed, BF16, "cpu", oracle.draw)
    named = {name: p.detach().float() for name, p in gpt.named_parameters(whole)}
    masters = [{name: cut(name, p, rank, case.t).clone().requires_grad_()
                for name, p in named.items()} for rank in range(case.t)]  # fmt: skip
    every = [p for mine in masters for p in mine.values()]
    groups = [{"params": [p for p in every if p.ndim >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = (
        torch.optim.SGD(groups, lr=0.0, fused=True)
        if case.optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=oracle.EPS, fused=True)
    )
    losses = []
    for step in range(case.steps):
        x, y = oracle.reader(case)(step, range(args.global_batch_size))
        models, count = [OneProcess(case, masters) for _ in range(case.d)], (y >= 0).sum()
        k = case.shard_size or case.d
        groups = [models[i : i + k] for i in range(0, case.d, k)]
        parts = list(zip(x.split(case.b), y.split(case.b), strict=True))
        by_rank = [0.0] * case.d
        for i in range(case.m):
            for rank, model in enumerate(models):
                by_rank[rank] += model.microbatch(*parts[rank * case.m + i], count)
            for group in groups if case.zero >= 2 or i + 1 == case.m else ():
                sum_over_ranks(group)
        if len(groups) > 1:
            sum_over_replicas([group[0] for group in groups])
        losses.append(sum(by_rank))
        for name in named:
            for mine, gradient in zip(masters, models[0].gradients(name), strict=True):
                mine[name].grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = gpt.learning_rate(step, args.steps, args.warmup_steps, args.lr)
        optimizer.step()
    return losses, masters


def differences(case: Case) -> tuple[list[str], list[str], dict]:
    """On each rank: (what differs from the emulation, the parameters that were compared, the
    dtypes in which gradients and parameters were sent, by (group, operation))."""
    losses, masters = emulate(case)
    trainer = oracle.trainer_of(case)
    expected, wrong = masters[trainer.tp_group.rank()], []
    with measure.Collectives(dry_run.groups_of(trainer)) as seen:
        for step, loss in enumerate(losses):
            # Four shares of a loss have several sums.
            if not torch.equal(trainer.step(step)[0], loss) and case.d <= 2:
                wrong.append(f"loss of step {step}")
        trainer.sync.gather()
    pieces = trainer.sync.pieces()
    for name, piece, p, at in pieces:
        gradient, value = (x.flatten()[at : at + piece.numel()].view_as(piece)
                           for x in (expected[name].grad, expected[name]))  # fmt: skip
        if not torch.equal(piece.grad, gradient):
            wrong.append(f"gradient of {name}")
        if not (torch.equal(piece, value) and torch.equal(p, expected[name].to(BF16))):
            wrong.append(name)
    sent: dict = {}
    for call in seen.calls:
        # Not the count of tokens, nor the loss and the norm.
        if call.dtype.is_floating_point and call.payload > 3:
            sent.setdefault((call.group, call.operation), set()).add(call.dtype)
    return wrong, [name for name, *_ in pieces], sent


@pytest.mark.parametrize(
    "layout",
    [
        {"t": 2}, {"t": 2, "sequence": True, "tied": False, "optimizer": "sgd"}, {"p": 2},
        {"p": 2, "schedule": "zb-v", "tied": False}, {"t": 2, "p": 2, "sequence": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_bf16_layout_is_bitwise_one_process_that_adds_in_the_same_order(layout):
    sizes = {"m": 3, "n_layer": 4, "n_head": 2, "n_embd": 16, "seq_len": 8, "vocab_size": 31}
    case = Case(dtype="bf16", clip=0.0, steps=2, **sizes, **layout)
    ranks = launch(case.world_size, differences, case)
    assert [wrong for wrong, *_ in ranks] == [[]] * case.world_size
    with torch.device("meta"):
        whole = gpt.GPT(gpt.GPTConfig(4, 2, 16, 31, 8, tied=case.tied))
    names = {name for name, _ in gpt.named_parameters(whole)}
    assert set().union(*(compared for _, compared, _ in ranks)) == names


def differences_by_dtypes(case: Case) -> dict:
    """By (grad_dtype, reduce_dtype): (what differs, the dtypes that were sent)."""
    found = {}
    for dtypes in itertools.product((None, "bf16"), (None, "float32")):
        fields = dict(zip(("grad_dtype", "reduce_dtype"), dtypes, strict=True))
        wrong, _, sent = differences(dataclasses.replace(case, **fields))
        found[dtypes] = wrong, sent
    return found


SUMS = {  # collectives that sum gradients
    "DDP": ({}, {("dp", "all_reduce")}),
    "DDP on 2 hosts": (
        {"d": 4, "nodes": 2},
        {("inside", "reduce_scatter"), ("across", "all_reduce"), ("inside", "all_gather")},
    ),
    **{f"ZeRO-{stage}": ({"zero": stage}, {("dp", "reduce_scatter")}) for stage in (1, 2, 3)},
    **{
        f"ZeRO-{stage}, hybrid": (
            {"d": 4, "zero": stage, "shard_size": 2},
            {("shard", "reduce_scatter"), ("replica", "all_reduce")},
        )
        for stage in (1, 2, 3)
    },
}


@pytest.mark.parametrize("layout, sums", SUMS.values(), ids=SUMS)
def test_gradients_are_summed_over_ranks_in_the_reduce_dtype(layout, sums):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "seq_len": 4, "vocab_size": 11, "b": 1}
    # SGD: fused AdamW rounds the last few entries of a piece in another way than the rest.
    case = Case(dtype="bf16", clip=0.0, steps=2, optimizer="sgd", **{"d": 2, **sizes, **layout})
    for found in launch(case.world_size, differences_by_dtypes, case):
        for (grad, reduce), (wrong, sent) in found.items():
            assert wrong == [], (grad, reduce)
            expected = {key: {options.DTYPES[reduce or "bf16"]} for key in sums}
            shard = "shard" if case.shard_size else "dp"  # one group, if nothing is replicated
            gathers = {(shard, "all_gather"): {BF16}} if case.zero else {}
            assert sent == expected | gathers, (grad, reduce)
