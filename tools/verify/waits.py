"""Two simulations of the network under a pipeline's transfers. Nothing is run.

    python -m tools.verify.waits

bubble() computes how much waiting on GPU streams adds to the bubble. Each rank has one stream for
compute and one for transfers, and the host runs ahead of both. A batch of transfers starts when the
previous batch and the compute that was queued before it have finished. A transfer also needs that
its batch has started on the other rank. Before it uses a received tensor, compute waits for the
handle of the whole batch, as under NCCL, or only for that transfer, as under gloo. Before a send,
compute waits for the previous send of the same stage (Pipeline._post), or it does not.

check_no_deadlock() tests whether programs could deadlock on the strictest network.
"""

import random
import statistics
from collections.abc import Callable, Iterator

import pipeline
import schedules
from schedules import Action


def bubble(
    schedule: schedules.Schedule, transfer: float = 0.0, one_handle: bool = True,
    wait_for_sends: bool = True, time: Callable[[Action], float] | None = None,
) -> float:  # fmt: skip
    """The bubble of `schedule`. transfer, time: as in schedules.simulate. one_handle: compute waits
    for the batch of a transfer, not only for the transfer. wait_for_sends: compute waits for the
    previous send of a stage."""
    time, programs = time or schedules.unit_time(schedule), pipeline.derive_programs(schedule)
    last = sum(map(len, schedules.stages_of(schedule))) - 1
    place = {(rank, t): i for rank, program in enumerate(programs)
             for i, step in enumerate(program) if not isinstance(step, Action)
             for t in step}  # fmt: skip
    received = {(t.dst, t.action): t for _, t in place}
    start: dict[tuple[int, int], float] = {}  # (rank, place) of a batch
    compute = [0.0] * len(programs)

    def arrival(t: pipeline.Transfer) -> float:
        return max(start[rank, place[rank, t]] for rank in (t.src, t.dst)) + transfer

    def end(rank: int, i: int) -> float:
        return max(map(arrival, programs[rank][i]))

    def wait(function: Callable, *args) -> Iterator[None]:
        """Calls function(*args) until it raises no KeyError, which means that the other ranks have
        advanced far enough. Yields after each attempt."""
        while True:
            try:
                return function(*args)
            except KeyError:
                yield

    def run(rank: int) -> Iterator[None]:
        before, sent = 0.0, {}
        for i, step in enumerate(programs[rank]):
            if isinstance(step, Action):
                if t := received.get((rank, schedules.dependency(step, last))):
                    there = wait(end, rank, place[rank, t]) if one_handle else wait(arrival, t)
                    compute[rank] = max(compute[rank], (yield from there))
                compute[rank] += time(step)
                continue
            sends = [(t.action.kind, t.action.stage) for t in step if t.src == rank]
            for key in sends if wait_for_sends else ():
                if key in sent:
                    ended = yield from wait(end, rank, sent[key])
                    compute[rank] = max(compute[rank], ended)
            sent |= dict.fromkeys(sends, i)
            start[rank, i] = max(compute[rank], before)
            before = yield from wait(end, rank, i)

    ranks = [run(rank) for rank in range(len(programs))]
    while ranks:
        ranks = [rank for rank in ranks if next(rank, "ended") is None]
    busy = sum(time(action) for row in schedule for action in row)
    return len(programs) * max(compute) / busy - 1


def vary(schedule: schedules.Schedule, by: float, seed: int) -> Callable[[Action], float]:
    """Durations for simulate: unit_time, multiplied by a random number from 1 - by to 1 + by for
    each action."""
    rng, unit = random.Random(seed), schedules.unit_time(schedule)
    times = {action: unit(action) * rng.uniform(1 - by, 1 + by) for row in schedule
             for action in row}  # fmt: skip
    return times.__getitem__


def batches(schedule: schedules.Schedule) -> tuple[int, int]:
    """(number of batches of all ranks, number of batches with several peers)."""
    ranks = [{rank for t in step for rank in (t.src, t.dst)}
             for program in pipeline.derive_programs(schedule) for step in program
             if not isinstance(step, Action)]  # fmt: skip
    return len(ranks), sum(len(each) > 2 for each in ranks)


def check_no_deadlock(programs: list[pipeline.Program]) -> None:
    """Simulates the strictest network: a rank waits for each batch, a transfer completes when both
    ranks have posted it, and transfers between two ranks complete in the order posted, as with
    NCCL. Raises ValueError if the programs deadlock or the orders of two ranks differ."""
    remaining = [list(program) for program in programs]
    batch: list[list[pipeline.Transfer]] = [
        [] for _ in programs
    ]  # posted and not complete, by rank
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(remaining):
            while program and not batch[rank]:
                step = program.pop(0)
                batch[rank] = [] if isinstance(step, Action) else list(step)
                progress = True
        for pair in {(t.src, t.dst) for posted in batch for t in posted}:
            first = [next((t for t in batch[r] if (t.src, t.dst) == pair), None) for r in pair]
            if None not in first:
                if first[0] != first[1]:
                    raise ValueError(f"ranks {pair} post in different orders: {first}")
                for rank in pair:
                    batch[rank].remove(first[0])
                progress = True
    if any(batch):
        waits = []
        for rank, posted in enumerate(batch):
            for t in posted[:1]:
                name = f"{t.action.kind}{t.action.microbatch}"
                send, receive = f"send {name} to rank {t.dst}", f"receive {name} from rank {t.src}"
                waits.append(f"rank {rank} waits to {send if t.src == rank else receive}")
        raise ValueError("deadlock: " + "; ".join(waits))


def main() -> None:
    print("schedule     p   transfer  times   no waits  sends  one handle  both")
    for name, entry in schedules.SCHEDULES.items():
        for p in (4, 8):
            schedule = entry(p, 2 * p)
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
