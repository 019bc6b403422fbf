"""Reports on a machine with several GPUs: hardware, links, correctness, speed of every strategy.

    make node OUT=node.md    python -m tools.bench.node --nproc 8 --out node.md    8 GPUs: 30 min

The report is Markdown and has four sections:
- the machine and its software;
- latency and bandwidth of the collectives (tools/bench/links.py);
- parity: the largest difference between each layout and one process, in float64;
- the speed of every strategy in bf16, of this repository and of PyTorch.

Rows of the last table: the loop without parallelism of tools/bench/gpu_check.py on one GPU ("bare
loop"), strategies of this repository run by train_3d.Trainer, and the PyTorch variants of
tools/bench/variants.py ("torch ..."). All process the same number of tokens per GPU. Each launch of
a row has fresh memory. A failure is reported in its row.

In all rows fused AdamW updates fp32 master weights, with the same settings and without clipping.
PyTorch's strategies leave master weights to the user: the class `Masters` makes them. `fully_shard`
has rows with fp32 parameters and its own `MixedPrecisionPolicy` too. Two differences remain:
PyTorch's variants compute no gradient norm, and with `Masters` they accumulate gradients in bf16.

Each row first trains on one global batch for LOSSES steps, the same batch in all rows. If a row's
losses differ from the others, it shows them instead of its times, and the exit status is 1. AdamW
hides constant factors of the gradients from this check, but parity would show them.

Steps are timed twice: with a synchronisation of host and GPU around each step, and free-running,
with a single synchronisation after the last step. On CPUs a small model shows that the report
works; its numbers say nothing about GPUs.
"""

import argparse
import datetime
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import Schedule1F1B
from torch.distributed.tensor import DTensor

import data
import gpt
import measure
import options
import startup
import train_3d
from tools.bench import gpu_check, variants
from tools.verify import oracle, parity

ROOT = Path(__file__).resolve().parents[2]
ROWS = 16  # sequences per GPU and step
LOSSES = 4  # steps on one batch before the timed ones
# Relative, of losses. On CPUs, rounding in bf16 causes up to 2e-4, measured with 2 to 48 layers.
# Without the sum of gradients over 2 ranks, losses differ by 1e-2 or more after three updates.
TOLERANCE = 2e-3
# t divides neither the 25 heads nor the 50257 tokens of gpt2-xl, so both are changed. Untied
# because torch.distributed.pipelining cannot tie weights.
MODEL = "--model gpt2-xl --n-head 40 --vocab-size 50304 --untied"
SMALL = "--n-layer 8 --n-head 8 --n-embd 64 --seq-len 64 --vocab-size 256 --untied"

COLUMNS = f"""
{ROWS} sequences per GPU and step, in microbatches of 4, or 8 with TP. Every second round runs the
rows in reverse order. `lowest to highest`: free-running ms of `n` launches. TFLOP/s and MFU count
the FLOPs of the model; nothing is recomputed. `peak GB`: peak of torch's allocator, on the rank
with the largest. `d loss`: largest relative difference of a loss from the median of all rows."""
PRIORITY = ", NCCL at high priority"  # rows with this suffix set TORCH_NCCL_HIGH_PRIORITY=1

# --- rows -----------------------------------------------------------------------------------------


def trainer_rows(n: int) -> dict[str, str | None]:
    """Row -> flags of train_3d.py; None if the layout does not exist for n ranks."""
    return {
        "DDP": "",
        f"DDP{PRIORITY}": "",
        **{f"ZeRO-{z}": f"--zero {z}" for z in (1, 2, 3)},
        "TP": f"--tp {n}",
        "TP+SP": f"--tp {n} --sequence-parallel",
        f"TP+SP{PRIORITY}": f"--tp {n} --sequence-parallel",
        "PP, 1f1b": f"--pp {n}",
        "2 x 2 x d": "--tp 2 --pp 2" if n % 4 == 0 and n > 4 else None,
    }


def torch_rows(n: int) -> dict[str, Callable | None]:
    """Row -> variant of tools/bench/variants.py; None if the layout does not exist for n ranks."""
    batch = n * ROWS
    pp = "torch pipelining, 1F1B"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {
        "torch DDP": functools.partial(variants.torch_ddp, zero=True),
        **{f"torch fully_shard{kept}{how}": functools.partial(
               variants.torch_fsdp, reshard=not kept, policy=policy if how else None)
           for kept in ("", ", kept") for how in ("", ", MixedPrecisionPolicy")},
        "torch DTensor TP": functools.partial(variants.torch_tp, sequence=False),
        "torch DTensor TP+SP": functools.partial(variants.torch_tp, sequence=True),
        pp: functools.partial(
            variants.torch_pp, kind=Schedule1F1B, chunks=1, fold=False, m=batch // microbatch(pp)),
        "torch 2 x 2 x d": functools.partial(
            variants.torch_3d, reshard=True, m=batch // 2 // microbatch("torch 2 x 2 x d"))
        if n == 8 else None,
    }  # fmt: skip


def microbatch(row: str) -> int:
    """Sequences per microbatch."""
    return 8 if "TP" in row or "2 x 2" in row else 4


BARE, PARITY = "bare loop", "parity"


def names(n: int) -> list[str]:
    return [BARE, *trainer_rows(n), *torch_rows(n)]


# All rows use the same settings of AdamW, so that their losses can be compared.
ADAMW_FLAGS = "--lr 1e-3 --warmup-steps 0 --weight-decay 0 --grad-clip 0"
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": oracle.EPS, "weight_decay": 0.0}
ADAMW = functools.partial(torch.optim.AdamW, fused=True, **SETTINGS)


class Masters:
    """AdamW on fp32 copies of bf16 parameters; for a DTensor, of this rank's shard."""

    def __init__(self, parameters):
        groups = [x["params"] if isinstance(x, dict) else [x] for x in parameters]
        self.parameters = [p for group in groups for p in group]
        self.local = [self._local(p.detach()) for p in self.parameters]
        self.masters = [p.float() for p in self.local]
        self.optimizer = ADAMW(self.masters)

    @staticmethod
    def _local(t: Tensor) -> Tensor:
        return t.to_local() if isinstance(t, DTensor) else t

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters:
            if set_to_none or p.grad is None:
                p.grad = None
            else:
                p.grad.zero_()

    def step(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            grad = p.grad
            if isinstance(grad, DTensor):
                grad = grad.redistribute(placements=p.placements)
            master.grad = None if grad is None else self._local(grad).float()
        self.optimizer.step()
        for p, master in zip(self.local, self.masters, strict=True):
            p.copy_(master)
            master.grad = None


class TorchLoop:
    """A variant of tools/bench/variants.py with the method step(step), like train_3d.Trainer."""

    def __init__(self, build: Callable, args: argparse.Namespace, config: gpt.GPTConfig,
                 device: torch.device, rows: range):  # fmt: skip
        with torch.device("meta"):
            model = gpt.GPT(config)
        gpt.init_weights(model, args.seed, torch.bfloat16, device, oracle.draw)
        casts = build.keywords.get("policy")  # fully_shard makes bf16 copies of fp32 parameters
        variants.adamw = ADAMW if casts else Masters
        self.read, self.device, self.rows = gpu_check.reader(config), device, rows
        self.b, self.valid = args.micro_batch_size, args.global_batch_size * config.seq_len
        self.run = build(model.float() if casts else model, dist.group.WORLD)

    def step(self, step: int) -> Tensor:
        x, y = (data.to_device(t, self.device) for t in self.read(step, self.rows))
        return self.run(list(zip(x.split(self.b), y.split(self.b), strict=True)), self.valid)


# --- on a rank ------------------------------------------------------------------------------------


def loop_of(row: str, n: int, model: str, device: torch.device):
    """(an object with the method step(step), the configuration of its model)."""
    flags = f"{model} {ADAMW_FLAGS} --dtype bf16 --micro-batch-size {microbatch(row)} "
    flags += f"--global-batch-size {n * ROWS} {trainer_rows(n).get(row) or ''}"
    args = options.parser().parse_args(flags.split())
    config = options.check(args, 1 if row == BARE else n)
    if row == BARE:
        return gpu_check.Bare(args, config, device), config
    if row in trainer_rows(n):
        return gpu_check.trainer_of(args, config, device), config
    t, replicas = (2, 2) if row == "torch 2 x 2 x d" else (1, n)
    if "TP" in row or "pipelining" in row:  # every rank processes the full batch
        replicas = 1
    share = n * ROWS // replicas
    first = dist.get_rank() // t % replicas * share
    rows = range(first, first + share)
    return TorchLoop(torch_rows(n)[row], args, config, device, rows), config


def loss_of(row: str, stats: Tensor, device: torch.device) -> float:
    """The loss of the global batch. stats: what a step returned on this rank. Replicas of PyTorch's
    strategies return the loss of their rows, and other stages than the last return 0.
    """
    stats = stats.full_tensor() if isinstance(stats, DTensor) else stats
    loss = stats.flatten()[0].to(device)  # those zeros are on the CPU
    if row.startswith("torch") and "TP" not in row:
        dist.all_reduce(loss)
        loss /= 2 if row == "torch 2 x 2 x d" else 1  # both tp ranks have the same loss
    return loss.item()


def on_rank(row: str, n: int, model: str, steps: int, device: torch.device) -> dict:
    """Measures `row` on this rank. Returns the losses of the first steps; the maximum over ranks of
    the seconds per step (synchronised and free-running) and of the peak bytes of CUDA's allocator;
    and the tokens and TFLOP per GPU and step.
    """
    gpu_check.free_memory()
    loop, config = loop_of(row, n, model, device)
    losses = [loss_of(row, loop.step(0), device) for _ in range(LOSSES)]
    if row == BARE:
        loop.args.global_batch_size = ROWS  # time one GPU's rows
    (seconds,) = gpu_check.seconds([loop], steps, device)
    (free,) = gpu_check.free_running_seconds([loop], steps, device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    worst = torch.tensor([seconds, free, peak], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    seconds, free, peak = worst.tolist()
    tokens = ROWS * config.seq_len  # per GPU
    return {"losses": losses, "seconds": seconds, "free": free, "peak": peak, "tokens": tokens,
            "tflop": 3e-12 * gpt.forward_flops_per_token(config) * tokens}  # fmt: skip


def check_layouts(n: int, device: torch.device) -> dict:
    """Compares layouts of n ranks with one process, over the backend of `device`.

    Returns {"parity": {case: largest relative error}}.
    """
    worst, trainers = {}, []

    def step_of(trainer: train_3d.Trainer, step: int) -> Tensor:
        trainers.append(trainer)
        return trainer.step(step)

    for case in parity.cases(n, n_head=24):
        if case.zero in (1, 2) or case.schedule not in ("1f1b", "zb-v") or case.shard_size:
            continue
        expected = oracle.reference(case)
        expected = {kind: x.to(device) if isinstance(x, Tensor) else
                    {name: t.to(device) for name, t in x.items()}
                    for kind, x in expected.items()}  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            seams = {"device": device, "step": step_of}
            errors = oracle.layout(case, expected, seams, 0, case.steps, folder).errors
        every = (error for kind in errors.values() for error in kind.values())
        largest = torch.tensor(measure.largest(every), dtype=torch.float64, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        held = [x for x in vars(trainers[0]).values() if isinstance(x, dist.ProcessGroup)]
        # Destroy the layout's groups, otherwise NCCL's buffers accumulate. Axes may share a group.
        for group in dict.fromkeys(held):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        trainers.clear()
        name = f"t={case.t} p={case.p} d={case.d}, ZeRO-{case.zero}, {case.schedule}"
        worst[name + ", SP" * case.sequence] = largest.item()
    return {"parity": worst}


def one_row(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device, _ = startup.pick_device(args.device)
    startup.join_ranks(device)
    if args.row == PARITY:
        found = check_layouts(args.nproc, device)
    else:
        found = on_rank(args.row, args.nproc, model_of(args, device), args.steps, device)
    if dist.get_rank() == 0:
        Path(args.out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# --- the report -----------------------------------------------------------------------------------


def model_of(args: argparse.Namespace, device: torch.device) -> str:
    return args.model or (MODEL if device.type == "cuda" else SMALL)


def torchrun(ranks: int, command: list[str], **variables: str) -> str | None:
    """Runs `command` under torchrun. Returns None, or one line that says what went wrong."""
    line = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node".split(),
            str(ranks), *command]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | variables
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return None
    # torchrun prefixes lines with "[rank0]: ".
    split = (line.strip().partition("]: ") for line in done.stderr.splitlines())
    lines = [rest or full for full, _, rest in split if re.search("[Ee]rror: ", rest or full)]
    return (lines or [f"exit code {done.returncode}"])[0][:200].replace("|", "/")


def launch(row: str, args: argparse.Namespace) -> dict | str:
    """The result of one row, or a line that says what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found"
        own = ["--row", row, "--out", out, "--nproc", str(args.nproc), "--device", args.device,
               "--steps", str(args.steps), f"--model={args.model}"]  # fmt: skip
        high = {"TORCH_NCCL_HIGH_PRIORITY": "1"} if PRIORITY in row else {}
        ranks = 1 if row == BARE else args.nproc
        wrong = torchrun(ranks, ["-m", "--", "tools.bench.node", *own], **high)
        return wrong or json.loads(Path(out).read_text())


def machine(n: int, device: torch.device) -> list[str]:
    """Lines of the Markdown table of hardware and software."""
    rows = {"ranks": str(n), "date": str(datetime.date.today()), "torch": torch.__version__,
            "CPU cores": str(os.cpu_count())}  # fmt: skip
    if device.type == "cuda":
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which(
            "nvidia-smi") else "no nvidia-smi"  # fmt: skip
        kinds = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        rows |= {"GPU": ", ".join(sorted(kinds)), "driver": driver, "CUDA": str(torch.version.cuda),
                 "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}  # fmt: skip
    else:
        rows["GPU"] = "none: a small model on the CPU over gloo, which says nothing about GPUs"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def links_table(n: int, device: torch.device) -> list[str]:
    mb = (25, 400) if device.type == "cuda" else (1, 25)  # 25 MB do not saturate NVLink
    sizes = ["--sizes-kb", "4", *(str(1024 * size) for size in mb)]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/links"
        own = ["--device", device.type, *sizes, "--out", out]
        if wrong := torchrun(n, ["-m", "--", "tools.bench.links", *own]):
            return [wrong]
        fits = json.loads(Path(out).read_text())["fit"]
    speed = {True: lambda f: f"{f['gb_per_s']:.2f}", False: lambda f: "too noisy"}
    return ["| ranks | collective | latency, us | GB/s of wire |", "|---|---|---|---|",
            *(f"| {f['ranks']} | {f['operation']} | {f['latency_us']:.0f} | "
              f"{speed[f['gb_per_s'] is not None](f)} |" for f in fits)]  # fmt: skip


def parity_table(found: dict | str) -> tuple[list[str], bool]:
    if isinstance(found, str):
        return [f"failed: {found}"], False
    worst = found["parity"]
    same = all(error <= measure.TOLERANCE for error in worst.values())
    rows = [f"| {case} | {error:.1e} |" for case, error in worst.items()]
    return ["| layout | largest relative difference |", "|---|---|", *rows], same


def check_losses(found: dict[str, list]) -> bool:
    """Compares the losses of each launch with the median of all. The results of a row with a launch
    that differs by more than TOLERANCE become an error message. Returns whether all rows agree.
    """
    every = [x["losses"] for results in found.values() for x in results if isinstance(x, dict)]
    steps, alike = zip(*every, strict=True), True
    median = [statistics.median(math.inf if math.isnan(t) else t for t in step) for step in steps]
    for row, results in found.items():
        for x in (x for x in results if isinstance(x, dict)):
            pairs = list(zip(x["losses"], median, strict=True))
            x["difference"] = measure.largest(abs(loss - m) / m for loss, m in pairs)
            if x["difference"] > TOLERANCE:
                each = ", ".join(f"{loss:.4f} ({m:.4f})" for loss, m in pairs)
                alike, found[row] = False, [f"WRONG: losses (median of all rows): {each}"]
    return alike


def speed_table(rows: list[str], found: dict[str, list], peak: float | None) -> list[str]:
    """Lines of the table of speeds: medians over launches; rates are those of free-running steps.

    `vs bare loop` is tokens/s per GPU divided by that of the bare loop. peak: TFLOP/s of the GPU.
    """
    lines = [
        "| | step, ms | free-running, ms | lowest to highest | n | tokens/s per GPU | "
        "TFLOP/s per GPU | MFU | vs bare loop | peak GB | d loss |",
        "|---" * 11 + "|",
    ]
    bare = [x["free"] for x in found.get(BARE, ()) if isinstance(x, dict)]
    for row in rows:
        good = [x for x in found[row] if isinstance(x, dict)]
        if not good:
            lines.append(f"| {row} | {found[row][0]}{' |' * 10}")
            continue
        seconds, times = ([1e3 * x[how] for x in good] for how in ("seconds", "free"))
        one, free = good[0], statistics.median(times) / 1e3
        tflops = one["tflop"] / free
        share = f"{statistics.median(bare) / free:.3f}" if bare else "-"
        mfu = f"{100 * tflops / peak:.1f} %" if peak else "-"
        held = f"{max(x['peak'] for x in good) / 1e9:.2f}" if one["peak"] else "-"
        lines.append(
            f"| {row} | {statistics.median(seconds):.1f} | {1e3 * free:.1f} | "
            f"{min(times):.1f} to {max(times):.1f} | {len(good)} | "
            f"{one['tokens'] / free:,.0f} | {tflops:.3g} | {mfu} | {share} | {held} | "
            f"{max(x['difference'] for x in good):.0e} |"
        )
    return lines


def report(args: argparse.Namespace, device: torch.device, say: Callable[..., None]) -> bool:
    n, rows = args.nproc, args.rows or names(args.nproc)
    model = model_of(args, device)
    say(f"# {n} ranks on one machine\n", *machine(n, device))
    say("\n## Links (`make links`)\n", *links_table(n, device))
    say("\n## Parity with one process, in float64\n")
    lines, same = parity_table(launch(PARITY, args))
    verdict = "All within" if same else "MISMATCH: not all within"
    say(*lines, f"\n{verdict} {measure.TOLERANCE:.0e}.", f"\n## Strategies: bf16, `{model}`\n")
    say(f"Medians of {args.rounds} launches of {args.steps} steps.\n")
    args.model, found = model, {row: [] for row in rows}
    able = trainer_rows(n) | torch_rows(n) | {BARE: ""}
    for i in range(args.rounds):
        for row in rows[::-1] if i % 2 else rows:
            found[row].append(f"not possible with {n} ranks" if able[row] is None
                              else launch(row, args))  # fmt: skip
    same &= check_losses(found)
    say(*speed_table(rows, found, startup.peak_tflops(device, "bf16")))
    say(COLUMNS)
    return same


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("tools.bench.node", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--nproc", type=options.at_least(2), default=8, help="ranks, one per GPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--model", default="", help=f"flags of train_3d.py, in one string (default: {MODEL})")
    add("--rows", nargs="+", metavar="ROW", help="measure only these rows of the last table")
    add("--steps", type=options.at_least(1), default=10, help="timed steps per launch")
    add("--rounds", type=options.at_least(1), default=2, help="launches of each row")
    add("--out", metavar="FILE", help="also write the report to FILE")
    add("--row", help=argparse.SUPPRESS)
    return p


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    if args.row:
        return one_row(args)
    os.environ["LOCAL_WORLD_SIZE"] = str(args.nproc)
    known = names(args.nproc)
    if wrong := [row for row in args.rows or () if row not in known]:
        arguments.error(f"--rows {wrong[0]!r} is not one of {', '.join(map(repr, known))}")
    try:
        device, _ = startup.pick_device(args.device)
        startup.check_writable("--out", args.out)
    except ValueError as error:
        arguments.error(str(error))
    args.device = device.type
    since, lines = time.monotonic(), []

    def say(*text: str) -> None:
        lines.extend(text)
        print(*text, sep="\n", flush=True)
        if args.out:
            Path(args.out).write_text("\n".join(lines) + "\n")

    same = report(args, device, say)
    seconds = time.monotonic() - since
    say(f"\n`python -m tools.bench.node {' '.join(sys.argv[1:])}`: {seconds:.0f} s")
    sys.exit(not same)


if __name__ == "__main__":
    main()
