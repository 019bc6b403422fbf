"""Layouts compared with one process: float64, 1e-12, every gradient and parameter."""

import dataclasses
import functools
import itertools
import math
import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import activation_ckpt
import context_parallel
import gpt
import schedules
import train_3d
from measure import TOLERANCE
from tools.plan import dry_run
from tools.verify.fuzz import draw_case, refusal, verdict
from tools.verify.oracle import Case, judge

# Each option of a layout and its tested values. LIVE defines when a value has an effect.
FACTORS = {
    "layout": [  # (t, c, p, d)
        (1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 1, 2, 1), (2, 1, 1, 2),
        (1, 1, 2, 2), (2, 1, 2, 2), (4, 1, 1, 1), (1, 1, 4, 1), (1, 1, 1, 4), (3, 1, 2, 1),
        (1, 1, 3, 2), (1, 1, 2, 4), (2, 1, 1, 4), (1, 2, 1, 1), (1, 3, 1, 1), (2, 2, 1, 1),
        (1, 2, 2, 1), (1, 2, 1, 2), (2, 2, 2, 1), (1, 2, 2, 2),
    ],
    "cp_attention": [*context_parallel.METHODS],
    "schedule": [  # and chunks
        (name, chunks) for name, entry in schedules.SCHEDULES.items()
        for chunks in ((2, 3) if entry.any_chunks else (None,))
    ],
    "zero": [  # stage, --zero-shard-size (DDP: ranks of a host), --zero-reshard-after-forward
        (0, None, 1), (0, "d/2", 1), (1, None, 1), (2, None, 1), (3, None, 1), (3, None, 0),
        (1, "d/2", 1), (2, "d/2", 1), (3, "d/2", 1),
    ],
    "sequence": [False, True],
    "keep_gathered": [False, True],
    "recompute": [  # policy, every, layers
        ("none", 1, None), ("full", 1, None), ("full", 2, None), ("full", 1, 1),
        ("selective", 1, None), ("offload", 1, None),
    ],
    "n_layer": [2, 3],  # more if there are more stages
    "dropout": [0.0, 0.2],
    "attention": ["sdpa", "explicit"],
    "bucket_bytes": [1, 3000, 10**9],  # one bucket per parameter, a few, one
    "vocab_size": [40, 41],
    "m": [1, 2, "p", 3],
    "tied": [True, False],
    "optimizer": ["adamw", "sgd"],
    "clip": [0.1, 0.0, 1e9],  # active in every step, off, larger than any norm
    "masked": [True, False],
}  # fmt: skip
# For each option: the options it depends on, and whether its value has an effect in a row. All
# schedules are equivalent at p = 1, and all ZeRO stages at d = 1.
LIVE = {
    "cp_attention": (("layout",), lambda row: row["layout"][1] > 1),
    "schedule": (("layout",), lambda row: row["layout"][2] > 1),
    "zero": (("layout",), lambda row: replicas(row) > (3 if row["zero"][1] else 1)),
    "sequence": (("layout",), lambda row: row["layout"][0] > 1),
    "keep_gathered": (("layout", "sequence"), lambda row: row["sequence"] and row["layout"][0] > 1),
    "vocab_size": (("layout",), lambda row: row["layout"][0] > 1),
    "bucket_bytes": (("layout", "zero"), lambda row: replicas(row) > 1 and row["zero"][0] == 0),
    "recompute": (  # `every` and `layers` need a rank with more than one block
        ("layout", "schedule", "n_layer"),
        lambda row: row["recompute"][1:] == (1, None) or blocks(row) > row["layout"][2],
    ),
    "attention": (  # with dropout, sdpa falls back to explicit attention
        ("dropout",),
        lambda row: row["attention"] == "explicit" or row["dropout"] == 0,
    ),
}
Pair = tuple[tuple[str, object], tuple[str, object]]  # two values of different factors


def replicas(row: dict) -> int:
    """The ranks over which gradients are summed."""
    _, c, _, d = row["layout"]
    return c * d


def blocks(row: dict) -> int:
    schedule, chunks = row["schedule"]
    stages = row["layout"][2] * (chunks or schedules.SCHEDULES[schedule].chunks)
    return max(row["n_layer"], stages + row["n_layer"] - 2)


def is_live(row: dict, factor: str) -> bool:
    return factor not in LIVE or LIVE[factor][1](row)


def live_pairs(row: dict) -> set[Pair]:
    live = [(factor, row[factor]) for factor in FACTORS if is_live(row, factor)]
    return set(itertools.combinations(live, 2))


def all_live_pairs() -> list[Pair]:
    """The pairs of values that have an effect together in some layout."""

    def can_be_live(pair: Pair) -> bool:
        fixed = dict(pair)
        free = {f for factor in fixed if factor in LIVE for f in LIVE[factor][0]} - fixed.keys()
        rows = (
            dict(zip(free, values, strict=True)) | fixed
            for values in itertools.product(*(FACTORS[f] for f in free))
        )
        return any(all(is_live(row, factor) for factor in fixed) for row in rows)

    return [
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(FACTORS[a], FACTORS[b])
        if can_be_live(((a, x), (b, y)))
    ]


def ranks(row: dict) -> int:
    return math.prod(row["layout"])


def pairwise(tries: int = 20) -> list[dict]:
    """Rows that together cover every live pair. Each row starts from a pair that is missing. The
    best of `tries` random completions is improved one option at a time. Rows are scored by the
    missing pairs that they cover per (ranks + 2)."""
    missing, rows, rng = dict.fromkeys(all_live_pairs()), [], random.Random(0)

    def gain(row: dict, start: dict) -> float:
        if not all(is_live(row, factor) for factor in start):
            return -1.0
        return len(live_pairs(row) & missing.keys()) / (ranks(row) + 2)

    while missing:
        start = dict(next(iter(missing)))
        drawn = ({f: rng.choice(values) for f, values in FACTORS.items()} for _ in range(tries))
        row = max((row | start for row in drawn), key=lambda row: gain(row, start))
        for factor in [f for f in FACTORS if f not in start] * 2:
            values = [row | {factor: value} for value in FACTORS[factor]]
            row = max(values, key=lambda row: gain(row, start))
        for pair in live_pairs(row):
            missing.pop(pair, None)
        rows.append(row)
    return rows


def strategies(row: dict) -> list[str]:
    """The names of the strategies that have an effect in it."""
    t, c, p, d = row["layout"]
    live = []
    if t > 1:
        live.append("SP" if row["sequence"] else "TP")
    if c > 1:
        live.append(row["cp_attention"])
    if p > 1:
        live.append(row["schedule"][0])
    if c * d > 1:
        live.append(f"ZeRO-{row['zero'][0]}")
    if is_live(row, "recompute"):
        live.append(row["recompute"][0])
    return live


def small_cover(rows: list[dict]) -> list[dict]:
    """A small subset, chosen greedily, that covers every live value and every pair of
    strategies."""

    def covers(row: dict) -> set:
        values = {(factor, row[factor]) for factor in FACTORS if is_live(row, factor)}
        return values | set(itertools.combinations(strategies(row), 2))

    missing, cover = set().union(*map(covers, rows)), []
    while missing:
        best = max(rows, key=lambda row: len(covers(row) & missing) / (ranks(row) + 2))
        missing -= covers(best)
        cover.append(best)
    return cover


def case_of(row: dict) -> Case:
    (t, c, p, d), n = row["layout"], replicas(row)
    recompute, every, layers = row["recompute"]
    zero, shard_size, reshard = row["zero"]
    shard_size = max(1, n // 2) if shard_size and n % 2 == 0 else None
    nodes, shard_size = (1, shard_size) if zero else (n // (shard_size or n), None)
    schedule, chunks = row["schedule"]
    same = ("cp_attention", "sequence", "dropout", "attention", "bucket_bytes", "vocab_size",
            "tied", "optimizer", "clip", "masked")  # fmt: skip
    return Case(
        t=t, c=c, p=p, d=d, m=p if row["m"] == "p" else row["m"], schedule=schedule, chunks=chunks,
        zero=zero, shard_size=shard_size, reshard=reshard, nodes=nodes, recompute=recompute,
        every=every, layers=layers, n_layer=blocks(row), seq_len=12,
        keep_gathered=row["keep_gathered"] and row["sequence"],
        steps=2,  # the second step starts from the state after the first
        **{factor: row[factor] for factor in same},
    )  # fmt: skip


ROWS = pairwise()
FAST = small_cover(ROWS)


def counted_step(trainer: train_3d.Trainer, step: int) -> torch.Tensor:
    """The second step: in the first one DDP's buckets have no order yet."""
    if step != 1:
        return trainer.step(step)
    seen = dry_run.observe(trainer, dist.get_rank(), step=step)
    assert seen.differences() == {}, f"(counted, predicted): {seen.differences()}"
    return seen.stats


@pytest.mark.parametrize(
    "case",
    [pytest.param(case_of(row), marks=() if row in FAST else pytest.mark.slow) for row in ROWS],
    ids=str,
)
def test_layout_equals_one_process(case):
    """And each rank holds, sends and computes what is predicted."""
    errors = judge(case, {"step": counted_step})
    assert errors.worst <= TOLERANCE, errors


def test_every_live_pair_of_options_is_tested():
    """A pair counts where both options have an effect: every schedule that runs on several pipeline
    ranks together with every ZeRO stage that runs on several replicas, and so on."""
    cases = list(map(case_of, ROWS))
    for schedule, chunks in FACTORS["schedule"]:
        for stage, part, reshard in FACTORS["zero"]:
            assert any(
                (case.schedule, case.chunks) == (schedule, chunks) and case.p > 1
                and (case.zero, case.reshard) == (stage, reshard) and (n := case.c * case.d) > 1
                and (part is None or 1 < (case.shard_size or n // case.nodes) < n)
                for case in cases
            ), (schedule, chunks, stage, part, reshard)  # fmt: skip
    met = set().union(*map(live_pairs, ROWS))
    assert met == {*all_live_pairs()} and len(met) >= 1900 and len(ROWS) >= 180


def test_the_fast_run_has_every_strategy():
    tested = Counter(name for row in FAST for name in strategies(row))
    stages = (f"ZeRO-{n}" for n in range(4))
    expected = {"TP", "SP", *context_parallel.METHODS, *schedules.SCHEDULES, *stages,
                *activation_ckpt.POLICIES}  # fmt: skip
    assert {*tested} == expected and min(tested.values()) >= 2
    pairs = {pair for row in FAST for pair in itertools.combinations(strategies(row), 2)}
    for name, stage in itertools.product(schedules.SCHEDULES, range(4)):
        assert (name, f"ZeRO-{stage}") in pairs


class PrimeBlock(gpt.Block):
    """5 numbers more, so that no d divides its parameters: 24 wide, 7,229, a prime."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Parameter(torch.empty(5))

    def forward(self, x):
        return super().forward(x) + nn.functional.pad(self.extra, (0, x.size(-1) - 5))


def prime_model(tied: bool):
    config = gpt.GPTConfig(3, 12, 24, 41, 7, tied=tied)
    model = gpt.GPT(config)
    model.h = nn.ModuleDict({name: PrimeBlock(config) for name in model.h})
    return model


@pytest.mark.parametrize(
    "case",
    [
        Case(d=2, zero=1), Case(d=3, zero=2, tied=False), Case(d=4, zero=3, optimizer="sgd"),
        Case(d=3, zero=3, reshard=0, m=3), Case(t=2, d=2, zero=3, recompute="full"),
        Case(d=4, zero=3, shard_size=2, p=2, m=3, tied=False), Case(d=4, zero=2, shard_size=2),
        Case(d=5, zero=3), Case(d=7, zero=1, optimizer="sgd"),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_with_a_prime_number_of_parameters(case):
    case = dataclasses.replace(case, n_layer=3)
    plan = gpt.PLAN | {"h.?": "replicated"}
    errors = judge(case, {"model": functools.partial(prime_model, case.tied), "plan": plan})
    assert errors.worst <= TOLERANCE, errors


@pytest.mark.parametrize("t, sequence", [(2, True), (3, False), (4, True)])
def test_gpt2s_own_vocabulary(t, sequence):
    """50257: no t divides it."""
    case = Case(t=t, m=1, b=2, n_layer=1, seq_len=4, vocab_size=50257, sequence=sequence)
    errors = judge(dataclasses.replace(case, dropout=0.1))
    assert errors.worst <= TOLERANCE, errors


@pytest.mark.slow
def test_a_slice_of_fuzz():
    rng = random.Random(2026)
    cases = [case for case in (draw_case(rng) for _ in range(8)) if refusal(case) is None]
    assert len(cases) >= 5
    for case in cases:
        ok, line = verdict(case)
        assert ok, (str(case), line)
