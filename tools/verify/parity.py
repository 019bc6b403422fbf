"""Compares every valid layout of N ranks with a single process, in float64 and in float32.

    make parity NPROC=8    python -m tools.verify.parity --nproc 8

A layout is a choice of t, c, p, d (sizes of tensor, context, pipeline and data parallelism),
sequence parallelism (SP), the attention of context parallelism, ZeRO stage and pipeline schedule.
Each is trained for a few steps, and the table has its largest relative errors in loss, gradient
norm, gradients and parameters. The exit code is 1 if an error in float64 exceeds measure.TOLERANCE.

The two halves of the table tell rounding from bugs. A layout adds numbers in another order than one
process, so results differ by rounding: about 1e-6 in float32 and 1e-15 in float64. The error caused
by a bug does not shrink that much with the dtype.
"""

import argparse
import itertools
import sys
import time

import context_parallel
import measure
import schedules
from tools.verify.oracle import Case, judge


def cases(nproc: int, n_head: int) -> list[Case]:
    """All layouts with t c p d = nproc in which t (with Ulysses, t c) divides the heads.

    Options without effect are left out: schedules if p = 1, ZeRO if d c = 1, SP if t = 1. To save
    time, schedules other than 1F1B are combined with ZeRO stages 0 and 3 only, and SP with 1F1B and
    with schedules that have several chunks and split the backward. If c > 1, only these schedules
    and ZeRO stages are used, TP with SP only, and Ulysses and gathered keys with 1F1B and DDP only.
    """
    divisors = [n for n in range(1, nproc + 1) if nproc % n == 0]
    sizes = [
        (t, c, p, nproc // (t * c * p))
        for c, t, p in itertools.product(divisors, repeat=3)
        if nproc % (t * c * p) == 0 and n_head % t == 0
    ]
    with_sp = ["1f1b", *(name for name, entry in schedules.SCHEDULES.items()
                         if entry.chunks > 1 and entry.splits_backward)]  # fmt: skip
    return [
        Case(t=t, c=c, p=p, d=d, m=max(2, p - 1), sequence=sequence, cp_attention=attention,
             zero=z, shard_size=k, schedule=schedule, n_head=n_head, n_embd=2 * n_head,
             n_layer=2 * p + 1, vocab_size=45, seq_len=nproc if c == 1 else 2 * nproc)
        for t, c, p, d in sizes
        for attention in (context_parallel.METHODS if c > 1 else ("ring",))
        if attention != "ulysses" or n_head % (t * c) == 0
        for z, k in stages(d * c)
        for schedule in (schedules.SCHEDULES if p > 1 else ("1f1b",))
        if (schedule == "1f1b" and c == 1) or (z, k) in ((0, None), (3, None))
        if c == 1 or (schedule in with_sp and attention == "ring") or (schedule, z) == ("1f1b", 0)
        for sequence in ((False, True) if t > 1 and schedule in with_sp else (False,))
        if c == 1 or sequence == (t > 1)
    ]  # fmt: skip


def stages(d: int) -> list[tuple[int, int | None]]:
    """(ZeRO stage, shard size or None) for gradients that are summed over d ranks."""
    hybrid = [(3, d // 2)] if d > 2 and d % 2 == 0 else []
    return [(z, None) for z in range(4 if d > 1 else 1)] + hybrid


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks")
    nproc = arguments.parse_args().nproc
    columns = "     loss     norm  gradient parameter"
    print(f" t  c  p  d  SP  attention zero schedule    | float64{columns} | float32{columns}")
    failed, since = 0, time.monotonic()
    for case in cases(nproc, n_head=24):
        errors = judge(case)
        case.dtype = "float32"
        rounding = judge(case)
        ok = errors.worst <= measure.TOLERANCE
        failed += not ok
        zero_name = f"{case.zero}" + (f"/{case.shard_size}" if case.shard_size else "")
        numbers = [
            f"{e.loss:9.1e}{e.norm:9.1e}{e.gradient:10.1e}{e.parameter:10.1e}"
            for e in (errors, rounding)
        ]
        sp, attention = "SP" * case.sequence, case.cp_attention if case.c > 1 else ""
        print(
            f"{case.t:2d} {case.c:2d} {case.p:2d} {case.d:2d}  {sp:2s}  {attention:9s} "
            f"{zero_name:>4s} {case.schedule:11s} "
            f"|       {numbers[0]} |       {numbers[1]}  {'ok' if ok else 'MISMATCH'}",
            flush=True,
        )
    print(f"{failed} mismatches (float64 error above {measure.TOLERANCE:.0e}); "
          f"{time.monotonic() - since:.0f} s")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
