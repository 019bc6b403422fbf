"""Larger and odd group sizes compared with one process. Slow: up to 16 ranks."""

import pytest

from measure import TOLERANCE
from tools.verify.oracle import Case, judge

MODEL = dict(n_layer=3, steps=2, b=1)
T5 = dict(t=5, n_head=5, n_embd=20, vocab_size=41, seq_len=10, **MODEL)  # 9, 9, 9, 9, 5 words
T7 = dict(t=7, n_head=7, n_embd=28, vocab_size=41, seq_len=14, **MODEL)  # six times 6, and 5
HOSTS = dict(d=6, b=1, m=3, n_layer=2, steps=2)  # shards of 2 ranks, replicated on 3 hosts

LARGE = [
    Case(sequence=True, **T5), Case(dropout=0.1, tied=False, **T5),
    Case(sequence=True, recompute="full", optimizer="sgd", **T5),
    Case(sequence=True, dropout=0.1, **T7), Case(zero=2, d=2, optimizer="sgd", **T7),
    Case(p=5, **MODEL | {"n_layer": 7}), Case(p=5, schedule="zb-h1", m=7, **MODEL | {"n_layer": 8}),
    Case(p=5, schedule="interleaved", chunks=2, m=6, **MODEL | {"n_layer": 11}),
    Case(p=5, schedule="zb-v", m=9, optimizer="sgd", **MODEL | {"n_layer": 12}),
    Case(p=7, schedule="gpipe", tied=False, m=3, **MODEL | {"n_layer": 9}),
    Case(p=7, m=8, optimizer="sgd", recompute="full", **MODEL | {"n_layer": 10}),
    Case(p=7, schedule="zb-v", m=3, **MODEL | {"n_layer": 15}),
    Case(t=2, p=3, d=2, zero=1, sequence=True, seq_len=8, n_layer=4, b=1, m=3, steps=2),
    Case(t=2, p=3, d=2, zero=3, schedule="zb-v", n_layer=7, b=1, m=3, steps=2, optimizer="sgd"),
    Case(t=2, p=2, d=4, nodes=2, n_layer=3, b=1, steps=2),
    Case(t=2, p=2, d=4, zero=3, shard_size=2, schedule="zb-h1", sequence=True, seq_len=8, n_layer=3,
         b=1, steps=2, recompute="selective"),
    Case(zero=1, shard_size=2, **HOSTS), Case(zero=2, shard_size=2, optimizer="sgd", **HOSTS),
    Case(zero=3, shard_size=2, tied=False, **HOSTS),
    Case(zero=3, shard_size=2, reshard=0, recompute="full", **HOSTS),
    Case(nodes=3, **HOSTS), Case(nodes=3, **HOSTS | {"d": 3}, optimizer="sgd"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_large_or_odd_layout_equals_one_process(case):
    errors = judge(case)
    assert errors.worst <= TOLERANCE, errors
