"""Print the pipeline bubble of a traced run, next to a simulation with the same action times.

    torchrun --standalone --nproc-per-node 2 train_3d.py --pp 2 --trace trace.json
    python -m tools.plan.bubble trace.json

The bubble is idle time divided by busy time. The simulation runs the same schedule with the mean
duration of each action and with transfers that take no time. The measured bubble is the median over
steps. The first step is left out: it is slower than the others. Both describe the pipeline of
dp rank 0, tp rank 0.
"""

import argparse
import collections
import json
import re
import statistics
from collections.abc import Iterable

import schedules


def read_steps(path: str) -> list[list[schedules.Span]]:
    """For each training step, the actions of dp rank 0, tp rank 0, with times in seconds. Raises
    ValueError if the file is not a trace of training steps."""
    pp_rank, steps = {}, collections.defaultdict(list)
    try:
        with open(path) as file:
            events = json.load(file)["traceEvents"]
        ours = re.compile(r"pp (\d+), dp 0, (cp 0, )?tp 0$")
        for event in events:
            about = event["args"]
            if event["ph"] == "M" and (found := ours.search(about["name"])):
                pp_rank[event["pid"]] = int(found[1])
            elif "step" in about and event["pid"] in pp_rank:
                action, start = schedules.Action(*about["action"]), 1e-6 * event["ts"]
                end = start + 1e-6 * event["dur"]
                steps[about["step"]].append(
                    schedules.Span(pp_rank[event["pid"]], action, start, end)
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a trace of train_3d.py --trace: {error!r}") from None
    if not steps:
        raise ValueError(f"{path} has no training steps: trace a run of at least one step")
    return [steps[step] for step in sorted(steps)]


def mean_times(spans: Iterable[schedules.Span]) -> dict[tuple[str, int], float]:
    """(kind, stage) -> mean duration."""
    durations = collections.defaultdict(list)
    for span in spans:
        durations[span.action.kind, span.action.stage].append(span.end - span.start)
    return {key: statistics.fmean(values) for key, values in durations.items()}


def table(steps: list[list[schedules.Span]]) -> str:
    """Mean duration of each action by stage, then the simulated and the measured bubble."""
    steps = steps[1:] or steps
    mean = mean_times(span for step in steps for span in step)
    ranks = sorted({span.rank for span in steps[0]})
    schedule = [
        [span.action for span in sorted(steps[0], key=lambda s: s.start) if span.rank == rank]
        for rank in ranks
    ]
    simulated = schedules.bubble(
        schedules.simulate(schedule, lambda action: mean[action.kind, action.stage])
    )
    measured = statistics.median(map(schedules.bubble, steps))
    lines = ["stage" + "".join(f"{kind + ' ms':>9s}" for kind in "FBW")]
    for k in sorted({stage for _, stage in mean}):
        lines.append(f"{k:5d}" + "".join(f"{1e3 * mean.get((kind, k), 0):9.2f}" for kind in "FBW"))
    lines.append(f"bubble: simulated with these times {simulated:.3f} | measured {measured:.3f}")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("trace", metavar="FILE", help="written by train_3d.py --trace")
    args = arguments.parse_args()
    try:
        print(table(read_steps(args.trace)))
    except ValueError as error:
        arguments.error(str(error))


if __name__ == "__main__":
    main()
