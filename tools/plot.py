"""Plots the training and validation losses of runs over the number of tokens.

    make plot RUNS="a.jsonl b.jsonl" OUT=runs.png
    python -m tools.plot a.jsonl b.jsonl --out runs.png

The input files are written by `train_3d.py --metrics FILE`. If a file contains a step twice,
because the run was resumed from an earlier checkpoint, the second entry is used. It writes one PNG
with a line per run (training loss) and dots (validation loss), and needs the package matplotlib.
"""

import argparse
import json
from pathlib import Path


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


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("runs", nargs="+", metavar="FILE", help="files of --metrics")
    arguments.add_argument("--out", default="runs.png", metavar="FILE", help="the PNG to write")
    args = arguments.parse_args()
    try:
        curves = {run: [curve(run, key) for key in ("loss", "val_loss")] for run in args.runs}
    except (OSError, ValueError) as error:
        arguments.error(str(error))
    try:
        import matplotlib
    except ImportError:
        arguments.error("matplotlib is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for run, (train, validation) in curves.items():
        (line,) = axes.plot(*train, linewidth=0.8, label=run)
        axes.plot(*validation, "o--", color=line.get_color(), markersize=4)
    axes.set(xlabel="tokens", ylabel="loss, nats per token (dots: validation)")
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(args.out)


if __name__ == "__main__":
    main()
