"""Trains random configurations and compares each with a single process.

    make fuzz N=50 SEED=0    python -m tools.verify.fuzz --n 50 --seed 0
    python -m tools.verify.fuzz --case '{"t": 2, "d": 2, "zero": 1}'  replays one configuration

Compared are losses, gradient norms, every gradient and every parameter (tools/verify/oracle.py). A
quarter of the runs are saved and resumed in another layout. About one configuration in eight is
invalid and must be refused with a one-line message.

It prints one line per configuration with the largest relative errors. A configuration that fails is
printed as a command that replays it, and is then reduced to a smaller one that also fails. The
table at the end counts how many valid configurations had each pair of features. The exit code is 1
if a configuration failed, or if those with one feature are refused far more often than the others:
then draw_case() does not know what the feature needs, and the feature is hardly tested.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator

import activation_ckpt
import context_parallel
import options
import schedules
from tools.verify.oracle import FIELDS, STEPS, Case, judge

# Fields of a Case that may change when a run is resumed. b and m may change, too, as long as the
# global batch stays the same.
LAYOUT = ["t", "c", "p", "d", "bucket_bytes", *(f for f in FIELDS if FIELDS[f].kind == "layout")]


def draw_resume(rng: random.Random, case: Case, largest_world: int = 8) -> dict:
    """A random layout in which the run can be resumed, as a value for Case.resume."""
    while True:
        other = draw_case(rng, largest_world, resumes=0.0)
        fields = {name: getattr(other, name) for name in LAYOUT}
        rows, uneven = divmod(case.d * case.m * case.b, other.d)
        fields["b"] = rng.choice([b for b in (1, 2, 3) if rows % b == 0] or [1])
        fields["m"] = rows // fields["b"]
        if not uneven and refusal(dataclasses.replace(case, **fields)) is None:
            return {"at": rng.randint(1, STEPS - 1), **fields}


def draw_option(rng: random.Random, option: argparse.Action):
    """A random value: on or off, one of the choices, or a number. Otherwise, the default."""
    others = [option.const] if option.nargs == 0 else option.choices or ()
    if option.type and not others:
        others = (1, 2)
    return rng.choice([*dict.fromkeys([option.default, *others])])


def draw_case(rng: random.Random, largest_world: int = 8, resumes: float = 0.25) -> Case:
    """A random configuration of at most `largest_world` ranks.

    resumes: probability that it is resumed in another layout. Odd sizes are as likely as even ones.
    """
    sizes = (1, 1, 2, 2, 3, 4)
    while True:
        t, c, p, d = (rng.choice(sizes) for _ in range(4))
        if t * c * p * d <= largest_world:
            break
    schedule, entry = rng.choice(list(schedules.SCHEDULES.items()))
    chunks = rng.choice((None, *((1, 2, 3) if entry.any_chunks else (entry.chunks,))))
    chunks = rng.randint(1, 2) if rng.random() < 0.05 else chunks
    stages = p * (chunks or entry.chunks)
    n_layer = rng.randint(1, 6) if rng.random() < 0.1 else stages + rng.randint(0, 3)
    dtype = rng.choice(("float64",) * 4 + ("float32", "bf16"))
    drawn = {field: draw_option(rng, option) for field, option in FIELDS.items()}
    # Values that depend on others, or that need another distribution. One in ten does not fit t and
    # c, and is refused.
    by_heads = t * c if c > 1 and drawn["cp_attention"] == "ulysses" else t
    n_head = rng.choice((1, 2, 3, 4)) if rng.random() < 0.1 else by_heads * rng.randint(1, 3)
    shards = t if drawn["sequence"] else 1
    multiple = (c * math.lcm(2, shards) if c > 1 else shards) if rng.random() < 0.9 else 1
    drawn |= dict(
        t=t, c=c, p=p, d=d,
        m=rng.randint(1, 6),
        b=rng.randint(1, 3),
        shard_size=rng.choice((None, 1, 2 if d * c % 2 == 0 or rng.random() < 0.2 else None)),
        nodes=rng.choice([1, *(k for k in (2, 3, 4) if d * c % k == 0)]),
        schedule=schedule,
        chunks=chunks,
        recompute=rng.choice(activation_ckpt.POLICIES),
        compile=False,  # takes half a minute
        tied=rng.random() < 0.5,
        clip=rng.choice((0.0, 0.1, 1e9)),  # off, active, larger than the norm
        masked=rng.random() < 0.7,
        dropout=rng.choice((0.0, 0.0, 0.2)),
        document_mask=rng.choice((None, 1)),
        n_layer=n_layer,
        n_head=n_head,
        # The LayerNorm of 2 entries is always +-1, so gradients are 0 apart from rounding, which
        # cannot be compared. In bf16 even 4 entries are too few.
        n_embd=n_head * rng.randint(-(-(6 if dtype == "bf16" else 4) // n_head), 6),
        vocab_size=rng.randint(5, 60),
        seq_len=rng.randint(1, 12 if c == 1 else 4) * multiple,
        bucket_bytes=rng.choice((1, 500, 3000, 10**9)),
        dtype=dtype,
        seed=rng.randint(0, 10**6),
    )  # fmt: skip
    unmet = options.unmet(options.parser().parse_args(Case(**drawn).arguments()))
    drawn |= {f: option.default for f, option in FIELDS.items() if option.dest in unmet}
    case = Case(**drawn)
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
    """(whether the case passed, a line to print). A refusal in one line passes."""
    reason = refusal(case)
    if reason is not None:
        return "\n" not in reason, f"refused: {reason}"
    try:
        errors = judge(case)
    except (RuntimeError, AssertionError) as error:
        return False, str(error).strip().splitlines()[-1]
    line = "  ".join(f"{kind} {getattr(errors, kind):.0e}" for kind in errors._fields[:4])
    return errors.within(case.dtype), f"{line}  largest: {errors.where}"


# --- reduction of a failing case ------------------------------------------------------------------

PLAIN = {"t": 1, "c": 1, "p": 1, "d": 1,
         **{f: option.default for f, option in FIELDS.items() if option.kind != "size"},
         "masked": False, "clip": 0.0, "optimizer": "sgd", "tied": False, "dtype": "float64",
         "bucket_bytes": 10**9}  # fmt: skip
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
        # These must be multiples, so all smaller values are tried. Other sizes are set to the
        # smallest value, halved, or reduced by one.
        multiples = name in ("n_head", "n_embd", "seq_len")
        steps = range(least, value) if multiples else (least, value // 2, value - 1)
        for less in sorted({n for n in steps if least <= n < value}):
            yield dataclasses.replace(case, **{name: less})
    for name in ("t", "c", "p", "d"):
        if getattr(case, name) > 2:
            yield dataclasses.replace(case, **{name: 2})
    for name in LAYOUT if case.resume else ():
        if case.resume[name] != PLAIN[name]:
            yield dataclasses.replace(case, resume=case.resume | {name: PLAIN[name]})


def shrink(case: Case, seconds: float = 120, say=print) -> Case:
    """A smaller case that also fails.

    Repeatedly takes the first simpler case that fails, until none does or time runs out.
    """
    end, tried = time.monotonic() + seconds, 0
    while True:
        for other in simpler(case):
            if time.monotonic() > end:
                say(f"     stopped reducing after {seconds:.0f} s and {tried} tries")
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


# --- coverage: pairs of features ------------------------------------------------------------------

STAGES = ("ddp", "zero1", "zero2", "zero3")
ALL = ["tp", "sp", "spkeep", *(name[:6] for name in context_parallel.METHODS),
       *(name[:6] for name in schedules.SCHEDULES), *STAGES, "hybrid", "kept", "nodes",
       "m>1", "b>1", "select", "full", "offloa", "drop", "explic", "untied", "mask", "odd v",
       "clip", "sgd", "fp32", "bf16", "reduce", "resume", "docs"]  # fmt: skip
# Features of which a layout has at most one.
ONE_OF = [STAGES, tuple(name[:6] for name in context_parallel.METHODS),
          tuple(name[:6] for name in schedules.SCHEDULES), ("select", "full", "offloa"),
          ("fp32", "bf16"), ("fp32", "reduce"), ("hybrid", "ddp"), ("nodes", "hybrid"),
          ("nodes", "kept"),
          *(("kept", stage) for stage in STAGES[:3]),
          *(("nodes", stage) for stage in STAGES[1:])]  # fmt: skip


def features(case: Case) -> list[str]:
    """Names (at most 6 letters) of the features that have an effect in this case.

    A schedule has an effect only with p > 1, a ZeRO stage with d c > 1, sequence parallelism with
    t > 1.
    """
    replicas = case.d * case.c
    live = {
        "tp": case.t > 1, "sp": case.sequence and case.t > 1,
        "spkeep": case.keep_gathered and case.t > 1,
        **{name[:6]: case.cp_attention == name and case.c > 1 for name in context_parallel.METHODS},
        **{name[:6]: case.schedule == name and case.p > 1 for name in schedules.SCHEDULES},
        **{name: case.zero == n and replicas > 1 for n, name in enumerate(STAGES)},
        "hybrid": 1 < (case.shard_size or replicas) < replicas,
        "kept": not case.reshard and replicas > 1, "nodes": case.nodes > 1,
        "m>1": case.m > 1, "b>1": case.b > 1,
        **{p[:6]: case.recompute == p for p in activation_ckpt.POLICIES if p != "none"},
        "drop": case.dropout > 0, "explic": case.attention == "explicit",
        "untied": not case.tied, "mask": case.masked, "odd v": case.vocab_size % case.t > 0,
        "clip": case.clip == 0.1, "sgd": case.optimizer == "sgd", "fp32": case.dtype == "float32",
        "bf16": case.dtype == "bf16", "reduce": case.reduce_dtype == "float32" and replicas > 1,
        "resume": case.resume is not None, "docs": case.document_mask is not None,
    }  # fmt: skip
    return [name for name in ALL if live[name]]


def coverage(cases: list[Case]) -> str:
    """Table: how many cases had each pair of features; "-" for a pair that no case can have."""
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


def refused_too_often(drawn: list[Case], refused: list[bool]) -> list[str]:
    """A line for each feature of whose cases the share refused is more than 15 percentage points
    above that of the others, by more than 4 standard deviations."""
    lines, live = [], [features(case) for case in drawn]
    for name in ALL:
        mine = [no for names, no in zip(live, refused, strict=True) if name in names]
        n, of_others = len(drawn) - len(mine), sum(refused) - sum(mine)
        limit = min(1.0, 0.15 + (of_others + 1) / (n + 2))  # 1 of 2 is added: n may be small
        deviation = math.sqrt(limit * (1 - limit) * len(mine))
        if sum(mine) > limit * len(mine) + 4 * deviation:
            counts = f"{sum(mine)} of {len(mine)} refused, and {of_others} of the other {n}"
            lines.append(f"{name}: {counts}: draw_case() must draw what {name} requires")
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--n", type=int, default=50, help="number of configurations")
    arguments.add_argument("--seed", type=int, default=0, help="of the random configurations")
    arguments.add_argument("--case", metavar="JSON", help="replay this configuration")
    args = arguments.parse_args(argv)
    if args.case:
        drawn = [Case(**json.loads(args.case))]
    else:
        rng = random.Random(args.seed)
        drawn = [draw_case(rng) for _ in range(args.n)]
    failed, refused, ran, since = 0, [], [], time.monotonic()
    for i, case in enumerate(drawn):
        ok, line = verdict(case)
        refused.append(ok and line.startswith("refused"))
        ran += [case] if ok and not refused[-1] else []
        state = "ok  " if ok else "FAIL"
        sizes = "t{t} c{c} p{p} d{d}"
        then = f"then {sizes}".format(**case.resume) if case.resume else ""
        layout = f"{sizes.format(**vars(case))} {then:16s}"
        print(f"{i + 1:4d}/{len(drawn)} {state} {layout}  {line}", flush=True)
        if not ok:
            failed += 1
            print(f"     replay: python -m tools.verify.fuzz --case '{case}'", flush=True)
            small = shrink(case)
            print(f"     smallest that fails: python -m tools.verify.fuzz --case '{small}'\n"
                  f"     {verdict(small)[1]}", flush=True)  # fmt: skip
    seconds = time.monotonic() - since
    if len(drawn) > 1:
        print(coverage(ran))
    print(f"{len(ran)} equal to one process, {sum(refused)} refused, {failed} failed; "
          f"{seconds:.0f} s, {60 * len(drawn) / seconds:.0f} per minute")  # fmt: skip
    for line in (too_often := refused_too_often(drawn, refused)):
        print(line)
    sys.exit(1 if failed or too_often else 0)


if __name__ == "__main__":
    main()
