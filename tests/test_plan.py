"""The sums of the planner are compared with counts of real ranks. Tests of the planner itself."""

import dataclasses
import functools
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import activation_ckpt
import gpt
import options
import schedules
from tests.commands import forked
from tools.plan import calibrate, cost, dry_run, plan, published
from tools.plan.cost import HARDWARE, Layout
from tools.verify.oracle import Case, launch, trainer_of

# --- a rank's bytes, traffic and FLOPs ------------------------------------------------------------


def differences(case: Case) -> dict:
    """Of this rank's first step."""
    seen = dry_run.observe(trainer_of(case), dist.get_rank())
    left_out = "broadcast"  # DDP's order of buckets, once a run
    return {what: pair for what, pair in seen.differences().items() if left_out not in what}


UNDER_POLICIES = [  # beyond the matrix: dtypes, many microbatches, uneven chunks
    Case(t=3, dropout=0.2, sequence=True), Case(t=2, dropout=0.2, dtype="bf16"),
    Case(p=3, m=4, schedule="gpipe", attention="explicit", dtype="float32"),
    Case(p=2, m=4, schedule="zb-v", dtype="bf16", n_layer=6),
    Case(p=2, m=4, schedule="interleaved", chunks=3, n_layer=7),
    Case(t=3, p=2, m=8, schedule="zb-h1", attention="explicit", dtype="float32"),
    Case(t=2, p=2, m=5, dropout=0.2, sequence=True),
]  # fmt: skip
MORE = [
    Case(p=2, d=2, m=5, zero=3, recompute="full", every=2, tied=False),
    Case(p=3, d=2, m=4, zero=3, reshard=0, recompute="full"),
    Case(t=2, d=4, m=2, zero=3, shard_size=2, attention="explicit"),
    Case(p=2, d=2, m=4, zero=3, schedule="interleaved", chunks=3, n_layer=7),
    Case(d=2, m=3, zero=3, schedule="zb-h1"), Case(d=4, m=3, zero=1, shard_size=2),
    Case(t=4, d=2, zero=3, vocab_size=50257, n_layer=1), Case(optimizer="sgd", dtype="bf16"),
    Case(d=2, zero=2, dtype="bf16", grad_dtype="bf16", optimizer="sgd"),
]  # fmt: skip
SMALL_BF16 = functools.partial(Case, n_layer=2, b=1, dtype="bf16")
WIDE_SUMS = functools.partial(SMALL_BF16, reduce_dtype="float32")
SUMS = [  # of gradients, over ranks
    SMALL_BF16(d=2), SMALL_BF16(d=2, zero=1), SMALL_BF16(d=2, zero=2), SMALL_BF16(d=2, zero=3),
    SMALL_BF16(d=2, grad_dtype="bf16"), WIDE_SUMS(d=2, zero=1, grad_dtype="bf16"),
    WIDE_SUMS(d=2), WIDE_SUMS(d=2, zero=2), WIDE_SUMS(d=2, zero=3), Case(d=2, dtype="float32"),
]  # fmt: skip
CONTEXT = functools.partial(Case, c=2, seq_len=12, n_layer=2)
CONTEXTS = [
    CONTEXT(c=3, attention="explicit"), CONTEXT(c=3, dtype="bf16", recompute="selective"),
    CONTEXT(t=2, p=2, sequence=True, schedule="zb-v", n_layer=4, dropout=0.1, recompute="full"),
    CONTEXT(d=2, nodes=2, cp_attention="gathered"), CONTEXT(d=2, zero=3, recompute="selective"),
    CONTEXT(cp_attention="gathered", b=1, attention="explicit", recompute="selective", every=2),
    CONTEXT(t=2, p=2, cp_attention="gathered", sequence=True, dropout=0.1, zero=1),
    CONTEXT(t=2, sequence=True, keep_gathered=True, recompute="full", schedule="zb-h1", every=2),
    CONTEXT(c=3, cp_attention="ulysses", attention="explicit", recompute="selective", every=2),
    CONTEXT(p=2, cp_attention="ulysses", dtype="bf16", recompute="full", schedule="zb-h1"),
    CONTEXT(t=2, cp_attention="ulysses", recompute="selective", every=2, zero=2, d=2, shard_size=2),
]  # fmt: skip
IN_BF16 = [  # the other collectives
    SMALL_BF16(t=2), SMALL_BF16(t=2, sequence=True, seq_len=8), SMALL_BF16(p=2),
    SMALL_BF16(t=2, p=2, sequence=True, seq_len=8, keep_gathered=True, schedule="zb-v", n_layer=4),
    SMALL_BF16(d=4, nodes=2), WIDE_SUMS(d=4, nodes=2), SMALL_BF16(d=4, zero=2, shard_size=2),
    WIDE_SUMS(d=4, zero=3, shard_size=2),
]  # fmt: skip


@pytest.mark.parametrize("case", [
    *MORE, *SUMS, *IN_BF16, *CONTEXTS,
    *(pytest.param(dataclasses.replace(case, recompute=policy, seq_len=12), marks=pytest.mark.slow)
      for case in UNDER_POLICIES for policy in activation_ckpt.POLICIES),
], ids=str)  # fmt: skip
def test_a_rank_holds_sends_and_computes_what_is_predicted(case):
    """More of it, with every pair of options, in tests/test_layouts.py."""
    assert launch(case.world_size, differences, case) == [{}] * case.world_size


@pytest.mark.parametrize("t", [1, 2, 4])
def test_the_closed_forms_of_gpt2(t):
    """Of the description of a block that is read off gpt.py and its plan."""
    config = gpt.GPTConfig(5, 12, 24, 50, 7)
    b, s, h = 2, config.seq_len, config.n_embd
    (block,) = cost.units(config, t, 1, False, False)
    assert sum(block) == (12 * h * h + 7 * h) // t + 6 * h
    flops = 24 * b * s * h * h + 4 * b * s * s * h
    assert cost.predicted_flops(config, 5, b, "none", t=t) == 3 * 5 * flops // t
    for sequence, n in ((False, 1), (True, t)):
        elements = 2 * b * s * h // n + 2 * b * s * h + 12 * b * s * h // t
        assert cost.predicted_queue_bytes(config, 3, b, 8, t=t, sequence=sequence) == 24 * elements


def observed(case: Case) -> tuple:
    trainer = trainer_of(case)
    counted, _ = dry_run.observe(trainer, dist.get_rank(), activations=False).traffic
    about = trainer.config, dry_run.layout_of(trainer), dry_run.program_of(trainer)
    return {key: nbytes for key, (_, nbytes) in counted.items()}, *about


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_the_time_of_gradient_sums_is_that_of_the_bytes_that_were_sent(case):
    """On a link of 1 byte a second, and where no part of a collective is hidden."""
    counted, config, layout, program = launch(2, observed, case)[0]
    slow = A100._replace(link=1.0, link_gb_per_s=1e-9, link_us=0.0, overlap=1.0)
    whole, rest = (cost.predicted_step(config, layout, slow, 8, each).total
                   for each in (program, program._replace(reduce_itemsize=0)))  # fmt: skip
    if case.zero:
        sent = counted["dp", "reduce_scatter"] / 2  # (d - 1) / d
    else:  # 2 (d - 1) / d, without the count of tokens (8) and loss, norm, stop (12)
        sent = counted["dp", "all_reduce"] - 20
    assert whole - rest == pytest.approx(sent, rel=1e-9)


@pytest.mark.parametrize("case", [CONTEXT(c=3, dtype="bf16"), CONTEXT(recompute="full")], ids=str)
def test_the_time_of_the_ring_is_that_of_the_bytes_that_were_sent(case):
    """On a link as above."""
    counted, config, layout, program = launch(case.c, observed, case)[0]
    slow = A100._replace(link=1.0, link_gb_per_s=1e-9, link_us=0.0, overlap=1.0)
    times = cost.predicted_step(config, layout, slow, 8, program)
    assert times.tp == pytest.approx(counted["cp", "send"], rel=1e-9)


def without_ranks(seen: dry_run.Seen) -> dict:
    """What a dry run and a real one have in common. Transfers by peer: gloo posts them a batch
    ahead of their turn."""
    calls = {group: [(call.operation, call.payload, str(call.dtype)) for call in calls
                     if call.operation not in ("send", "recv", "broadcast")]
             for group, calls in seen.calls.items()}  # fmt: skip
    return {
        "calls": {group: made for group, made in calls.items() if made}, "flops": seen.flops[0],
        "bytes": {kind: counted for kind, (counted, _) in seen.bytes.items()},
        "activations": seen.activations[0], "members": seen.members,
        "transfers": sorted(seen.transfers),
    }  # fmt: skip


def really(case: Case) -> dict:
    return without_ranks(dry_run.observe(trainer_of(case, sync=None), dist.get_rank()))


EIGHT = [
    Case(t=2, p=2, d=2, attention="explicit", recompute="full"),
    Case(t=2, p=2, d=2, zero=3, schedule="zb-v", sequence=True, n_layer=6, dropout=0.1, seq_len=8),
    Case(p=4, d=2, zero=1, schedule="interleaved", chunks=2, n_layer=9, m=4, attention="explicit"),
    Case(d=8, zero=2, shard_size=4, m=1, tied=False, attention="explicit"),
    Case(t=4, p=2, m=3, schedule="zb-h1", vocab_size=50, attention="explicit", dtype="float32"),
    Case(t=2, c=2, p=2, zero=3, attention="explicit", seq_len=8, n_layer=4),
    Case(t=4, p=2, sequence=True, keep_gathered=True, schedule="zb-v", seq_len=8, n_layer=4,
         attention="explicit"),
]  # fmt: skip


@pytest.mark.parametrize("case", [
    EIGHT[1], *(pytest.param(case, marks=pytest.mark.slow) for case in EIGHT if case != EIGHT[1])
], ids=str)  # fmt: skip
def test_a_dry_run_of_each_of_8_ranks_is_the_real_run(case):
    args = options.parser().parse_args(case.arguments())
    args.world_size, config = 8, options.check(args, 8)
    ranks = [dry_run.dry_run(args, config, rank) for rank in range(8)]
    for seen, real in zip(ranks, launch(8, really, case), strict=True):
        assert without_ranks(seen) == real
    assert dry_run.deadlock([seen.queue for seen in ranks]) is None


def test_the_dry_run_of_a_rank_of_3072():
    flags = ("--world-size 3072 --rank 1536 --model gpt-1t --tp 8 --pp 64 --zero 1 "
             "--global-batch-size 48 --micro-batch-size 1").split()  # fmt: skip
    done = forked(0, dry_run.main, *flags)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert "stage 32 (2 blocks); 8 microbatches" in done.stdout and "differs" not in done.stdout
    assert re.search(r"send to rank 1584: 8\n", done.stdout)


def test_a_difference_is_marked_and_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "predicted_flops", lambda trainer: 1)
    flags = "--n-layer 1 --n-embd 8 --n-head 1 --global-batch-size 1 --micro-batch-size 1"
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    with pytest.raises(SystemExit) as end:
        dry_run.main()
    assert end.value.code == 1
    assert [line for line in capsys.readouterr().out.splitlines() if "differs" in line] != []


@pytest.mark.parametrize("flags, message", [
    ("--world-size 16 --all-ranks", "--all-ranks with --world-size 16: it supports at most 8"),
    ("--world-size 8 --rank 8", "--rank 8 with --world-size 8: give 0 to 7"),
    ("--world-size 8 --tp 3", "world size 8 is not divisible by --tp 3 x --pp 1: give a "
     "--world-size that is a multiple of 3"),
    ("--recompute offload", "meta tensors cannot be offloaded: use another policy"),
    ("--world-siz 8", "unrecognized arguments: --world-siz 8; did you mean --world-size?"),
])  # fmt: skip
def test_dry_runs_that_cannot_be(flags, message):
    done = forked(0, dry_run.main, *flags.split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and message in line
    assert line.startswith("tools.plan.dry_run: error: ")


# --- the cost model -------------------------------------------------------------------------------

A100 = HARDWARE["a100-80"]
SMALL = gpt.GPTConfig(16, 16, 1024, 50000, 1024)


def some_layouts(n: int, seed: int = 0) -> list[tuple[plan.Job, Layout]]:
    rng, found = random.Random(seed), []
    explicit, long = {"attention": "explicit"}, {"seq_len": 8192}
    for gpus, changed in ((16, {}), (64, explicit), (16, long)):
        job = plan.Job(dataclasses.replace(SMALL, **changed), gpus, 8, 64, A100)
        every = [layout for layout in plan.layouts(job, {}) if layout.cp > 1 or changed != long]
        found += [(job, layout) for layout in rng.sample(every, n // 3)]
    return found


def test_all_layouts_of_the_search_are_taken_by_the_trainer():
    for job, layout in some_layouts(400):
        words = " ".join(plan.arguments(job, layout, ["--model gpt2"])).split()
        sizes = f"--n-layer 16 --n-head 16 --n-embd 1024 --vocab-size 50000 --attention " \
                f"{job.config.attention} --seq-len {job.config.seq_len}".split()  # fmt: skip
        args = options.parser().parse_args(words + sizes)
        assert options.check(args, job.gpus) == job.config
        assert args.global_batch_size == layout.dp * layout.micro_batch_size * layout.microbatches


def test_schedules_that_are_worse_than_another_are_not_tried(monkeypatch):
    assert {*plan.worth_trying()} >= {"1f1b", "interleaved", "zb-h1", "zb-v"}
    assert "gpipe" not in plan.worth_trying()
    zb_v = schedules.SCHEDULES["zb-v"]
    known = {
        "zb-v": zb_v, "no closed forms": schedules.Entry(zb_v.make),
        "stores more": zb_v._replace(held=lambda p, m, c, r: 2 * p + 1),
        "other chunks": zb_v._replace(make=lambda p, m, chunks=3: schedules.interleaved(p, m, 3)),
    }  # fmt: skip
    monkeypatch.setattr(schedules, "SCHEDULES", known)
    assert plan.worth_trying.__wrapped__() == ["zb-v", "other chunks"]
    known["faster"] = zb_v._replace(bubble=lambda p, m, c: 0.0)
    assert plan.worth_trying.__wrapped__() == ["other chunks", "faster"]


def test_halving_a_bandwidth_never_makes_a_layout_faster():
    for job, layout in some_layouts(120):

        def seconds(hardware, job=job, layout=layout) -> float:
            return cost.predicted_step(job.config, layout, hardware).total

        whole = seconds(A100)
        for field in ("tflops", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s"):
            slower = A100._replace(**{field: getattr(A100, field) / 2})
            assert seconds(slower) >= whole * (1 - 1e-12), (field, layout)
        assert seconds(A100._replace(link_us=20, network_us=40)) >= whole * (1 - 1e-12)


def test_more_memory_never_makes_what_fits_not_fit():
    job = plan.Job(gpt.MODELS["gpt-3.6b"], 32, 8, 512, A100)
    products, times = [], []
    for memory in (20, 24, 32, 40, 60, 80, 160):
        roomier = job._replace(hardware=A100._replace(memory_gb=memory))
        layout = plan.recipe(roomier)[2]
        products.append(layout.tp * layout.pp if layout else float("inf"))
        asked = {"schedule": "1f1b", "micro_batch_size": 1}
        best = plan.search(roomier, 1, asked)[0]
        times.append(best[0].times.total if best else float("inf"))
    assert products == sorted(products, reverse=True) and len(set(products)) > 2
    assert times == sorted(times, reverse=True) and len(set(times)) > 1


def test_what_may_not_fit_does_not_and_the_least_is_the_least():
    """The two bounds by which the search passes layouts over."""
    refused = 0
    for job, layout in some_layouts(200, seed=1):
        held = sum(cost.worst_rank(job.config, layout).values())
        for limit in (0.5 * held, 0.99 * held):
            assert not cost.fits(job.config, layout, limit)
            refused += not cost.may_fit(job.config, layout, limit)
        assert cost.fits(job.config, layout, held) and cost.may_fit(job.config, layout, held)
        least, times = (cost.predicted_step(job.config, layout, A100, least=least)
                        for least in (True, False))  # fmt: skip
        assert least.total <= times.total * (1 + 1e-9)
    assert refused > 100


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("p, m", [(2, 16), (4, 32), (4, 36), (3, 30), (8, 64)])
def test_a_schedule_that_repeats_itself_is_simulated_in_part(name, p, m):
    rng, v = random.Random(p), schedules.SCHEDULES[name].chunks
    even = tuple((1.0, 1.0, 1.0) for _ in range(p * v))
    uneven = tuple((rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2), 0.7) for _ in range(p * v))
    layout = Layout(1, p, 1, microbatches=m, schedule=name, chunks=v)
    assert (cost.repeating_microbatches(layout) == m) == (name == "gpipe")
    for seconds, near in ((even, 1e-9), (uneven, 0.02)):
        whole = cost.makespan(name, p, m, v, seconds, 0.02)
        assert cost.pipeline_seconds(layout, seconds, 0.02) == pytest.approx(whole, rel=near)


def ticks(schedule: schedules.Schedule, length: dict[str, int]) -> int:
    """The clock at the end of a schedule that is run tick by tick: a rank begins its next action
    when it is free and what the action needs is done. length: ticks of an action, by kind."""
    rows, done, free = [list(row) for row in schedule], {}, [0] * len(schedule)
    last, clock = max(action.stage for row in schedule for action in row), 0
    while any(rows):
        for rank, row in enumerate(rows):
            if row and free[rank] <= clock:
                needed = schedules.dependency(row[0], last)
                if needed is None or done.get(needed, clock + 1) <= clock:
                    free[rank] = done[row[0]] = clock + length[row[0].kind]
                    row.pop(0)
        clock += 1
    return max(free)


@pytest.mark.parametrize("p, m", [(1, 3), (2, 5), (4, 12)])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_pipeline_takes_the_ticks_that_are_counted(name, p, m):
    """F 2, B 3 and W 1 ticks. Where F = B = W, the bubble of 1F1B is (p - 1) / m of the work."""
    v = schedules.SCHEDULES[name].chunks
    schedule, layout = (schedules.SCHEDULES[name](p, m, v),
                        Layout(1, p, 1, microbatches=m, schedule=name, chunks=v))  # fmt: skip
    split_backward = any(map(schedules.splits_backward, schedule))
    counted = ticks(schedule, {"F": 2, "B": 3 if split_backward else 4, "W": 1})
    assert cost.pipeline_seconds(layout, ((2.0, 3.0, 1.0),) * (p * v), 0.0) == counted
    if name == "1f1b":
        assert ticks(schedule, {"F": 1, "B": 2}) == 3 * m * (1 + (p - 1) / m)


# --- published ------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", published.TABLES)
def test_published_tables(title):
    """Mean under 5 %, no row above 12 %, and better than one throughput for all."""
    rows = published.TABLES[title]()
    ours = published.errors([published.seconds(row, A100) for row in rows], rows)
    guess = published.errors(published.guesses(rows), rows)
    mean, largest = statistics.fmean(map(abs, ours)), max(map(abs, ours))
    assert mean < 5 and largest < 12
    assert mean < statistics.fmean(map(abs, guess)) and largest < max(map(abs, guess))


def test_one_row_scales_the_others():
    """On three rows of one job: published 1, 2 and 4 s, predicted 2, 2 and 1 s."""
    row = published.sc21_1()[0]
    rows = [row._replace(seconds=x) for x in (1.0, 2.0, 4.0)]
    first, second, third = published.from_one_row([2.0, 2.0, 1.0], rows)
    assert first == pytest.approx([-50, -87.5]) and second == pytest.approx([100, -75])
    assert third == pytest.approx([700, 300])


def test_the_order_and_the_choice_of_layouts():
    """Published 1, 2 and 4 s. The model predicts 3, 1 and 2 s, so it orders one pair of three as
    published, and chooses the second layout. A random one takes 7/3 s."""
    row = published.sc21_1()[0]
    rows = [row._replace(seconds=x) for x in (1.0, 2.0, 4.0)]
    times = published.jobs([3.0, 1.0, 2.0], rows)
    assert times == [[(3.0, 1.0), (1.0, 2.0), (2.0, 4.0)]]
    assert published.right_order(times) == (1, 3)
    assert published.losses(times) == pytest.approx((100, 100 * 4 / 3))
    other_job = rows[1]._replace(layout=rows[1].layout._replace(dp=1))
    assert published.jobs([3.0, 1.0, 2.0], [rows[0], other_job, rows[2]]) == [[(3, 1), (2, 4)]]
    assert published.right_order([[(1.0, 2.0), (2.0, 2.02)]]) == (0, 0)


@pytest.mark.parametrize("title", published.UNSEEN)
def test_unseen_tables(title):
    rows = published.UNSEEN[title]()
    for row in rows:
        batch = row.layout.dp * row.layout.micro_batch_size * row.layout.microbatches
        peak = row.hardware.tflops * 1e12 * row.layout.gpus
        # Full recomputation is counted, so these are hardware FLOP/s.
        assert 0.25 < row.flops / row.seconds / peak < 0.81, row.name
        if "BLOOM" in title:
            assert batch in (512, 1024, 1536, 1568, 2016, 2048), row.name
            assert row.layout.gpus in (320, 384) and row.config.n_layer == row.split[-1].stop
        else:
            assert row.layout.gpus in (8, 16, 32, 64, 128, 256, 512), row.name
    found = published.accuracy(title)
    if "BLOOM" in title:  # all predictions are too low, so a factor helps
        assert found.anchor[0] < found.model[0]


def test_the_accuracy_in_the_docs_is_the_measured_one():
    text = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text()
    assert [line for line in published.summary_lines() if line not in text] == []


def test_zeros_table_and_bubble_rates():
    """The bytes are compared with counts in tests/test_zero.py::
    test_bf16_is_bitwise_one_process_that_adds_in_the_same_order, the simulation with a count of
    ticks in test_a_pipeline_takes_the_ticks_that_are_counted."""
    assert all(ours == pytest.approx(gb, rel=0.03) for _, gb, ours in published.zero_memory())
    off = [abs(ours - rate) for _, rate, ours in published.bubble_rates()]
    assert statistics.fmean(off) < 0.02 and max(off) < 0.06


# --- the plan -------------------------------------------------------------------------------------

SC21 = {  # 2104.04473, table 1: model: (t, p, GPUs, batch)
    "gpt-1.7b": (1, 1, 32, 512), "gpt-3.6b": (2, 1, 64, 512), "gpt-7.5b": (4, 1, 128, 512),
    "gpt-18b": (8, 1, 256, 1024), "gpt-39b": (8, 2, 512, 1536), "gpt-76b": (8, 4, 1024, 1792),
    "gpt-145b": (8, 8, 1536, 2304), "gpt-310b": (8, 16, 1920, 2160),
    "gpt-530b": (8, 35, 2520, 2520), "gpt-1t": (8, 64, 3072, 3072),
}  # fmt: skip


@pytest.mark.parametrize("model", SC21)
def test_the_recipe_gives_what_they_ran(model):
    t, p, gpus, batch = SC21[model]
    layout = plan.recipe(plan.Job(gpt.MODELS[model], gpus, 8, batch, A100))[2]
    assert (layout.tp, layout.pp, layout.dp) == (t, p, gpus // (t * p))


def test_the_recipe_depends_on_the_constant():
    """At 1.0 of the memory it gives less than they ran, for models in the middle."""
    t, p, gpus, batch = SC21["gpt-3.6b"]
    layout = plan.recipe(plan.Job(gpt.MODELS["gpt-3.6b"], gpus, 8, batch, A100, usable=1.0))[2]
    assert (layout.tp, layout.pp) == (1, 1)


def said(monkeypatch, capsys, flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags.split()])
    plan.main()
    return capsys.readouterr().out


SMALL_JOB = "--model gpt2-xl --gpus 16 --hardware h100-80 --global-batch-size 64"


def test_a_report(monkeypatch, capsys):
    text = said(monkeypatch, capsys, SMALL_JOB)
    assert "The recipe" in text and "The best of" in text and "Memory of the best" in text
    (line,) = [line for line in text.splitlines() if line.startswith("torchrun")]
    arguments = line.split(" train_3d.py ")[1].split()
    options.check(options.parser().parse_args(arguments), 16)
    assert "--nnodes 2" in line and "--nproc-per-node 8" in line
    assert re.search(r"300 B tokens are [\d,]+ steps: [\d.]+ days", text)


def test_json(monkeypatch, capsys):
    found = json.loads(said(monkeypatch, capsys, f"{SMALL_JOB} --json"))
    assert set(found) == {"recipe", "best", "layouts"} and found["layouts"][0] == found["best"]
    for layout in (found["recipe"], *found["layouts"]):
        assert layout["tp"] * layout["pp"] * layout["dp"] == 16
        assert layout["dp"] * layout["micro_batch_size"] * layout["microbatches"] == 64
        assert set(layout["bytes"]) == {"parameters", "gradients", "optimizer", "activations",
                                        "buffers"}  # fmt: skip
        assert sum(layout["bytes"].values()) <= 0.7 * 80e9 and layout["step_s"] > 0
        assert {"zero", "recompute", "schedule", "tflops_per_gpu"} <= set(layout)
    times = [layout["step_s"] for layout in found["layouts"]]
    assert times == sorted(times) and times[0] <= found["recipe"]["step_s"]


LONG_ROWS = ("--model gpt-7.5b --n-layer 4 --seq-len 131072 --gpus 64 --hardware h100-80 "
             "--global-batch-size 8")  # fmt: skip


def test_context_parallelism_is_planned_for_long_rows(monkeypatch, capsys):
    text = said(monkeypatch, capsys, LONG_ROWS)
    (line,) = [line for line in text.splitlines() if line.startswith("torchrun")]
    args = options.parser().parse_args(line.split(" train_3d.py ")[1].split())
    options.check(args, 64)
    assert args.cp > 1 and f" c={args.cp} p=" in text
    found = json.loads(said(monkeypatch, capsys, f"{LONG_ROWS} --cp 4 --json"))
    assert found["layouts"]
    for layout in found["layouts"]:
        assert layout["tp"] * layout["cp"] * layout["pp"] * layout["dp"] == 64
        assert layout["cp"] == 4
    for config in gpt.MODELS.values():  # their rows are too short
        assert plan.cp_sizes(plan.Job(config, 64, 8, 64, A100), 1) == [1]


def test_a_rank_of_c_has_1_c_of_the_activations_and_of_the_work():
    """And a ring that is hidden costs a fraction `overlap` of its time."""
    config, fast = dataclasses.replace(SMALL, seq_len=32768), A100._replace(ramp_gflop=0, overlap=0)
    one, four = (
        (cost.worst_rank(config, layout), cost.predicted_step(config, layout, fast, 8))
        for layout in (Layout(1, 1, 1, recompute="none", cp=c) for c in (1, 4))
    )
    assert four[0]["activations"] == pytest.approx(one[0]["activations"] / 4, rel=1e-6)
    assert four[1].matmul == pytest.approx(one[1].matmul / 4)
    assert one[1].tp == 0 < four[1].tp < 0.02 * four[1].matmul


HERE = "--calibrate --model nano --gpus 2 --global-batch-size 8 --schedule 1f1b --json"


def test_calibration_recovers_the_speeds_of_a_machine(monkeypatch, capsys):
    """A machine of 0.1 TFLOP/s, 2 us per matmul, 5 GB/s of memory, 30 us and 1 GB/s per message."""

    def measured(n: int, machine) -> list[tuple]:
        terms = [(f, c, k) for f in (1e9, 2e9, 7e9) for c in (10, 40) for k in (1e6, 9e6)]
        blocks = [(f, c, k, f / 1e11 + 2e-6 * c + k / 5e9) for f, c, k in terms]
        sent = [(size, 30e-6 + size / 1e9) for size in (1e3, 1e5, 1e7)]
        return [(blocks, 5e9, sent, 0.25)] * n

    monkeypatch.setattr(calibrate, "launch", measured)
    hardware = calibrate.calibrate(2)
    assert (hardware.tflops, hardware.ramp_gflop) == pytest.approx((0.1, 2e-6 * 100))
    assert (hardware.memory_gb_per_s, hardware.passes) == pytest.approx((5.0, 1.0))
    assert (hardware.link_us, hardware.link_gb_per_s) == pytest.approx((30.0, 1.0))
    assert hardware.overlap == 0.25
    best = json.loads(said(monkeypatch, capsys, HERE))["best"]
    assert best["tp"] * best["pp"] * best["dp"] == 2 and best["bytes"]["parameters"] > 1e6
    seconds = best["step_s"]
    monkeypatch.setattr(calibrate, "calibrate", lambda n: hardware._replace(tflops=0.05))
    assert seconds < json.loads(said(monkeypatch, capsys, HERE))["best"]["step_s"] < 2 * seconds


@pytest.mark.slow
def test_a_plan_for_this_machine(monkeypatch, capsys):
    """If other work disturbs the measurement, the planner ends with one line."""
    try:
        best = json.loads(said(monkeypatch, capsys, HERE))["best"]
    except SystemExit as error:
        assert str(error).endswith("measured times do not grow with FLOPs. Is the machine idle?")
    else:
        assert best["tp"] * best["pp"] * best["dp"] == 2


ANCHORED = f"{SMALL_JOB} --schedule 1f1b --micro-batch-size 2 --json"


def test_an_anchor_scales_all_times(monkeypatch, capsys):
    """First of the best layout, then of the third, which is given as the command that ran it."""
    plain = json.loads(said(monkeypatch, capsys, ANCHORED))
    best, third = plain["layouts"][0], plain["layouts"][2]
    sequence = " --sequence-parallel" if third["sequence_parallel"] else ""
    command = (f"torchrun --nproc-per-node 8 -- train_3d.py --tp {third['tp']} --pp {third['pp']} "
               f"--zero {third['zero']} --micro-batch-size {third['micro_batch_size']} "
               f"--recompute {third['recompute']}{sequence}")  # fmt: skip
    for layout, factor, more in ((best, 1.25, []), (third, 0.5, ["--anchor-layout", command])):
        measured = factor * layout["step_s"]
        argv = ["plan.py", *ANCHORED.split(), "--anchor", str(measured), *more]
        monkeypatch.setattr(sys, "argv", argv)
        plan.main()
        found = json.loads(capsys.readouterr().out)
        anchor = found.pop("anchor")
        assert anchor["factor"] == pytest.approx(factor)
        assert {name: layout[name] for name in anchor["layout"]} == anchor["layout"]
        assert anchor["measured_s"] == measured
        for was, now in zip((plain["recipe"], *plain["layouts"]),
                            (found["recipe"], *found["layouts"]), strict=True):  # fmt: skip
            assert now["step_s"] == pytest.approx(anchor["factor"] * was["step_s"])
            assert now["tflops_per_gpu"] == pytest.approx(was["tflops_per_gpu"] / anchor["factor"])
            assert sum(now["seconds"].values()) == pytest.approx(now["step_s"])
            assert {k: now[k] for k in ("bytes", *anchor["layout"])} == {
                k: was[k] for k in ("bytes", *anchor["layout"])
            }


def test_the_report_names_the_anchor(monkeypatch, capsys):
    flags = SMALL_JOB + " --schedule 1f1b --micro-batch-size 2 --anchor"
    near, far = (said(monkeypatch, capsys, f"{flags} {x}") for x in (0.2, 10))
    head = near.split("The recipe")[0]
    found = re.search(r"Anchor: measured 0.2 s, predicted (\S+) s for the best layout below", head)
    assert f"All times below are predictions times {0.2 / float(found[1]):.3g}" in head
    assert "far from 1" not in near and "far from 1: check --hardware" in far
    first = far.split("The best of")[1].splitlines()[2]
    assert float(first.split()[0]) == pytest.approx(10)


@pytest.mark.parametrize("flags, layout, message", [
    ("--anchor 0", None, "--anchor 0: give the measured seconds per step, above 0"),
    ("--anchor nan", None, "--anchor nan: give the measured"),
    ("--anchor -1", None, "--anchor -1: give the measured"),
    ("--anchor x", None, "--anchor: invalid float value: 'x'"),
    ("--anchor 0.001", "--micro-batch-size 1", "than the 989 of h100-80: give seconds per step"),
    ("", "--tp 2", "--anchor-layout: give the measured seconds too: --anchor SECONDS"),
    ("--anchor 1", "--tp 3", "--anchor-layout: --gpus 16 is not divisible by --tp 3 x"),
    ("--anchor 1", "--tp 2", "--n-head 25 is not divisible by --tp 2"),
    ("--anchor 1", "--micro-batch-size 3", "--global-batch-size 64 is not divisible by d 16 x"),
    ("--anchor 1", "--global-batch-size 32", "is 32, but this plan assumes 64: measure"),
    ("--anchor 1", "--zero 1 --zero-shard-size 8", "is 8, but this plan assumes None: measure"),
    ("--anchor 1", "--document-mask 0", "is 0, but this plan assumes None: measure"),
    ("--anchor 1", "--cp 2 --cp-attention gathered", "is gathered, but this plan assumes ring: "),
    ("--anchor 1", "--recompute offload", "does not know --recompute offload"),
    ("--anchor 1", "--model gpt2", "it has flags of another model: leave them out"),
    ("--anchor 1", "--modle gpt2", "--anchor-layout: unrecognized arguments: --modle"),
])  # fmt: skip
def test_anchors_that_cannot_be(monkeypatch, flags, layout, message):
    more = [] if layout is None else ["--anchor-layout", layout]
    monkeypatch.setattr(sys, "argv", ["plan.py", *SMALL_JOB.split(), *flags.split(), *more])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert "\n" not in end.value.code and message in end.value.code
    assert end.value.code.startswith("tools.plan.plan: error: ")


def test_an_anchor_where_nothing_fits_needs_its_layout(monkeypatch, capsys):
    flags = "--model gpt-175b --gpus 8 --global-batch-size 8 --hardware a100-40 --anchor 9"
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags.split()])
    with pytest.raises(SystemExit, match="--anchor: no layout fits, so none is the best: describe"):
        plan.main()


def test_a_plan_does_not_import_what_it_does_not_need():
    slow = ("torch.distributed.checkpoint", "torch._dynamo", "train_3d")
    code = f"import sys, tools.plan.plan; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_names_of_flags_are_those_of_the_trainer():
    """`make plan` has the trainer's names for a layout, also the former ones."""
    ours, trainer = plan.parser(), options.parser()
    for flag, field in (("--tp 2", "tp"), ("--pp 2", "pp"), ("--micro-batch-size 2",
                        "micro_batch_size"), ("--virtual-stages 2", "chunks"),
                        ("--chunks 2", "chunks"), ("--schedule zb-v", "schedule"),
                        ("--recompute full", "recompute")):  # fmt: skip
        found, expected = (getattr(p.parse_args(flag.split()), field) for p in (ours, trainer))
        assert found == expected is not None
    assert "--chunks" not in ours.format_help()


def test_nothing_fits(monkeypatch, capsys):
    flags = "--model gpt-175b --gpus 8 --global-batch-size 8 --hardware a100-40"
    text = said(monkeypatch, capsys, flags)
    assert "none fits" in text and "smallest: t=8" in text
    assert re.search(r"it would fit on GPUs of \d+ GB", text)
    assert re.search(r"the model would fit on \d+ of these GPUs: t=", text)
    found = json.loads(said(monkeypatch, capsys, flags + " --json"))
    assert found == {"recipe": None, "best": None, "layouts": []}


def test_hardware_from_a_file(tmp_path):
    path = tmp_path / "b200.json"
    path.write_text(json.dumps({"tflops": 2250, "memory_gb": 180, "memory_gb_per_s": 8000,
                                "link_gb_per_s": 900, "network_gb_per_s": 50}))  # fmt: skip
    hardware = plan.read_hardware(str(path), {"memory_gb": 192.0})
    assert (hardware.tflops, hardware.memory_gb, hardware.matmul) == (2250, 192, A100.matmul)


@pytest.mark.parametrize("flags, message", [
    ("--hardware a100", "--hardware a100 is not one of v100-32, a100-40, a100-80, h100-80"),
    ("--hardware h100", "; did you mean h100-80?"),
    ("--gpus 0", "--gpus"), ("--global-batch-size 7 --gpus 1024", "--global-batch-size 7: no d"),
    ("--tp 5 --gpus 16", "16 is not divisible by --tp 5"), ("--tp 16", "more than the 8 GPUs"),
    ("--model gpt2 --n-head 10 --tp 4 --n-embd 640", "--n-head 10 is not divisible by --tp 4"),
    ("--pp 7 --gpus 64", "not divisible"), ("--usable 1.5", "--usable 1.5: give a fraction"),
    ("--cp 3 --gpus 16", "16 is not divisible by --tp 1 x --pp 1 x --cp 3: give a divisor, or"),
    ("--gpus 12", "--gpus 12 is not a multiple of --gpus-per-node 8"),
    ("--memory-gb 0", "memory_gb is 0"), ("--tflops -3", "tflops is -3"), ("--modle x", "--modle"),
    ("--model gpt9", "gpt9"), ("--tokens 0", "--tokens"),
    ("--modle gpt2", "unrecognized arguments: --modle gpt2; did you mean --model?"),
    ("--model gpt2xl", "did you mean gpt2-xl?"), ("--hardware h100", "did you mean h100-80?"),
    ("--tp 5 --gpus 16", "--gpus 16 is not divisible by --tp 5 x --pp 1: give a divisor, or"),
])  # fmt: skip
def test_what_cannot_be_planned(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        plan.main()
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    assert end.value.code.startswith("tools.plan.plan: error: ") and message in end.value.code
