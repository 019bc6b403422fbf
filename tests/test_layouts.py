"""Layouts beside one process: float64, 1e-12, every gradient and every parameter after 3 steps."""

import itertools
import random

import pytest

from measure import TOLERANCE
from tools.fuzz import draw_case, refusal
from tools.oracle import Case, judge

FACTORS = {
    "layout": [  # (t, p, d)
        (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2),
        (4, 1, 1), (1, 4, 1), (1, 1, 4), (3, 2, 1), (1, 3, 2), (1, 2, 4), (2, 1, 4),
    ],
    "m": [1, 2, "p", 5],
    "schedule": ["gpipe", "1f1b"],
    "zero": [  # stage, --zero-shard-size, --zero-reshard-after-forward
        (0, None, 1), (1, None, 1), (2, None, 1), (3, None, 1), (3, None, 0),
        (1, "d/2", 1), (2, "d/2", 1), (3, "d/2", 1),
    ],
    "recompute": [("none", 1), ("full", 1), ("full", 2)],
    "tied": [True, False],
    "optimizer": ["adamw", "sgd"],
    "clip": [0.1, 0.0, 1e9],  # active in every step, off, larger than any norm
    "seed": [0, 7],
    "attention": ["sdpa", "explicit"],
    "masked": [True, False],
    "n_layer": [4, 5],
    "vocab_size": [40, 41],
    "bucket_bytes": [1, 3000, 10**9],  # one bucket a parameter, a few, one
}  # fmt: skip


def pairwise(factors: dict) -> list[dict]:
    """Rows in which every pair of values of two factors meets at least once. Greedy: a row is begun
    with a pair that is still missing, and filled with what covers most."""
    names = list(factors)

    def pairs(row: dict) -> set:
        met = [(n, row[n]) for n in names if n in row]
        return set(itertools.combinations(met, 2))

    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows, rng = [], random.Random(0)
    while missing:
        row = dict(rng.choice(sorted(missing, key=repr)))
        for name in names:
            if name not in row:
                gains = [len(pairs(row | {name: v}) & missing) for v in factors[name]]
                best = [v for v, g in zip(factors[name], gains, strict=True) if g == max(gains)]
                row[name] = rng.choice(best)
        missing -= pairs(row)
        rows.append(row)
    return rows


def case_of(row: dict) -> Case:
    t, p, d = row["layout"]
    recompute, every = row["recompute"]
    m = p if row["m"] == "p" else row["m"]
    zero, shard_size, reshard = row["zero"]
    shard_size = max(1, d // 2) if shard_size and d % 2 == 0 else None
    rest = {k: v for k, v in row.items() if k not in ("layout", "m", "recompute", "zero")}
    return Case(t=t, p=p, d=d, m=m, recompute=recompute, every=every, zero=zero,
                shard_size=shard_size, reshard=reshard, **rest)  # fmt: skip


@pytest.mark.parametrize("case", [case_of(row) for row in pairwise(FACTORS)], ids=str)
def test_layout_equals_one_process(case):
    errors = judge(case)
    assert errors.worst <= TOLERANCE, errors


def test_every_pair_of_options_is_met():
    rows = pairwise(FACTORS)
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(xs, ys)), (a, b)


def test_a_slice_of_fuzz():
    rng = random.Random(2026)
    cases = [case for case in (draw_case(rng) for _ in range(12)) if refusal(case) is None]
    assert len(cases) >= 8
    for case in cases:
        errors = judge(case)
        assert errors.worst <= TOLERANCE, (str(case), errors)
