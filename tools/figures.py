"""Draws the figures of README and docs as SVG files, with the standard library.

    make figures                               writes docs/img/*.svg
    python -m tools.figures mesh --out DIR     one of them, to another directory

The numbers come from schedules.py, from docs/img/data/*.json, which `python -m tools.figure_data`
measures, and from docs/bench/growth.json of `make growth`. The same numbers give the same bytes.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import schedules
from tools.svg import (
    COLORS,
    GRAY,
    INK,
    LEFT,
    RIGHT,
    ROW,
    Axes,
    Picture,
    action_bars,
    action_legend,
    draw_schedules,
    number,
    schedules_height,
    short,
    ticks,
    timeline,
)

FOLDER = Path(__file__).parent.parent / "docs" / "img"
WIDTH = 880  # of a README on GitHub


def read(name: str) -> dict:
    """The measured data of a figure."""
    return json.loads((FOLDER / "data" / f"{name}.json").read_text())


def time_axis(picture: Picture, x: float, y: float, scale: float, end: float, unit: str) -> None:
    """Numbers below a timeline. scale: pixels per unit of time."""
    picture.line((x, y), (x + end * scale, y), GRAY)
    for t in ticks(0, end, 8):
        picture.line((x + t * scale, y), (x + t * scale, y + 4), GRAY)
        picture.text(x + t * scale, y + 16, f"{number(t)} {unit}", 11, "middle", GRAY)


# --- schedules ------------------------------------------------------------------------------------


def draw_all_schedules() -> Picture:
    """The built-in schedules, and below them one that was measured."""
    p, m, data = 4, 8, read("schedules")
    named, notes = {}, {}
    for name, entry in schedules.SCHEDULES.items():
        named[name] = entry(p, m)
        held = [entry.held(p, m, entry.chunks, rank) / entry.chunks for rank in range(p)]
        notes[name] = [
            f"bubble {schedules.bubble(schedules.simulate(named[name])):.3f}",
            f"= {entry.formula}",
            f"stores {' '.join(f'{n:g}' for n in held)}",
        ]
    spans = [
        schedules.Span(rank, schedules.Action(kind, i, stage), start, end)
        for rank, kind, i, stage, start, end in data["spans"]
    ]
    ranks = data["ranks"]
    top, below = 76, 76 + schedules_height([p] * len(named))
    picture = Picture(WIDTH, below + ranks * ROW + 72, "pipeline schedules, one measured")
    picture.text(20, 28, f"Pipeline schedules: p = {p} ranks, m = {m} microbatches", 15,
                 bold=True)  # fmt: skip
    action_legend(picture, 20, 54)
    picture.text(WIDTH - 20, 28, "stores: most microbatches held, by rank", 12, "end", GRAY)
    picture.text(WIDTH - 20, 54, "lighter: second stage of a rank", 12, "end", GRAY)
    draw_schedules(picture, top, named, notes)

    picture.line((20, below - 2), (WIDTH - 20, below - 2), GRAY)
    what = f"{data['schedule']}, measured: p = {ranks}, m = {data['microbatches']}"
    picture.text(20, below + 22, what, 15, bold=True)
    picture.text(
        WIDTH - 20,
        below + 22,
        f"fastest step of --trace; {data['machine']}; simulated: without transfers",
        11,
        "end",
        GRAY,
    )
    y, end = below + 36, max(span.end for span in spans)
    scale = (WIDTH - LEFT - RIGHT) / end
    timeline(picture, LEFT, y, ranks, scale, action_bars(spans))
    for rank in range(ranks):
        picture.text(LEFT - 8, y + rank * ROW + 11, f"rank {rank}", 10, "end", GRAY)
    time_axis(picture, LEFT, y + ranks * ROW + 2, scale, end, "ms")
    right = WIDTH - RIGHT + 12
    picture.text(right, y + 11, f"bubble {data['bubble']:.3f}", 12, bold=True)
    picture.text(right, y + 27, f"simulated {data['simulated']:.3f}", 11)
    return picture


# --- memory of ZeRO -------------------------------------------------------------------------------

KINDS = {
    "parameters": "#56b4e9",
    "gradients": "#e69f00",
    "optimizer": "#2fb18b",
    "activations": "#d9a3c0",
}


def draw_zero_memory() -> Picture:
    """A stacked bar per ZeRO stage: predicted. A dot at the top of each part: counted."""
    data = read("zero_memory")
    picture = Picture(WIDTH, 420, "memory per rank of ZeRO stages 0 to 3")
    picture.text(20, 28, f"Memory per rank: {data['model']}, {data['ranks']} ranks, AdamW", 15,
                 bold=True)  # fmt: skip
    x = picture.legend(20, 54, [(color, kind) for kind, color in KINDS.items()])
    picture.text(x, 54, "bars: predicted")
    picture.circle((x + 112, 50), 4, INK, "#ffffff")
    picture.text(x + 122, 54, "counted in a run")
    most = max(sum(row["predicted"].values()) for row in data["rows"])
    width = 370
    for panel, dtype in enumerate(("float32", "bf16")):
        rows = [row for row in data["rows"] if row["dtype"] == dtype]
        left = 66 + panel * (width + 34)
        axes = Axes(picture, left, 96, width, 240, (0, len(rows)), (0, 1.12e-9 * most))
        axes.frame("", "GB" if panel == 0 else "", xticks=False)
        what = {"float32": "float32", "bf16": "bf16, with fp32 gradients and master weights"}[dtype]
        picture.text(left, 84, what, 12, bold=True)
        for i, row in enumerate(rows):
            total, center = 0.0, axes.at(i + 0.5, 0)[0]
            for kind, color in KINDS.items():
                bottom, total = axes.at(0, total)[1], total + 1e-9 * row["predicted"][kind]
                top = axes.at(0, total)[1]
                picture.rect(center - 29, top, 58, bottom - top, color)
            for counted in itertools.accumulate(row["counted"][kind] for kind in KINDS):
                picture.circle((center, axes.at(0, 1e-9 * counted)[1]), 4, INK, "#ffffff")
            picture.text(center, top - 9, f"{total:.2f} GB", 12, "middle", bold=True)
            picture.text(center, 354, f"ZeRO-{row['zero']}" if row["zero"] else "DDP", 12, "middle")
    picture.text(20, 384, "DDP stores everything on every rank. ZeRO-1 shards the optimizer state, "
                 "ZeRO-2 the gradients too, ZeRO-3 the parameters too.", 12)  # fmt: skip
    picture.text(20, 403, f"Microbatch: {data['rows_per_microbatch']} x {data['seq_len']} tokens, "
                 "no recomputation. Temporary buffers are not shown.", 12, color=GRAY)  # fmt: skip
    return picture


# --- the mesh -------------------------------------------------------------------------------------

AXES = {"tp": "#0072b2", "pp": "#d55e00", "dp": "#009e73"}


def draw_mesh() -> Picture:
    """The ranks of a 2 x 2 x 2 mesh, its collectives, and their elements per step."""
    data = read("mesh")
    picture = Picture(WIDTH, 560, "the 2 x 2 x 2 mesh and its collectives")
    picture.text(20, 28, "8 ranks: tensor x pipeline x data parallelism = 2 x 2 x 2", 15, bold=True)
    picture.text(20, 48, f"Elements sent or reduced per rank and step. {data['about']}", 12,
                 color=GRAY)  # fmt: skip
    size, depth = 38, (120, -60)  # of a rank's box; offset of tp rank 1

    def center(rank: int) -> tuple[float, float]:
        tp, dp, pp = rank % 2, rank // 2 % 2, rank // 4
        return 180 + 410 * pp + depth[0] * tp, 180 + 170 * dp + depth[1] * tp

    def edge(axis: str, a: int, b: int) -> None:
        picture.line(center(a), center(b), AXES[axis], 3)

    for stage in range(2):
        x = center(4 * stage)[0] + depth[0] / 2
        picture.text(x, 82, f"stage {stage}: {data['stages'][stage]}", 12, "middle", bold=True)
    for a in range(8):
        for axis, stride in (("tp", 1), ("dp", 2), ("pp", 4)):
            if not a & stride:
                edge(axis, a, a + stride)
    for dp in range(2):
        picture.text(24, center(2 * dp)[1] + 4, f"replica {dp}", 12, bold=True)
    for rank in sorted(range(8), key=lambda rank: rank % 2 == 0):  # tp rank 0 is in front
        x, y = center(rank)
        picture.rect(x - size / 2, y - size / 2, size, size, "#f6f8fa", rx=6, stroke=INK)
        picture.text(x, y + 5, str(rank), 14, "middle", bold=True)

    def note(x: float, y: float, axis: str, lines: list[str], anchor: str) -> None:
        for i, line in enumerate(lines):
            picture.text(x, y + 16 * i, line, 12, anchor, AXES[axis])

    def total(rank: int, axis: str, operation: str) -> str:
        return short(data["ranks"][str(rank)][axis][operation][1])

    middle = (center(1)[0] + center(4)[0]) / 2 - 20
    sent = [f"send {total(0, 'pp', 'send')} forward,", f"{total(4, 'pp', 'send')} backward"]
    note(middle, center(0)[1] - 34, "pp", sent, "middle")
    note(middle, center(2)[1] + 20, "pp", [" ".join(sent)], "middle")
    for stage in range(2):
        rank = 4 * stage
        reduced = [f"reduce-scatter {total(rank, 'dp', 'reduce_scatter')},",
                   f"all-gather {total(rank, 'dp', 'all_gather')}"]  # fmt: skip
        x, y = center(rank + stage)  # to the left of ranks 0 and 2, to the right of 5 and 7
        note(x + (14 if stage else -14), y + 86, "dp", reduced, "start" if stage else "end")
        summed = [f"all-reduce {total(rank, 'tp', 'all_reduce')}"]
        for dp, (right, up, anchor) in enumerate(((42, 38, "end"), (72, 16, "start"))):
            x, y = center(rank + 2 * dp)
            note(x + right, y - up, "tp", summed, anchor)

    picture.line((20, 424), (WIDTH - 20, 424), GRAY)
    for i, (axis, ranks, what) in enumerate((
        ("tp", "0-1, 2-3, 4-5, 6-7", "all-reduces activations in every layer, forward and backward;"
         " innermost axis: ranks of one node"),
        ("dp", "0-2, 1-3, 4-6, 5-7", "ZeRO-1 reduce-scatters gradients and all-gathers "
         "parameters, once per step"),
        ("pp", "0-4, 1-5, 2-6, 3-7", "sends activations to the next stage and their "
         "gradients back, once per microbatch"),
    )):  # fmt: skip
        y = 450 + 24 * i
        picture.line((20, y - 4), (44, y - 4), AXES[axis], 3)
        picture.text(54, y, axis, 12, bold=True)
        picture.text(82, y, ranks, 12, color=GRAY)
        picture.text(208, y, what, 12)
    picture.text(20, 526, f"Also, per step: {data['tied']} elements of the tied embedding's "
                 "gradient are all-reduced between the first and the last stage,", 12)  # fmt: skip
    what = f"and {data['world']} elements over all ranks: loss, gradient norm, requests to stop."
    picture.text(20, 544, what, 12)
    return picture


# --- overlap of DDP -------------------------------------------------------------------------------

SPANS = {
    "forward": "#56b4e9",
    "backward": "#e69f00",
    "optimizer": "#2fb18b",
    "all-reduce": "#b86a92",
}


def draw_ddp_overlap() -> Picture:
    """One step of rank 0 with each version of ddp.py: computation above, all-reduces below."""
    data = read("ddp_overlap")
    versions, left, right = data["versions"], 216, 96
    end = max(span[2] for version in versions for span in version["spans"])
    scale, top, each = (WIDTH - left - right) / end, 82, 70
    picture = Picture(WIDTH, top + each * len(versions) + 64, "DDP: overlap with backward")
    picture.text(20, 28, "One step of data parallelism, by version of ddp.py", 15, bold=True)
    picture.legend(20, 54, [(color, name) for name, color in SPANS.items()])
    picture.text(WIDTH - 20, 54, "from a trace of rank 0: the fastest of 18 steps", 12, "end", GRAY)
    for i, version in enumerate(versions):
        y = top + each * i
        spans = version["spans"]
        last = max(stop for _, _, stop in spans)
        picture.text(20, y + 12, version["name"], 13, bold=True)
        picture.text(20, y + 29, version["function"], 11, color=GRAY)
        picture.text(left - 8, y + 13, "compute", 10, "end", GRAY)
        picture.text(left - 8, y + 32, "network", 10, "end", GRAY)
        for row in range(2):
            picture.rect(left, y + 19 * row, last * scale, 17, "#eceff2")
        for name, start, stop in spans:
            row = name == "all-reduce"
            width = max(0.6, (stop - start) * scale - (0.6 if row else 0))
            picture.rect(left + start * scale, y + 19 * row, width, 17, SPANS[name])
        picture.text(left + last * scale + 10, y + 17, f"{last:.1f} ms", 13, bold=True)
        calls = sum(name == "all-reduce" for name, _, _ in spans)
        exposed = f"{calls} all-reduce{'s' if calls > 1 else ''}; {version['exposed']:.1f} ms of " \
                  "them after backward"  # fmt: skip
        picture.text(left, y + 53, exposed, 11, color=GRAY)
    bottom = top + each * len(versions)
    time_axis(picture, left, bottom, scale, end, "ms")
    picture.text(20, bottom + 46, data["about"], 12, color=GRAY)
    return picture


# --- losses ---------------------------------------------------------------------------------------


def draw_loss() -> Picture:
    """The losses of eight layouts, and their differences from one process."""
    data = read("loss")
    picture = Picture(WIDTH, 640, "the loss of eight layouts and of one process")
    steps = len(data["reference"]["float32"])
    picture.text(20, 28, f"The loss of {len(data['layouts'])} layouts of 4 and 8 ranks, and of one "
                 "process", 15, bold=True)  # fmt: skip
    picture.text(20, 48, data["about"], 12, color=GRAY)
    reference = data["reference"]["float32"]
    low, high = min(reference), max(reference)
    axes = Axes(picture, 74, 70, 506, 190, (0, steps + 0.5), (low - 0.4, high + 0.4))
    axes.frame("", "loss", xticks=False)
    # Thinner lines on top of thicker ones show that all are there.
    lines = [(name, COLORS[i]) for i, name in enumerate(data["layouts"])]
    for i, (name, color) in enumerate(lines):
        differences = data["layouts"][name]["float32"]
        losses = [x * (1 + d) for x, d in zip(reference, differences, strict=True)]
        points = [(step + 1, loss) for step, loss in enumerate(losses)]
        axes.line(points, color, 12.5 - 1.5 * i)
    axes.line([(step + 1, loss) for step, loss in enumerate(reference)], "#ffffff", 1)
    for i, (name, color) in enumerate(lines):
        y = 106 + 19 * i
        picture.rect(600, y - 9, 16, 10, color, rx=2)
        picture.text(624, y, name, 12)
    picture.text(600, 82, "t, p, d: sizes of TP, PP, DP", 12, color=GRAY)

    axes = Axes(picture, 74, 300, 506, 270, (0, steps + 0.5), (1e-17, 1e-4), log=True)
    axes.frame("step", "relative difference from one process")
    for i, (name, _) in enumerate(lines):
        for dtype in ("float32", "float64"):
            differences = enumerate(data["layouts"][name][dtype], 1)
            points = [(step + 0.1 * (i - 3.5), abs(d)) for step, d in differences]
            axes.dots([p for p in points if p[1] > 0], COLORS[i], 2)
    for dtype, eps in (("float32", 2**-24), ("float64", 2**-53)):
        rows = [sorted(map(abs, layout[dtype])) for layout in data["layouts"].values()]
        every = sorted(d for row in rows for d in row)
        median, most = every[len(every) // 2], every[-1]
        _, y = axes.at(0, eps)
        picture.text(600, y - 22, dtype, 13, bold=True)
        picture.text(600, y - 4, f"median {median:.0e}, largest {most:.0e}", 12)
        picture.text(600, y + 13, f"rounding of one operation: {eps:.0e}", 12, color=GRAY)
    picture.text(600, 412, "Sums in another order round differently.", 12)
    picture.text(600, 429, "A difference that does not shrink", 12)
    picture.text(600, 446, "with the dtype is a bug.", 12)
    picture.text(20, 626, "Differences of exactly 0 are not drawn. Points and lines have the same "
                 "colors.", 12, color=GRAY)  # fmt: skip
    return picture


# --- growth ---------------------------------------------------------------------------------------


def draw_growth() -> Picture:
    """How cost grows: a panel for layers, microbatches, ranks, and the length of a schedule."""
    data = json.loads((FOLDER.parent / "bench" / "growth.json").read_text())
    picture = Picture(WIDTH, 668, "how cost grows")
    picture.text(20, 28, "How cost grows", 15, bold=True)
    model = data["model"]
    machine = f"{data['cpu']}, {data['cores']} cores, gloo, torch {data['torch']}"
    sizes = f"h {model['n_embd']}, s {model['seq_len']}, float32"
    marks = f"Dots: the median of {data['rounds']} rounds. Bars: their range."
    picture.text(20, 48, f"{machine}; {sizes}. {marks}", 12, color=GRAY)
    titles = {
        "layers": "Layers: 8 rows in one microbatch",
        "microbatches": f"Microbatches of one row, {model['n_layer']} layers",
        "ranks": f"Ranks: 8 rows in all, {model['n_layer']} layers",
        "schedule": "Length of a schedule of p ranks (1F1B)",
    }
    for i, (name, title) in enumerate(titles.items()):
        left, top = 74 + 434 * (i % 2), 134 + 304 * (i // 2)
        points = [point for point in data["points"] if point["panel"] == name]
        xs = sorted({point["x"] for point in points})
        most = max(max(point["values"]) for point in points)
        axes = Axes(picture, left, top, 360, 180, (0, 1.04 * xs[-1]), (0, 1.08 * most))
        axes.frame(*data["axes"][name], xs)
        picture.text(left, top - 42, title, 12, bold=True)
        x = left
        for k, series in enumerate(dict.fromkeys(point["series"] for point in points)):
            color, medians = COLORS[k], []
            if k == 3:  # the legend's second row
                x = left
            x = picture.legend(x, top - 24 + 16 * (k // 3), [(color, series)])
            for point in points:
                if point["series"] == series:
                    n, values = point["x"], point["values"]
                    medians.append((n, statistics.median(values)))
                    picture.line(axes.at(n, min(values)), axes.at(n, max(values)), color, 1.5)
            axes.line(medians, color)
            axes.dots(medians, color)
    return picture


FIGURES = {
    "schedules": draw_all_schedules,
    "zero_memory": draw_zero_memory,
    "mesh": draw_mesh,
    "ddp_overlap": draw_ddp_overlap,
    "loss": draw_loss,
    "growth": draw_growth,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)} "
                           "(default: all)")  # fmt: skip
    arguments.add_argument("--out", default=FOLDER, type=Path, metavar="DIR", help="directory")
    args = arguments.parse_args()
    for name in args.names:
        if name not in FIGURES:
            arguments.error(f"{name} is not a figure: give some of {', '.join(FIGURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        path = args.out / f"{name}.svg"
        FIGURES[name]().save(path)
        print(path)


if __name__ == "__main__":
    main()
