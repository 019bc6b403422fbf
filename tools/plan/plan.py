"""Chooses a layout for a model and a number of GPUs, and predicts its memory and step time.

    make plan ARGS="--model gpt2-xl --gpus 16 --hardware h100-80 --global-batch-size 64 --zero"
    python -m tools.plan.plan --model gpt-175b --gpus 96 --hardware a100-80 --global-batch-size 1536

A layout has t tensor-parallel ranks, c context-parallel ranks, p pipeline ranks and d replicas. Two
layouts are proposed:

- The recipe of Narayanan et al. (arXiv 2104.04473, section 5.4), step by step. It takes the
  smallest t, up to the GPUs of one machine, with which the model fits; if there is none, the
  smallest p with which it fits. "Fits" means that the rank with the most bytes needs at most USABLE
  of its GPU's memory. With --zero the recipe tries ZeRO-3 before p > 1. The other GPUs become
  replicas, and each replica accumulates gradients over its rows with the fastest microbatch size.
- The best: the fastest of all layouts that fit. Those with c > 1 are searched for long sequences
  only, of at least 2 SHORTEST tokens.

For both it prints bytes and times, why the best is faster, a bar chart of its memory and time, the
days of training, and the torchrun command. --json prints the same as JSON. Memory and time are
predicted by tools/plan/cost.py. `make published` compares these predictions with measurements, and
docs/recipe.md lists what the model leaves out.

--anchor corrects the times with one measurement. Run some steps of the printed command, and plan
again with the seconds per step that it prints:

    make plan ARGS="--model gpt2-xl --gpus 16 --hardware h100-80 ... --anchor 2.4"

All predicted times are multiplied by measured / predicted. The order of the layouts stays the same.
--anchor-layout describes the measured layout, if it was not the best.
"""

import argparse
import dataclasses
import functools
import heapq
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

import gpt
import options
import schedules
from tools.plan import cost
from tools.plan.cost import HARDWARE, Hardware, Layout, Times

# Fraction of a GPU's memory that the counted bytes may use. The rest is for fragmentation, NCCL's
# buffers, CUDA's context and larger microbatches. With 0.7 the recipe gives the (t, p) of all ten
# rows of table 1 of 2104.04473; with 1.0 it does not.
USABLE = 0.7
SHORTEST = 2048  # fewest tokens of a row that the search gives to a context-parallel rank


class Job(NamedTuple):
    """The planning problem: a model, GPUs and a global batch size."""

    config: gpt.GPTConfig
    gpus: int
    per_node: int  # GPUs per machine
    batch: int  # rows (sequences) per step
    hardware: Hardware
    program: cost.Program = cost.DEFAULT_PROGRAM
    usable: float = USABLE
    scale: float = 1.0  # all predicted times are multiplied by it; see Anchor

    @property
    def limit(self) -> float:
        """Bytes that a rank may use."""
        return self.usable * self.hardware.memory_gb * 1e9


class Plan(NamedTuple):
    """A layout and its predicted cost. held: bytes by kind on the rank with the most."""

    layout: Layout
    held: dict[str, int]
    times: Times

    def tflops(self, job: Job) -> float:
        """TFLOP/s per GPU, counting the FLOPs of the model without recomputation."""
        tokens = job.batch * job.config.seq_len
        return 3 * sum(model_flops(job.config)) * tokens / job.gpus / self.times.total / 1e12


def scaled(plan: Plan, factor: float) -> Plan:
    return plan._replace(times=Times(*(factor * x for x in plan.times)))


def model_flops(config: gpt.GPTConfig) -> tuple[float, float, float]:
    """FLOPs of the forward of one token: (embedding, all blocks, head)."""
    embedding, block, head = gpt.flops_per_token(config)
    return embedding, config.n_layer * block, head


def price(job: Job, layout: Layout, round_to: int | None = None) -> Plan:
    """The layout with its predicted cost. round_to: see cost.predicted_step."""
    held = cost.worst_rank(job.config, layout, job.program)
    times = cost.predicted_step(
        job.config, layout, job.hardware, job.per_node, job.program, round_to=round_to
    )
    return scaled(Plan(layout, held, times), job.scale)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# --- the recipe -----------------------------------------------------------------------------------


class Tried(NamedTuple):
    layout: Layout
    held: dict[str, int]


def recipe(job: Job, zero: bool = False) -> tuple[list[Tried], list[str], Layout | None]:
    """(layouts tried, layouts skipped with the reason, the first layout that fits or None).

    With full recomputation and microbatches of one row. Only bytes are considered, no times.
    """
    tried, skipped = [], []

    def fits(t: int, p: int, stage: int) -> Layout | None:
        if job.gpus % (t * p) or job.batch % (d := job.gpus // (t * p)):
            reason = f"{t * p} does not divide {job.gpus} GPUs" if job.gpus % (t * p) else (
                f"d = {d} does not divide the batch of {job.batch} rows")  # fmt: skip
            skipped.append(f"t={t} p={p}: {reason}")
            return None
        layout = Layout(t, p, d, stage if d > 1 else 0, 1, job.batch // d, "full", "1f1b", 1)
        held = cost.worst_rank(job.config, layout, job.program)
        tried.append(Tried(layout, held))
        return layout if sum(held.values()) <= job.limit else None

    widths = [t for t in divisors(job.config.n_head) if job.per_node % t == 0]
    for t in widths:
        if layout := fits(t, 1, 0):
            return tried, skipped, layout
    for stage in (3,) if zero else (0,):
        depths = divisors(job.config.n_layer)
        for p in depths if zero else depths[1:]:
            if layout := fits(widths[-1], p, stage):
                return tried, skipped, layout
    return tried, skipped, None


def best_microbatch(job: Job, layout: Layout) -> list[Plan]:
    """The recipe's layout with every microbatch size that fits."""
    found = []
    for b in divisors(layout.microbatches):
        m = layout.microbatches // b
        plan = price(job, layout._replace(micro_batch_size=b, microbatches=m))
        if sum(plan.held.values()) > job.limit:
            break
        found.append(plan)
    return found


# --- the search -----------------------------------------------------------------------------------


@functools.cache
def worth_trying() -> list[str]:
    """The schedules with closed forms, without those that are worse than another one by these: with
    as many chunks and the same splitting of the backward, they have a larger bubble or store more,
    and are better in neither. GPipe has the bubble of 1F1B and stores more."""
    p, m, costs = 4, 16, {}
    for name, entry in schedules.SCHEDULES.items():
        if entry.bubble and entry.held:
            held = max(entry.held(p, m, entry.chunks, r) for r in range(p))
            bubble = entry.bubble(p, m, entry.chunks)
            costs[name] = (entry.chunks, entry.splits_backward), bubble, held

    def is_worse(a: tuple, b: tuple) -> bool:
        return a != b and a[0] == b[0] and a[1] >= b[1] and a[2] >= b[2]

    return [name for name, a in costs.items() if not any(is_worse(a, b) for b in costs.values())]


def cp_sizes(job: Job, t: int) -> list[int]:
    """The numbers of context-parallel ranks to try: 1, and those with enough tokens per rank."""
    s = job.config.seq_len
    return [c for c in divisors(job.gpus // t)
            if c == 1 or (s % (2 * c) == 0 and s >= SHORTEST * c)]  # fmt: skip


def layouts(job: Job, asked: dict) -> Iterator[Layout]:
    """All layouts that the trainer accepts and that could be the fastest.

    Left out: schedules that are not worth_trying(); chunks that do not divide the blocks; t larger
    than a machine; microbatches of more than 64 rows; fewer than SHORTEST tokens of a row per rank;
    --cp-attention other than ring, for which cost.py predicts no time. asked: fields of the layout
    that the user has fixed.
    """
    config = job.config
    explicit = config.attention == "explicit" or config.dropout > 0
    # With sdpa, selective recomputation frees only a log-sum-exp, so it is left out.
    policies = ("none", "selective", "full") if explicit else ("none", "full")

    def choices(field: str, values: list) -> list:
        return [asked[field]] if field in asked else values

    for t in choices("tp", [t for t in divisors(config.n_head) if job.per_node % t == 0]):
        if job.gpus % t:
            continue
        for c, p in itertools.product(
            choices("cp", cp_sizes(job, t)),
            choices("pp", [p for p in divisors(job.gpus // t) if p <= config.n_layer]),
        ):
            if job.gpus % (t * c * p):
                continue
            d = job.gpus // (t * c * p)
            shards = t if c == 1 else 2 * c * t // math.gcd(2, t)  # of a row, see options.check()
            sequences = (False, True) if t > 1 and config.seq_len % shards == 0 else (False,)
            several = [k // p for k in divisors(config.n_layer) if k % p == 0 and k > p]
            orders = [
                (name, chunks)
                for name in (worth_trying() if p > 1 else ["1f1b"])
                for entry in [schedules.SCHEDULES[name]]
                for chunks in (several if entry.any_chunks else [entry.chunks])
                if chunks * p <= config.n_layer
                and name in choices("schedule", [name])
                and chunks in choices("chunks", [chunks])
            ]
            sizes = [b for b in divisors(job.batch // d) if b <= 64]
            for b in choices("micro_batch_size", sizes):
                if job.batch % (d * b):
                    continue
                m = job.batch // (d * b)
                for name, chunks in orders:
                    for zero in choices("zero", [0, 1, 2, 3] if d * c > 1 else [0]):
                        for policy in choices("recompute", policies):
                            for sequence in choices("sequence_parallel", sequences):
                                yield Layout(t, p, d, zero, b, m, policy, name, chunks, sequence, c)


def search(job: Job, keep: int = 8, asked: dict | None = None) -> tuple[list[Plan], int]:
    """(the `keep` fastest layouts that fit, the number of candidates).

    Candidates are examined in the order of a lower bound of their time. The search ends when the
    next bound exceeds the times of the `keep` fastest layouts found. Bytes and schedules are
    computed exactly only for examined candidates. Times are within 1 % of cost.predicted_step's.
    """
    candidates = []
    for number, layout in enumerate(layouts(job, asked or {})):
        if cost.may_fit(job.config, layout, job.limit, job.program):
            least = cost.predicted_step(
                job.config, layout, job.hardware, job.per_node, job.program, least=True
            )
            candidates.append((job.scale * least.total, number, layout))
    heapq.heapify(candidates)
    found: list[tuple[float, int, Plan]] = []
    n = len(candidates)
    while candidates and not (len(found) >= keep and candidates[0][0] >= found[keep - 1][0]):
        _, number, layout = heapq.heappop(candidates)
        if cost.fits(job.config, layout, job.limit, job.program):
            plan = price(job, layout, 2)
            found = sorted([*found, (plan.times.total, number, plan)])[:keep]
    return [plan for _, _, plan in found], n


def what_would_fit(job: Job) -> list[str]:
    """Lines for the case that nothing fits: the layout with the fewest bytes, and what it needs."""
    least = min(
        (layout for layout in layouts(job, {"recompute": "full", "micro_batch_size": 1})
         if layout.schedule == "1f1b"),
        key=lambda layout: sum(cost.worst_rank(job.config, layout, job.program).values()),
        default=None,
    )  # fmt: skip
    if least is None:
        return ["no layout with one row per microbatch divides the GPUs and the batch"]
    held = cost.worst_rank(job.config, least, job.program)
    need = sum(held.values())
    lines = [f"smallest: {spell(least)}, {need / 1e9:.1f} GB: {spell_bytes(held)}",
             f"it would fit on GPUs of {need / job.usable / 1e9:.0f} GB"]  # fmt: skip
    for times in (2, 4, 8, 16, 32, 64, 128, 256):
        more = job._replace(gpus=job.gpus * times, batch=max(job.batch, job.gpus * times))
        for layout in layouts(more, {"recompute": "full", "micro_batch_size": 1}):
            if layout.schedule == "1f1b" and cost.fits(job.config, layout, job.limit, job.program):
                lines.append(f"the model would fit on {more.gpus} of these GPUs: {spell(layout)}")
                return lines
    return lines


# --- one measured step ----------------------------------------------------------------------------


class Anchor(NamedTuple):
    """One measured step, and the model's prediction for the same layout."""

    layout: Layout
    measured: float  # seconds
    predicted: float
    is_best: bool  # whether the layout is that of the first line of the search

    @property
    def factor(self) -> float:
        return self.measured / self.predicted


def measured_layout(job: Job, text: str, model: list[str]) -> Layout:
    """The layout described by flags of train_3d.py, or by a command that contains train_3d.py.

    The model, the batch and the dtype are those of the job; the other flags have the trainer's
    defaults. Raises ValueError if the job has no such layout.
    """
    parser = options.parser()

    def refuse(message: str):
        raise ValueError(f"--anchor-layout: {message}")

    parser.error = refuse
    dtype = "bf16" if job.program.itemsize == 2 else "float32"
    own = f"{' '.join(model)} --global-batch-size {job.batch} --dtype {dtype}".split()
    args = parser.parse_args(own + shlex.split(text.split("train_3d.py ")[-1]))
    default = parser.parse_args(own)
    known = (*FIELDS, "chunks", "sequence_parallel", "compile")
    unknown = [n for n, o in options.OPTIONS.items() if o.kind == "layout" and n not in known]
    runs = ("global_batch_size", "dtype", "grad_dtype", "reduce_dtype", "document_mask")
    for name in (*runs, *unknown):
        if (value := getattr(args, name)) != (planned := getattr(default, name)):
            refuse(f"{options.flag(name)} is {value}, but this plan assumes {planned}: measure a "
                   "step with that")  # fmt: skip
    try:
        check_ranks(args.tp, args.pp, args.cp, job.gpus)
        config = options.check(args, job.gpus)
    except ValueError as error:
        refuse(str(error))
    if config != job.config:
        refuse("it has flags of another model: leave them out")
    if args.recompute == "offload" or args.schedule not in schedules.SCHEDULES:
        name = "recompute" if args.recompute == "offload" else "schedule"
        refuse(f"the cost model does not know --{name} {getattr(args, name)}: measure another "
               "layout")  # fmt: skip
    d = job.gpus // (args.tp * args.cp * args.pp)
    m = job.batch // (d * args.micro_batch_size)
    chunks = args.chunks or schedules.SCHEDULES[args.schedule].chunks
    return Layout(args.tp, args.pp, d, args.zero if d * args.cp > 1 else 0, args.micro_batch_size,
                  m, args.recompute, args.schedule, chunks, args.sequence_parallel,
                  args.cp)  # fmt: skip


def anchor_of(job: Job, seconds: float, layout: Layout | None, asked: dict) -> Anchor:
    """The anchor for a measured step of `layout`; None: the best layout. Raises ValueError."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"--anchor {seconds:g}: give the measured seconds per step, above 0")
    if is_best := layout is None:
        best, _ = search(job, 1, asked)
        if not best:
            raise ValueError("--anchor: no layout fits, so none is the best: describe the measured "
                             "layout with --anchor-layout")  # fmt: skip
        layout = best[0].layout
    plan = price(job, layout, 2)  # rounded as in the search, so that it lists the measured time
    anchor = Anchor(layout, seconds, plan.times.total, is_best)
    tflops = scaled(plan, anchor.factor).tflops(job)
    if tflops > job.hardware.tflops:
        raise ValueError(
            f"--anchor {seconds:g}: with {spell(layout)}, this is {tflops:,.3g} TFLOP/s per GPU, "
            f"more than the {job.hardware.tflops:g} of {job.hardware.name}: give seconds per step"
        )
    return anchor


# --- the report -----------------------------------------------------------------------------------

FIELDS = (
    "tp",
    "cp",
    "pp",
    "dp",
    "zero",
    "micro_batch_size",
    "microbatches",
    "recompute",
    "schedule",
)
# Part of the time -> the fields of a layout that change it most. Used by `why`.
REASONS = {
    "matmul": ("recompute", "micro_batch_size"), "memory": ("recompute", "tp"),
    "tp": ("tp", "cp", "sequence_parallel"), "bubble": ("pp", "microbatches", "schedule"),
    "dp": ("zero", "dp"), "optimizer": ("zero",),
}  # fmt: skip


def spell(layout: Layout) -> str:
    """The layout in words."""
    name = f"{layout.schedule} x{layout.chunks}" if layout.chunks > 1 else layout.schedule
    c = f" c={layout.cp}" * (layout.cp > 1)
    return (f"t={layout.tp}{c} p={layout.pp} d={layout.dp} ZeRO-{layout.zero}, "
            f"{layout.microbatches} x {layout.micro_batch_size} rows, {name}, "
            f"recompute {layout.recompute}"
            + ", sequence parallel" * layout.sequence_parallel)  # fmt: skip


def spell_bytes(held: dict[str, int]) -> str:
    return ", ".join(f"{kind} {n / 1e9:.1f}" for kind, n in held.items())


def why(fast: Plan, slow: Plan, name_of_slow: str) -> str:
    """One sentence on what makes `fast` faster than `slow`."""
    gains = {name: getattr(slow.times, name) - getattr(fast.times, name) for name in Times._fields}
    reasons = []
    for name in sorted(gains, key=lambda name: -abs(gains[name])):
        if abs(gains[name]) < 0.01 * slow.times.total:
            break
        changed = [
            f"{field.replace('_', ' ')} {was} -> {now}"
            for field in REASONS[name]
            if (was := getattr(slow.layout, field)) != (now := getattr(fast.layout, field))
        ]
        more = "less" if gains[name] > 0 else "more"
        reason = f" ({', '.join(changed)})" if changed else ""
        reasons.append(f"{abs(gains[name]):.3g} s {more} of {name}{reason}")
    ratio = slow.times.total / fast.times.total
    what = "; ".join(reasons) or "each part differs by less than 1 %"
    return f"{ratio:.2f}x as fast as {name_of_slow}: {what}"


def command(job: Job, layout: Layout, model: list[str]) -> str:
    """The torchrun command that starts the layout."""
    nodes = -(-job.gpus // job.per_node)
    where = ("--standalone" if nodes == 1 else
             f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500")  # fmt: skip
    return " ".join(["torchrun", where, f"--nproc-per-node {min(job.gpus, job.per_node)}",
                     "train_3d.py", *arguments(job, layout, model)])  # fmt: skip


def arguments(job: Job, layout: Layout, model: list[str]) -> list[str]:
    """The flags of train_3d.py."""
    flags = [
        *model,
        f"--tp {layout.tp} --pp {layout.pp}" + f" --cp {layout.cp}" * (layout.cp > 1),
        f"--global-batch-size {job.batch} --micro-batch-size {layout.micro_batch_size}",
        f"--zero {layout.zero} --recompute {layout.recompute} --schedule {layout.schedule}",
    ]
    flags += [f"--virtual-stages {layout.chunks}"] * schedules.SCHEDULES[layout.schedule].any_chunks
    flags += ["--sequence-parallel"] * layout.sequence_parallel
    return flags + [f"--dtype {'bf16' if job.program.itemsize == 2 else 'float32'}"]


def bars(values: dict[str, float], unit: str, total: float, width: int = 48) -> Iterator[str]:
    """Lines of a bar chart, with the percentage of `total`."""
    for name, value in values.items():
        bar = "#" * round(width * value / total)
        yield f"  {name:12s}{value:9.4g} {unit:3s} {100 * value / total:5.1f} %  {bar}"


def row_of_bytes(layout: Layout, held: dict[str, int], limit: float) -> str:
    need = sum(held.values())
    cells = "".join(f"{n / 1e9:12.4g}" for n in held.values())
    what = f"t={layout.tp} p={layout.pp}" + f" ZeRO-{layout.zero}" * (layout.zero > 0)
    return f"  {what:16s}{cells}{need / 1e9:10.4g}   {'fits' if need <= limit else 'does not fit'}"


def row_of_times(plan: Plan, job: Job) -> str:
    parts = "".join(f"{x:10.4g}" for x in plan.times)
    need = sum(plan.held.values()) / 1e9
    return (f"  {plan.times.total:9.4g}{plan.tflops(job):9.4g}{need:7.3g}{parts}   "
            + spell(plan.layout))  # fmt: skip


HEAD = f"  {'s/step':>9s}{'TFLOP/s':>9s}{'GB':>7s}" + "".join(f"{n:>10s}" for n in Times._fields)


def layout_fields(layout: Layout) -> dict:
    return {name: getattr(layout, name) for name in (*FIELDS, "chunks", "sequence_parallel")}


def as_json(plan: Plan | None, job: Job) -> dict | None:
    if plan is None:
        return None
    return layout_fields(plan.layout) | {
        "step_s": plan.times.total,
        "tflops_per_gpu": plan.tflops(job),
        "bytes": plan.held,
        "seconds": plan.times._asdict(),
    }


def spell_anchor(anchor: Anchor) -> Iterator[str]:
    which = "the best layout below" if anchor.is_best else spell(anchor.layout)
    yield (f"Anchor: measured {anchor.measured:.4g} s, predicted {anchor.predicted:.4g} s for "
           f"{which}.")  # fmt: skip
    yield f"All times below are predictions times {anchor.factor:.3g}."
    if not 0.5 <= anchor.factor <= 2:
        yield "This is far from 1: check --hardware, --gpus-per-node and the measured layout."


def report(
    job: Job, zero: bool, tokens: float, asked: dict, model: list[str],
    anchor: Anchor | None = None,
) -> Iterator[str]:  # fmt: skip
    """Lines of the report. tokens: length of the training run. model: flags of the model."""
    config, hardware = job.config, job.hardware
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    step_tokens = job.batch * config.seq_len
    yield (
        f"{size / 1e9:.4g} B parameters: {config.n_layer} blocks, hidden size {config.n_embd}, "
        f"{config.n_head} heads; {job.batch} rows of {config.seq_len} tokens per step"
    )
    yield (f"{job.gpus} x {hardware.name}, {job.per_node} per machine; usable memory "
           f"{job.usable:g} x {hardware.memory_gb:g} GB = {job.limit / 1e9:.1f} GB")  # fmt: skip
    yield from spell_anchor(anchor) if anchor else ()

    tried, skipped, first = recipe(job, zero)
    yield "\nThe recipe: the smallest t, then " + ("ZeRO-3, then " * zero) + "the smallest p that"
    yield "fits. GB on the largest rank, with full recomputation and a microbatch of 1 row:"
    kinds = ("parameters", "gradients", "optimizer", "buffers", "activations")
    yield "  " + " " * 16 + "".join(f"{kind:>12s}" for kind in kinds) + f"{'sum':>10s}"
    yield from (row_of_bytes(layout, held, job.limit) for layout, held in tried)
    yield from (f"  skipped: {line}" for line in skipped)
    unlimited = recipe(job._replace(usable=1.0), zero)[2]
    spelled = f"t={unlimited.tp} p={unlimited.pp}" if unlimited else "nothing fits"
    yield f"  (if all of the GPU's memory were usable: {spelled})"
    chosen = None
    if first:
        yield (
            f"Then replicas: d = {job.gpus} / ({first.tp} x {first.pp}) = {first.dp}; then "
            f"accumulation: {job.batch} / {first.dp} = {first.microbatches} rows per replica."
        )
        yield "The microbatch sizes that fit; the recipe takes the fastest:"
        yield HEAD
        sizes = best_microbatch(job, first)
        yield from (row_of_times(plan, job) for plan in sizes)
        chosen = min(sizes, key=lambda plan: plan.times.total)

    found, n = search(job, asked=asked)
    given = " ".join(f"{options.flag(name)} {value}" for name, value in asked.items())
    yield f"\nThe best of {n} layouts that may fit{f', with {given}' if given else ''}:"
    if not found:
        yield "  none fits"
        yield from (f"  {line}" for line in what_would_fit(job))
        return
    yield HEAD
    yield from (row_of_times(plan, job) for plan in found)
    best = found[0]
    if chosen and chosen.layout != best.layout:
        yield f"The best is {why(best, chosen, 'the recipe')}."
    elif chosen:
        yield "The recipe is the best."
    if len(found) > 1:
        yield f"The best is {why(best, found[1], 'the next')}."

    yield "\nMemory of the best, on the largest rank:"
    total = hardware.memory_gb
    yield from bars({kind: n / 1e9 for kind, n in best.held.items()}, "GB", total)
    yield from bars({"free": total - sum(best.held.values()) / 1e9}, "GB", total)
    yield "Time per step:"
    yield from bars(best.times._asdict(), "s", best.times.total)
    days = tokens / step_tokens * best.times.total / 86400
    peak = 100 * best.tflops(job) / hardware.tflops
    yield (f"{tokens / 1e9:g} B tokens are {tokens / step_tokens:,.0f} steps: {days:.3g} days, at "
           f"{best.tflops(job):.3g} TFLOP/s per GPU ({peak:.2g} % of its peak; recomputation does "
           "not count).")  # fmt: skip
    yield "\n" + command(job, best.layout, model)


# --- command line ---------------------------------------------------------------------------------


class Parser(options.Parser):
    def error(self, message: str):
        sys.exit(f"tools.plan.plan: error: {message}")


def read_hardware(name: str, own: dict[str, float]) -> Hardware:
    """The hardware `name` of cost.HARDWARE, or of a JSON file with fields of cost.Hardware.

    own: fields that override it. Raises ValueError for an unknown name or an invalid value.
    """
    if name in HARDWARE:
        hardware = HARDWARE[name]
    else:
        try:
            with open(name) as file:
                fields = json.load(file)
            hardware = Hardware(**{"name": name} | fields)
        except FileNotFoundError:
            raise ValueError(f"--hardware {name} is not one of {', '.join(HARDWARE)}, nor a JSON "
                             "file with fields of cost.Hardware"
                             + options.did_you_mean(name, HARDWARE)) from None  # fmt: skip
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"--hardware {name} is not a JSON file with fields of cost.Hardware: "
                             f"{error}") from None  # fmt: skip
    hardware = hardware._replace(**own)
    for field, value in hardware._asdict().items():
        if field == "name":
            continue
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"--hardware {name}: {field} is {value}: give a number above 0")
        if value == 0 and field in ("tflops", "memory_gb", "memory_gb_per_s", "link_gb_per_s",
                                    "network_gb_per_s", "matmul", "link", "network"):  # fmt: skip
            raise ValueError(f"--hardware {name}: {field} is 0: give a number above 0")
    return hardware


def parser() -> Parser:
    p = Parser("tools.plan.plan", description=__doc__.splitlines()[0], allow_abbrev=False)
    add, natural = p.add_argument, options.at_least(1)
    add("--model", choices=gpt.MODELS, default="gpt-175b",
        help="named sizes; the next flags override them")  # fmt: skip
    for size in options.SIZES:
        add(f"--{size.replace('_', '-')}", type=natural, metavar="N")
    add("--attention", choices=("sdpa", "explicit"), default="sdpa")
    add("--gpus", type=natural, default=1024, help="number of GPUs")
    add("--gpus-per-node", type=natural, default=8, metavar="N", help="GPUs per machine")
    add("--hardware", default="a100-80", metavar="NAME|FILE",
        help=f"{', '.join(HARDWARE)}; or a JSON file with fields of cost.Hardware; the next flags "
        "override them")  # fmt: skip
    for field in Hardware._fields[1:6]:
        add(f"--{field.replace('_', '-')}", type=float, metavar="X")
    add("--calibrate", action="store_true", help="measure this machine, in float32 (1 min)")
    add("--global-batch-size", type=natural, default=1536, help="rows (sequences) per step")
    add("--usable", type=float, default=USABLE, help="fraction of the memory that may be used")
    add("--tokens", type=options.at_least(1, float), default=300e9, help="tokens to train on")
    add("--zero", action="store_true", help="the recipe tries ZeRO-3 before p > 1")
    fixed = "search for the best among layouts with this value only"
    for field in ("tp", "cp", "pp", "micro_batch_size"):
        add(f"--{field.replace('_', '-')}", type=natural, metavar="N", help=fixed)
    add("--virtual-stages", dest="chunks", type=natural, metavar="N", help=fixed)
    add("--chunks", type=natural, help=argparse.SUPPRESS)  # the former name
    add("--schedule", choices=worth_trying(), help=fixed)
    add("--recompute", choices=("none", "selective", "full"), help=fixed)
    add("--anchor", type=float, metavar="SECONDS", help="measured seconds per step of one layout: "
        "tokens per step / the tokens/s that train_3d.py prints; scales all predicted "
        "times")  # fmt: skip
    add("--anchor-layout", metavar="FLAGS", help="the measured layout, as flags of train_3d.py: "
        "'--tp 2 --zero 1'; default: the best layout")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")
    return p


def check_ranks(t: int, p: int, c: int, gpus: int) -> None:
    if gpus % (t * p * c):
        product = f"--tp {t} x --pp {p}" + f" x --cp {c}" * (c > 1)
        raise ValueError(f"--gpus {gpus} is not divisible by {product}: give a divisor, or other "
                         "--gpus")  # fmt: skip


def job_of(args: argparse.Namespace) -> tuple[Job, dict, list[str]]:
    """(the job, the layout fields that the user has fixed, the flags of the model).

    Raises ValueError if no layout is possible; with the trainer's message if it would refuse it.
    """
    sizes = {size: n for size in options.SIZES if (n := getattr(args, size)) is not None}
    own = {field: x for field in Hardware._fields[1:6] if (x := getattr(args, field)) is not None}
    program = cost.DEFAULT_PROGRAM
    if args.calibrate:
        from tools.plan import calibrate  # here, because it imports the trainer, which is slow

        hardware = calibrate.calibrate(min(2, args.gpus))._replace(**own)
        program = calibrate.PROGRAM
    else:
        hardware = read_hardware(args.hardware, own)
    if not 0 < args.usable <= 1:
        raise ValueError(f"--usable {args.usable}: give a fraction above 0 and at most 1")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ValueError(f"--gpus {args.gpus} is not a multiple of --gpus-per-node "
                         f"{args.gpus_per_node}: change one")  # fmt: skip
    asked = {field: value for field in ("tp", "cp", "pp", "micro_batch_size", "schedule", "chunks",
             "recompute") if (value := getattr(args, field)) is not None}  # fmt: skip
    model = [f"--model {args.model}"]
    model += [f"--{size.replace('_', '-')} {n}" for size, n in sizes.items()]
    model += [f"--attention {args.attention}"] * (args.attention != "sdpa")
    config = dataclasses.replace(gpt.MODELS[args.model], **sizes, attention=args.attention)
    job = Job(config, args.gpus, min(args.gpus, args.gpus_per_node), args.global_batch_size,
              hardware, program, args.usable)  # fmt: skip

    t, p, c = (asked.get(field, 1) for field in ("tp", "pp", "cp"))
    layout = Layout(t, p, max(1, job.gpus // (t * p * c)), 0, asked.get("micro_batch_size", 1), 1,
                    asked.get("recompute", "full"), asked.get("schedule", "1f1b"),
                    asked.get("chunks", 2), cp=c)  # fmt: skip
    if t > job.per_node:
        raise ValueError(f"--tp {t} is more than the {job.per_node} GPUs of a machine: lower it")
    rows = layout.dp * layout.micro_batch_size  # the batch is checked by layouts()
    flags = " ".join(arguments(job._replace(batch=rows), layout, model)).split()
    if asked.keys() & {"tp", "cp", "pp", "micro_batch_size"}:
        check_ranks(t, p, c, job.gpus)
        options.check(options.parser().parse_args(flags), job.gpus)
    if not any(True for _ in layouts(job, asked)):
        raise ValueError(f"--global-batch-size {job.batch}: no d = {job.gpus} / (t p) divides it "
                         "for any possible t, p and microbatch size: give a multiple of "
                         f"{job.gpus}, or fewer GPUs")  # fmt: skip
    return job, asked, model


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    try:
        job, asked, model = job_of(args)
        anchor = None
        if args.anchor is not None:
            layout = args.anchor_layout and measured_layout(job, args.anchor_layout, model)
            anchor = anchor_of(job, args.anchor, layout or None, asked)
            job = job._replace(scale=anchor.factor)
        elif args.anchor_layout is not None:
            raise ValueError("--anchor-layout: give the measured seconds too: --anchor SECONDS")
    except ValueError as error:
        arguments.error(str(error))
    if not args.json:
        for line in report(job, args.zero, args.tokens, asked, model, anchor):
            print(line, flush=True)
        return
    first = recipe(job, args.zero)[2]
    sizes = best_microbatch(job, first) if first else []
    chosen = min(sizes, key=lambda plan: plan.times.total, default=None)
    found, _ = search(job, asked=asked)
    measured = {"anchor": {
        "measured_s": anchor.measured, "predicted_s": anchor.predicted, "factor": anchor.factor,
        "layout": layout_fields(anchor.layout),
    }} if anchor else {}  # fmt: skip
    print(json.dumps(measured | {
        "recipe": as_json(chosen, job), "best": as_json(found[0] if found else None, job),
        "layouts": [as_json(plan, job) for plan in found],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
