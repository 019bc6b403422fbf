"""Compares the step times of this repository with those of PyTorch's implementations.

    make bench-dp    python -m tools.bench.compare dp    2 ranks, data parallelism and ZeRO
    make bench-tp    python -m tools.bench.compare tp    2 ranks, tensor parallelism
    make bench-cp    python -m tools.bench.compare cp    2 ranks, one long row
    make bench-pp    python -m tools.bench.compare pp    2 ranks, 8 microbatches of one row
    make bench-ckpt  python -m tools.bench.compare ckpt  1 rank, recomputation, explicit attention
    make bench-3d    python -m tools.bench.compare 3d    8 ranks, t = p = d = 2, train_3d.py's step

Ranks are forked processes of one thread that communicate through gloo. If there are enough cores,
each is bound to one. tools/bench/variants.py lists the variants. Those of one comparison take turns
in the same processes, forwards and then backwards, on the same batches. Each launch starts new
processes. A launch during which other processes use more than 0.05 of a core is repeated. If the
losses of two variants differ, the benchmark fails. tools/bench/stats.py explains the statistics.

The result is a Markdown table; `--out` writes it as JSON, with the values of each launch. Columns:

    step        time of a step on its slowest rank: median of a launch, median over launches
    ratio       step / step of PyTorch's fastest variant (marked "best"): below 1, it is faster.
                In brackets a 95 % interval
    CPU         CPU time of all ranks per step
    operators   operators of PyTorch that rank 0 runs in a step; DTensor's are counted after it has
                replaced them by operators on local tensors
    copied      bytes that operators such as copy_, clone and cat write
    calls       collectives and sends of rank 0 per step
    sent        bytes that rank 0 sends for them, with ring algorithms
    bubble      idle time / busy time of a pipeline: simulated with the measured time of F, B and W
                and with instantaneous transfers, then measured

`3d` also prints which fraction of a step's CPU time is spent outside the strategies, on data,
gradient norm and log. It is CPU time of the main thread, so waiting for other ranks is excluded.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

import torch
import torch._dynamo  # imported before the fork: otherwise every rank would import it
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import data
import gpt
import measure
import schedules
from logger import Logger
from tools.bench import links, stats, variants
from tools.bench.variants import ONE, SILENT, SUITES, Comparison, Suite
from tools.plan import bubble
from tools.verify.oracle import launch

WARMUP, LAUNCHES = 2, 10
LOSSES = 1e-4  # largest relative difference between the losses of two variants, in float32


# --- one launch -----------------------------------------------------------------------------------


class Work(measure.Collectives):
    """Counts operators and the bytes that they copy, and records collectives. Also records
    functional collectives, which DTensor uses."""

    COPIES = ("copy_", "_copy", "_copy_in", "clone", "cat", "stack")
    # name -> payload of (input, size of the group)
    FUNCTIONAL = {
        "all_reduce": lambda x, n: x.numel(),
        "all_gather_into_tensor": lambda x, n: n * x.numel(),
        "reduce_scatter_tensor": lambda x, n: x.numel(),
        "all_to_all_single": lambda x, n: x.numel(),
    }
    NAMES = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
             "all_to_all_single": "all_to_all"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.operators = self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FakeTensor in types:  # DTensor computes shapes with them
            return func(*args, **(kwargs or {}))
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a subclass such as DTensor runs operators on local tensors
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "_c10d_functional" and name in self.FUNCTIONAL:
            group = torch._C._distributed_c10d._resolve_process_group(args[-1])
            payload = self.FUNCTIONAL[name](args[0], group.size())
            operation = self.NAMES.get(name, name)
            call = measure.Call(operation, "", payload, args[0].dtype, "", group.size())
            self.calls.append(call)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace in ("aten", "fsdp"):  # fully_shard has operators, too
            self.operators += 1
            # DistributedDataParallel copies with a product, because it also divides.
            if name.endswith(self.COPIES) or func.name() == "aten::mul.out":
                written = (kwargs or {}).get("out", result)
                if name in ("_foreach_copy_", "all_gather_copy_in"):
                    written = args[0]
                for t in written if isinstance(written, list | tuple) else [written]:
                    self.copied += t.nbytes if isinstance(t, Tensor) else 0
                if name == "copy_" and args[0].data_ptr() == args[1].data_ptr():
                    self.copied -= args[0].nbytes  # onto itself
        return result

    def summary(self) -> dict[str, float]:
        calls = [c for c in self.calls if c.ranks > 1 and c.operation != "recv"]
        return {"operators": self.operators, "copied_mb": self.copied / 1e6, "calls": len(calls),
                "sent_mb": sum(map(sent_bytes, calls)) / 1e6}  # fmt: skip


def sent_bytes(call: measure.Call) -> float:
    """Bytes that a rank sends for this call: with ring algorithms, in a broadcast one payload."""
    share = 1.0 if call.operation == "send" else 1 - 1 / call.ranks
    if call.operation in links.WIRE and call.operation != "all_to_all":
        share = links.WIRE[call.operation](call.ranks)
    elif call.operation not in ("send", "all_to_all"):
        share = 1.0
    return share * call.payload * call.dtype.itemsize


def on_rank(suite: Suite, comparison: Comparison, size: int, pairs: int, count: bool) -> dict:
    """Trains all variants on this rank's rows. Returns by variant: seconds per timed step, losses,
    CPU seconds per step, the spans of pipelines and, with `count`, what one more step does."""
    config, rank, n = suite.config(size), dist.get_rank(), dist.get_world_size()
    share, replica = suite.rows // suite.d, rank // suite.t % suite.d
    mine = slice(replica * share, (replica + 1) * share)
    fake = dist.new_group(backend="fake") if n > 1 else None
    built = {}
    sides = comparison.variants(n)
    for name, (side, build) in sides.items():
        if side == ONE and rank > 0:
            continue
        group = fake if side == SILENT else dist.group.WORLD
        built[name] = side, build(gpt.build(config, seed=0), group)
    results = {
        name: {"seconds": [], "losses": [], "cpu": [], "spans": [], "schedule": None}
        for name in sides
    }
    turns = WARMUP + 2 * pairs + count
    for i in range(turns):
        generator = torch.Generator().manual_seed(i)
        shape = suite.rows, config.seq_len + 1
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        order = [*results] if i % 2 == 0 else [*reversed(results)]
        for name in order:
            result = results[name]
            side, step = built.get(name, (ONE, None))
            rows = slice(None) if side == ONE else mine
            x, y = tokens[rows, :-1], tokens[rows, 1:]
            m = comparison.m * (suite.d if side == ONE else 1)
            batch = list(zip(x.chunk(m), y.chunk(m), strict=True))
            seen = Work() if count and i == turns - 1 else None
            timed = WARMUP <= i < WARMUP + 2 * pairs
            if timed and comparison.schedules and hasattr(step, "pipe"):
                trace = measure.Trace(torch.device("cpu"))
                step.pipe.watch = lambda action, trace=trace: trace.span("", action=action)
                result["spans"].append(trace.spans)
                result["schedule"] = step.schedule
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            with seen or contextlib.nullcontext():
                loss = step(batch, suite.rows * config.seq_len) if step else 0.0
            if seen:
                result["work"] = seen.summary()
                continue
            result["losses"].append(float(loss))
            if timed:
                result["seconds"].append(time.perf_counter() - start)
                result["cpu"].append(time.process_time() - cpu_start)
    return results


def run(
    suite: Suite, comparison: Comparison, size: int, pairs: int, count: bool, tries: int
) -> dict:
    """One launch. Returns {"variants": {name: milliseconds of each step on its slowest rank, CPU
    milliseconds of a step on all ranks, and the other results}, "foreign": cores that other
    processes used, "loss_difference": see check_losses()}."""
    args = suite, comparison, size, pairs, count
    before = functools.partial(stats.bind, ranks=suite.ranks)
    launched, foreign = stats.undisturbed(
        lambda: launch(suite.ranks, on_rank, *args, timeout=900, before=before), tries
    )

    def summary(ranks: list[dict]) -> dict:
        losses, spans = (
            zip(*(r[kind] for r in ranks), strict=True) for kind in ("losses", "spans")
        )
        return {
            "ms": [1e3 * max(each) for each in zip(*(r["seconds"] for r in ranks), strict=True)],
            "cpu_ms": 1e3 * sum(statistics.median(r["cpu"]) for r in ranks),
            "losses": [sum(parts[:: suite.t]) for parts in losses],  # tp ranks return equal losses
            "bubble": bubbles(ranks[0]["schedule"], spans) if ranks[0]["spans"] else None,
            "work": ranks[0].get("work"),
        }

    found = {name: summary([r[name] for r in launched]) for name in launched[0]}
    sides = comparison.variants(suite.ranks)
    losses = {name: r["losses"] for name, r in found.items() if sides[name][0] != SILENT}
    return {"variants": found, "foreign": foreign, "loss_difference": check_losses(losses)}


def check_losses(losses: dict[str, list[float]]) -> float:
    """The largest relative difference from the losses of the first variant. Raises SystemExit if
    it is larger than LOSSES."""
    first, expected = next(iter(losses.items()))
    worst = 0.0
    for name, mine in losses.items():
        error = measure.largest(abs(a - b) / abs(b) for a, b in zip(mine, expected, strict=True))
        if not error <= LOSSES:
            sys.exit(f"the losses of {name!r} and {first!r} differ by {error:.1e}, relatively: "
                     "they do not train the same model")  # fmt: skip
        worst = max(worst, error)
    return worst


def bubbles(schedule: schedules.Schedule, spans: Iterable) -> tuple[float, float]:
    """(simulated, measured) bubble, medians over steps. spans: [step][rank]."""
    both = []
    for ranks in spans:
        step = [schedules.Span(rank, known["action"], start, end) for rank, mine in enumerate(ranks)
                for _, start, end, known in mine]  # fmt: skip
        mean = bubble.mean_times(step)
        simulated = schedules.simulate(schedule, lambda a, mean=mean: mean[a.kind, a.stage])
        both.append((schedules.bubble(simulated), schedules.bubble(step)))
    return tuple(statistics.median(side) for side in zip(*both, strict=True))


def loop_shares(config: gpt.GPTConfig, steps: int = 10) -> dict[str, float]:
    """Fractions of a step's CPU time (main thread of this rank, ZeRO-1): data, norm, log.

    Every rank logs here. In train_3d.py only rank 0 does.
    """
    tokens, _ = data.load(None, config.seq_len, config.vocab_size)
    spent: dict[str, float] = {}

    def timed(kind: str, function: Callable) -> Callable:
        def call(*args):
            start = time.thread_time()
            result = function(*args)
            spent[kind] = spent.get(kind, 0.0) + time.thread_time() - start
            return result

        return call

    read = functools.partial(data.batch, tokens, seq_len=config.seq_len, seed=0)
    trainer = variants.make_trainer(config, timed("data", read), stage="1")
    trainer._global_stats = timed("norm", trainer._global_stats)
    with tempfile.NamedTemporaryFile("w") as file, contextlib.redirect_stdout(file):
        args = vars(trainer.args) | {"log": file.name, "steps": steps, "print_every": steps}
        logger = Logger(argparse.Namespace(**args), config)
        log = timed("log", logger.step)
        timed_step = timed("step", lambda i: log(i, trainer.step(i), trainer.learning_rate(i)))
        for i in range(WARMUP):
            trainer.step(i)
        spent.clear()
        logger.start()
        for i in range(steps):
            timed_step(i)
    return {kind: seconds / spent["step"] for kind, seconds in spent.items() if kind != "step"}


# --- the table ------------------------------------------------------------------------------------


def rows_of(suite: Suite, size: int, name: str, launches: list[dict]) -> list[dict]:
    """One row per variant of the comparison `name`. launches: what run() returned."""
    comparison, difference = suite.comparisons[name], max(x["loss_difference"] for x in launches)
    launches = [launch["variants"] for launch in launches]

    def ms(variant: str) -> float:
        return statistics.median(statistics.median(found[variant]["ms"]) for found in launches)

    def ratio(over: str, under: str) -> dict:
        each = [stats.launch_ratio(found[over]["ms"], found[under]["ms"]) for found in launches]
        return {"ratio": statistics.median(each), "interval": stats.interval(each), "ratios": each}

    sides, rows = comparison.variants(suite.ranks), []
    best = min(comparison.torch, key=ms, default=None)
    for variant, (side, _) in sides.items():
        runs = [found[variant] for found in launches]
        row = {suite.axis: size, "comparison": name, "variant": variant, "side": side,
               "best": variant == best, "ms": ms(variant), "n": len(runs),
               "launch_ms": [statistics.median(r["ms"]) for r in runs],
               "cpu_ms": statistics.median(r["cpu_ms"] for r in runs),
               "loss_difference": difference}  # fmt: skip
        if best and variant != best:
            row |= {"over": best} | ratio(variant, best)
        if ONE in sides and variant != ONE:
            row["over_one_process"] = ratio(variant, ONE)
        if comparison.schedules and side == "ours":
            first = next(iter(sides))
            row["over_" + first] = ratio(variant, first)
            each = zip(*(r["bubble"] for r in runs), strict=True)
            row["bubble"] = [statistics.median(values) for values in each]
        if side != SILENT:
            row |= runs[0]["work"]
        rows.append(row)
    return rows


COLUMNS = ("comparison", "variant", "size", "step", "ratio", "n", "CPU", "operators", "copied",
           "calls", "sent", "bubble")  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        ratio = "best" if r["best"] else ""
        if "ratio" in r:
            ratio = "{:.3f} ({:.3f} to {:.3f})".format(r["ratio"], *r["interval"])
        counted = "operators" in r
        cells = (
            r["comparison"], r["variant"], r.get("h") or r["s"], f"{r['ms']:.1f} ms", ratio, r["n"],
            f"{r['cpu_ms']:.0f} ms", r["operators"] if counted else "",
            f"{r['copied_mb']:.1f} MB" if counted else "", r["calls"] if counted else "",
            f"{r['sent_mb']:.2f} MB" if counted else "",
            "{:.3f}, {:.3f}".format(*r["bubble"]) if "bubble" in r else "",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("suite", choices=SUITES)
    add("--sizes", type=int, nargs="+", metavar="N", help="some of the suite's sizes: hidden sizes "
        f"{[*variants.SIZES]}, or for cp sequence lengths {[*variants.LONG]}")  # fmt: skip
    add("--only", nargs="+", metavar="NAME", help="some of the suite's comparisons")
    add("--launches", type=int, default=LAUNCHES, metavar="N", help="launches per comparison")
    add("--pairs", type=int, default=1, metavar="N", help="pairs of timed steps per launch")
    add(
        "--tries",
        type=int,
        default=stats.TRIES,
        metavar="N",
        help="repeat a launch at most so often if other processes use the cores",
    )
    add("--out", metavar="FILE", help="write the rows as JSON")
    args = arguments.parse_args()
    suite = SUITES[args.suite]
    sizes, names = args.sizes or [*suite.sizes], args.only or [*suite.comparisons]
    for option, given, known in (("--sizes", sizes, suite.sizes),
                                 ("--only", names, suite.comparisons)):  # fmt: skip
        if unknown := [x for x in given if x not in known]:
            arguments.error(f"{option} {unknown[0]}: choose from {[*known]}")

    def report(line: str) -> None:
        print(line, flush=True)

    report(f"{suite.ranks} ranks x 1 thread on {len(stats.cores())} cores, gloo, "
           f"torch {torch.__version__}, float32, global batch {suite.rows} rows")  # fmt: skip
    shares: dict[int, dict] = {}
    for h in sizes if args.suite == "3d" else ():
        found = launch(suite.ranks, loop_shares, suite.config(h))
        shares[h] = max(found, key=lambda of: sum(of.values()))
        parts = ", ".join(f"{kind} {share:.2%}" for kind, share in shares[h].items())
        report(f"h {h}: data, norm and log take {sum(shares[h].values()):.2%} of a step's CPU time "
               f"on the rank where they take most: {parts}")  # fmt: skip
    runs: dict[tuple, list[dict]] = {(size, name): [] for size in sizes for name in names}
    start = time.perf_counter()
    for i in range(args.launches):
        for (size, name), launches in runs.items():
            comparison = suite.comparisons[name]
            launches.append(run(suite, comparison, size, args.pairs, i == 0, args.tries))
        took = time.perf_counter() - start
        report(f"launch {i + 1} of {args.launches}: done after {took:.0f} s")
    rows = [row for (size, name), launches in runs.items()
            for row in rows_of(suite, size, name, launches)]  # fmt: skip
    foreign = [launch["foreign"] for launch in sum(runs.values(), [])]
    report(f"other processes used up to {max(foreign):.2f} cores during a launch, and more than "
           f"{stats.BUSY} in {sum(f > stats.BUSY for f in foreign)} of {len(foreign)}")  # fmt: skip
    worst = max(row["loss_difference"] for row in rows)
    report(f"the losses of the variants differ by at most {worst:.1e}, relatively")
    report("\n" + markdown(rows))
    if args.out:
        about = stats.provenance(f"make bench-{args.suite}")
        about |= {"ranks": suite.ranks, "launches": args.launches, "steps": 2 * args.pairs,
                  "foreign_cores": foreign, "shares": shares, "rows": rows}  # fmt: skip
        stats.write(args.out, about)


if __name__ == "__main__":
    main()
