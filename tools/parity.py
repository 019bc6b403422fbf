"""The valid (t, p, d, ZeRO, schedule) on NPROC ranks beside one process: one table.

Left, in float64: the layout's largest relative error. It is a few roundings; a bug is not. Right,
the same layout in float32 beside one process in float32: what rounding alone does, sums being in
another order. So: is the difference that you see a bug? If it goes from 1e-6 to 1e-15 when you
change the dtype, it was rounding.

    python -m tools.parity --nproc 8
"""

import argparse
import sys
import time

import measure
import pipeline
from tools.oracle import Case, judge


def cases(nproc: int, n_head: int) -> list[Case]:
    """Every way to write nproc = t p d with whole heads; every option that means something there,
    but that schedules other than 1F1B meet ZeRO's first and last stage alone."""
    sizes = [
        (t, p, nproc // (t * p))
        for t in range(1, nproc + 1)
        for p in range(1, nproc + 1)
        if nproc % (t * p) == 0 and n_head % t == 0
    ]
    return [
        Case(t=t, p=p, d=d, m=max(2, p - 1), sequence=sequence, zero=z, shard_size=k,
             schedule=schedule, n_head=n_head, n_embd=2 * n_head, n_layer=2 * p + 1, vocab_size=45,
             seq_len=nproc)
        for t, p, d in sizes
        for z, k in stages(d)
        for schedule in (pipeline.SCHEDULES if p > 1 else ("1f1b",))
        if schedule == "1f1b" or (z, k) in ((0, None), (3, None))
        for sequence in ((False, True) if t > 1 and schedule in ("1f1b", "zb-v") else (False,))
    ]  # fmt: skip


def stages(d: int) -> list[tuple[int, int | None]]:
    """(ZeRO stage, shard size) of each way to share the state among d replicas."""
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
    print(f"{failed} mismatches (float64 beyond {measure.TOLERANCE:.0e}); "
          f"{time.monotonic() - since:.0f} s")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
