"""Compares the trainer of train_3d.py on one GPU with a plain training loop.

    make gpu-check OUT=gpu.md    python -m tools.bench.gpu_check --out gpu.md     5 minutes

The plain loop (class `Bare`, "bare loop" in the tables) consists of the model, microbatches,
clipping and AdamW. It uses none of the strategies. The trainer runs with t = p = d = 1, so its
strategies are no-ops. The report is Markdown:
- largest relative differences of losses, gradient norms, gradients and parameters in float64;
- time per step in bf16, with and without --compile. Loops alternate. Steps are timed with a
  synchronisation around each step, and free-running, with one after the last of several steps;
- time of recomputation and of offloading;
- peak memory of CUDA's allocator, compared with the formulas.

The exit code is 1 if a difference in float64 is too large. Without a GPU the report uses a small
model on the CPU, which shows only that the tool works.
"""

import argparse
import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import data
import gpt
import measure
import options
import startup
import train_3d
from tools.plan import dry_run
from tools.verify.oracle import EPS, draw

STEPS = 3  # of the comparison in float64
SMALL = "--n-layer 2 --n-head 2 --n-embd 64 --seq-len 64 --vocab-size 512".split()


class Bare:
    """Plain training loop: one device, m microbatches, bf16 with fp32 master weights."""

    def __init__(self, args: argparse.Namespace, config: gpt.GPTConfig, device: torch.device):
        self.args, self.read, self.device = args, reader(config), device
        dtype = options.DTYPES[args.dtype]
        with torch.device("meta"):
            self.model = gpt.GPT(config)
        gpt.init_weights(self.model, args.seed, dtype, device, draw)
        self.parameters, narrow = list(self.model.parameters()), dtype.itemsize < 4
        self.masters = [p.detach().float() if narrow else p for p in self.parameters]
        for p in self.parameters if narrow else ():
            p.grad_dtype = torch.float32  # accumulate microbatches in fp32, as ddp.py does
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2]},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, 0.0, (0.9, 0.95), EPS, args.weight_decay,
                                           fused=True)  # fmt: skip
        for block in self.model.h.values() if args.compile else ():
            block.forward = torch.compile(block.forward)

    def step(self, step: int) -> Tensor:
        """One training step. Returns [loss, gradient norm]."""
        args, b = self.args, self.args.micro_batch_size
        rows = range(args.global_batch_size)
        x, y = (data.to_device(t, self.device) for t in self.read(step, rows))
        count, total = (y >= 0).sum(), torch.zeros((), device=self.device)
        for p in self.parameters:
            p.grad = None
        for xs, ys in zip(x.split(b), y.split(b), strict=True):
            loss = gpt.cross_entropy(self.model(xs), ys) / count
            loss.backward()
            total = total + loss.detach()
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad = p.grad
        norm = torch.nn.utils.get_total_norm([master.grad for master in self.masters])
        if args.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.masters, args.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = gpt.learning_rate(step, args.steps, args.warmup_steps, args.lr)
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                p.copy_(master)
        return torch.stack([total, norm])


def reader(config: gpt.GPTConfig) -> Callable:
    """A function (step, rows) -> (inputs, targets) of random tokens. `rows` are numbers in the
    global batch: a row has the same tokens on every rank."""

    def read(step: int, rows: range) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        shape = rows.stop, config.seq_len + 1
        row = torch.randint(config.vocab_size, shape, generator=generator)[rows.start :]
        return row[:, :-1].contiguous(), row[:, 1:].contiguous()

    return read


def trainer_of(
    args: argparse.Namespace, config: gpt.GPTConfig, device: torch.device
) -> train_3d.Trainer:
    trainer = train_3d.Trainer(args, config, reader(config), device, draw)
    for group in trainer.optimizer.param_groups:
        group["eps"] = EPS
    return trainer


def now(device: torch.device) -> float:
    """The time after all work launched on `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(loops: list, steps: int, device: torch.device) -> list[float]:
    """Median seconds per step of each loop. The loops alternate; the first two steps warm up."""
    times: list[list[float]] = [[] for _ in loops]
    for step in range(2 + steps):
        for loop, measured in zip(loops, times, strict=True):
            start = now(device)
            loop.step(step)
            measured.append(now(device) - start)
    return [statistics.median(measured[2:]) for measured in times]


def free_running_seconds(loops: list, steps: int, device: torch.device) -> list[float]:
    """Seconds per step of each loop, without synchronisation between steps, as in training.

    A window is `steps` steps. Windows of the loops alternate, and the result is the median of three
    of them. The loops must be warm.
    """
    times: list[list[float]] = [[] for _ in loops]
    for _ in range(3):
        for loop, measured in zip(loops, times, strict=True):
            start = now(device)
            for step in range(steps):
                loop.step(step)
            measured.append((now(device) - start) / steps)
    return [statistics.median(measured) for measured in times]


def free_memory() -> None:
    """Frees cached GPU memory and resets the allocator's peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- comparisons ----------------------------------------------------------------------------------


def parity(flags: list[str], device: torch.device) -> Iterator[tuple[str, bool]]:
    """(row of the table, whether the difference is within measure.TOLERANCE)."""
    args = options.parser().parse_args([*flags, "--dtype=float64", "--grad-clip=0.1"])
    config = options.check(args, 1)
    loops = trainer_of(args, config, device), Bare(args, config, device)
    stats = [[loop.step(step)[:2] for step in range(STEPS)] for loop in loops]
    parameters = [dict(gpt.named_parameters(loop.model)) for loop in loops]
    for what, a, b in (
        ("losses and norms", *({"": torch.stack(s)} for s in stats)),
        ("gradients", *({n: p.grad for n, p in named.items()} for named in parameters)),
        ("parameters", *parameters),
    ):
        worst = measure.largest(measure.relative_errors(a, b).values())
        yield f"| {what} | {worst:.1e} |", worst <= measure.TOLERANCE


SPEED_HEAD = (
    "| bf16 | bare loop, ms | trainer, ms | trainer / bare | bare loop, free-running, ms | "
    "trainer, free-running, ms | trainer / bare, free-running | tokens/s, free-running | TFLOP/s | "
    "MFU | max difference of loss, norm |",
    "|---" * 11 + "|",
)


def speed(
    flags: list[str], device: torch.device, steps: int, compiled: Iterable[bool] = (False, True)
) -> Iterator[str]:  # fmt: skip
    """Rows of the table below SPEED_HEAD, one for each value in `compiled`."""
    for compile_blocks in compiled:
        mode = ["--compile"] if compile_blocks else []
        args = options.parser().parse_args([*flags, "--dtype=bf16", *mode])
        config = options.check(args, 1)
        loops = [trainer_of(args, config, device), Bare(args, config, device)]
        ms, bare = (1e3 * taken for taken in seconds(loops, steps, device))
        free, free_bare = free_running_seconds(loops, steps, device)
        both = zip(*(loop.step(9)[:2].tolist() for loop in loops), strict=True)
        difference = measure.largest(abs(a - b) for a, b in both)
        tokens = args.global_batch_size * config.seq_len
        tflops = 3e-12 * gpt.forward_flops_per_token(config) * tokens / free
        peak = args.peak_tflops or startup.peak_tflops(device, args.dtype)
        mfu = f"{100 * tflops / peak:.1f} %" if peak else "-"
        how = "compiled" if compile_blocks else "eager"
        yield (
            f"| {how} | {bare:.1f} | {ms:.1f} | {ms / bare:.3f} | "
            f"{1e3 * free_bare:.1f} | {1e3 * free:.1f} | {free / free_bare:.3f} | "
            f"{tokens / free:,.0f} | {tflops:.3g} | {mfu} | {difference:.1e} |"
        )
        del loops
        free_memory()


MEMORY_HEAD = (
    "| recompute | ms per step | predicted GB | peak allocated GB | allocated / predicted |",
    "|---" * 5 + "|",
)


def memory(flags: list[str], device: torch.device, steps: int) -> Iterator[str]:
    """Rows of the table below MEMORY_HEAD."""
    policies = ("none", "full", "offload")

    def trainer_with(policy: str) -> train_3d.Trainer:
        args = options.parser().parse_args([*flags, "--dtype=bf16", f"--recompute={policy}"])
        return trainer_of(args, options.check(args, 1), device)

    taken = seconds([trainer_with(policy) for policy in policies], steps, device)
    times = dict(zip(policies, taken, strict=True))
    for policy in policies:
        free_memory()
        trainer = trainer_with(policy)
        trainer.step(0)
        free_memory()  # measure the peak of a step, without that of the initialisation
        trainer.step(1)
        held = dry_run.predicted_bytes(trainer)
        expected, measured = sum(held.values()), "no GPU | -"
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            measured = f"{peak / 1e9:.3f} | {peak / expected:.3f}"
        yield f"| {policy} | {1e3 * times[policy]:.1f} | {expected / 1e9:.3f} | {measured} |"
        del trainer


def report(model: str | None, vocab_size: int | None, batch: tuple[int, int], steps: int,
           device: torch.device, failed: list[str]) -> Iterator[str]:  # fmt: skip
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "no GPU: a small model on the CPU"
    yield f"## {name}, torch {torch.__version__}, {datetime.date.today()}\n"
    sizes = [f"--model={model}"] if model else ["--model=gpt2-medium"] if on_gpu else SMALL
    vocabulary = [f"--vocab-size={vocab_size}"] if vocab_size else []
    rows = [f"--global-batch-size={batch[0]}", f"--micro-batch-size={batch[1]}"]
    flags = [*sizes, *vocabulary, *rows]
    yield f"`{' '.join(flags)}`; CUDA {torch.version.cuda}; float32 matmuls without TF32\n"
    yield "| float64, 3 steps of AdamW, small model | largest relative difference |\n|---|---|"
    for line, same in parity([*SMALL, "--global-batch-size=4", "--micro-batch-size=2"], device):
        failed += [] if same else [line]
        yield line
    yield ""
    yield from SPEED_HEAD
    yield from speed(flags, device, steps)
    yield ""
    yield from MEMORY_HEAD
    yield from memory(flags, device, steps)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--model", choices=gpt.MODELS, help="default: gpt2-medium; on a CPU a small one")
    add("--vocab-size", type=options.at_least(1), help="default: that of the model")
    add("--batch", type=options.at_least(1), nargs=2, default=(16, 4), metavar=("ROWS", "MICRO"),
        help="sequences per step and per microbatch")  # fmt: skip
    add("--steps", type=options.at_least(1), default=10, help="timed steps")
    add("--out", metavar="FILE", help="also write the report to FILE")
    args = arguments.parse_args()
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        device, line = startup.pick_device(args.device)
        startup.check_writable("--out", args.out)
    except ValueError as error:
        sys.exit(f"tools.bench.gpu_check: {error}")
    print(line, flush=True)
    startup.join_ranks(device)
    lines, failed = [], []
    for line in report(args.model, args.vocab_size, args.batch, args.steps, device, failed):
        print(line, flush=True)
        lines.append(line)
        if args.out:
            Path(args.out).write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()
    sys.exit(f"MISMATCH: {failed[0]}" if failed else 0)


if __name__ == "__main__":
    main()
