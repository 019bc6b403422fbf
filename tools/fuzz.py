"""Layouts drawn at random through the oracle. A failure prints the line that replays it.

    python -m tools.fuzz --n 20 --seed 0
    python -m tools.fuzz --case '{"t": 2, "d": 2, "zero": 1}'

One in four is saved on the way and resumed in another layout. One in eight or so of the
configurations drawn is invalid; it must be refused with a ValueError.
"""

import argparse
import dataclasses
import json
import random
import sys
import time

import activation_ckpt
import measure
import options
import pipeline
from tools.oracle import STEPS, Case, judge

# What may be another after a save and a resume; and the rows of a microbatch, and how many.
LAYOUT = ("t", "p", "d", "zero", "shard_size", "reshard", "schedule", "chunks", "sequence",
          "recompute", "layers", "every", "bucket_bytes")  # fmt: skip


def draw_resume(rng: random.Random, case: Case, largest_world: int = 8) -> dict:
    """For Case.resume: a layout in which the same run can go on."""
    while True:
        other = draw_case(rng, largest_world, resumes=0.0)
        fields = {name: getattr(other, name) for name in LAYOUT}
        rows, uneven = divmod(case.d * case.m * case.b, other.d)
        fields["b"] = rng.choice([b for b in (1, 2, 3) if rows % b == 0] or [1])
        fields["m"] = rows // fields["b"]
        if not uneven and refusal(dataclasses.replace(case, **fields)) is None:
            return {"at": rng.randint(1, STEPS - 1), **fields}


def draw_case(rng: random.Random, largest_world: int = 8, resumes: float = 0.25) -> Case:
    """Uniform over shapes rather than over layouts: odd sizes are as likely as even ones."""
    sizes = (1, 1, 2, 2, 3, 4)
    while True:
        t, p, d = (rng.choice(sizes) for _ in range(3))
        if t * p * d <= largest_world:
            break
    n_head = rng.choice((1, 2, 3, 4)) if rng.random() < 0.1 else t * rng.randint(1, 3)
    schedule = rng.choice(list(pipeline.SCHEDULES))
    chunks = {"interleaved": rng.choice((None, 1, 2, 3)), "zb-v": rng.choice((None, 2))}
    chunks = rng.randint(1, 2) if rng.random() < 0.05 else chunks.get(schedule)
    stages = p * (chunks or (2 if schedule in ("interleaved", "zb-v") else 1))
    n_layer = rng.randint(1, 6) if rng.random() < 0.1 else stages + rng.randint(0, 3)
    zero = rng.randint(0, 3)
    case = Case(
        t=t, p=p, d=d,
        m=rng.randint(1, 6),
        b=rng.randint(1, 3),
        sequence=(sequence := rng.random() < 0.5),
        zero=zero,
        shard_size=rng.choice((None, 1, 2 if d % 2 == 0 or rng.random() < 0.2 else None))
        if zero else None,
        reshard=rng.randint(0, 1) if zero == 3 else 1,
        schedule=schedule,
        chunks=chunks,
        recompute=rng.choice(activation_ckpt.POLICIES),
        layers=rng.choice((None, 1, 2)),
        every=rng.randint(1, 2 if n_layer > 1 else 1),
        tied=rng.random() < 0.5,
        optimizer=rng.choice(("adamw", "sgd")),
        clip=rng.choice((0.0, 0.1, 1e9)),  # off, active, there but larger than the norm
        masked=rng.random() < 0.7,
        attention=rng.choice(("sdpa", "explicit")),
        dropout=rng.choice((0.0, 0.0, 0.2)),
        n_layer=n_layer,
        n_head=n_head,
        # At least 4: over 2 entries LayerNorm gives +-1 whatever they are, so the true gradient
        # behind it is 0, and what is left to compare is rounding.
        n_embd=n_head * rng.randint(-(-4 // n_head), 6),
        vocab_size=rng.randint(5, 60),
        # What t does not divide is refused; some of those is tried.
        seq_len=rng.randint(1, 12) * (t if sequence and rng.random() < 0.9 else 1),
        bucket_bytes=rng.choice((1, 500, 3000, 10**9)),
        seed=rng.randint(0, 10**6),
    )  # fmt: skip
    if rng.random() < resumes and refusal(case) is None:
        case.resume = draw_resume(rng, case, largest_world)
    return case


def refusal(case: Case) -> str | None:
    """Why train_3d.py refuses this configuration, or None."""
    try:
        options.check(options.parser().parse_args(case.arguments()), case.world_size)
    except ValueError as error:
        return str(error)
    return None


def verdict(case: Case) -> tuple[bool, str]:
    """(whether it is as it should be, one line)."""
    reason = refusal(case)
    if reason is not None:
        return "\n" not in reason, f"refused: {reason}"
    try:
        errors = judge(case)
    except (RuntimeError, AssertionError) as error:
        return False, str(error).strip().splitlines()[-1]
    line = "  ".join(f"{kind} {getattr(errors, kind):.0e}" for kind in errors._fields[:4])
    return errors.worst <= measure.TOLERANCE, f"{line}  largest: {errors.where}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--n", type=int, default=20, help="layouts")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--case", metavar="JSON", help="replay this one")
    args = arguments.parse_args()
    if args.case:
        drawn = [Case(**json.loads(args.case))]
    else:
        rng = random.Random(args.seed)
        drawn = [draw_case(rng) for _ in range(args.n)]
    failed = refused = 0
    since = time.monotonic()
    for i, case in enumerate(drawn):
        ok, line = verdict(case)
        failed += not ok
        refused += line.startswith("refused")
        state = "ok  " if ok else "FAIL"
        then = "then t{t} p{p} d{d}".format(**case.resume) if case.resume else ""
        print(f"{i + 1:4d}/{len(drawn)} {state} t{case.t} p{case.p} d{case.d} {then:13s}  {line}",
              flush=True)  # fmt: skip
        if not ok:
            print(f"     replay: python -m tools.fuzz --case '{case}'", flush=True)
    print(f"{len(drawn) - failed - refused} equal to one process, {refused} refused, "
          f"{failed} failed; {time.monotonic() - since:.0f} s")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
