"""Bytes that rings send, counted: each collective is replaced by a ring over isend and irecv.

The strategy files predict them as a factor of the payload: 2 (n-1)/n for an all-reduce, (n-1)/n for
a reduce-scatter and an all-gather over n ranks.
"""

import collections

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ddp
import gpt
import tensor_parallel as tp
import zero
from tools.bench.links import WIRE
from tools.verify.oracle import launch

SENT: collections.Counter = collections.Counter()  # (from, to), ranks of the world -> bytes


def pass_on(out: Tensor, into: Tensor, group: dist.ProcessGroup) -> None:
    """`out` to the next rank of the ring, `into` from the previous one."""
    n, rank = group.size(), group.rank()
    work = dist.isend(out, group=group, group_dst=(rank + 1) % n)
    dist.irecv(into, group=group, group_src=(rank - 1) % n).wait()
    work.wait()
    to = dist.get_global_rank(group, (rank + 1) % n)
    SENT[dist.get_rank(), to] += out.numel() * out.element_size()


def sum_chunks(chunks: list[Tensor], group: dist.ProcessGroup, op=torch.add) -> None:
    """Afterwards the chunk of this rank's number is the sum over the group."""
    n, rank = group.size(), group.rank()
    for i in range(1, n):
        out, mine = (chunks[(rank - i - k) % n] for k in (0, 1))
        into = torch.empty_like(mine)
        pass_on(out.contiguous(), into, group)
        mine.copy_(op(mine, into))


def gather_chunks(chunks: list[Tensor], group: dist.ProcessGroup) -> None:
    """Before, the chunk of this rank's number is filled; afterwards all are."""
    n, rank = group.size(), group.rank()
    for i in range(n - 1):
        pass_on(chunks[(rank - i) % n], chunks[(rank - i - 1) % n], group)


class Done:
    def wait(self) -> None:
        pass


def ring_all_reduce(x: Tensor, op=dist.ReduceOp.SUM, group=None, async_op=False) -> Done:
    group, chunks = group or dist.group.WORLD, x.view(-1).tensor_split(group.size())
    sum_chunks(chunks, group, torch.add if op == dist.ReduceOp.SUM else torch.maximum)
    gather_chunks(chunks, group)
    return Done()


def ring_reduce_scatter(mine: Tensor, whole: Tensor, group=None, async_op=False) -> Done:
    chunks = whole.clone().chunk(group.size())
    sum_chunks(chunks, group)
    mine.copy_(chunks[group.rank()])
    return Done()


def ring_all_gather(whole: Tensor, mine: Tensor, group=None, async_op=False) -> Done:
    chunks = whole.chunk(group.size())
    chunks[group.rank()].copy_(mine)
    gather_chunks(chunks, group)
    return Done()


def use_rings() -> None:
    """In this process. dist.all_reduce is the one that ddp.py, tensor_parallel.py and zero.py
    call."""
    dist.all_reduce = ring_all_reduce
    for module in (ddp, tp, zero):
        module.reduce_scatter, module.all_gather = ring_reduce_scatter, ring_all_gather


def rings(numel: int) -> dict[str, int]:
    """Elements that this rank sent, by operation."""
    group, n, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x = (rank + 1.0) * torch.arange(numel, dtype=torch.float64)
    expected, sent = n * (n + 1) / 2 * torch.arange(numel, dtype=torch.float64), {}
    chunks = x.tensor_split(n)
    for operation, function in (("reduce_scatter", sum_chunks), ("all_gather", gather_chunks)):
        SENT.clear()
        function(chunks, group)
        sent[operation] = sum(SENT.values()) // 8
        if operation == "reduce_scatter":
            assert torch.equal(chunks[rank], expected.tensor_split(n)[rank])
    assert torch.equal(x, expected)
    SENT.clear()
    x = (rank + 1.0) * torch.arange(numel, dtype=torch.float64)
    ring_all_reduce(x, group=group)
    assert torch.equal(x, expected)
    return sent | {"all_reduce": sum(SENT.values()) // 8}


@pytest.mark.parametrize("n, numel", [(2, 60), (3, 60), (4, 60), (5, 60), (3, 61), (5, 63)])
def test_a_ring_sends_what_the_factors_say(n, numel):
    """On the average over the ranks, and on each rank if n divides the payload."""
    ranks = launch(n, rings, numel)
    for operation, sent in ranks[0].items():
        each = WIRE[operation](n) * numel
        assert sum(rank[operation] for rank in ranks) == pytest.approx(n * each, abs=1e-6)
        assert numel % n or sent == pytest.approx(each, abs=1e-6), operation


PSI, M = 144, 2  # parameters (2 x 3 x 8 divides both), microbatches


def step_of(kind: type, per_host: int | None = None) -> collections.Counter:
    """What this rank sends in a step. per_host: ranks of a host, for Hierarchical."""
    use_rings()
    group, how = dist.group.WORLD, {}
    if per_host:
        grid = torch.arange(group.size()).view(-1, per_host)
        inside, _ = dist.new_subgroups_by_enumeration(grid.tolist())
        across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())
        how["reduce"] = ddp.Hierarchical(inside, across)
    linears = (torch.nn.Linear(*sizes, bias=False) for sizes in ((6, 8), (8, 12)))
    net = torch.nn.Sequential(*linears).double()
    sync = kind(net, group, M, **how)
    for _ in range(M):
        net(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    sync.finish()
    sync.before_step()
    sync.after_step()
    sync.gather()
    return SENT


@pytest.mark.parametrize("d", [2, 3])
def test_zero_1_sends_as_much_as_ddp_and_zero_2_half_as_much_again(d):
    """ZeRO-2 has a reduce-scatter for each of two microbatches."""
    expected = ddp.predicted_wire_bytes(PSI, d, 8)
    for kind, factor in ((ddp.DDP, 1), (zero.Zero1, 1), (zero.Zero2, 1.5)):
        for sent in launch(d, step_of, kind):
            assert sum(sent.values()) == factor * expected, kind


@pytest.mark.parametrize("hosts, n", [(2, 2), (3, 2), (2, 3)])
def test_what_crosses_between_hosts(hosts, n):
    """n ranks a host, side by side in the ring."""
    for per_host, ring in ((None, hosts * n), (n, hosts)):
        expected = ddp.predicted_wire_bytes(PSI, ring, 8)
        sent = sum(launch(hosts * n, step_of, ddp.DDP, per_host), collections.Counter())
        left = collections.Counter()
        for (a, b), nbytes in sent.items():
            left[a // n] += nbytes * (a // n != b // n)
        assert left == dict.fromkeys(range(hosts), expected)


def step_of_blocks(n_layer: int, sequence: bool, keep: bool) -> int:
    """Bytes that this rank sends."""
    use_rings()
    group, x = dist.group.WORLD, torch.zeros(1, 12, dtype=torch.int64)
    model = gpt.build(gpt.GPTConfig(n_layer, 12, 24, 41, 12), dtype=torch.float64)
    tp.parallelize(model, gpt.PLAN, group, sequence, keep)
    tp.vocab_parallel_cross_entropy(model(x), x, model.lm_head, group).backward()
    return sum(SENT.values())


@pytest.mark.parametrize("t", [2, 3])
@pytest.mark.parametrize(
    "sequence, keep, factor", [(False, False, 8), (True, False, 10), (True, True, 8)]
)
def test_wire_of_a_block(sequence, keep, factor, t):
    """Korthikanti et al., section 4.2.2: the two halves send what an all-reduce sends; two gathers
    more are for the two inputs that a column-parallel layer keeps as shards."""
    one, two = (launch(t, step_of_blocks, n, sequence, keep) for n in (1, 2))
    for n, ranks in ((1, one), (2, two)):
        costs = tp.predicted_collectives(n, 1, 12, 24, sequence=sequence, keep_gathered=keep)
        elements = sum(WIRE[op](t) * payload for (_, op), (_, payload) in costs.items())
        assert ranks == [pytest.approx(8 * elements, abs=1e-6)] * t
    assert two[0] - one[0] == factor * (t - 1) / t * 12 * 24 * 8
