"""Measures what tools/figures.py draws, and writes it to docs/img/data/*.json.

    python -m tools.figure_data                     all figures (5 min on 2 cores, 12 GB of memory)
    python -m tools.figure_data mesh ddp_overlap    some of them
    make figures                                    then draws them

Counts (mesh, zero_memory) are the same on every machine, and the losses are almost the same. Times
(schedules, ddp_overlap) are those of this machine: two ranks with one thread each.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import data
import ddp
import gpt
import measure
import options
import schedules
import train_3d
from tools import figures
from tools.plan import bubble, dry_run
from tools.verify.oracle import CPU, launch

MACHINE = "gloo, float32, 2 ranks on 2 cores"


def trainer_of(flags: str, tokens=None) -> train_3d.Trainer:
    """A trainer as `train_3d.py FLAGS` makes it. tokens: the corpus; default: random tokens."""
    args = options.parser().parse_args([*flags.split(), "--device", "cpu"])
    config = options.check(args, dist.get_world_size())

    def read(step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        if tokens is not None:
            return data.batch(tokens, step, rows, config.seq_len, args.seed)
        x = torch.randint(config.vocab_size, (len(rows), config.seq_len))
        return x, x.roll(-1, 1)

    return train_3d.Trainer(args, config, read, CPU)


# --- schedules ------------------------------------------------------------------------------------

PIPELINE = (
    "--pp 2 --schedule zb-h1 --n-layer 8 --n-embd 256 --n-head 4 --global-batch-size 32 "
    "--micro-batch-size 4"
)


def trace_on_rank(folder: str) -> None:
    """What train_3d.py does with --trace."""
    trainer, trace = trainer_of(PIPELINE), measure.Trace(CPU)
    trainer.watch(trace)
    for step in range(12):
        trainer.step(step)
    trace.write(f"{folder}/trace.json", f"pp {trainer.pp_rank}, dp 0, tp 0")


def measure_schedules() -> dict:
    """The fastest step of a run with --trace. Other programs that use the cores slow the others."""
    with tempfile.TemporaryDirectory() as folder:
        launch(2, trace_on_rank, folder, timeout=600)
        steps = bubble.read_steps(f"{folder}/trace.json")[1:]
    fastest = min(steps, key=lambda spans: max(s.end for s in spans) - min(s.start for s in spans))
    spans = sorted(fastest, key=lambda span: span.start)
    zero, took = spans[0].start, {span.action: span.end - span.start for span in spans}
    ranks = [[s.action for s in spans if s.rank == rank] for rank in range(2)]
    simulated = schedules.simulate(ranks, lambda action: took[action])
    return {
        "command": f"train_3d.py {PIPELINE} --trace FILE",
        "machine": MACHINE,
        "schedule": "zb-h1",
        "ranks": 2,
        "microbatches": 8,
        "bubble": round(schedules.bubble(spans), 4),
        "simulated": round(schedules.bubble(simulated), 4),
        "spans": [
            [s.rank, *s.action, round(1e3 * (s.start - zero), 2), round(1e3 * (s.end - zero), 2)]
            for s in spans
        ],
    }


# --- memory of ZeRO -------------------------------------------------------------------------------


def held_on_rank(flags: str) -> dict:
    """{"predicted": {kind: bytes}, "counted": ...} of this rank after one step."""
    seen = dry_run.observe(trainer_of(flags), dist.get_rank())
    pairs = seen.bytes | {"activations": seen.activations}
    return {what: {kind: pairs[kind][i] for kind in figures.KINDS}
            for i, what in enumerate(("counted", "predicted"))}  # fmt: skip


ZERO = "--model gpt2 --seq-len 256 --global-batch-size 4 --micro-batch-size 1"


def measure_zero_memory() -> dict:
    rows = []
    for dtype in ("float32", "bf16"):
        for zero in range(4):
            held = launch(4, held_on_rank, f"{ZERO} --zero {zero} --dtype {dtype}", timeout=600)[0]
            rows.append({"zero": zero, "dtype": dtype, **held})
    return {
        "command": f"train_3d.py {ZERO} --zero 0 .. 3 --dtype float32 and bf16",
        "model": "GPT-2 (124 M parameters)",
        "ranks": 4,
        "rows_per_microbatch": 1,
        "seq_len": 256,
        "rows": rows,
    }


# --- the mesh -------------------------------------------------------------------------------------

MESH = "--tp 2 --pp 2 --zero 1"


def calls_on_rank(flags: str) -> tuple[dict, list[int], dict]:
    """({group: {operation: (calls, elements)}}, blocks of this rank, what differs from the
    prediction), of one step."""
    trainer = trainer_of(flags)
    seen = dry_run.observe(trainer, dist.get_rank())
    counted: dict = {}
    for group, calls in seen.calls.items():
        for call in calls:
            of = counted.setdefault(group, {}).setdefault(call.operation, [0, 0])
            of[0] += 1
            of[1] += call.payload
    return counted, [*map(int, trainer.model.h)], seen.differences()


def measure_mesh() -> dict:
    ranks = launch(8, calls_on_rank, MESH)
    wrong = {rank: differences for rank, (_, _, differences) in enumerate(ranks) if differences}
    if wrong:
        raise SystemExit(f"counts differ from the prediction: {wrong}")
    blocks = [ranks[rank][1] for rank in (0, 4)]
    tables = [counted for counted, _, _ in ranks]
    config = gpt.GPTConfig()
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    names = [f"blocks {own[0]} to {own[-1]}" for own in blocks]
    return {
        "command": f"train_3d.py {MESH}",
        "about": f"{size / 1e6:.2f} M parameters, 4 microbatches of 4 x {config.seq_len} tokens, "
        "1F1B, ZeRO-1",
        "stages": [f"embedding, {names[0]}", f"{names[1]}, head"],
        "tied": tables[0]["pp"]["all_reduce"][1],  # the first and the last stage: the pp group
        "world": tables[0]["world"]["all_reduce"][1],
        "ranks": {str(rank): table for rank, table in enumerate(tables)},
    }


# --- overlap of DDP -------------------------------------------------------------------------------

SMALL = gpt.GPTConfig(n_layer=6, n_head=8, n_embd=512, vocab_size=256, seq_len=96)


def overlap_on_rank(version: str, folder: str, steps: int = 20) -> None:
    """Trains with a version of ddp.py and writes a trace."""
    trace, plain = measure.Trace(CPU), dist.all_reduce
    model = gpt.build(SMALL, seed=0)
    x = torch.randint(SMALL.vocab_size, (2, SMALL.seq_len))

    def all_reduce(flat, group=None, async_op=False):
        """all_reduce, recorded from its launch to its end."""
        start = trace.now()

        def completed(_=None) -> None:
            trace.spans.append(("all-reduce", start, trace.now(), {"step": step}))

        work = plain(flat, group=group, async_op=async_op)
        if async_op:
            work.get_future().then(completed)
        else:
            completed()
        return work

    sync = ddp.DDP(model, bucket_bytes=2**22) if version == "DDP" else None
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    dist.all_reduce, step = all_reduce, -1
    for step in range(steps):
        plain(torch.zeros(1))  # ranks start together
        (sync.start if sync else optimizer.zero_grad)()
        with trace.span("forward", step=step):
            loss = gpt.cross_entropy(model(x), x) / (x.numel() * dist.get_world_size())
        with trace.span("backward", step=step):
            loss.backward()
        if sync:
            sync.finish()
            sync.before_step()
        elif version == "version 1":
            ddp.all_reduce_gradients(model.parameters(), dist.group.WORLD)
        else:
            ddp.all_reduce_flat(model.parameters(), dist.group.WORLD)
        with trace.span("optimizer", step=step):
            optimizer.step()
        if sync:
            sync.after_step()
    dist.all_reduce = plain
    trace.write(f"{folder}/trace.json", version)


def steps_of(path: str) -> list[list[tuple[str, float, float]]]:
    """For each step but the first two, the spans (name, start, end) of rank 0, in ms."""
    steps: dict[int, list] = {}
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == 0:
            start, end = 1e-3 * event["ts"], 1e-3 * (event["ts"] + event["dur"])
            steps.setdefault(event["args"]["step"], []).append((event["name"], start, end))
    shifted = []
    for step in sorted(steps)[2:]:
        zero = min(start for _, start, _ in steps[step])
        shifted.append(sorted(
            ((name, round(start - zero, 2), round(end - zero, 2))
             for name, start, end in steps[step]), key=lambda span: span[1]
        ))  # fmt: skip
    return shifted


def measure_ddp_overlap() -> dict:
    versions = []
    for name, function in (
        ("version 1", "all_reduce_gradients"),
        ("version 2", "all_reduce_flat"),
        ("DDP", "DDP, buckets of 4 MB"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            launch(2, overlap_on_rank, name, folder)
            steps = steps_of(f"{folder}/trace.json")
        spans = min(steps, key=lambda spans: max(end for _, _, end in spans))
        after = max(end for kind, _, end in spans if kind == "backward")
        last = max(end for kind, _, end in spans if kind == "all-reduce")
        versions.append({"name": name, "function": function, "exposed": round(last - after, 2),
                         "spans": spans})  # fmt: skip
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(SMALL).parameters())
    return {
        "about": f"{size / 1e6:.1f} M parameters, {MACHINE}. gloo copies with the cores that "
        "compute, so an overlapped all-reduce is not free.",
        "versions": versions,
    }


# --- losses ---------------------------------------------------------------------------------------

LOSS = "--n-layer 4 --n-head 4 --n-embd 64 --seq-len 64 --global-batch-size 16 --lr 3e-3"
LAYOUTS = {  # (ranks, flags)
    "d4, DDP": (4, ""),
    "d4, ZeRO-3": (4, "--zero 3"),
    "t4": (4, "--tp 4"),
    "t2 d2, SP, ZeRO-2": (4, "--tp 2 --sequence-parallel --zero 2"),
    "p4, 1F1B": (4, "--pp 4"),
    "p2 d2, ZB-V": (4, "--pp 2 --schedule zb-v"),
    "t2 p2, interleaved": (4, "--tp 2 --pp 2 --schedule interleaved"),
    "t2 p2 d2, ZeRO-1": (8, "--tp 2 --pp 2 --zero 1"),
}
STEPS = 30


def losses_on_rank(flags: str, tokens) -> list[float]:
    trainer = trainer_of(f"{LOSS} {flags} --steps {STEPS}", tokens)
    return [trainer.step(step)[0].item() for step in range(STEPS)]


def measure_loss() -> dict:
    tokens, _ = data.load(None)
    reference: dict[str, list[float]] = {}
    layouts: dict[str, dict] = {name: {} for name in LAYOUTS}
    for dtype in ("float32", "float64"):
        one = launch(1, losses_on_rank, f"--dtype {dtype}", tokens, timeout=600)[0]
        reference[dtype] = [round(loss, 4) for loss in one]
        for name, (ranks, flags) in LAYOUTS.items():
            losses = launch(ranks, losses_on_rank, f"{flags} --dtype {dtype}", tokens, timeout=600)[
                0
            ]
            differences = [(a - b) / b for a, b in zip(losses, one, strict=True)]
            layouts[name][dtype] = [float(f"{d:.1e}") for d in differences]
            print(f"{dtype} {name:34s} {max(map(abs, differences)):.1e}", flush=True)
    return {
        "command": f"train_3d.py {LOSS} --steps {STEPS}",
        "about": "4 blocks of hidden size 64, 16 rows of 64 tokens per step; the same data, "
        "initial values and optimizer",
        "reference": reference,
        "layouts": layouts,
    }


MEASUREMENTS: dict[str, Callable[[], dict]] = {
    "schedules": measure_schedules,
    "zero_memory": measure_zero_memory,
    "mesh": measure_mesh,
    "ddp_overlap": measure_ddp_overlap,
    "loss": measure_loss,
}


def compact(value: object, depth: int = 0) -> str:
    """JSON with one line per entry of the outer levels, and short lists on one line."""
    inner = json.dumps(value)
    if not isinstance(value, dict | list) or not value or len(inner) <= 90:
        return inner
    if isinstance(value, list) and not isinstance(value[0], dict | list):
        return inner
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {compact(v, depth + 1)}" for key, v in value.items()]
    else:
        lines = [compact(v, depth + 1) for v in value]
    ends = "{}" if isinstance(value, dict) else "[]"
    return f"{ends[0]}\n{pad}" + f",\n{pad}".join(lines) + f"\n{' ' * depth}{ends[1]}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(MEASUREMENTS)} "
                           "(default: all)")  # fmt: skip
    args = arguments.parse_args()
    for name in args.names:
        if name not in MEASUREMENTS:
            arguments.error(f"{name} is not measured: give some of {', '.join(MEASUREMENTS)}")
    folder = figures.FOLDER / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.names or MEASUREMENTS:
        since = time.monotonic()
        path = folder / f"{name}.json"
        path.write_text(compact(MEASUREMENTS[name]()) + "\n")
        print(f"{path}: {time.monotonic() - since:.0f} s", flush=True)


if __name__ == "__main__":
    main()
