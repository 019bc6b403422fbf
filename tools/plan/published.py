"""Compares the cost model of tools/plan/cost.py with published measurements.

    make published               python -m tools.plan.published
    make published ARGS=--fit    also fits the constants of the model to the tables (3 min)

For each row of a published table it prints published | predicted | error. The last lines are a
summary by table. It has the errors of four predictions:

- the model;
- the model with an anchor: one measured row of the table scales the others (`make plan` has
  --anchor);
- a guess: every row runs at the same FLOP/s per GPU, namely the mean of the table's other rows;
- a guess from one row: all rows run at its FLOP/s per GPU.

A model must beat the guess to be of any use. For layouts of the same job, the summary also counts
the pairs that the model orders as published, and what its choice loses (see `losses`).

The constants of `cost.Hardware` (FITTED below) were fitted to the tables in TABLES, and are the
same for all. To show that they are not tuned to a single table, --fit fits them to all tables but
one and predicts the one left out, for each table. The tables in UNSEEN were not used in a fit.

Two tables contain no times: the memory of the ZeRO stages and the bubble rates of three schedules.
They are compared with the formula of zero.py and with the simulation of schedules.py.

t, p and d are the sizes of tensor, pipeline and data parallelism, b is the microbatch size, m the
number of microbatches of a step, and chunks the number of stages per rank.

Sources: Narayanan et al. 2021 (arXiv 2104.04473), tables 1 and 2, with the microbatch sizes and
chunks of Megatron-LM's examples/academic_paper_scripts/sc21. Korthikanti et al. 2022 (2205.05198),
tables 4 and 5. Rajbhandari et al. 2020 (1910.02054), table 1. Qi et al. 2023 (2401.10241), tables 3
to 5. All times were measured on A100s with 80 GB in DGX machines with 8 x 200 Gbit/s of network
(Qi et al.: RoCE). tools/plan/unseen.py has the sources of the unseen tables.
"""

import argparse
import collections
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import gpt
from tools.plan import cost, unseen
from tools.plan.cost import DEFAULT_PROGRAM, HARDWARE, Hardware, Layout, Program

A100 = HARDWARE["a100-80"]
SEQ, VOCABULARY = 2048, 51200
# Megatron-LM in 2021: a rank waits for tp's all-reduces, also in backward, and for its transfers.
# Each tp rank sends 1/t of a boundary tensor. Megatron's DDP all-reduces after backward (LOCAL),
# PyTorch's overlaps with it (TORCH).
LOCAL = Program(hides_tp=False, hides_dp=False, scatters=True, waits=True)
TORCH = LOCAL._replace(hides_dp=True)


class Row(NamedTuple):
    name: str
    seconds: float  # per step (Korthikanti's table 4: per block)
    flops: float  # of all GPUs, counted as the authors of the table do
    config: gpt.GPTConfig
    layout: Layout
    program: Program = LOCAL
    split: list[range] | None = None
    phase: str = ""  # of one block: "F" forward, "B" backward; "": a step
    hardware: Hardware = A100


def megatron(n_layer: int, n_head: int, n_embd: int, seq_len: int = SEQ) -> gpt.GPTConfig:
    """Megatron-LM's model: explicit attention, which saves the scores, and dropout."""
    return gpt.GPTConfig(n_layer, n_head, n_embd, VOCABULARY, seq_len, "explicit", dropout=0.1)


def flops(config: gpt.GPTConfig, batch: int, recompute: str) -> float:
    """FLOPs of a step, counted as the papers do.

    Full recomputation: 2104.04473, equation 3. Otherwise 2205.05198, equation 7, which leaves out
    what is recomputed.
    """
    h, s, n = config.n_embd, config.seq_len, config.n_layer
    dense, head = {"full": (96, 16), "none": (72, 12), "selective": (72, 12)}[recompute]
    return dense * batch * s * n * h * h * (1 + s / (6 * h) + config.vocab_size / (head * n * h))


# model in gpt.MODELS, t, p, GPUs, batch, b, chunks, program, TFLOP/s per GPU
SC21_1 = [
    ("1.7b", 1, 1, 32, 512, 16, 1, TORCH, 137), ("3.6b", 2, 1, 64, 512, 16, 1, TORCH, 138),
    ("7.5b", 4, 1, 128, 512, 16, 1, TORCH, 142), ("18b", 8, 1, 256, 1024, 8, 1, TORCH, 135),
    ("39b", 8, 2, 512, 1536, 4, 1, LOCAL, 138), ("76b", 8, 4, 1024, 1792, 2, 3, LOCAL, 140),
    ("145b", 8, 8, 1536, 2304, 2, 2, LOCAL, 148), ("310b", 8, 16, 1920, 2160, 1, 2, LOCAL, 155),
    ("530b", 8, 35, 2520, 2520, 1, 3, LOCAL, 163), ("1t", 8, 64, 3072, 3072, 1, 1, LOCAL, 163),
]  # fmt: skip
# model, p (with t = 8; 0: ZeRO-3 and t = 1), GPUs, batch, b, TFLOP/s per GPU
SC21_2 = [
    ("175b", 0, 384, 1536, 4, 144), ("175b", 0, 768, 1536, 2, 88), ("175b", 0, 1536, 1536, 1, 44),
    ("530b", 0, 640, 2560, 4, 138), ("530b", 0, 1120, 2240, 2, 98), ("530b", 0, 2240, 2240, 1, 48),
    ("175b", 12, 384, 1536, 1, 153), ("175b", 12, 768, 1536, 1, 149),
    ("175b", 12, 1536, 1536, 1, 141), ("530b", 35, 560, 2240, 1, 171),
    ("530b", 35, 1120, 2240, 1, 167), ("530b", 35, 2240, 2240, 1, 159),
]  # fmt: skip
# model, n_layer, heads, hidden size, p (with t = 8), chunks, d, batch, b, seconds with full
# recomputation, seconds with selective recomputation and sequence parallelism
KORTHIKANTI_5 = [
    ("22B", 48, 64, 6144, 1, 1, 1, 4, 4, 1.42, 1.10),
    ("175B", 96, 96, 12288, 8, 3, 1, 64, 1, 18.13, 13.75),
    ("530B", 105, 128, 20480, 35, 3, 1, 280, 1, 49.05, 37.83),
    ("1T", 128, 160, 25600, 64, 1, 1, 512, 1, 94.42, 71.49),
    ("530B, d = 8", 105, 128, 20480, 35, 3, 8, 2240, 1, None, 39.15),
]
# One block of the 22B model with t = 8, b = 4: recomputation, sequence parallelism, ms of forward,
# ms of backward
KORTHIKANTI_4 = [
    ("none", False, 7.7, 11.9), ("none", True, 7.2, 11.8), ("full", False, 7.7, 19.5),
    ("selective", False, 7.7, 13.2), ("selective", True, 7.2, 13.1),
]  # fmt: skip
# model, n_layer, heads, hidden size, p, b; by m: samples per GPU and second of 1F1B, interleaved
# 1F1B and ZB-1p (ZB-H1). ZERO_BUBBLE_5 has their bubble rates by model and m, which the authors
# computed from profiled times.
ZERO_BUBBLE = [
    ("1.5B", 22, 24, 2304, 8, 6, {24: (11.8, 13.1, 12.9), 32: (12.5, 13.4, 13.4),
                                  64: (13.6, 13.9, 14.2)}),
    ("6.2B", 30, 32, 4096, 8, 3, {24: (3.5, 4.01, 3.88), 32: (3.7, 4.08, 4.0),
                                  64: (4.03, 4.19, 4.2)}),
    ("14.6B", 46, 40, 5120, 16, 1, {48: (1.4, 1.54, 1.61), 64: (1.49, 1.59, 1.67),
                                    128: (1.64, 1.66, 1.76)}),
    ("28.3B", 62, 48, 6144, 32, 1, {96: (0.76, 0.82, 0.87), 128: (0.8, 0.85, 0.9),
                                    256: (0.88, 0.9, 0.96)}),
]  # fmt: skip
ZERO_BUBBLE_5 = {
    "1.5B": {24: (0.2431, 0.1055, 0.1585), 32: (0.1985, 0.0818, 0.1242),
             64: (0.1240, 0.0443, 0.0674)},
    "6.2B": {24: (0.2347, 0.0808, 0.1323), 32: (0.1898, 0.0628, 0.1045),
             64: (0.1091, 0.0320, 0.0554)},
    "14.6B": {48: (0.2552, 0.1104, 0.1397), 64: (0.2082, 0.0852, 0.1088),
              128: (0.1251, 0.0445, 0.0576)},
    "28.3B": {96: (0.2646, 0.1493, 0.1421), 128: (0.2168, 0.1164, 0.1106),
              256: (0.1352, 0.0624, 0.0594)},
}  # fmt: skip
# By number of parameters: GB per rank of (ZeRO-1, 2, 3) for d = 1, 4, 16, 64, 256, 1024
ZERO_1 = {
    7.5e9: [(120, 120, 120), (52.5, 41.3, 30), (35.6, 21.6, 7.5), (31.4, 16.6, 1.88),
            (30.4, 15.4, 0.47), (30.1, 15.1, 0.12)],
    128e9: [(2048, 2048, 2048), (896, 704, 512), (608, 368, 128), (536, 284, 32), (518, 263, 8),
            (513, 257, 2)],
    1e12: [(16000, 16000, 16000), (7000, 5500, 4000), (4750, 2875, 1000), (4187, 2218, 250),
           (4046, 2054, 62.5), (4011, 2013, 15.6)],
}  # fmt: skip


def even(n_layer: int, n: int) -> list[range]:
    """Blocks of each of n equal stages. Megatron-LM ignores the cost of the head."""
    return [range(k * n_layer // n, (k + 1) * n_layer // n) for k in range(n)]


def with_ends(n_layer: int, n: int) -> list[range]:
    """Blocks of each of n stages, where the embedding and the head count as one block each."""
    each = [(n_layer + 2) // n] * n
    each[0] -= 1
    each[-1] -= 1
    return [range(sum(each[:k]), sum(each[: k + 1])) for k in range(n)]


def rounded_up(n_layer: int, n: int) -> list[range]:
    """Blocks of each of n stages: the quotient rounded up, and the rest on the last stage."""
    size = -(-n_layer // n)
    return [range(min(n_layer, k * size), min(n_layer, (k + 1) * size)) for k in range(n)]


def model_config(name: str) -> gpt.GPTConfig:
    """The model `name` of gpt.MODELS as Megatron-LM trains it."""
    config = gpt.MODELS[f"gpt-{name}"]
    return megatron(config.n_layer, config.n_head, config.n_embd)


def sc21_1() -> list[Row]:
    found = []
    for name, t, p, gpus, batch, b, chunks, program, tflops in SC21_1:
        config, d = model_config(name), gpus // (t * p)
        work = flops(config, batch, "full")
        layout = Layout(t, p, d, 0, b, batch // (d * b), "full",
                        "interleaved" if chunks > 1 else "1f1b", chunks)  # fmt: skip
        found.append(Row(f"{name}  t={t} p={p} d={d}", work / (gpus * tflops * 1e12), work, config,
                         layout, program, even(config.n_layer, p * chunks)))  # fmt: skip
    return found


def sc21_2() -> list[Row]:
    found = []
    for name, p, gpus, batch, b, tflops in SC21_2:
        config, t = model_config(name), 8 if p else 1
        d = gpus // (t * max(1, p))
        work = flops(config, batch, "full")
        layout = Layout(t, max(1, p), d, 0 if p else 3, b, batch // (d * b))
        what = f"t=8 p={p} d={d}" if p else f"ZeRO-3 d={d}"
        found.append(Row(f"{name}  {what}", work / (gpus * tflops * 1e12), work, config, layout,
                         LOCAL if p else TORCH, even(config.n_layer, max(1, p))))  # fmt: skip
    return found


def korthikanti() -> list[Row]:
    found = []
    for name, n, a, h, p, chunks, d, batch, b, full, selective in KORTHIKANTI_5:
        config = megatron(n, a, h)
        for policy, seconds in (("full", full), ("selective", selective)):
            schedule, sequence = "interleaved" if chunks > 1 else "1f1b", policy == "selective"
            layout = Layout(8, p, d, 0, b, batch // (d * b), policy, schedule, chunks, sequence)
            if seconds:
                found.append(Row(f"{name}  {policy}", seconds, flops(config, batch, policy), config,
                                 layout, LOCAL, even(n, p * chunks)))  # fmt: skip
    return found


def block() -> list[Row]:
    found, config = [], megatron(48, 64, 6144)
    for policy, sequence, *both in KORTHIKANTI_4:
        layout = Layout(8, 1, 1, 0, 4, 1, policy, sequence_parallel=sequence)
        work = flops(megatron(1, 64, 6144), 4, "none")
        for phase, ms, share in zip("FB", both, (1 / 3, 2 / 3), strict=True):
            what = f"{policy}{', sequence' * sequence}: {'forward' if phase == 'F' else 'backward'}"
            found.append(Row(what, ms / 1e3, share * work, config, layout, LOCAL, even(48, 48),
                             phase))  # fmt: skip
    return found


def zero_bubble() -> list[Row]:
    found = []
    for name, n, a, h, p, b, by_m in ZERO_BUBBLE:
        config = megatron(n, a, h, 1024)
        for m, (plain, interleaved, h1) in by_m.items():
            for what, chunks, rate in (
                ("1f1b", 1, plain), ("interleaved", (n + 2) // p, interleaved), ("zb-h1", 1, h1),
            ):  # fmt: skip
                split = with_ends(n, p * chunks)
                layout = Layout(1, p, 1, 0, b, m, "none", what, chunks)
                work = flops(config, b * m, "none")
                found.append(Row(f"{name}  m={m} {what}", b * m / (rate * p), work, config, layout,
                                 LOCAL, split))  # fmt: skip
    return found


def bloom(period: str) -> list[Row]:
    hardware, found = A100._replace(network_gb_per_s=6.25), []  # 4 x 12.5 GB/s for 8 GPUs
    for (n, a, h), rows in unseen.BLOOM[period].items():
        config = gpt.GPTConfig(n, a, h, 250880, SEQ, "explicit", dropout=0.1)
        ends_count = n == 106 or period == "2022-02-28"
        for t, p, d, batch, b, seconds in rows:
            layout = Layout(t, p, d, 1, b, batch // (d * b))
            split = (with_ends if ends_count else rounded_up)(n, p)
            found.append(Row(f"{n} x {h} a={a}  t={t} p={p} d={d} b={b}", seconds,
                             flops(config, batch, "full"), config, layout, LOCAL, split,
                             hardware=hardware))  # fmt: skip
    return found


def mpt(gpu: str) -> list[Row]:
    found = []
    for name, rows in unseen.MPT[gpu].items():
        for s, gpus, b, m, what, rate in rows:
            config = gpt.GPTConfig(*unseen.MPT_SIZES[name], 50368, s)
            policy = "full" if what == "full" else "none"
            layout = Layout(1, 1, gpus, 2 if what == "zero-2" else 3, b, m, policy)
            batch = gpus * b * m
            found.append(Row(f"{name}  s={s} d={gpus} b={b} m={m}", b * m * s / rate,
                             flops(config, batch, policy), config, layout, DEFAULT_PROGRAM,
                             hardware=HARDWARE[gpu]))  # fmt: skip
    return found


TABLES: dict[str, Callable[[], list[Row]]] = {
    "2104.04473, table 1: step of GPT with t, p and d": sc21_1,
    "2104.04473, table 2: step with ZeRO-3, and with t and p": sc21_2,
    "2205.05198, table 5: step, full and selective recomputation": korthikanti,
    "2205.05198, table 4: one block": block,
    "2401.10241, table 4: step of three schedules": zero_bubble,
}
UNSEEN: dict[str, Callable[[], list[Row]]] = {
    f"BLOOM, {period}: t, p, d and b of ten models": functools.partial(bloom, period)
    for period in unseen.BLOOM
} | {
    f"MPT, {gpu}: FSDP, 8 to 512 GPUs": functools.partial(mpt, gpu) for gpu in unseen.MPT
}  # fmt: skip


def step(row: Row, hardware: Hardware) -> cost.Times:
    return cost.predicted_step(row.config, row.layout, hardware, 8, row.program, row.split, 3)


def seconds(row: Row, hardware: Hardware | None = None) -> float:
    """Predicted seconds of a row. hardware: instead of the row's."""
    hardware = hardware or row.hardware
    if row.phase:
        stage = cost.stage_seconds(row.config, row.layout, hardware, 8, row.program, row.split)[1]
        return sum(sum(stage[kind]) for kind in ("F" if row.phase == "F" else "BW"))
    return step(row, hardware).total


def guesses(rows: list[Row]) -> list[float]:
    """Seconds of each row, if it ran at the mean FLOP/s per GPU of the other rows."""
    rates = [row.flops / row.layout.gpus / row.seconds for row in rows]
    return [row.seconds * rate / ((sum(rates) - rate) / (len(rates) - 1))
            for row, rate in zip(rows, rates, strict=True)]  # fmt: skip


def errors(predicted: list[float], rows: list[Row]) -> list[float]:
    """Relative errors in percent."""
    return [100 * (p / row.seconds - 1) for p, row in zip(predicted, rows, strict=True)]


def from_one_row(predicted: list[float], rows: list[Row]) -> list[list[float]]:
    """Errors in percent of the other rows, if one row scales all predictions; for each choice."""
    found = []
    for k, row in enumerate(rows):
        factor = row.seconds / predicted[k]
        scaled = errors([factor * x for x in predicted], rows)
        found.append(scaled[:k] + scaled[k + 1 :])
    return found


def jobs(predicted: list[float], rows: list[Row]) -> list[list[tuple[float, float]]]:
    """The (predicted, published) seconds of each job with two or more layouts.

    Rows of a job have the same model, batch and number of GPUs, so that only the layout differs.
    """
    found = collections.defaultdict(list)
    for seconds, row in zip(predicted, rows, strict=True):
        layout = row.layout
        batch = layout.dp * layout.micro_batch_size * layout.microbatches
        found[row.config, layout.gpus, batch, row.phase].append((seconds, row.seconds))
    return [times for times in found.values() if len({seconds for seconds, _ in times}) > 1]


def right_order(times: list[list[tuple[float, float]]]) -> tuple[int, int]:
    """(pairs of layouts of a job that the model orders as published, such pairs).

    Pairs whose published times differ by less than 2 % do not count: a repeated run differs by 1 %.
    """
    pairs = [
        (a[0] < b[0]) == (a[1] < b[1])
        for job in times
        for a, b in itertools.combinations(job, 2)
        if abs(math.log(a[1] / b[1])) > 0.02
    ]
    return sum(pairs), len(pairs)


def losses(times: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """(loss of the model's choice, loss of a random choice) in percent, mean over the jobs.

    The loss of a layout is its published time over the shortest of its job, minus 1.
    """
    best = [min(published for _, published in job) for job in times]
    model = [100 * (min(job)[1] / x - 1) for job, x in zip(times, best, strict=True)]
    chance = [100 * (statistics.fmean(published for _, published in job) / x - 1)
              for job, x in zip(times, best, strict=True)]  # fmt: skip
    return statistics.fmean(model), statistics.fmean(chance)


def mean(values: list[float]) -> float:
    return statistics.fmean(map(abs, values))


class Accuracy(NamedTuple):
    """Errors in percent for one table. from_one_row is evaluated with each row as the one."""

    rows: int
    model: tuple[float, float]  # mean, largest
    anchor: tuple[float, float]  # mean over all choices of the row, mean with the worst choice
    guess: tuple[float, float]  # mean, largest
    one: tuple[float, float]  # a guess from one row; as anchor
    order: tuple[int, int] | None  # see right_order; None: no two layouts of the same job
    choice: tuple[float, float] | None  # see losses

    def markdown(self, title: str) -> str:
        pairs = (self.model, self.anchor, self.guess, self.one, self.choice)
        cells = [" / ".join(f"{x:.1f}" for x in pair) if pair else "-" for pair in pairs]
        order = f"{self.order[0]} of {self.order[1]}" if self.order else "-"
        return f"| {' | '.join([title, str(self.rows), *cells[:4], order, cells[4]])} |"


@functools.cache
def accuracy(title: str) -> Accuracy:
    """For a table in TABLES or UNSEEN."""
    rows = (TABLES | UNSEEN)[title]()
    predicted = [seconds(row) for row in rows]
    work = [row.flops / row.layout.gpus for row in rows]
    model, guess = errors(predicted, rows), errors(guesses(rows), rows)
    anchor, one = ([mean(off) for off in from_one_row(x, rows)] for x in (predicted, work))
    times = jobs(predicted, rows)
    return Accuracy(
        len(rows), (mean(model), max(map(abs, model))), (statistics.fmean(anchor), max(anchor)),
        (mean(guess), max(map(abs, guess))), (statistics.fmean(one), max(one)),
        right_order(times) if times else None, losses(times) if times else None,
    )  # fmt: skip


COLUMNS = ("", "rows", "model", "model, anchor", "guess", "guess from one", "order", "choice")
LEGEND = """
Errors in %. Model and guess: mean / largest. Model with an anchor and guess from one row: mean over
all choices of the row / mean with the worst choice. Order: pairs of layouts of one job that the
model orders as published. Choice: by how many % the layout that the model calls the fastest is
slower than the fastest / the same for a random layout.
"""


def summary_lines() -> Iterator[str]:
    """A Markdown table of the accuracy for all tables. docs/recipe.md has a copy."""
    yield f"| {' | '.join(COLUMNS)} |".replace("|  |", "| |")
    yield "|---" * len(COLUMNS) + "|"
    for group, tables in (("fitted", TABLES), ("unseen", UNSEEN)):
        for title in tables:
            yield accuracy(title).markdown(f"{group}: {title.split(':')[0]}")


def summary(values: list[float]) -> str:
    values = [abs(value) for value in values]
    return f"mean {statistics.fmean(values):5.1f} %   max {max(values):5.1f} %"


FITTED = ("matmul", "ramp_gflop", "passes", "link", "network", "overlap")


def fit(tables: list[list[Row]], start: Hardware = A100) -> Hardware:
    """The constants that minimise the mean square of log(predicted / published).

    All tables have the same weight. The search changes one constant at a time by a factor, and
    halves the step when no change improves the loss.
    """

    def loss(hardware: Hardware) -> float:
        return statistics.fmean(
            statistics.fmean(math.log(seconds(row, hardware) / row.seconds) ** 2 for row in rows)
            for rows in tables
        )

    best, step = loss(start), 0.2
    while step > 0.01:
        better = False
        for name in FITTED:
            for factor in (1 + step, 1 / (1 + step)):
                other = start._replace(**{name: getattr(start, name) * factor})
                if name in ("ramp_gflop", "passes") or getattr(other, name) <= 1.0:
                    if (value := loss(other)) < best:
                        best, start, better = value, other, True
        step = step if better else step / 2
    return start


# --- tables of memory and bubble rates ------------------------------------------------------------


def zero_memory() -> list[tuple[str, float, float]]:
    """1910.02054, table 1: (name, published GB, predicted GB) per rank.

    16 bytes per parameter: bf16 parameter and gradient, fp32 master weight and AdamW moments. Each
    of them is divided by d where the ZeRO stage shards it.
    """
    found = []
    for numel, by_d in ZERO_1.items():
        for d, published in zip((1, 4, 16, 64, 256, 1024), by_d, strict=True):
            for stage, gb in zip((1, 2, 3), published, strict=True):
                held = cost.predicted_zero_bytes([[int(numel)]], d, 0, stage, torch.bfloat16,
                                                 torch.bfloat16)  # fmt: skip
                name = f"{numel / 1e9:g}B  d={d} ZeRO-{stage}"
                found.append((name, gb, sum(held.values()) / 1e9))
    return found


def bubble_rates() -> list[tuple[str, float, float]]:
    """2401.10241, table 5: (name, published rate, predicted rate), rate = idle time / step time.

    Predicted by simulating the schedule with the model's time of each stage, without waiting for
    transfers, as the authors do.
    """
    found, rows = [], iter(zero_bubble())
    for name, by_m in ZERO_BUBBLE_5.items():
        for m, rates in by_m.items():
            for rate, row in zip(rates, rows, strict=False):
                times = step(row._replace(program=row.program._replace(waits=False)), A100)
                found.append((f"{name}  m={m} {row.layout.schedule}", rate,
                              times.bubble / times.total))  # fmt: skip
    return found


# --- the report -----------------------------------------------------------------------------------


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument(
        "--fit", action="store_true", help="also fit the constants to the tables (3 min)"
    )
    args = arguments.parse_args()
    tables = {title: rows() for title, rows in TABLES.items()}
    for title, rows in (tables | {title: rows() for title, rows in UNSEEN.items()}).items():
        predicted = [seconds(row) for row in rows]
        print(f"\n{title}\n{'':42s}published   predicted   error")
        for row, model, error in zip(rows, predicted, errors(predicted, rows), strict=True):
            print(f"  {row.name:38s}{row.seconds:9.4g} s {model:9.4g} s {error:+6.1f} %")
        print(f"  {f'model, {len(rows)} rows:':16s}  {summary(errors(predicted, rows))}")
        print(f"  {'constant FLOP/s:':16s}  {summary(errors(guesses(rows), rows))}")
    for title, rows in (("1910.02054, table 1: GB per rank", zero_memory()),
                        ("2401.10241, table 5: bubble rate", bubble_rates())):  # fmt: skip
        print(f"\n{title}\n{'':42s}published   predicted")
        for name, published, model in rows:
            print(f"  {name:38s}{published:9.5g}   {model:9.5g}")
    off = [100 * (model / published - 1) for _, published, model in zero_memory()]
    print(f"\n1910.02054, table 1: {summary(off)}; the paper prints two or three digits")
    off = [100 * abs(model - published) for _, published, model in bubble_rates()]
    print(f"2401.10241, table 5: mean {statistics.fmean(off):.1f}, max {max(off):.1f} points")
    print(LEGEND)
    for line in summary_lines():
        print(line)
    if not args.fit:
        return
    fitted = fit(list(tables.values()))
    print(f"\nfitted to all tables: {', '.join(f'{n} {getattr(fitted, n):.3g}' for n in FITTED)}")
    for title, rows in tables.items():
        other = fit([rest for name, rest in tables.items() if name != title])
        off = errors([seconds(row, other) for row in rows], rows)
        print(f"  fitted without this table: {summary(off)}   {title}", flush=True)
        print(f"    {', '.join(f'{n} {getattr(other, n):.3g}' for n in FITTED)}")


if __name__ == "__main__":
    main()
