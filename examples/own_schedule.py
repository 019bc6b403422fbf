"""A pipeline schedule of your own: GPipe in waves, which bounds the memory for activations.

GPipe runs all m forwards, then all m backwards, so a rank stores the activations of m microbatches.
waves() runs w forwards, then their w backwards, then the next wave. A rank stores at most w
microbatches. The price is time: ranks are idle at the start and at the end of every wave.

             bubble (idle / busy time)    stored microbatches
    GPipe    (p-1) / m                    m
    waves    ceil(m/w) (p-1) / m          min(w, m)

p: number of ranks. m: number of microbatches per step.

A schedule is a function (p, m) that returns a list of actions per rank. train_3d.Trainer takes it
as schedule=... No other file changes: the transfers between stages are derived from the list.

    torchrun --standalone --nproc-per-node 2 -m examples.own_schedule

What to look at: waves(), which is all that a schedule needs; its timeline, in which F is a forward,
B a backward and a dot is idle time; and the losses, which are equal to those of one process.
schedules.check() raises ScheduleError for a list that cannot run, and names the rank.
"""

import functools
import itertools

import torch

import data
import measure
import options
import schedules
import train_3d
from examples.compare import compare
from schedules import Action


def waves(p: int, m: int, w: int = 2) -> schedules.Schedule:
    def actions(stage: int) -> list[Action]:
        actions = []
        for first in range(0, m, w):
            wave = range(first, min(m, first + w))
            actions += [Action("F", i, stage) for i in wave]
            actions += [Action("B", i, stage) for i in reversed(wave)]
        return actions

    return [actions(stage) for stage in range(p)]


def predicted_bubble(p: int, m: int, w: int = 2) -> float:
    return -(-m // w) * (p - 1) / m


def stored(row: list[Action]) -> int:
    """The largest number of microbatches between F and B on a rank with one stage."""
    return max(itertools.accumulate(1 if action.kind == "F" else -1 for action in row))


def main() -> None:
    with measure.Report("examples.own_schedule") as report:
        p, m = report.group.size(), 5
        # Neither the layers nor the microbatches divide evenly.
        flags = (f"--pp {p} --n-layer {2 * p + 1} --n-head 2 --n-embd 32 --seq-len 16 --steps 2 "
                 f"--global-batch-size {m} --micro-batch-size 1 --lr 0.5 --warmup-steps 1 "
                 "--optimizer sgd --weight-decay 0 --dtype float64 --device cpu")  # fmt: skip
        args = options.parser().parse_args(flags.split())
        config = options.check(args, p)

        schedule = waves(p, m)
        schedules.check(schedule, m)
        if report.group.rank() == 0:
            for name, drawn in (("GPipe", schedules.gpipe(p, m)), ("waves", schedule)):
                print(f"{name}:\n{schedules.draw(drawn)}")
        bubble = schedules.bubble(schedules.simulate(schedule))
        report.equal("bubble of waves", round(predicted_bubble(p, m), 12), round(bubble, 12))
        report.equal("stored microbatches by rank", [2] * p, [stored(row) for row in schedule])

        read = functools.partial(data.batch, data.example(), seq_len=config.seq_len, seed=0)
        trainer = train_3d.Trainer(args, config, read, torch.device("cpu"), schedule=waves)
        compare(report, "waves", trainer)


if __name__ == "__main__":
    main()
