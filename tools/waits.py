"""How much waiting on GPU streams adds to a pipeline's bubble, simulated.

    python -m tools.waits

A rank has a stream for compute and one for transfers. The host runs ahead of both. A batch starts
when the previous batch and the compute queued before it have finished; each transfer also needs its
peer's batch to have started. Compute waits for what it receives:
for the one handle of its batch, as under NCCL, or for the transfer alone, as with gloo. Before a
send, compute waits for the previous send of the same stage (Pipeline._post), or it does not.
"""

import random
import statistics
from collections.abc import Callable, Iterator

import pipeline
from pipeline import Action


def bubble(
    schedule: pipeline.Schedule, transfer: float = 0.0, one_handle: bool = True,
    wait_for_sends: bool = True, time: Callable[[Action], float] | None = None,
) -> float:  # fmt: skip
    """transfer, time: as in pipeline.simulate."""
    time, programs = time or pipeline.unit_time(schedule), pipeline.derive_programs(schedule)
    last = sum(map(len, pipeline.stages_of(schedule))) - 1
    place = {(rank, t): i for rank, program in enumerate(programs)
             for i, step in enumerate(program) if not isinstance(step, Action)
             for t in step}  # fmt: skip
    received = {(t.dst, Action(*t[:3])): t for _, t in place}
    start: dict[tuple[int, int], float] = {}  # (rank, place) of a batch
    compute = [0.0] * len(programs)

    def arrival(t: pipeline.Transfer) -> float:
        return max(start[rank, place[rank, t]] for rank in (t.src, t.dst)) + transfer

    def end(rank: int, i: int) -> float:
        return max(map(arrival, programs[rank][i]))

    def wait(function: Callable, *args) -> Iterator[None]:
        """Polls function(*args) until the other ranks have advanced far enough (KeyError until
        then)."""
        while True:
            try:
                return function(*args)
            except KeyError:
                yield

    def run(rank: int) -> Iterator[None]:
        before, sent = 0.0, {}
        for i, step in enumerate(programs[rank]):
            if isinstance(step, Action):
                if t := received.get((rank, pipeline.dependency(step, last))):
                    there = wait(end, rank, place[rank, t]) if one_handle else wait(arrival, t)
                    compute[rank] = max(compute[rank], (yield from there))
                compute[rank] += time(step)
                continue
            for t in step if wait_for_sends else ():
                if t.src == rank and (t.kind, t.stage) in sent:
                    ended = yield from wait(end, rank, sent[t.kind, t.stage])
                    compute[rank] = max(compute[rank], ended)
            sent |= {(t.kind, t.stage): i for t in step if t.src == rank}
            start[rank, i] = max(compute[rank], before)
            before = yield from wait(end, rank, i)

    ranks = [run(rank) for rank in range(len(programs))]
    while ranks:
        ranks = [rank for rank in ranks if next(rank, "ended") is None]
    busy = sum(time(action) for row in schedule for action in row)
    return len(programs) * max(compute) / busy - 1


def vary(schedule: pipeline.Schedule, by: float, seed: int) -> Callable[[Action], float]:
    """unit_time, times a random number between 1 - by and 1 + by for each action."""
    rng, unit = random.Random(seed), pipeline.unit_time(schedule)
    times = {action: unit(action) * rng.uniform(1 - by, 1 + by) for row in schedule
             for action in row}  # fmt: skip
    return times.__getitem__


def batches(schedule: pipeline.Schedule) -> tuple[int, int]:
    """(batches of all ranks, those that touch several peers)."""
    ranks = [{rank for t in step for rank in t[3:]}
             for program in pipeline.derive_programs(schedule) for step in program
             if not isinstance(step, Action)]  # fmt: skip
    return len(ranks), sum(len(each) > 2 for each in ranks)


def main() -> None:
    print("schedule     p   transfer  times   no waits  sends  one handle  both")
    for name in ("1f1b", "interleaved", "zb-h1", "zb-v"):
        for p in (4, 8):
            schedule = pipeline.SCHEDULES[name](p, 2 * p)
            for transfer, by in ((0.1, 0.0), (0.1, 0.2), (0.2, 0.0)):
                times = [vary(schedule, by, seed) for seed in range(10 if by else 1)]
                row = [statistics.mean(bubble(schedule, transfer, handle, sends, time)
                                       for time in times)
                       for handle in (False, True) for sends in (False, True)]  # fmt: skip
                how = f"+-{by:3.0%}" if by else "equal"
                print(f"{name:12s} {p}   {transfer:8.1f}  {how:6s}",
                      *(f"{number:9.4f}" for number in row))  # fmt: skip


if __name__ == "__main__":
    main()
