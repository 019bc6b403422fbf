"""Draws a pipeline schedule in the terminal and prints its bubble and memory. No training is run.

    make draw P=4 M=8 SCHEDULE=zb-v
    python -m tools.draw zb-v --p 4 --m 8
    python -m tools.draw my_schedule.txt --p 2 --m 4       a file, as read by train_3d.py --schedule
    python -m tools.draw interleaved --virtual-stages 3 --text     the schedule as such a file
    python -m tools.draw all --p 4 --m 8                   the numbers of all built-in schedules
    python -m tools.draw zb-v --svg zb-v.svg               also writes a picture

The timeline has one row per rank. An action is a letter and the number of its microbatch: F
forward, B backward, W gradient of the weights (then B is the gradient of the input only). Lower
case is the second chunk of a rank; a chunk is one of the rank's stages, and a stage is a contiguous
slice of the layers. On a terminal, actions have colors instead of letters.

The numbers below the timeline are the bubble (idle time / busy time), the messages that a rank
sends per microbatch, and the largest number of microbatches whose activations a rank stores.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import options
import pipeline
import schedules
from tools import svg
from tools.plan import cost

COLORS = {"F": 44, "B": 42, "W": 43, "f": 46, "b": 102, "w": 103}  # backgrounds


def in_color(timeline: str) -> str:
    def paint(match: re.Match) -> str:
        letter, rest = match[0][0], match[0][1:].replace("-", " ")
        return f"\033[30;{COLORS[letter]}m{rest}\033[0m "

    # The color replaces the letter, and covers the width of the action.
    return re.sub(r"[FBWfbw]\d+(?:\.\d+)?-*", paint, timeline)


def wrap(timeline: str, columns: int) -> str:
    """Splits a timeline that is wider than `columns` into several, one below the other."""
    rows = [line.split("|") for line in timeline.splitlines()]
    width = len(re.match(r"\S+ +", rows[0][1])[0])  # of a cell
    length = -(-max(len(cells) for _, cells in rows) // width)
    timelines = -(-length // max(1, (columns - 8) // width))
    step = -(-length // timelines) * width
    return "\n\n".join(
        "\n".join(f"{rank}|{cells[start : start + step]}".rstrip() for rank, cells in rows)
        for start in range(0, length * width, step)
    )


def most_stored(schedule: schedules.Schedule) -> str:
    """By rank, the largest number of microbatches whose activations it stores."""
    one = {k: 1.0 / len(row) for row in schedules.stages_of(schedule) for k in row}
    return " ".join(f"{cost.peak_held(row, one, one):g}" for row in schedule)


def numbers(name: str, schedule: schedules.Schedule) -> str:
    stages = schedules.stages_of(schedule)
    sends = [pipeline.predicted_sends(stages, r, 1, 1, 1, 1)[0] for r in range(len(schedule))]
    bubble = schedules.bubble(schedules.simulate(schedule))
    return (f"{name:12s} bubble {bubble:.3f}   {max(sends)} sends per microbatch   most stored "
            f"microbatches, by rank: {most_stored(schedule)}")  # fmt: skip


def picture(named: dict[str, schedules.Schedule], p: int, m: int) -> svg.Picture:
    """The schedules below each other, with their bubbles and stored microbatches."""
    notes = {}
    for name, schedule in named.items():
        bubble, stored = schedules.bubble(schedules.simulate(schedule)), most_stored(schedule)
        notes[name] = [f"bubble {bubble:.3f}", *[f"stores {stored}"] * (len(schedule) <= 6)]
    height = 96 + svg.schedules_height([p] * len(named))
    drawn = svg.Picture(svg.schedules_width(named), height, ", ".join(named))
    drawn.text(20, 28, f"p = {p} ranks, m = {m} microbatches", 15, bold=True)
    svg.action_legend(drawn, 20, 54)
    svg.draw_schedules(drawn, 76, named, notes)
    return drawn


def main() -> None:
    arguments = options.Parser("draw", description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("schedule", help=f"{', '.join(schedules.SCHEDULES)}, all, or a file")
    add("--p", type=options.at_least(1), default=4, help="number of ranks")
    add("--m", type=options.at_least(1), default=8, help="number of microbatches")
    add("--virtual-stages", "--chunks", dest="chunks", type=options.at_least(1), metavar="N",
        help=f"stages per rank, for {schedules.with_any_chunks()}")  # fmt: skip
    add("--text", action="store_true", help="print a file for train_3d.py --schedule")
    add("--svg", metavar="FILE", help="also write a picture to this file")
    args = arguments.parse_args()
    names = list(schedules.SCHEDULES) if args.schedule == "all" else [args.schedule]
    drawn = {}
    for name in names:
        asked = argparse.Namespace(schedule=name, chunks=args.chunks, pp=args.p)
        try:
            schedule = options.make_schedule(asked, args.m)
        except ValueError as error:
            arguments.error(str(error))
        drawn[Path(name).stem[:12]] = schedule
        stages = schedules.stages_of(schedule)
        if args.text:
            for row, mine in zip(schedule, stages, strict=True):
                actions = " ".join(schedules.label(action, mine) for action in row)
                print(f"{' '.join(map(str, mine))}: {actions}")
            continue
        if args.schedule != "all":
            tty = sys.stdout.isatty()
            timeline = wrap(schedules.draw(schedule), shutil.get_terminal_size((160, 24)).columns)
            print((in_color(timeline) if tty else timeline) + "\n")
        print(numbers(name, schedule))
    if args.svg:
        try:
            picture(drawn, args.p, args.m).save(args.svg)
        except OSError as error:
            arguments.error(f"--svg {args.svg} cannot be written: {error.strerror}")
        if not args.text:  # whose output is a file
            print(args.svg)


if __name__ == "__main__":
    main()
