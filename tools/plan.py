"""Will it fit, how fast will it be, which layout: the recipe with its numbers, and a launch line.

    python -m tools.plan --model gpt-175b --gpus 1536 --hardware a100-80 --global-batch-size 1536
    make plan ARGS="--model gpt2-xl --gpus 16 --hardware h100-80 --global-batch-size 64 --zero"

The *recipe* is the lecture's, and Narayanan et al.'s (arXiv 2104.04473, section 5.4): the smallest
t, up to a machine's GPUs, and then the smallest p for which a rank's bytes fit into USABLE of its
GPU; with --zero, ZeRO-3 before any p; then replicas; then gradient accumulation, with the
microbatch that is fastest. The *best* is the fastest of all layouts that fit. What both cost, says
tools/cost.py; `make published` shows how well, and docs/recipe.md what it does not know.
"""

import argparse
import dataclasses
import heapq
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

import gpt
import options
from tools import cost
from tools.cost import HARDWARE, Hardware, Layout, Times

# Of a GPU's memory, for what is counted here. The rest: fragmentation, NCCL's buffers, CUDA's
# context, room for larger microbatches. At 0.7 the recipe gives (t, p) of all ten rows of table 1
# of 2104.04473; this depends on it: at 1.0 it does not.
USABLE = 0.7


class Job(NamedTuple):
    """What is asked: this model, on these GPUs, so many rows a step."""

    config: gpt.GPTConfig
    gpus: int
    per_node: int
    batch: int
    hardware: Hardware
    program: cost.Program = cost.OURS
    usable: float = USABLE

    @property
    def limit(self) -> float:
        return self.usable * self.hardware.memory_gb * 1e9


class Plan(NamedTuple):
    """A layout, and what it costs; `held` is of the rank with most."""

    layout: Layout
    held: dict[str, int]
    times: Times

    def tflops(self, job: Job) -> float:
        """Of the model, per GPU and second: what is recomputed is not counted."""
        tokens = job.batch * job.config.seq_len
        return 3 * sum(model_flops(job.config)) * tokens / job.gpus / self.times.total / 1e12


def model_flops(config: gpt.GPTConfig) -> tuple[float, float, float]:
    """Of a token's forward: embedding, blocks, head."""
    embedding, block, head = gpt.flops_per_token(config)
    return embedding, config.n_layer * block, head


def price(job: Job, layout: Layout, round_to: int | None = None) -> Plan:
    held = cost.worst_rank(job.config, layout, job.program)
    times = cost.predicted_step(
        job.config, layout, job.hardware, job.per_node, job.program, round_to=round_to
    )
    return Plan(layout, held, times)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# --- the recipe -----------------------------------------------------------------------------------


class Tried(NamedTuple):
    layout: Layout
    held: dict[str, int]


def recipe(job: Job, zero: bool = False) -> tuple[list[Tried], list[str], Layout | None]:
    """(what was tried, what was passed over and why, the first that fits or None), with full
    recomputation and one row at a time. Pure arithmetic on bytes: the clock has no say."""
    tried, passed = [], []

    def fits(t: int, p: int, stage: int) -> Layout | None:
        if job.gpus % (t * p) or job.batch % (d := job.gpus // (t * p)):
            why = f"{job.gpus} GPUs are no multiple of {t * p}" if job.gpus % (t * p) else (
                f"d = {d} does not divide the batch of {job.batch}")  # fmt: skip
            passed.append(f"t={t} p={p}: {why}")
            return None
        layout = Layout(t, p, d, stage if d > 1 else 0, 1, job.batch // d, "full", "1f1b", 1)
        held = cost.worst_rank(job.config, layout, job.program)
        tried.append(Tried(layout, held))
        return layout if sum(held.values()) <= job.limit else None

    widths = [t for t in divisors(job.config.n_head) if job.per_node % t == 0]
    for t in widths:
        if layout := fits(t, 1, 0):
            return tried, passed, layout
    for stage in (3,) if zero else (0,):
        depths = divisors(job.config.n_layer)
        for p in depths if zero else depths[1:]:
            if layout := fits(widths[-1], p, stage):
                return tried, passed, layout
    return tried, passed, None


def best_microbatch(job: Job, layout: Layout) -> list[Plan]:
    """The recipe's layout with each microbatch size that fits."""
    found = []
    for b in divisors(layout.microbatches):
        m = layout.microbatches // b
        plan = price(job, layout._replace(micro_batch_size=b, microbatches=m))
        if sum(plan.held.values()) > job.limit:
            break
        found.append(plan)
    return found


# --- the search -----------------------------------------------------------------------------------


def layouts(job: Job, asked: dict) -> Iterator[Layout]:
    """All that the trainer takes and that could win: without gpipe (as fast as 1f1b, and holds
    more), with chunks that divide the blocks, t within a machine, microbatches of at most 64 rows.
    asked: fields that are given."""
    config = job.config
    explicit = config.attention == "explicit" or config.dropout > 0
    # Of sdpa, selective saves a log-sum-exp.
    policies = ("none", "selective", "full") if explicit else ("none", "full")

    def of(field: str, values: list) -> list:
        return [asked[field]] if field in asked else values

    for t in of("tp", [t for t in divisors(config.n_head) if job.per_node % t == 0]):
        if job.gpus % t:
            continue
        sequences = (False, True) if t > 1 and config.seq_len % t == 0 else (False,)
        for p in of("pp", [p for p in divisors(job.gpus // t) if p <= config.n_layer]):
            d = job.gpus // (t * p)
            ways = [("1f1b", 1)]
            if p > 1:
                ways += [("zb-h1", 1)] + [("zb-v", 2)] * (2 * p <= config.n_layer)
                ways += [("interleaved", k // p) for k in divisors(config.n_layer)
                         if k % p == 0 and k > p]  # fmt: skip
            for b in of("micro_batch_size", [b for b in divisors(job.batch // d) if b <= 64]):
                if job.batch % (d * b):
                    continue
                m = job.batch // (d * b)
                for schedule, v in ways:
                    if schedule not in of("schedule", [schedule]) or v not in of("chunks", [v]):
                        continue
                    for zero in of("zero", [0, 1, 2, 3] if d > 1 else [0]):
                        for policy in of("recompute", policies):
                            for sequence in of("sequence_parallel", sequences):
                                yield Layout(t, p, d, zero, b, m, policy, schedule, v, sequence)


def search(job: Job, keep: int = 8, asked: dict | None = None) -> tuple[list[Plan], int]:
    """(the `keep` fastest that fit, how many layouts there are). From the least that each could
    take upwards, until that is more than what was found; bytes and schedules are only then looked
    at closely. Times are within 1 % of cost.predicted_step's."""
    candidates = []
    for number, layout in enumerate(layouts(job, asked or {})):
        if cost.may_fit(job.config, layout, job.limit, job.program):
            least = cost.predicted_step(
                job.config, layout, job.hardware, job.per_node, job.program, least=True
            )
            candidates.append((least.total, number, layout))
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
    """When nothing does: the layout that needs least, and what would make room."""
    least = min(
        (layout for layout in layouts(job, {"recompute": "full", "micro_batch_size": 1})
         if layout.schedule == "1f1b"),
        key=lambda layout: sum(cost.worst_rank(job.config, layout, job.program).values()),
        default=None,
    )  # fmt: skip
    if least is None:
        return ["no layout of one row a microbatch divides the GPUs and the batch"]
    held = cost.worst_rank(job.config, least, job.program)
    need = sum(held.values())
    lines = [f"nearest: {spell(least)}, {need / 1e9:.1f} GB: {spell_bytes(held)}",
             f"it would fit on GPUs of {need / job.usable / 1e9:.0f} GB"]  # fmt: skip
    for times in (2, 4, 8, 16, 32, 64, 128, 256):
        more = job._replace(gpus=job.gpus * times, batch=max(job.batch, job.gpus * times))
        for layout in layouts(more, {"recompute": "full", "micro_batch_size": 1}):
            if layout.schedule == "1f1b" and cost.fits(job.config, layout, job.limit, job.program):
                lines.append(f"on {more.gpus} of these GPUs, it would: {spell(layout)}")
                return lines
    return lines


# --- what is said ---------------------------------------------------------------------------------

FIELDS = ("tp", "pp", "dp", "zero", "micro_batch_size", "microbatches", "recompute", "schedule")
# What a part of the time depends on most, in words for `why`.
REASONS = {
    "matmul": ("recompute", "micro_batch_size"), "memory": ("recompute", "tp"),
    "tp": ("tp", "sequence_parallel"), "bubble": ("pp", "microbatches", "schedule"),
    "dp": ("zero", "dp"), "optimizer": ("zero",),
}  # fmt: skip


def spell(layout: Layout) -> str:
    name = f"{layout.schedule} x{layout.chunks}" if layout.chunks > 1 else layout.schedule
    return (f"t={layout.tp} p={layout.pp} d={layout.dp} ZeRO-{layout.zero}, {layout.microbatches} "
            f"x {layout.micro_batch_size} rows, {name}, recompute {layout.recompute}"
            + ", sequence parallel" * layout.sequence_parallel)  # fmt: skip


def spell_bytes(held: dict[str, int]) -> str:
    return ", ".join(f"{kind} {n / 1e9:.1f}" for kind, n in held.items())


def why(mine: Plan, other: Plan) -> str:
    """One sentence on what makes `mine` faster than `other`."""
    parts = {name: getattr(other.times, name) - getattr(mine.times, name) for name in Times._fields}
    words = []
    for name in sorted(parts, key=lambda name: -abs(parts[name])):
        if abs(parts[name]) < 0.01 * other.times.total:
            break
        changed = [f"{field.replace('_', ' ')} {was} -> {now}" for field in REASONS[name]
                   if (was := getattr(other.layout, field)) != (now := getattr(mine.layout, field))]
        more = "less" if parts[name] > 0 else "more"
        reason = f" ({', '.join(changed)})" if changed else ""
        words.append(f"{abs(parts[name]):.3g} s {more} of {name}{reason}")
    ratio = other.times.total / mine.times.total
    return f"{ratio:.2f}x as fast: " + ("; ".join(words) or "by less than 1 % in each part")


def command(job: Job, layout: Layout, model: list[str]) -> str:
    """What starts it."""
    nodes = -(-job.gpus // job.per_node)
    where = ("--standalone" if nodes == 1 else
             f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500")  # fmt: skip
    return " ".join(["torchrun", where, f"--nproc-per-node {min(job.gpus, job.per_node)} --",
                     "train_3d.py", *arguments(job, layout, model)])  # fmt: skip


def arguments(job: Job, layout: Layout, model: list[str]) -> list[str]:
    """train_3d.py's."""
    flags = [*model, f"--tp {layout.tp} --pp {layout.pp}",
             f"--global-batch-size {job.batch} --micro-batch-size {layout.micro_batch_size}",
             f"--zero {layout.zero} --recompute {layout.recompute} --schedule {layout.schedule}"]
    flags += [f"--chunks {layout.chunks}"] * (layout.schedule == "interleaved")
    flags += ["--sequence-parallel"] * layout.sequence_parallel
    return flags + [f"--dtype {'bf16' if job.program.itemsize == 2 else 'float32'}"]


def bars(values: dict[str, float], unit: str, whole: float, width: int = 48) -> Iterator[str]:
    for name, value in values.items():
        bar = "#" * round(width * value / whole)
        yield f"  {name:12s}{value:9.4g} {unit:3s} {100 * value / whole:5.1f} %  {bar}"


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


def as_json(plan: Plan | None, job: Job) -> dict | None:
    if plan is None:
        return None
    layout = {name: getattr(plan.layout, name) for name in (*FIELDS, "chunks", "sequence_parallel")}
    return layout | {"step_s": plan.times.total, "tflops_per_gpu": plan.tflops(job),
                     "bytes": plan.held, "seconds": plan.times._asdict()}  # fmt: skip


def report(job: Job, zero: bool, tokens: float, asked: dict, model: list[str]) -> Iterator[str]:
    config, hardware = job.config, job.hardware
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    a_step = job.batch * config.seq_len
    yield (f"{size / 1e9:.4g} B parameters: {config.n_layer} blocks, {config.n_embd} wide, "
           f"{config.n_head} heads; {job.batch} rows of {config.seq_len} a step")  # fmt: skip
    yield (f"{job.gpus} x {hardware.name}, {job.per_node} to a machine; of {hardware.memory_gb:g} "
           f"GB each, {job.usable:g} = {job.limit / 1e9:.1f} GB to be filled")  # fmt: skip

    tried, passed, first = recipe(job, zero)
    yield "\nThe recipe: the smallest t, then " + ("ZeRO-3, then " * zero) + "the smallest p that"
    yield "fits. GB of the rank with most, with full recomputation and a microbatch of 1 row:"
    kinds = ("parameters", "gradients", "optimizer", "buffers", "activations")
    yield "  " + " " * 16 + "".join(f"{kind:>12s}" for kind in kinds) + f"{'sum':>10s}"
    yield from (row_of_bytes(layout, held, job.limit) for layout, held in tried)
    yield from (f"  passed over: {line}" for line in passed)
    whole = recipe(job._replace(usable=1.0), zero)[2]
    spelled = f"t={whole.tp} p={whole.pp}" if whole else "nothing fits"
    yield f"  (with all of the GPU's memory to be filled: {spelled})"
    chosen = None
    if first:
        yield (f"Then replicas: d = {job.gpus} / ({first.tp} x {first.pp}) = {first.dp}; then "
               f"accumulation: {job.batch} / {first.dp} = {first.microbatches} rows on each.")
        yield "The microbatch that is fastest, of those that fit:"
        yield HEAD
        sizes = best_microbatch(job, first)
        yield from (row_of_times(plan, job) for plan in sizes)
        chosen = min(sizes, key=lambda plan: plan.times.total)

    found, n = search(job, asked=asked)
    given = ", ".join(f"{name} {value}" for name, value in asked.items())
    yield f"\nThe best of {n} layouts that may fit{f', {given}' if given else ''}:"
    if not found:
        yield "  none fits"
        yield from (f"  {line}" for line in what_would_fit(job))
        return
    yield HEAD
    yield from (row_of_times(plan, job) for plan in found)
    best = found[0]
    if chosen and chosen.layout != best.layout:
        yield f"The best and the recipe: {why(best, chosen)}."
    elif chosen:
        yield "The recipe is the best."
    if len(found) > 1:
        yield f"The best and the next: {why(best, found[1])}."

    yield "\nMemory of the best, on the rank with most:"
    total = hardware.memory_gb
    yield from bars({kind: n / 1e9 for kind, n in best.held.items()}, "GB", total)
    yield from bars({"free": total - sum(best.held.values()) / 1e9}, "GB", total)
    yield "Time of its step:"
    yield from bars(best.times._asdict(), "s", best.times.total)
    days = tokens / a_step * best.times.total / 86400
    yield (f"{tokens / 1e9:g} B tokens are {tokens / a_step:,.0f} steps: {days:.3g} days, at "
           f"{best.tflops(job):.3g} TFLOP/s a GPU ({100 * best.tflops(job) / hardware.tflops:.2g} "
           "% of its peak; recomputation does not count).")  # fmt: skip
    yield "\n" + command(job, best.layout, model)


# --- command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        sys.exit(f"tools.plan: error: {message}")


def read_hardware(name: str, own: dict[str, float]) -> Hardware:
    """A name of HARDWARE, or a JSON file with fields of Hardware; `own` fields override."""
    if name in HARDWARE:
        hardware = HARDWARE[name]
    else:
        try:
            with open(name) as file:
                fields = json.load(file)
            hardware = Hardware(**{"name": name} | fields)
        except (OSError, ValueError, TypeError) as error:
            known = ", ".join(HARDWARE)
            raise ValueError(f"--hardware {name} is none of {known}, and no JSON file with fields "
                             f"of cost.Hardware: {error}") from None  # fmt: skip
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
    p = Parser("tools.plan", description=__doc__.splitlines()[0], allow_abbrev=False)
    add, natural = p.add_argument, options.at_least(1)
    add("--model", choices=gpt.MODELS, default="gpt-175b", help="named sizes, overridden by:")
    for size in options.SIZES:
        add(f"--{size.replace('_', '-')}", type=natural, metavar="N")
    add("--attention", choices=("sdpa", "explicit"), default="sdpa")
    add("--gpus", type=natural, default=1024)
    add("--gpus-per-node", type=natural, default=8, metavar="N")
    add("--hardware", default="a100-80", metavar="NAME|FILE",
        help=f"{', '.join(HARDWARE)}; or JSON with the fields of cost.Hardware; overridden by:")
    for field in Hardware._fields[1:6]:
        add(f"--{field.replace('_', '-')}", type=float, metavar="X")
    add("--calibrate", action="store_true", help="this machine, measured, in float32 (1 min)")
    add("--global-batch-size", type=natural, default=1536, help="rows a step")
    add("--usable", type=float, default=USABLE, help="part of the memory that may be filled")
    add("--tokens", type=options.at_least(1, float), default=300e9, help="to be trained on")
    add("--zero", action="store_true", help="the recipe's other branch: ZeRO-3 before any p")
    for field in ("tp", "pp", "micro_batch_size", "chunks"):
        add(f"--{field.replace('_', '-')}", type=natural, metavar="N", help="of the best: given")
    add("--schedule", choices=("1f1b", "interleaved", "zb-h1", "zb-v"), help="of the best: given")
    add("--recompute", choices=("none", "selective", "full"), help="of the best: given")
    add("--json", action="store_true", help="the same as one JSON object")
    return p


def job_of(args: argparse.Namespace) -> tuple[Job, dict, list[str]]:
    """(what is asked, fields of the layout that are given, the model's flags). Raises ValueError
    for what is impossible: what the trainer would say, where it has something to say."""
    sizes = {size: n for size in options.SIZES if (n := getattr(args, size)) is not None}
    own = {field: x for field in Hardware._fields[1:6] if (x := getattr(args, field)) is not None}
    program = cost.OURS
    if args.calibrate:
        from tools import calibrate  # only here: it imports the trainer

        hardware = calibrate.calibrate(min(2, args.gpus))._replace(**own)
        program = calibrate.PROGRAM
    else:
        hardware = read_hardware(args.hardware, own)
    if not 0 < args.usable <= 1:
        raise ValueError(f"--usable {args.usable}: give a part of the memory, above 0, at most 1")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ValueError(f"--gpus {args.gpus} are no whole machines of --gpus-per-node "
                         f"{args.gpus_per_node}: give a multiple")  # fmt: skip
    asked = {field: value for field in ("tp", "pp", "micro_batch_size", "schedule", "chunks",
             "recompute") if (value := getattr(args, field)) is not None}  # fmt: skip
    model = [f"--model {args.model}"]
    model += [f"--{size.replace('_', '-')} {n}" for size, n in sizes.items()]
    model += [f"--attention {args.attention}"] * (args.attention != "sdpa")
    config = dataclasses.replace(gpt.MODELS[args.model], **sizes, attention=args.attention)
    job = Job(config, args.gpus, min(args.gpus, args.gpus_per_node), args.global_batch_size,
              hardware, program, args.usable)  # fmt: skip

    t, p = asked.get("tp", 1), asked.get("pp", 1)
    layout = Layout(t, p, max(1, job.gpus // (t * p)), 0, asked.get("micro_batch_size", 1), 1,
                    asked.get("recompute", "full"), asked.get("schedule", "1f1b"),
                    asked.get("chunks", 2))  # fmt: skip
    if t > job.per_node:
        raise ValueError(f"--tp {t} is more than the {job.per_node} GPUs of a machine: lower it")
    words = " ".join(arguments(job, layout, model)).split()
    if "pp" in asked or "tp" in asked or "micro_batch_size" in asked:
        options.check(options.parser().parse_args(words), job.gpus)
    every = [layout.dp for layout in layouts(job, asked)]
    if not every:
        raise ValueError(f"--global-batch-size {job.batch}: no d = {job.gpus} / (t p) divides it, "
                         "with the t, p and microbatch that there can be: give a multiple of "
                         f"{job.gpus}, or fewer GPUs")  # fmt: skip
    return job, asked, model


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    try:
        job, asked, model = job_of(args)
    except ValueError as error:
        arguments.error(str(error))
    if not args.json:
        for line in report(job, args.zero, args.tokens, asked, model):
            print(line, flush=True)
        return
    first = recipe(job, args.zero)[2]
    sizes = best_microbatch(job, first) if first else []
    chosen = min(sizes, key=lambda plan: plan.times.total, default=None)
    found, _ = search(job, asked=asked)
    print(json.dumps({
        "recipe": as_json(chosen, job), "best": as_json(found[0] if found else None, job),
        "layouts": [as_json(plan, job) for plan in found],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
