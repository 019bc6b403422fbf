"""The output of a run: first lines, lines of progress, and a JSON object per step (--metrics)."""

import argparse
import json
import math
import os
import signal
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

import gpt
import options
import schedules


class Logger:
    """Rank 0 prints progress lines and writes a JSON object per step. The other ranks do nothing.

    Steps are numbered from 1 in both. Losses are copied from the device every --log-interval steps,
    so the host does not wait for the device after each step.

    peak: TFLOP/s of a rank's device. If given, the MFU is reported: achieved / peak TFLOP/s
        (Chowdhery et al. 2022, PaLM, appendix B), without the operations of recomputation.
    append: keep the rows of the file. Steps that are repeated after a crash appear twice.
    device: where the steps run. Their durations on a GPU are measured by events."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: gpt.GPTConfig,
        world_size: int = 1,
        peak: float | None = None,
        append: bool = False,
        device: torch.device | None = None,
    ):
        self.args, self.peak = args, peak
        self.on_gpu = device is not None and device.type == "cuda"
        self.end = min(args.steps, args.stop_after or args.steps)  # steps when this process ends
        self.tokens = args.global_batch_size * config.seq_len  # per step
        # 3: a backward pass takes twice as many operations as a forward pass. 1e-12: to TFLOP.
        self.tflop = 1e-12 * 3 * gpt.forward_flops_per_token(config) * self.tokens / world_size
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        mode = "a" if append else "w"
        self.file = open(args.log, mode, buffering=1) if args.log and self.is_main else None
        self.pending: list[tuple[int, Tensor, float, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Start the clock that measures the next step."""
        self.since = self._now()

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # the GPU notes the time when it gets here
        return event

    def _seconds(self) -> list[float]:
        """Durations of the recorded steps. Each begins at the end of the previous one."""
        ends = [end for *_, end in self.pending]
        pairs = zip([self.since, *ends], ends, strict=False)
        if self.on_gpu:
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]

    def step(self, step: int, stats: Tensor, lr: float) -> None:
        """Record a step. stats: [loss, gradient norm, ...] on any device."""
        self.pending.append((step, stats, lr, self._now()))
        if len(self.pending) == self.args.print_every or step + 1 == self.end:
            self.flush()

    def flush(self) -> None:
        """Print and write the recorded steps. Waits for the device."""
        if not self.pending:
            return
        rows = torch.stack([stats for _, stats, *_ in self.pending]).tolist()
        seconds = self._seconds()
        for (step, _, lr, _), (loss, norm, *_), duration in zip(
            self.pending, rows, seconds, strict=True
        ):
            row = {"loss": loss, "grad_norm": norm, "lr": lr, **self._speed(duration)}
            if not math.isfinite(norm):
                row["skipped"] = True  # see Trainer.step
                self._say_at(step + 1, f"update skipped: gradient norm {norm}")
            self._write(step + 1, **row)
        mean = sum(seconds) / len(seconds)
        speed = self._speed(mean)
        mfu = f"MFU {100 * speed['mfu']:.1f} %  " if self.peak else ""
        self._say_at(
            step + 1,
            f"loss {loss:.4f}  norm {norm:.3f}  lr {lr:.1e}  "
            f"{speed['tokens_per_s']:,.0f} tokens/s  "
            f"{speed['tflops_per_rank']:.3g} TFLOP/s per rank  {mfu}"
            f"{mean * (self.end - step - 1):.0f} s left",
        )
        self.pending = []
        self.start()

    def validation(self, step: int, loss: Tensor) -> None:
        self._write(step + 1, val_loss=loss.item())
        self._say_at(step + 1, f"val loss {loss.item():.4f}")
        self.start()  # the time of the validation does not count as training

    def saved(self, result: NamedTuple) -> None:
        """Report a checkpoint: checkpoint.SaveResult."""
        step, size, pause, seconds, failed = result
        self._write(step, saved=failed is None, save_pause_s=pause, save_s=seconds)
        what = f"saved  {size / 1e6:.1f} MB in {seconds:.2f} s"
        if failed:
            what = f"save FAILED, earlier checkpoints are unchanged: {failed}"
        pause = f"training paused for {1e3 * pause:.0f} ms"
        self._say_at(step, f"{what}; {pause}")

    def _speed(self, seconds: float) -> dict[str, float]:
        """Throughput of a step that takes `seconds`."""
        tflops = self.tflop / seconds
        mfu = {"mfu": tflops / self.peak} if self.peak else {}
        return {"tokens_per_s": self.tokens / seconds, "tflops_per_rank": tflops, **mfu}

    def say(self, line: str) -> None:
        """Print a line on rank 0. If the output is closed (`make train | head`), the run stops and
        saves, as after a signal."""
        if self.is_main:
            try:
                print(line, flush=True)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                os.kill(os.getpid(), signal.SIGTERM)

    def _say_at(self, step: int, line: str) -> None:
        self.say(f"step {step:5d}/{self.args.steps}  {line}")

    def _write(self, step: int, **row) -> None:
        """step: the number of completed steps."""
        if self.file:
            position = {"step": step, "tokens": step * self.tokens}
            self.file.write(json.dumps(position | row) + "\n")


def describe(
    args: argparse.Namespace, config: gpt.GPTConfig, world_size: int, device: torch.device
) -> list[str]:
    """Lines to print at the start: the model and the layout, then a line for each option that does
    not have the effect that its name suggests."""
    b, (p, d, c, t) = args.micro_batch_size, options.axes(args, world_size).values()
    m = args.global_batch_size // (d * b)
    with torch.device("meta"):
        model = gpt.module_of(config).Model(config)
        size = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{size / 1e6:.2f} M parameters in {args.dtype}; "
        f"t={t} {f'c={c} ' if c > 1 else ''}p={p} d={d}; "
        f"{m} microbatches of {b} x {config.seq_len} tokens; {args.schedule}, ZeRO-{args.zero}, "
        f"recompute {args.recompute}{', compiled' if args.compile else ''}"
    ]
    zero_bubble = any(map(schedules.splits_backward, options.make_schedule(args, m)))
    if args.compile and (t > 1 or zero_bubble):
        reason = "weight gradients are deferred" if zero_bubble else "collectives are asynchronous"
        lines.append(f"--compile: several graphs per block, because {reason}, see docs/gpu.md")
    if args.zero and d * c == 1:
        lines.append(f"--zero {args.zero} has no effect: d is 1, so there are no other replicas")
    if args.sequence_parallel and t == 1:
        lines.append("--sequence-parallel has no effect: t is 1")
    if args.attention == "sdpa" and args.dropout:
        lines.append("--dropout: attention is explicit, because the fused kernel takes no masks")
    elif args.attention == "sdpa" and args.recompute == "selective":
        lines.append("--recompute selective saves little memory: sdpa does not store s x s scores")
    if args.recompute == "offload" and device.type == "cpu":
        lines.append("--recompute offload saves no memory on a CPU: all memory is host memory")
    return lines
