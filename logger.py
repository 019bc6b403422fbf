"""The output of a run: lines of progress, and a JSON object per step in the file of --log."""

import argparse
import json
import math
import os
import time
from typing import NamedTuple

import torch
from torch import Tensor

import gpt


class Logger:
    """Rank 0 prints progress lines and writes a JSON object per step. The other ranks do nothing.

    Losses are copied from the device every --print-every steps, so the host does not wait for the
    device after each step.

    peak: TFLOP/s of a rank's device. If given, the MFU is reported: achieved / peak TFLOP/s
        (Chowdhery et al. 2022, PaLM, appendix B), without the operations of recomputation.
    append: keep the rows of the file. Steps that are repeated after a crash appear twice."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: gpt.GPTConfig,
        world_size: int = 1,
        peak: float | None = None,
        append: bool = False,
    ):
        self.args, self.peak = args, peak
        self.end = min(args.steps, args.stop_after or args.steps)  # steps when this process ends
        self.tokens = args.global_batch_size * config.seq_len  # per step
        # 3: a backward pass takes twice as many operations as a forward pass. 1e-12: to TFLOP.
        self.tflop = 1e-12 * 3 * gpt.forward_flops_per_token(config) * self.tokens / world_size
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        mode = "a" if append else "w"
        self.file = open(args.log, mode, buffering=1) if args.log and self.is_main else None
        self.pending: list[tuple[int, Tensor, float]] = []

    def start(self) -> None:
        """Start the clock that measures the steps until the next flush()."""
        self.since = time.perf_counter()

    def step(self, step: int, stats: Tensor, lr: float) -> None:
        """Record a step. stats: [loss, gradient norm, ...] on any device."""
        self.pending.append((step, stats, lr))
        if len(self.pending) == self.args.print_every or step + 1 == self.end:
            self.flush()

    def flush(self) -> None:
        """Print and write the recorded steps. Waits for the device."""
        if not self.pending:
            return
        rows = torch.stack([stats for _, stats, _ in self.pending]).tolist()
        seconds = (time.perf_counter() - self.since) / len(rows)
        speed, tflops = self.tokens / seconds, self.tflop / seconds
        mfu = {"mfu": tflops / self.peak} if self.peak else {}
        for (step, _, lr), (loss, norm, *_) in zip(self.pending, rows, strict=True):
            row = dict(loss=loss, grad_norm=norm, lr=lr, tokens_per_s=speed, tflops_per_rank=tflops)
            if not math.isfinite(norm):
                row["skipped"] = True  # see Trainer.step
                self._say_at(step + 1, f"update skipped: gradient norm {norm}")
            self._write(step, **row, **mfu)
        left = seconds * (self.end - step - 1)
        self._say_at(
            step + 1,
            f"loss {loss:.4f}  norm {norm:.3f}  lr {lr:.1e}  "
            f"{speed:,.0f} tokens/s  {tflops:.3g} TFLOP/s per rank  "
            + "".join(f"MFU {100 * x:.1f} %  " for x in mfu.values())
            + f"{left:.0f} s left",
        )
        self.pending = []
        self.start()

    def validation(self, step: int, loss: Tensor) -> None:
        self._write(step, val_loss=loss.item())
        self._say_at(step + 1, f"val loss {loss.item():.4f}")
        self.start()  # the time of the validation does not count as training

    def saved(self, result: NamedTuple) -> None:
        """Report a checkpoint: checkpoint.SaveResult."""
        step, size, pause, seconds, failed = result
        self._write(step - 1, saved=failed is None, save_pause_s=pause, save_s=seconds)
        what = f"saved  {size / 1e6:.1f} MB in {seconds:.2f} s"
        if failed:
            what = f"save FAILED, earlier checkpoints are unchanged: {failed}"
        pause = f"training paused for {1e3 * pause:.0f} ms"
        self._say_at(step, f"{what}; {pause}")

    def say(self, line: str) -> None:
        """Print a line on rank 0."""
        if self.is_main:
            print(line, flush=True)

    def _say_at(self, step: int, line: str) -> None:
        self.say(f"step {step:5d}/{self.args.steps}  {line}")

    def _write(self, step: int, **row) -> None:
        if self.file:
            position = {"step": step, "tokens": (step + 1) * self.tokens}
            self.file.write(json.dumps(position | row) + "\n")
