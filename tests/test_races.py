"""Late delivery: the output of each collective and transfer is NaN from its launch to wait()."""

import functools
import inspect
import re
import time

import pytest
import torch.distributed as dist

import context_parallel
import ddp
import measure
import pipeline
import zero
from tools.verify import races
from tools.verify.oracle import Case

SMALL = dict(n_layer=3, n_head=2, n_embd=4, vocab_size=5, seq_len=4, b=1, steps=2, dtype="float64")
CASES = {
    "DDP": Case(d=2, bucket_bytes=500, **SMALL),
    "ZeRO-1": Case(d=2, zero=1, **SMALL),
    "ZeRO-3": Case(d=2, zero=3, **SMALL),
    "zb-v": Case(p=2, schedule="zb-v", m=3, **SMALL | {"n_layer": 4}),
    "TP": Case(t=2, **SMALL),
    "TP+SP": Case(t=2, sequence=True, **SMALL),
    "ring": Case(c=3, attention="explicit", **SMALL | {"seq_len": 6}),
}


HANG = 30.0  # seconds, where a wait is missing


@pytest.mark.parametrize("name", CASES)
def test_no_layout_reads_an_output_or_frees_a_tensor_before_wait(name):
    errors = races.judge_late(CASES[name], timeout=HANG)
    assert errors.worst <= measure.TOLERANCE, errors


def rank_1_is_late():
    time.sleep(1e-3 * dist.get_rank())


@pytest.mark.parametrize("name", ["ZeRO-3", "zb-v"])
def test_outputs_filled_with_nan_ahead_of_the_launch(name):
    errors = races.judge_late(CASES[name], direct=True, delay=rank_1_is_late, timeout=HANG)
    assert errors.worst <= measure.TOLERANCE, errors


def broken(name: str, *seams) -> str:
    try:
        errors = races.judge_late(CASES[name], *seams, timeout=HANG)
    except RuntimeError as error:
        return str(error)
    return f"{errors}"


def test_a_storage_that_is_resized_before_wait_is_seen(monkeypatch):
    plain = zero.Unit.wait

    def free_then_wait(unit):
        if unit.gathering is not None:
            unit.parameters.untyped_storage().resize_(0)
        plain(unit)

    monkeypatch.setattr(zero.Unit, "wait", free_then_wait)
    said = broken("ZeRO-3")
    expected = r"of shape \(\d+,\) had .* = \(\d+, \d+\) at the launch and has \(\d+, 0\) at wait"
    assert re.search(expected, said), said


class Unused:
    """The handle of a bucket that finish() does not wait for."""

    def wait(self):
        pass


def reduce_without_a_wait(flat, group):
    dist.all_reduce(flat, group=group, async_op=True)
    return Unused()


def test_a_missing_wait_is_seen(monkeypatch):
    sync = functools.partial(ddp.DDP, reduce=reduce_without_a_wait)
    assert "handles were not waited for" in broken("DDP", {"sync": sync})


def test_a_wait_that_comes_after_the_read_is_seen(monkeypatch):
    plain = pipeline.Pipeline._take

    def read_then_wait(pipe, action):
        tensor, handle = pipe.inbox[action]
        early = tensor.clone()
        plain(pipe, action)
        return early

    monkeypatch.setattr(pipeline.Pipeline, "_take", read_then_wait)
    said = broken("zb-v")
    assert re.search("loss=(nan|inf)", said), said


def test_keys_that_are_used_before_they_are_received_are_seen(monkeypatch):
    plain = context_parallel.exchange

    def exchange(x, group):
        wait = plain(x, group)
        received = inspect.getclosurevars(wait).nonlocals["received"]
        return lambda: (received.clone(), wait())[0]

    monkeypatch.setattr(context_parallel, "exchange", exchange)
    said = broken("ring")
    assert re.search("loss=(nan|inf)", said), said


def test_an_input_that_is_written_to_before_wait_is_seen(monkeypatch):
    def reduce(flat, group):
        handle = ddp.all_reduce_bucket(flat, group)
        flat += 1  # NaN stays NaN
        return handle

    sync = functools.partial(ddp.DDP, reduce=reduce)
    assert "inputs were written to before wait()" in broken("DDP", {"sync": sync})
