"""Statistics of the benchmarks, and where their numbers come from.

A benchmark compares variants A and B in n launches of new processes. In a launch, the variants take
turns, forwards and then backwards (A B B A), so that a slow drift of the machine affects both. The
ratio of a launch is the median of the ratios of these pairs of steps. The result is the median of
the n launches and a 95 % bootstrap interval of this median (Efron 1979): launches are drawn with
replacement, because they differ by more than the steps of one launch do.
"""

import contextlib
import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
BUSY = 0.05  # cores that other processes may use during a launch
TRIES = 4  # launches, if other processes use more


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of `values`."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (4000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def launch_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The ratio of one launch. Steps 2 i and 2 i + 1 are a pair: the first in a forward turn, the
    second in a backward turn."""
    pairs = [[sum(x[i : i + 2]) for i in range(0, len(x), 2)] for x in (over, under)]
    return statistics.median(a / b for a, b in zip(*pairs, strict=True))


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def bind(rank: int, ranks: int) -> None:
    """Binds this process to one core, if there are at least as many cores as ranks. To be called
    before the process group is made: gloo's threads then run on the same core."""
    mine = cores()[rank : rank + 1]
    if len(cores()) >= ranks and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)


def machine_cpu_seconds() -> float:
    """CPU seconds of all processes since boot, and of other virtual machines on these cores. 0 on
    systems without /proc/stat."""
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        user, nice, system, _, _, _, _, steal = (int(n) for n in file.readline().split()[1:9])
        return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def undisturbed(run: Callable[[], list], tries: int = TRIES) -> tuple[list, float]:
    """Calls run(), which starts processes and waits for them, until other processes use at most
    BUSY of a core in the meantime, or `tries` times. Returns the least disturbed result, and the
    number of cores that other processes used."""
    results = []
    for _ in range(tries):
        before, used, start = machine_cpu_seconds(), sum(os.times()[:4]), os.times().elapsed
        result = run()
        own, wall = sum(os.times()[:4]) - used, os.times().elapsed - start
        results.append((result, max(0.0, machine_cpu_seconds() - before - own) / wall))
        if results[-1][1] <= BUSY:
            break
    return min(results, key=lambda pair: pair[1])


def provenance(command: str) -> dict:
    """What a reader needs to repeat a measurement: the first entries of each JSON file."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    names = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return {
        "command": command,
        "commit": git("rev-parse", "--short=10", "HEAD") + " and changes" * bool(changed),
        "date": str(datetime.date.today()),
        "cpu": (names or ["unknown"])[0],
        "cores": len(cores()),
        "torch": torch.__version__,
        "backend": "gloo",
    }


def write(path: str, found: dict) -> None:
    """Writes JSON with 5 digits per number, one entry per line."""

    def rounded(x):
        if isinstance(x, float):
            return float(f"{x:.5g}")
        if isinstance(x, dict):
            return {str(key): rounded(value) for key, value in x.items()}
        return [rounded(y) for y in x] if isinstance(x, list | tuple) else x

    def lines(value) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
        return json.dumps(value)

    entries = (f" {json.dumps(key)}: {lines(value)}" for key, value in rounded(found).items())
    Path(path).write_text("{\n" + ",\n".join(entries) + "\n}\n")
