"""A parameter whose gradient is summed over a subgroup of the data-parallel ranks.

The model is a GPT with two experts in each block. An expert is one matrix, and each row of the
global batch uses one of them. Each data-parallel rank holds one expert. DDP or ZeRO sums its
gradient over the ranks that hold the same expert, and all other gradients over all ranks.
"""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ddp
import gpt
import tensor_parallel
import zero
import zero3
from tools.verify import oracle
from tools.verify.oracle import Case, judge, launch

EXPERTS, D = 2, 4  # experts, and the data-parallel ranks over which rows are assigned to them


class Experts(nn.Module):
    """x [b, s, h] -> x W_e, where e is the expert of the row. `split`: whether this rank holds one
    expert only. The ranks are a grid [p, D / EXPERTS, EXPERTS, t]."""

    def __init__(self, h: int, draws: gpt.Draws, rows: int, split: bool, groups: dict):
        super().__init__()
        self.draws, self.rows_per_rank = draws, rows // D
        full = nn.Parameter(torch.zeros(EXPERTS, h, h))
        self.weight, self.first = full, 0
        if split:
            self.weight = tensor_parallel.shard_parameter(full, 0, (1,), groups["experts"])
            how = tensor_parallel.distribution_of(self.weight)
            self.weight.distribution = dataclasses.replace(how, replicas=groups["replicas"])
            self.first = groups["experts"].rank()

    def forward(self, x: Tensor) -> Tensor:
        expert = [(row // self.rows_per_rank) % EXPERTS - self.first for row in self.draws.rows]
        return x @ self.weight[expert]


class Block(gpt.Block):
    def __init__(self, config: gpt.GPTConfig, *args):
        super().__init__(config)
        self.experts = Experts(config.n_embd, *args)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.experts(x)


def build(case: Case, split: bool) -> gpt.GPT:
    config = gpt.GPTConfig(
        case.n_layer, case.n_head, case.n_embd, case.vocab_size, case.seq_len,
        attention=case.attention, tied=case.tied, dropout=case.dropout,
    )  # fmt: skip
    groups = {}
    if split:
        shape = (case.p, D // EXPERTS, EXPERTS, case.t)
        mesh = dist.init_device_mesh(
            "cpu", shape, mesh_dim_names=("pp", "replicas", "experts", "tp")
        )
        groups = {name: mesh.get_group(name) for name in ("replicas", "experts")}
    model = gpt.GPT(config)
    for i in model.h:
        model.h[i] = Block(config, model.draws, case.d * case.m * case.b, split, groups)
    return model


PLAN = gpt.PLAN | {"h.*.experts": "replicated"}


def compared(case: Case, part: Case, seams: dict, first: int, end: int, folder: str):
    """As oracle.compared(), but the single process holds all experts, and so do the ranks of a part
    with d != D."""
    path = f"{folder}/expected"
    if first == 0 and dist.get_rank() == 0:
        torch.save(oracle.reference(case, functools.partial(build, case, False)), path)
    dist.barrier()
    seams = {"plan": PLAN, "model": functools.partial(build, part, part.d == D)}
    return oracle.layout(part, torch.load(path), seams, first, end, folder)


# Dropout is on: the experts find the rows of a microbatch in `draws`.
SIZES = dict(n_layer=2, n_head=2, n_embd=6, vocab_size=11, seq_len=4, m=2, b=1, dropout=0.1)


@pytest.mark.parametrize(
    "case",
    [
        Case(d=D, **SIZES),
        Case(d=D, zero=1, **SIZES, optimizer="sgd"),
        Case(d=D, zero=2, **SIZES),
        Case(d=D, zero=3, **SIZES, recompute="full"),
        Case(d=D, t=2, sequence=True, zero=1, **SIZES),
        Case(d=D, p=2, **SIZES),
        Case(d=D, p=2, zero=3, schedule="zb-h1", **SIZES),
        Case(d=D, zero=1, **SIZES, resume={"at": 2, "d": 2, "m": 4, "zero": 3}),
        Case(d=2, **SIZES | {"m": 4}, resume={"at": 1, "d": D, "m": 2, "zero": 3}),
        Case(d=D, **SIZES, resume={"at": 2, "t": 2, "zero": 1}),
        Case(d=D, zero=3, **SIZES, resume={"at": 1, "zero": 0}),
    ],
    ids=lambda case: " ".join(case.arguments()[:1]) if isinstance(case, Case) else None,
)
def test_experts_equal_one_process(case):
    errors = judge(case, on_rank=compared)
    assert errors.within("float64"), errors


def refused(kind: type, **how):
    group = dist.group.WORLD
    case = Case(d=D, **SIZES)
    model = build(case, split=True)
    pairs, _ = dist.new_subgroups(2)
    others, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    try:
        if kind is ddp.DDP:
            sync = ddp.DDP(model, group, reduce=ddp.Hierarchical(pairs, others))
            sync.finish()
        else:
            kind(model, pairs, replicas=others)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", [zero.Zero1, zero3.Zero3])
def test_hybrid_sharding_refuses_such_a_parameter(kind):
    for message in launch(D, refused, kind):
        assert "h.0.experts.weight has a gradient group of its own" in message


def test_hierarchical_refuses_such_a_parameter():
    for message in launch(D, refused, ddp.DDP):
        assert "all_reduce_bucket for other groups" in message


def clipped(kind: type):
    model = build(Case(d=D, **SIZES), split=True)
    sync = kind(model, dist.group.WORLD)
    sync.finish()
    try:
        sync.step(torch.optim.SGD([p.tensor for p in sync.pieces()], lr=0.1), clip=1.0)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1])
def test_the_norm_of_one_rank_is_refused(kind):
    for message in launch(D, clipped, kind):
        assert "h.0.experts.weight is distributed over several ranks" in message


def different_values():
    model = build(Case(d=D, **SIZES), split=True)
    for i, p in enumerate(model.parameters()):
        nn.init.constant_(p, i)
    with torch.no_grad():  # each expert has other values, which is not an error
        model.h["0"].experts.weight.fill_(10 + dist.get_rank() % EXPERTS)
    ddp.DDP(model, dist.group.WORLD)
    with torch.no_grad():  # two ranks with the same expert differ: an error
        model.h["0"].experts.weight.fill_(dist.get_rank())
    try:
        ddp.DDP(model, dist.group.WORLD)
    except ValueError as error:
        return str(error)


def test_values_are_compared_within_the_group():
    for message in launch(D, different_values):
        assert "h.0.experts.weight" in message and "on rank 0" in message and "rank 2" in message
