"""Random configurations compared with one process: losses, norms, every gradient and parameter.

    python -m tools.fuzz --n 50 --seed 0
    python -m tools.fuzz --case '{"t": 2, "d": 2, "zero": 1}'            replay one

One in four is saved on the way and resumed in another layout. One in eight or so is invalid; it
must be refused in one line. A case that fails is reduced step by step, as long as it still fails.
At the end: how many of the layouts that ran had each pair of features.
"""

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator

import activation_ckpt
import options
import pipeline
from tools.oracle import STEPS, Case, judge

# What may be another after a save and a resume; and the rows of a microbatch, and how many.
LAYOUT = ("t", "p", "d", "zero", "shard_size", "nodes", "reshard", "schedule", "chunks", "sequence",
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
    zero, dtype = rng.randint(0, 3), rng.choice(("float64",) * 4 + ("float32", "bf16"))
    case = Case(
        t=t, p=p, d=d,
        m=rng.randint(1, 6),
        b=rng.randint(1, 3),
        sequence=(sequence := rng.random() < 0.5),
        zero=zero,
        shard_size=rng.choice((None, 1, 2 if d % 2 == 0 or rng.random() < 0.2 else None))
        if zero else None,
        nodes=1 if zero else rng.choice([1, *(k for k in (2, 3, 4) if d % k == 0)]),
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
        # Over 2 entries LayerNorm returns +-1 whatever they are: the gradient before it is 0, and
        # rounding is all that is left to compare. In bf16 4 entries are too few, too.
        n_embd=n_head * rng.randint(-(-(6 if dtype == "bf16" else 4) // n_head), 6),
        vocab_size=rng.randint(5, 60),
        # What t does not divide is refused; some of those is tried.
        seq_len=rng.randint(1, 12) * (t if sequence and rng.random() < 0.9 else 1),
        bucket_bytes=rng.choice((1, 500, 3000, 10**9)),
        dtype=dtype,
        grad_dtype=rng.choice((None, "float32", "bf16")) if dtype == "bf16" else None,
        reduce_dtype=rng.choice((None, "float32")) if dtype == "bf16" else None,
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
    return errors.within(case.dtype), f"{line}  largest: {errors.where}"


# --- a failure, made small ------------------------------------------------------------------------

PLAIN = {"t": 1, "p": 1, "d": 1, "zero": 0, "shard_size": None, "nodes": 1, "reshard": 1,
         "sequence": False, "schedule": "1f1b", "chunks": None, "recompute": "none", "every": 1,
         "layers": None, "dropout": 0.0, "masked": False, "clip": 0.0, "optimizer": "sgd",
         "attention": "sdpa", "tied": False, "dtype": "float64", "grad_dtype": None,
         "reduce_dtype": None, "bucket_bytes": 10**9, "seed": 0}  # fmt: skip
SMALLEST = {"m": 1, "b": 1, "n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 5, "seq_len": 1}


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect each, the largest simplifications first."""
    if case.resume:
        yield dataclasses.replace(case, resume=None)
        yield dataclasses.replace(case.parts[1][0], resume=None)  # its second layout alone
    for name, plain in PLAIN.items():
        if getattr(case, name) != plain:
            yield dataclasses.replace(case, **{name: plain})
    for name, least in SMALLEST.items():
        value = getattr(case, name)
        least = 6 if name == "n_embd" and case.dtype == "bf16" else least  # see draw_case
        # n_embd goes in steps of heads; the rest is halved, or is one less.
        steps = range(least, value) if name == "n_embd" else (least, value // 2, value - 1)
        for less in sorted({n for n in steps if least <= n < value}):
            yield dataclasses.replace(case, **{name: less})
    for name in ("t", "p", "d"):
        if getattr(case, name) > 2:
            yield dataclasses.replace(case, **{name: 2})
    for name in LAYOUT if case.resume else ():
        if case.resume[name] != PLAIN[name]:
            yield dataclasses.replace(case, resume=case.resume | {name: PLAIN[name]})


def shrink(case: Case, seconds: float = 120, say=print) -> Case:
    """A smaller case that also fails. Repeatedly takes the first simpler case that fails, until
    none does or the time is over."""
    end, tried = time.monotonic() + seconds, 0
    while True:
        for other in simpler(case):
            if time.monotonic() > end:
                say(f"     shrinking: {seconds:.0f} s are over, after {tried} tries")
                return case
            valid = len({*other.batches}) == 1 and all(
                refusal(part) is None for part, _, _ in other.parts
            )
            tried += valid
            if valid and not verdict(other)[0]:
                case = other
                break
        else:
            return case


# --- what was tested together ---------------------------------------------------------------------

STAGES = ("ddp", "zero1", "zero2", "zero3")
ALL = ["tp", "sp", *(name[:6] for name in pipeline.SCHEDULES), *STAGES, "hybrid", "kept", "nodes",
       "m>1", "b>1", "select", "full", "offloa", "drop", "explic", "untied", "mask", "odd v",
       "clip", "sgd", "fp32", "bf16", "reduce", "resume"]  # fmt: skip
# Features of which a layout has at most one.
ONE_OF = [STAGES, tuple(name[:6] for name in pipeline.SCHEDULES), ("select", "full", "offloa"),
          ("fp32", "bf16"), ("fp32", "reduce"), ("hybrid", "ddp"), ("nodes", "hybrid"),
          ("nodes", "kept"),
          *(("kept", stage) for stage in STAGES[:3]),
          *(("nodes", stage) for stage in STAGES[1:])]  # fmt: skip


def features(case: Case) -> list[str]:
    """Names, at most 6 letters each, of the features that have an effect in it: a schedule only
    with p > 1, a ZeRO stage only with d > 1, sequence parallelism only with t > 1."""
    live = {
        "tp": case.t > 1, "sp": case.sequence and case.t > 1,
        **{name[:6]: case.schedule == name and case.p > 1 for name in pipeline.SCHEDULES},
        **{name: case.zero == n and case.d > 1 for n, name in enumerate(STAGES)},
        "hybrid": 1 < (case.shard_size or case.d) < case.d,
        "kept": not case.reshard and case.d > 1, "nodes": case.nodes > 1,
        "m>1": case.m > 1, "b>1": case.b > 1,
        **{p[:6]: case.recompute == p for p in activation_ckpt.POLICIES if p != "none"},
        "drop": case.dropout > 0, "explic": case.attention == "explicit",
        "untied": not case.tied, "mask": case.masked, "odd v": case.vocab_size % case.t > 0,
        "clip": case.clip == 0.1, "sgd": case.optimizer == "sgd", "fp32": case.dtype == "float32",
        "bf16": case.dtype == "bf16", "reduce": case.reduce_dtype == "float32" and case.d > 1,
        "resume": case.resume is not None,
    }  # fmt: skip
    return [name for name in ALL if live[name]]


def coverage(cases: list[Case]) -> str:
    """How many layouts had each pair of features; - where a layout cannot have both."""
    met = {pair: 0 for pair in itertools.combinations(ALL, 2)}
    for case in cases:
        for pair in itertools.combinations(features(case), 2):
            met[pair] += 1
    for group in ONE_OF:
        for pair in itertools.combinations(sorted(group, key=ALL.index), 2):
            assert met.pop(pair) == 0, pair
    lines = []
    for j, row in enumerate(ALL):
        cells = (str(min(999, met[pair])) if (pair := (column, row)) in met else "-"
                 for column in ALL[:j])  # fmt: skip
        lines.append(f"{row:6s}" + "".join(f"{cell:>4s}" for cell in cells))
    lines.append(" " * 6 + "".join(f"{name[:3]:>4s}" for name in ALL[:-1]))
    never = [" and ".join(pair) for pair, n in met.items() if n == 0]
    lines.append(f"{len(met) - len(never)} of {len(met)} pairs of features were tested together"
                 + ("" if not never else "; not: " + ", ".join(never[:12]))
                 + (f", and {len(never) - 12} more" if len(never) > 12 else ""))  # fmt: skip
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--n", type=int, default=50, help="configurations")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--case", metavar="JSON", help="replay this one")
    args = arguments.parse_args(argv)
    if args.case:
        drawn = [Case(**json.loads(args.case))]
    else:
        rng = random.Random(args.seed)
        drawn = [draw_case(rng) for _ in range(args.n)]
    failed, refused, ran, since = 0, 0, [], time.monotonic()
    for i, case in enumerate(drawn):
        ok, line = verdict(case)
        refused += ok and line.startswith("refused")
        ran += [case] if ok and not line.startswith("refused") else []
        state = "ok  " if ok else "FAIL"
        then = "then t{t} p{p} d{d}".format(**case.resume) if case.resume else ""
        print(f"{i + 1:4d}/{len(drawn)} {state} t{case.t} p{case.p} d{case.d} {then:13s}  {line}",
              flush=True)  # fmt: skip
        if not ok:
            failed += 1
            print(f"     replay: python -m tools.fuzz --case '{case}'", flush=True)
            small = shrink(case)
            print(f"     smallest that fails: python -m tools.fuzz --case '{small}'\n"
                  f"     {verdict(small)[1]}", flush=True)  # fmt: skip
    seconds = time.monotonic() - since
    if len(drawn) > 1:
        print(coverage(ran))
    print(f"{len(ran)} equal to one process, {refused} refused, {failed} failed; {seconds:.0f} s, "
          f"{60 * len(drawn) / seconds:.0f} a minute")  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
