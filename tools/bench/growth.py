"""Measures how cost grows with the number of layers, microbatches and ranks, and with the schedule.

    make growth    python -m tools.bench.growth --out docs/bench/growth.json     4 minutes

Ranks are forked processes of one thread that communicate through gloo. The model is small (MODEL),
so dispatch is a large part of a step. The step is that of train_3d.py, in float32. The panels:

    layers        milliseconds per step on the slowest rank; ROWS rows in one microbatch
    microbatches  milliseconds per step on the slowest rank; microbatches of one row
    ranks         CPU milliseconds per step, summed over the ranks; ROWS rows in all, in one
                  microbatch per rank. There are more ranks than cores, so the time until the last
                  rank has finished says little.
    schedule      microseconds per action of 1F1B over its microbatches. "run": the executor of
                  pipeline.py, including autograd, with stages that are 1 x 1 matrices. "derive":
                  making the schedule and derive_programs(), over the 2 p m actions of all p ranks.

A round measures every point once, and rounds are repeated for `--minutes`. Each value is the median
of a few steps in new processes; "derive" is measured once per round, in this process. The table
shows the median of the rounds and their range. `make figures` draws docs/img/growth.svg from
docs/bench/growth.json. `foreign_cores` in this file: the cores that other processes used.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import gpt
import options
import pipeline
import schedules
import train_3d
from tools.bench import stats
from tools.verify.oracle import launch

MODEL = gpt.GPTConfig(n_layer=8, n_head=4, n_embd=64, vocab_size=256, seq_len=64)
ROWS, WARMUP, STEPS, ROUNDS = 8, 2, 5, 2  # ROUNDS: the least number of rounds
LAYERS, MICROBATCHES, RANKS = (2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
LENGTHS, DEPTHS = (16, 64, 128, 256, 512), (4, 16, 64)  # of schedules: m and p


# --- one measurement ------------------------------------------------------------------------------


def bound(ranks: int) -> dict:
    """Arguments of launch(): ranks are bound to cores, and wait for each other for long enough."""
    return {"before": functools.partial(stats.bind, ranks=ranks), "timeout": 600}


def steps_on_rank(config: gpt.GPTConfig, flags: str) -> tuple[list[float], list[float]]:
    """Seconds and CPU seconds of each timed step of this rank."""
    args = options.parser().parse_args(flags.split())
    tokens = torch.randint(config.vocab_size, (args.global_batch_size, config.seq_len))

    def read(step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens[list(rows)], tokens[list(rows)]

    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"))
    seconds, cpu_seconds = [], []
    for step in range(WARMUP + STEPS):
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.step(step)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return seconds[WARMUP:], cpu_seconds[WARMUP:]


def step_ms(
    ranks: int, flags: str, rows: int = ROWS, layers: int = MODEL.n_layer, cpu: bool = False
) -> float:
    """The median step on the slowest rank. cpu: CPU time instead, summed over the ranks."""
    config = dataclasses.replace(MODEL, n_layer=layers)
    flags = f"--global-batch-size {rows} {flags}"
    results = launch(ranks, steps_on_rank, config, flags, **bound(ranks))
    seconds, cpu_seconds = (zip(*times, strict=True) for times in zip(*results, strict=True))
    return 1e3 * statistics.median(map(sum, cpu_seconds) if cpu else map(max, seconds))


def run_on_rank(m: int, runs: int = 10) -> float:
    """Microseconds per action of this rank's stage: the median of some runs of 1F1B."""
    p, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    program = pipeline.derive_programs(schedules.SCHEDULES["1f1b"](p, m))[rank]
    pipe = pipeline.Pipeline({rank: nn.Linear(1, 1)}, p, group, torch.float32, "cpu", program)
    x, each = torch.ones(m, 1, 1, requires_grad=True), []
    for _ in range(runs):
        dist.barrier()
        start = time.perf_counter()
        pipe.run(program, x, lambda y, i: y.sum(), (1, 1))
        each.append(1e6 * (time.perf_counter() - start) / (2 * m))
    return statistics.median(each)


def run_us(ranks: int, m: int) -> float:
    return max(launch(ranks, run_on_rank, m, **bound(ranks)))


def derive_us(p: int, m: int) -> float:
    start = time.perf_counter()
    schedule = schedules.SCHEDULES["1f1b"](p, m)
    pipeline.derive_programs(schedule)
    return 1e6 * (time.perf_counter() - start) / sum(map(len, schedule))


# --- all measurements -----------------------------------------------------------------------------

AXES = {  # of each panel: what x is, and the unit of the values
    "layers": ("layers", "ms per step"),
    "microbatches": ("microbatches", "ms per step"),
    "ranks": ("ranks", "CPU ms per step, all ranks"),
    "schedule": ("microbatches", "microseconds per action"),
}


class Point(NamedTuple):
    panel: str
    series: str
    x: int
    measure: Callable[[], float]


def points() -> list[Point]:
    found = []

    def add(panel: str, series: str, x: int, measure: Callable, *args, **options) -> None:
        found.append(Point(panel, series, x, functools.partial(measure, *args, **options)))

    for n in LAYERS:
        for series, ranks, flags in (
            ("1 rank", 1, f"--micro-batch-size {ROWS}"),
            ("DDP, 2 ranks", 2, f"--micro-batch-size {ROWS // 2}"),
            ("TP, 2 ranks", 2, f"--micro-batch-size {ROWS} --tp 2"),
        ):
            add("layers", series, n, step_ms, ranks, flags, layers=n)
    for m in MICROBATCHES:
        add("microbatches", "1 rank", m, step_ms, 1, "--micro-batch-size 1", rows=m)
        add("microbatches", "1F1B, 2 ranks", m, step_ms, 2, "--micro-batch-size 1 --pp 2", rows=m)
    for n in RANKS:
        for series, stage in (("DDP", 0), ("ZeRO-1", 1)):
            flags = f"--micro-batch-size {ROWS // n} --zero {stage}"
            add("ranks", series, n, step_ms, n, flags, cpu=True)
    for m in LENGTHS:
        for ranks in (1, 2):
            add("schedule", f"run, {ranks} rank{'s' * (ranks > 1)}", m, run_us, ranks, m)
        for p in DEPTHS:
            add("schedule", f"derive, p = {p}", m, derive_us, p, m)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--minutes", type=float, default=4, metavar="N", help="time limit (at least two rounds)")
    add("--out", metavar="FILE", help="write all values as JSON")
    args = arguments.parse_args()
    rows = [point._asdict() | {"values": []} for point in points()]
    start, longest, others = time.perf_counter(), 0.0, []
    while len(others) < ROUNDS or time.perf_counter() - start + longest < 60 * args.minutes:
        began, used = time.perf_counter(), stats.machine_cpu_seconds() - sum(os.times()[:4])
        for row in rows:
            row["values"].append(row["measure"]())
        took = time.perf_counter() - began
        used = stats.machine_cpu_seconds() - sum(os.times()[:4]) - used
        longest, others = max(longest, took), [*others, max(0.0, used / took)]
        print(f"round {len(others)}: {took:.0f} s; others used {others[-1]:.2f} cores", flush=True)
    for row in rows:
        del row["measure"]
        low, middle, high = (f(row["values"]) for f in (min, statistics.median, max))
        name = f"{row['panel']:13}{row['series']:16}{row['x']:>4}"
        print(f"{name}{middle:10.1f} {AXES[row['panel']][1]} ({low:.1f} to {high:.1f})")
    if args.out:
        about = stats.provenance("make growth OUT=docs/bench/growth.json")
        about |= {
            "rounds": len(others),
            "foreign_cores": others,
            "model": dataclasses.asdict(MODEL),
        }
        stats.write(args.out, about | {"axes": AXES, "points": rows})


if __name__ == "__main__":
    main()
