import json
import time

import pytest
import torch
import torch.distributed as dist

import measure
import zero
from tools.verify import counting
from tools.verify.oracle import launch


def every_operation():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    a, b = mesh["a"].get_group(), mesh["b"].get_group()
    x, two = torch.ones(6), torch.ones(12)
    p = torch.ones(5, requires_grad=True)
    p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, group=b))
    with measure.Collectives({"a": a, "b": b}) as seen:
        dist.all_reduce(x, group=a)
        zero.all_gather(two, x, group=a)
        zero.reduce_scatter(x, two, group=a)
        dist.broadcast(x, group=b, group_src=0)
        call = dist.isend if b.rank() == 0 else dist.irecv
        for work in dist.batch_isend_irecv([dist.P2POp(call, x, group=b, group_peer=1 - b.rank())]):
            work.wait()
        (p * 2).sum().backward()
    dist.all_reduce(x, group=a)  # not watched any more
    return [tuple(call)[:5] for call in seen.calls], b.rank()


def test_every_collective_is_seen_with_group_payload_and_phase():
    f = torch.float32
    for calls, rank in launch(4, every_operation):
        assert calls == [
            ("all_reduce", "a", 6, f, "forward"),
            ("all_gather", "a", 12, f, "forward"),
            ("reduce_scatter", "a", 12, f, "forward"),
            ("broadcast", "b", 6, f, "forward"),
            ("recv" if rank else "send", "b", 6, f, "forward"),
            ("all_reduce", "b", 5, f, "backward"),
        ]


def hidden_or_not():
    group, a = dist.group.WORLD, torch.ones(4, 4)
    x, y = torch.ones(3), torch.ones(3)
    with counting.Collectives({"dp": group}) as seen:
        first = dist.all_reduce(x, group=group, async_op=True)
        _ = a @ a
        second = dist.all_reduce(y, group=group, async_op=True)
        first.wait(), second.wait()
        x.add_(1), y.add_(1), a @ a  # y is read before anything is multiplied
        dist.all_reduce(x, group=group)  # not asynchronous: it has been waited for
        _ = a @ a
        x.add_(1)
        unread = dist.all_reduce(y, group=group, async_op=True)
        unread.wait()
    return [call.hidden for call in seen.calls], seen.total("dp", hidden=True)


def test_what_is_computed_between_a_call_and_the_use_of_its_result_hides_it():
    assert launch(2, hidden_or_not)[0] == ([True, False, False, False], (1, 3))


def test_bytes_held_counts_storages_once():
    flat = torch.zeros(10)
    assert counting.bytes_held([flat[:3], flat[3:], flat, torch.zeros(2, dtype=torch.int64)]) == 56


def test_saved_activations_count_storages_and_not_weights():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with measure.SavedActivations(net) as saved:
        y = net(x)
    assert saved.bytes() == 4 * (5 * 3 + 5 * 4)  # the first input; ReLU's output, for two layers
    del y
    assert saved.bytes() == 4 * 5 * 3 and saved.peak == 4 * (5 * 3 + 5 * 4)  # x is still referenced


def spans_on_one_clock(path: str):
    """Rank 1's clock is 5 s ahead, as another machine's may be."""
    rank, real = dist.get_rank(), time.perf_counter
    time.perf_counter = lambda: real() + 5 * rank
    trace = measure.Trace(torch.device("cpu"))
    dist.barrier()
    with trace.span("together", who=rank):
        dist.barrier()
    trace.write(path, f"the {rank}th")


def test_a_trace_puts_all_ranks_on_one_clock(tmp_path):
    path = tmp_path / "trace.json"
    launch(2, spans_on_one_clock, str(path))
    events = json.loads(path.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["rank 0: the 0th", "rank 1: the 1th"]
    a, b = spans = [e for e in events if e["ph"] == "X"]
    assert [e["pid"] for e in spans] == [0, 1] and a["name"] == b["name"] == "together"
    assert b["args"] == {"who": 1}
    assert min(a["ts"], b["ts"]) == 0 < b["dur"]
    assert max(a["ts"], b["ts"], abs(a["dur"] - b["dur"])) < 1e6


def test_relative_errors():
    expected = {"a": torch.tensor([4.0, -8.0]), "zero": torch.zeros(2), "b": torch.tensor([1e-3])}
    actual = {"a": torch.tensor([4.0, -6.0]), "zero": torch.tensor([0.0, 8e-12])}
    errors = measure.relative_errors(actual | {"b": expected["b"]}, expected)
    assert errors == pytest.approx({"a": 0.25, "zero": 1e-6, "b": 0.0})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_nan_and_inf_are_infinite_errors(wrong, place, side):
    """max() would skip a NaN that is not first."""
    good = {"a": torch.ones(2), "b": torch.ones(2)}
    bad = {"a": torch.ones(2), "b": torch.ones(2)}
    bad["b"][place] = wrong
    actual, expected = {"actual": (bad, good), "expected": (good, bad), "both": (bad, bad)}[side]
    errors = measure.relative_errors(actual, expected)
    assert errors["b"] == float("inf") and measure.largest(errors.values()) == float("inf")
    assert measure.largest([0.0, wrong]) == measure.largest([wrong, 0.0]) == float("inf")


@pytest.mark.parametrize(
    "actual, message",
    [
        ({"a": torch.ones(2)}, r"missing: \['b'\]; unexpected: \[\]"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, r"unexpected: \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, r"b is \(1,\) .* expected \(3,\)"),
        ({"a": torch.ones(1, 2), "b": torch.ones(3)}, r"a is \(1, 2\) .* expected \(2,\)"),
        ({"a": torch.ones(2), "b": torch.ones(3).double()}, "b is .* in torch.float64: expected"),
    ],
)
def test_other_names_shapes_and_dtypes_are_refused(actual, message):
    expected = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        measure.relative_errors(actual, expected)
