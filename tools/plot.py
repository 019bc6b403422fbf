"""Plots the training and validation losses of runs over the number of tokens, as SVG.

    make plot RUNS="a.jsonl b.jsonl" OUT=runs.svg
    python -m tools.plot a.jsonl b.jsonl --out runs.svg

The input files are written by `train_3d.py --metrics FILE`. If a file contains a step twice,
because the run was resumed from an earlier checkpoint, the second entry is used. The plot has a
line per run (training loss) and dots (validation loss). Losses that are NaN or infinite are left
out. A browser opens the file; no package is needed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from tools.svg import COLORS, Axes, Picture, limits, text_width


def curve(path: str, key: str) -> tuple[list[int], list[float]]:
    """(tokens, values of `key`) of a run. Raises ValueError if the file is not a log."""
    points: dict[int, float] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            points |= {row["tokens"]: row[key]} if key in row else {}
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} was not written by --metrics: {line[:60]}"
            ) from None
    xs = sorted(points)
    return xs, [points[x] for x in xs]


def thinned(points: list[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """The first, the lowest, the highest and the last point of each of `columns` columns."""
    if len(points) <= 4 * columns:
        return points
    step, kept = -(-len(points) // columns), []
    for start in range(0, len(points), step):
        column = points[start : start + step]
        low, high = (f(column, key=lambda point: point[1]) for f in (min, max))
        kept += sorted({column[0], low, high, column[-1]})
    return kept


def plot(curves: dict[str, list[list[tuple[float, float]]]]) -> Picture:
    """curves: {name of a run: [points of the training loss, points of the validation loss]}."""
    points = [point for both in curves.values() for points in both for point in points]
    picture = Picture(880, 460 + 20 * len(curves), "loss over tokens")
    ys = limits(y for _, y in points)
    axes = Axes(picture, 76, 24, 780, 370, limits(x for x, _ in points), ys)
    axes.xs = (0, axes.xs[1])
    axes.frame("tokens", "loss, nats per token")
    for i, (name, (train, validation)) in enumerate(curves.items()):
        color, y = COLORS[i % len(COLORS)], 454 + 20 * i
        axes.line(thinned(train, 800), color)
        axes.dots(validation, color, 4)
        picture.line((76, y - 4), (100, y - 4), color, 3)
        longest = 92  # characters that fit
        name = name if len(name) <= longest else f"...{name[-longest:]}"
        picture.text(108, y, name, 12)
        if validation:
            x = 108 + text_width(name, 12) + 16
            picture.circle((x, y - 4), 4, color, "#ffffff")
            picture.text(x + 9, y, "validation", 12)
    return picture


def main() -> None:
    arguments = argparse.ArgumentParser(prog="plot", description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("runs", nargs="+", metavar="FILE", help="logs of train_3d.py --metrics")
    add("--out", default="runs.svg", metavar="FILE", help="the SVG file to write")
    args = arguments.parse_args()
    if not args.out.endswith(".svg"):
        arguments.error(f"--out {args.out} is not an SVG file: give a name that ends in .svg")
    curves = {}
    try:
        for run in args.runs:
            both = [zip(*curve(run, key), strict=True) for key in ("loss", "val_loss")]
            curves[run] = [[p for p in points if math.isfinite(p[1])] for points in both]
        if not any(points for both in curves.values() for points in both):
            raise ValueError(f"there are no finite losses in {', '.join(args.runs)}")
        plot(curves).save(args.out)
    except (OSError, ValueError) as error:
        print(f"plot: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {', '.join(args.runs)}")


if __name__ == "__main__":
    main()
