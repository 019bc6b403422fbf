"""Compares every valid layout of N ranks with a single process, in float64 and in float32.

    make parity NPROC=8    python -m tools.verify.parity --nproc 8

A layout is a choice of t, p, d (sizes of tensor, pipeline and data parallelism), sequence
parallelism (SP), ZeRO stage and pipeline schedule. Each is trained for a few steps, and the table
has its largest relative errors in loss, gradient norm, gradients and parameters. The exit code is 1
if an error in float64 exceeds measure.TOLERANCE.

The two halves of the table tell rounding from bugs. A layout adds numbers in another order than one
process, so results differ by rounding: about 1e-6 in float32 and 1e-15 in float64. The error caused
by a bug does not shrink that much with the dtype.
"""

import argparse
import sys
import time

import measure
import schedules
from tools.verify.oracle import Case, judge


def cases(nproc: int, n_head: int) -> list[Case]:
    """All layouts with t p d = nproc in which t divides the heads.

    Options without effect are left out: schedules if p = 1, ZeRO if d = 1, SP if t = 1. To save
    time, schedules other than 1F1B are combined with ZeRO stages 0 and 3 only, and SP with 1F1B and
    with schedules that have several chunks and split the backward.
    """
    sizes = [
        (t, p, nproc // (t * p))
        for t in range(1, nproc + 1)
        for p in range(1, nproc + 1)
        if nproc % (t * p) == 0 and n_head % t == 0
    ]
    with_sp = ["1f1b", *(name for name, entry in schedules.SCHEDULES.items()
                         if entry.chunks > 1 and entry.splits_backward)]  # fmt: skip
    return [
        Case(t=t, p=p, d=d, m=max(2, p - 1), sequence=sequence, zero=z, shard_size=k,
             schedule=schedule, n_head=n_head, n_embd=2 * n_head, n_layer=2 * p + 1, vocab_size=45,
             seq_len=nproc)
        for t, p, d in sizes
        for z, k in stages(d)
        for schedule in (schedules.SCHEDULES if p > 1 else ("1f1b",))
        if schedule == "1f1b" or (z, k) in ((0, None), (3, None))
        for sequence in ((False, True) if t > 1 and schedule in with_sp else (False,))
    ]  # fmt: skip


def stages(d: int) -> list[tuple[int, int | None]]:
    """(ZeRO stage, shard size or None) for d data-parallel ranks."""
    hybrid = [(3, d // 2)] if d > 2 and d % 2 == 0 else []
    return [(z, None) for z in range(4 if d > 1 else 1)] + hybrid


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks")
    nproc = arguments.parse_args().nproc
    columns = "     loss     norm  gradient parameter"
    print(f" t  p  d  SP  zero schedule    | float64{columns} | float32{columns}")
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
        sp = "SP" if case.sequence else ""
        print(
            f"{case.t:2d} {case.p:2d} {case.d:2d}  {sp:2s}  {zero_name:>4s} {case.schedule:11s} "
            f"|       {numbers[0]} |       {numbers[1]}  {'ok' if ok else 'MISMATCH'}",
            flush=True,
        )
    print(f"{failed} mismatches (float64 error above {measure.TOLERANCE:.0e}); "
          f"{time.monotonic() - since:.0f} s")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
