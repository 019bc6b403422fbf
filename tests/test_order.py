"""Each rank has one queue for the calls of all its groups: all queues must run to completion."""

import functools
import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddp
import gpt
import options
import train_3d
from tools.plan import dry_run
from tools.plan.dry_run import Event, deadlock
from tools.verify.oracle import Case

SMALL = dict(n_layer=4, n_head=4, n_embd=16, vocab_size=19, seq_len=8, b=1, attention="explicit",
             dtype="float32")  # fmt: skip
LAYOUTS = [
    Case(t=2, p=2, d=2, **SMALL),
    Case(t=2, p=2, d=2, zero=3, sequence=True, schedule="zb-v", m=3, **SMALL),
    Case(p=2, d=2, schedule="interleaved", m=3, **SMALL),
    Case(p=4, d=2, zero=1, m=5, recompute="full", **SMALL),
    Case(p=2, d=4, zero=2, shard_size=2, **SMALL),
    Case(p=2, d=4, nodes=2, **SMALL),
    Case(t=2, d=4, zero=3, shard_size=2, reshard=0, **SMALL),
    Case(t=2, p=4, sequence=True, schedule="zb-h1", m=4, **SMALL),
    Case(p=4, d=2, zero=3, schedule="zb-v", m=4, **SMALL | {"n_layer": 8}),
    Case(p=4, d=2, zero=2, schedule="interleaved", m=6, tied=False, **SMALL | {"n_layer": 8}),
    Case(t=2, c=2, p=2, zero=3, schedule="zb-v", m=3, **SMALL),
]


def queues(case: Case, step: int = 1, **seams) -> list[dry_run.Queue]:
    """Of all ranks, in a step. In step 0, DDP sends all buckets at the end."""
    flags = [f"--world-size={case.world_size}", *case.arguments()]
    args = dry_run.parser().parse_args(flags)
    config = options.check(args, case.world_size)
    if not case.zero:
        small = functools.partial(dry_run.Alone, bucket_bytes=case.bucket_bytes)
        seams = {"sync": small} | seams
    return [dry_run.dry_run(args, config, rank, step, **seams).queue
            for rank in range(case.world_size)]  # fmt: skip


@pytest.mark.parametrize("case", [
    *LAYOUTS[:3], *(pytest.param(case, marks=pytest.mark.slow) for case in LAYOUTS[3:])
], ids=str)  # fmt: skip
def test_the_queues_of_a_layout_run_to_completion(case):
    of_ranks = queues(case)
    assert deadlock(of_ranks) is None
    groups = {event.group for queue in of_ranks for events in queue for event in events}
    expected = {"tp": case.t > 1, "pp": case.p > 1, "world": True,
                "dp": case.d > 1, "inside": case.nodes > 1, "across": case.nodes > 1,
                "cp": case.c > 1, "replica": case.shard_size is not None}  # fmt: skip
    assert {name for name, used in expected.items() if used} <= groups
    assert len({len(queue) for queue in of_ranks}) <= case.p  # none is empty: all have as many


def without_a_block(config: gpt.GPTConfig, m: int) -> nn.Module:
    """From the second step on, a block of stage 1, which is on rank 1 of the pipeline, is not used
    on replica 1, and one of stage 2, on rank 0, not on replica 0."""
    model = gpt.GPT(config)
    block = model.h["1" if dist.get_rank() % 2 else "2"]
    plain, calls = block.forward, itertools.count()
    block.forward = lambda x: plain(x) if next(calls) < m else x * 1
    return model


def test_replicas_that_use_different_parameters_on_opposite_stages_deadlock(monkeypatch):
    """DDP's buckets have one order, so one that is not complete keeps back the others until the
    end. On rank 0 of the pipeline, replica 1 sends in backward and replica 0 at the end, and on
    rank 1 the reverse. If all buckets are sent at the end, the same step has no deadlock."""
    monkeypatch.setattr(ddp, "is_unused", lambda gradient: False)  # on meta it has no values
    case = Case(p=2, d=2, schedule="interleaved", m=2, tied=False, **SMALL)
    config = options.check(options.parser().parse_args(case.arguments()), 4)
    how = dict(step=1, model=functools.partial(without_a_block, config, case.m))
    small = functools.partial(dry_run.Alone, bucket_bytes=1)
    assert deadlock(queues(case, sync=functools.partial(small, overlap=False), **how)) is None
    said = deadlock(queues(case, sync=small, **how))
    assert said is not None and said.startswith("deadlock: rank "), said
    assert said.count("in all_reduce of") == 2 and said.count("in transfer of") == 2, said
    assert "over dp [0, 1]" in said and "over dp [2, 3]" in said, said


def collective(group: str, *members: int, operation: str = "all_reduce", payload: int = 8):
    return [Event(group, members, operation, payload, torch.float32)]


def transfer(src: int, dst: int, payload: int = 8) -> Event:
    return Event("pp", (src, dst), "transfer", payload, torch.float32)


@pytest.mark.parametrize("queues, said", [
    ([[collective("a", 0, 1), collective("b", 0, 1)]] * 2, None),
    ([[collective("a", 0, 1), collective("b", 0, 1)], [collective("b", 0, 1),
      collective("a", 0, 1)]],
     "deadlock: rank 0 waits for rank 1 in all_reduce of 8 over a [0, 1]; "
     "rank 1 waits for rank 0 in all_reduce of 8 over b [0, 1]"),
    ([[collective("a", 0, 1)], [collective("a", 0, 1, payload=9)]],
     "in a [0, 1] rank 0 calls all_reduce of 8 torch.float32, "
     "rank 1 calls all_reduce of 9 torch.float32"),
    ([[collective("a", 0, 1)], [collective("a", 0, 1, operation="all_gather")]],
     "in a [0, 1] rank 0 calls all_reduce of 8 torch.float32, "
     "rank 1 calls all_gather of 8 torch.float32"),
    ([[collective("a", 0, 1)], []],
     "deadlock: rank 0 waits for rank 1 in all_reduce of 8 over a [0, 1]; rank 1 has finished"),
    ([[[transfer(0, 1), transfer(1, 0)]], [[transfer(1, 0), transfer(0, 1)]]], None),
    ([[[transfer(0, 1)], [transfer(1, 0)]], [[transfer(1, 0)], [transfer(0, 1)]]],
     "deadlock: rank 0 waits for rank 1 in transfer of 8 over pp [0, 1]; "
     "rank 1 waits for rank 0 in transfer of 8 over pp [1, 0]"),
    ([[[transfer(0, 1, 4), transfer(0, 1, 8)]], [[transfer(0, 1, 8), transfer(0, 1, 4)]]],
     "in pp [0, 1] rank 0 calls transfer of 4 torch.float32, "
     "rank 1 calls transfer of 8 torch.float32"),
    ([[[transfer(0, 1), transfer(2, 0)]], [[transfer(0, 1)], collective("a", 1, 2)],
      [collective("a", 1, 2), [transfer(2, 0)]]], None),
    ([[[transfer(0, 1)]], [collective("a", 1, 2), [transfer(0, 1)]], [collective("b", 1, 2)]],
     "deadlock: rank 1 waits for rank 2 in all_reduce of 8 over a [1, 2]; "
     "rank 2 waits for rank 1 in all_reduce of 8 over b [1, 2]"),
])  # fmt: skip
def test_the_strictest_network(queues, said):
    assert deadlock(queues) == said


def test_a_dry_run_of_all_ranks_executes_their_queues(monkeypatch, capsys):
    flags = "--n-layer 2 --n-embd 8 --n-head 2 --global-batch-size 4 --micro-batch-size 1 --pp 2"
    command = ["x", "--world-size", "4", "--all-ranks", *flags.split()]
    monkeypatch.setattr(sys, "argv", command)
    dry_run.main()
    assert "every queue completes" in capsys.readouterr().out
    plain = train_3d.Trainer.step

    def step(trainer, number):
        if dist.get_rank() == 3:
            dist.all_reduce(torch.zeros(3, device="meta"), group=trainer.dp_group)
        return plain(trainer, number)

    monkeypatch.setattr(train_3d.Trainer, "step", step)
    with pytest.raises(SystemExit):
        dry_run.main()
    assert "in dp [2, 3] rank 2 calls all_reduce of 1 " in capsys.readouterr().out
