"""Compares steps that the cost model predicts with steps measured on this machine.

    make plan-check    python -m tools.plan.plan_check     5 minutes, on an idle machine

For 20 layouts of 1 and 2 ranks it calibrates the cost model (tools/plan/calibrate.py), predicts the
step, runs train_3d.py's step, and prints measured | predicted | error. The last line has the median
and the largest absolute error.
"""

import argparse
import dataclasses
import statistics
import time

import torch
import torch.distributed as dist

import options
import train_3d
from tools.plan import plan
from tools.plan.calibrate import PROGRAM, SIZES, calibrate
from tools.plan.cost import Layout
from tools.verify.oracle import launch


def layouts() -> list[Layout]:
    """Layouts of 1 and 2 ranks, with 6 rows per replica and step."""
    one = Layout(1, 1, 1, 0, 1, 6, "none")
    t, p, d = one._replace(tp=2), one._replace(pp=2), one._replace(dp=2)
    return [
        one, one._replace(recompute="full"),
        t, t._replace(micro_batch_size=2, microbatches=3), t._replace(sequence_parallel=True),
        p, p._replace(schedule="zb-v", chunks=2), p._replace(schedule="interleaved", chunks=2),
        d, d._replace(zero=1),
    ]  # fmt: skip


def trainer_of(job: plan.Job, layout: Layout, more: str = "") -> train_3d.Trainer:
    """This rank's trainer, on random tokens. more: further flags of train_3d.py."""
    config = job.config
    sizes = zip(options.SIZES, dataclasses.astuple(config)[: len(options.SIZES)], strict=True)
    model = [f"--{name.replace('_', '-')} {n}" for name, n in sizes]
    flags = [*plan.arguments(job, layout, model), more]
    args = options.parser().parse_args(" ".join(flags).split())
    options.check(args, layout.gpus)

    def read(step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(config.vocab_size, (len(rows), config.seq_len))
        return tokens, tokens

    return train_3d.Trainer(args, config, read, torch.device("cpu"))


def step_seconds(trainer: train_3d.Trainer, steps: range) -> float:
    """Median duration of a step, until the last rank has finished it."""
    times = []
    for step in steps:
        dist.barrier()
        start = time.perf_counter()
        trainer.step(step)
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_rank(job: plan.Job, layout: Layout, steps: int) -> float:
    trainer = trainer_of(job, layout)
    step_seconds(trainer, range(2))  # the first steps connect the ranks and allocate memory
    return step_seconds(trainer, range(2, 2 + steps))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=6, help="timed steps per layout")
    args = arguments.parse_args()
    off = []
    print(f"{'':86s}measured  predicted   error")
    for config in SIZES:
        for layout in layouts():
            hardware = calibrate(layout.gpus)  # for each layout, since the machine's speed drifts
            batch = layout.dp * layout.micro_batch_size * layout.microbatches
            job = plan.Job(config, layout.gpus, layout.gpus, batch, hardware, PROGRAM)
            measured = max(launch(layout.gpus, on_rank, job, layout, args.steps))
            predicted = plan.price(job, layout).times.total
            off.append(100 * (predicted / measured - 1))
            print(
                f"  h={config.n_embd:<5d}{plan.spell(layout):76s}{1e3 * measured:8.1f} ms"
                f"{1e3 * predicted:8.1f} ms{off[-1]:+7.1f} %",
                flush=True,
            )
    sizes = sorted(map(abs, off))
    print(
        f"{len(off)} layouts: median error {statistics.median(sizes):.1f} %, "
        f"largest {sizes[-1]:.1f} %"
    )


if __name__ == "__main__":
    main()
