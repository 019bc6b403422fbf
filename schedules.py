"""Pipeline schedules: which computation each rank runs when. This file does not import torch.

A stage is a contiguous slice of the layers. Stages are numbered in model order. Each rank holds one
or more stages, called its chunks. The batch is split into microbatches. An action is one
computation for one microbatch and one stage: a forward (F) or a backward (B). A schedule is a list
of actions per rank. It determines how long ranks wait for each other, and how much memory they need
for activations. pipeline.py runs the actions and sends the tensors between stages.

The first timeline is 1F1B on 3 ranks. F0 is the forward of microbatch 0. B0 is its backward, which
takes twice as long. Dots are idle time. The second is ZB-H1, which splits each backward: B computes
the input gradient, which the previous stage needs, and W computes the weight gradients. No other
rank needs these, so W can run later and fill idle time.

    >>> print(draw(one_f_one_b(3, 4)), draw(zb_h1(3, 4)), sep="\\n\\n")
    rank 0 |F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
    rank 1 |.  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
    rank 2 |.  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .
    <BLANKLINE>
    rank 0 |F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3
    rank 1 |.  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    rank 2 |.  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

p ranks r = 0..p-1; c chunks per rank; m microbatches per step:

    schedule      c    bubble         if m >=  held by rank r      sends per microbatch
    gpipe         1    (p-1) / m      1        m                   2
    1f1b          1    (p-1) / m      1        p - r               2
    interleaved   >=2  (p-1) / (c m)  p        p + (p-1-2r) / c    2 c
    zb-h1         1    (p-1) / (3 m)  p        p                   2
    zb-v          2    (p-1) / (6 m)  2p - 1   p                   4
    dualpipe-v    2    (p-1) / (6 m)  2p       p + 1/2             4

Bubble: idle / busy time of all ranks; an unsplit B takes 2 time units, other actions take 1. Held:
the largest number of microbatches whose activations a rank stores at once. It stores them from F
until the end of B or, if the schedule has W, of W. A microbatch stored for one of c chunks counts
as 1/c. "Held" is valid for m = 2p, 3p, ...; fewer microbatches can need less. Sends: tensors sent
by a middle rank.

To draw a schedule: python -m tools.draw zb-v --p 4 --m 8

GPipe: arXiv 1811.06965. 1F1B, interleaved: 2104.04473. ZB-H1, ZB-V: 2401.10241 (sections 2
and 6). DualPipe: 2412.19437, and its variant DualPipeV: github.com/deepseek-ai/DualPipe.
"""

import collections
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

# --- actions and schedules ------------------------------------------------------------------------


class Action(NamedTuple):
    """One computation of a rank, for one microbatch and one stage.

    kind: "F" is a forward and "B" a backward. "W" computes the gradients of the weights of linear
    layers. If a schedule has W, then B computes all other gradients; otherwise B computes all."""

    kind: str
    microbatch: int
    stage: int


Schedule = list[list[Action]]  # [rank] -> actions in order


def stages_of(schedule: Schedule) -> list[list[int]]:
    """[rank][chunk] -> stage."""
    return [sorted({action.stage for action in row}) for row in schedule]


def splits_backward(actions: list[Action]) -> bool:
    """Whether these actions include W. A valid schedule has W on all ranks or on none."""
    return any(action.kind == "W" for action in actions)


def label(action: Action, stages: Sequence[int]) -> str:
    """The short name of an action of a rank that holds these stages. F0 is the forward of
    microbatch 0 on the rank's first chunk, f0 on the second, F0.2 on the third."""
    chunk = stages.index(action.stage)
    kind = action.kind.lower() if chunk == 1 else action.kind
    return f"{kind}{action.microbatch}" + (f".{chunk}" if chunk > 1 else "")


# --- the schedules --------------------------------------------------------------------------------
# To add one, write a function that returns the list of actions of each rank, given the number of
# ranks p and of microbatches m, and add an Entry to SCHEDULES. Every tool and test reads the entry.
# The number of chunks, the placement of stages and the transfers are computed from the list.


def from_phases(m: int, phases: list[tuple[int, str]], stages: Sequence[int]) -> list[Action]:
    """The actions of one rank. The phase (3, "FBW") means F, B, W, F, B, W, F, B, W. Each letter
    stands for an action on the next microbatch that has not had this action. Lower-case letters are
    actions of the second chunk. A letter is skipped once all m microbatches have had the action."""
    used: dict[str, int] = collections.Counter()
    actions = []
    for letter in itertools.chain(*(letters * times for times, letters in phases)):
        if used[letter] < m:
            chunk = int(letter.islower())
            actions.append(Action(letter.upper(), used[letter], stages[chunk]))
            used[letter] += 1
    return actions


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards."""
    return [from_phases(m, [(m, "F"), (m, "B")], [r]) for r in range(p)]


def one_f_one_b(p: int, m: int) -> Schedule:
    """A rank starts with one forward for each later rank, then alternates forward and backward.
    With fewer forwards at the start it would be idle for longer: the first gradient arrives only
    after the forward and backward of microbatch 0 on all later ranks. With more, it would hold more
    activations and finish no sooner. Rank r holds at most p - r microbatches. With p = 1 this is
    gradient accumulation."""
    return [from_phases(m, [(p - 1 - r, "F"), (m, "FB")], [r]) for r in range(p)]


def interleaved(p: int, m: int, chunks: int = 2) -> Schedule:
    """1F1B with several chunks per rank: rank r holds the stages r, p + r, 2 p + r, ... Each stage
    has fewer layers than in 1F1B, so later ranks start sooner and the bubble is smaller.

    Microbatches are processed in groups: the forwards of a group on the first chunk, then on the
    second, and so on, and its backwards from the last chunk to the first. A group has p
    microbatches: its first microbatch needs a forward on each of the p ranks before it returns to
    rank 0, and p forwards keep rank 0 busy until then. If p does not divide m, some groups have
    more, up to 2p - 1. If m < p, there is one group of m."""
    n = max(1, m // p)  # number of groups
    groups = [range(math.ceil(m * j / n), math.ceil(m * (j + 1) / n)) for j in range(n)]
    schedule = []
    for r in range(p):
        order = [(group, c) for group in groups for c in range(chunks)]
        forwards = [Action("F", i, c * p + r) for group, c in order for i in group]
        backwards = [Action("B", i, (chunks - 1 - c) * p + r) for group, c in order for i in group]
        # The number of forwards before the steady phase, which starts with a forward: the first
        # group on all chunks but the last, plus two per later rank. One per later rank would do if
        # transfers took no time. The second one hides them, and holds more activations. With one
        # chunk it is one per later rank, so that the schedule equals 1F1B.
        warmup = (chunks - 1) * len(groups[0]) + (p - 1 - r) * min(chunks, 2)
        warmup = min(warmup, len(forwards))
        # The forwards after the warm-up alternate with the first backwards. The drain is the rest.
        steady = itertools.chain(*zip(forwards[warmup:], backwards, strict=False))
        drain = backwards[len(forwards) - warmup :]
        schedule.append([*forwards[:warmup], *steady, *drain])
    return schedule


def held_by_interleaved(p: int, m: int, c: int, r: int) -> int:
    """The largest number of microbatches that rank r stores, times c."""
    group = math.ceil(m / max(1, m // p))  # the size of the first group of microbatches
    return min(c * m, (c - 1) * group + (p - 1 - r) * min(c, 2) + 1)


def zb_h1(p: int, m: int) -> Schedule:
    """1F1B with each backward split into B and W. On rank r, the W of a microbatch runs after the B
    of the next r microbatches. This adds r to the p - r microbatches that it holds in 1F1B. So
    every rank holds up to p, no more than rank 0 of 1F1B."""
    return [
        from_phases(m, [(p - 1 - r, "F"), (r, "FB"), (m, "FBW"), (m, "W")], [r]) for r in range(p)
    ]


def zb_v(p: int, m: int) -> Schedule:
    """Two chunks per rank, with stages placed in a V: stage k < p is on rank k, and stage k >= p on
    rank 2p - 1 - k. Rank 0 holds the first and the last stage, so it starts its backwards as soon
    as the forward of microbatch 0 has returned.

    With at least 2p - 1 microbatches, each rank holds up to p of them. Rank r starts r time units
    after rank 0, and is not idle between its first and its last action. It finishes p - 1 - r units
    before the last rank. The paper calls this zero bubble, because its ranks do not wait for each
    other between steps. Here all ranks wait for the gradient norm, which clipping needs. The idle
    time at the start and at the end is the bubble in the table."""
    n = max(m, 2 * p - 1)  # the phases need this many; microbatches m and above are removed
    schedule = []
    for r in range(p):
        phases = [
            (2 * (p - r) - 1, "F"),  # until the second chunk receives microbatch 0
            (r, "fF"),  # until the first gradient is received
            (p - r, "fbw"),  # until the first chunk receives a gradient
            (n - p, "FBWfbw"),  # steady state; no F remains in the last p - 1 - r rounds
            (r, "Bb"),  # no forwards remain; earlier ranks wait for B, so W is deferred
            (p - r, "BW"),  # no b remains
            (n, "wW"),  # the deferred W
        ]
        row = from_phases(n, phases, [r, 2 * p - 1 - r])
        schedule.append([action for action in row if action.microbatch < m])
    return schedule


def dualpipe_v(p: int, m: int) -> Schedule:
    """Stages are placed as in zb_v. In the steady state, a forward of one chunk alternates with a
    backward of the other chunk, for a different microbatch. The original DualPipeV runs the two at
    the same time, so that one computes while the other communicates. Here they run one after the
    other, so this schedule is no faster than zb_v, and it holds more activations. W follows its B,
    except at the end, where earlier ranks wait for B."""
    n = max(m, 2 * p)  # the phases need this many; the rest are removed, as in zb_v
    schedule = []
    for r in range(p):
        later = p - 1 - r
        pairs, odd = divmod(r + 1, 2)
        phases = [
            (2 * later, "F"),
            (r + 1, "Ff"),  # until the first gradient is received
            (later, "bwf"),  # until the first chunk receives a gradient
            (n - p - later, "FbwfBW"),  # steady state
            (later, "bwfBW"),  # no F remains
            *((pairs, "bwBW"), (odd, "bwB"), (pairs, "bB")),  # no f remains; half of W is deferred
            (later, "WB"),  # no b remains
            (n, "wW"),  # the deferred W
        ]
        row = from_phases(n, phases, [r, 2 * p - 1 - r])
        schedule.append([action for action in row if action.microbatch < m])
    return schedule


class Entry(NamedTuple):
    """A schedule, and closed forms of its costs for all p and m.

    make: a function (p, m), or (p, m, chunks) if `any_chunks`. The closed forms are optional:
    bubble(p, m, c) is idle / busy time with the durations of unit_time, for c chunks per rank, and
    `formula` is its text. It is valid for m >= exact_from(p). held(p, m, c, r) is c times the
    "held" of the table: a microbatch that two chunks hold counts twice. It is valid for every m."""

    make: Callable[..., Schedule]
    formula: str = ""
    bubble: Callable[[int, int, int], float] | None = None
    exact_from: Callable[[int], int] = lambda p: p
    held: Callable[[int, int, int, int], int] | None = None
    any_chunks: bool = False

    def __call__(self, p: int, m: int, chunks: int | None = None) -> Schedule:
        """The actions of each rank. Raises ValueError if `chunks` is given, and the schedule has
        another number of chunks per rank."""
        schedule = self.make(p, m, chunks) if self.any_chunks and chunks else self.make(p, m)
        has = len(stages_of(schedule)[0])
        if chunks is not None and chunks != has:
            raise ValueError(f"chunks = {chunks}: this schedule has {has} per rank")
        return schedule

    @property
    def chunks(self) -> int:
        """The default number of chunks per rank."""
        return len(stages_of(self.make(1, 1))[0])

    @property
    def splits_backward(self) -> bool:
        return splits_backward(self.make(1, 1)[0])


SCHEDULES = {
    "gpipe": Entry(
        gpipe,
        formula="(p-1) / m",
        bubble=lambda p, m, c: (p - 1) / m,
        exact_from=lambda p: 1,
        held=lambda p, m, c, r: m,
    ),
    "1f1b": Entry(
        one_f_one_b,
        formula="(p-1) / m",
        bubble=lambda p, m, c: (p - 1) / m,
        exact_from=lambda p: 1,
        held=lambda p, m, c, r: min(m, p - r),
    ),
    "interleaved": Entry(
        interleaved,
        formula="(p-1) / (c m)",
        bubble=lambda p, m, c: (p - 1) / (c * m),
        held=held_by_interleaved,
        any_chunks=True,
    ),
    "zb-h1": Entry(
        zb_h1,
        formula="(p-1) / (3 m)",
        bubble=lambda p, m, c: (p - 1) / (3 * m),
        held=lambda p, m, c, r: min(m, p),
    ),
    "zb-v": Entry(
        zb_v,
        formula="(p-1) / (6 m)",
        bubble=lambda p, m, c: (p - 1) / (6 * m),
        exact_from=lambda p: 2 * p - 1,
        held=lambda p, m, c, r: min(2 * p, m + r + 1, 2 * m),
    ),
    "dualpipe-v": Entry(
        dualpipe_v,
        formula="(p-1) / (6 m)",
        bubble=lambda p, m, c: (p - 1) / (6 * m),
        exact_from=lambda p: 2 * p,
        held=lambda p, m, c, r: min(2 * p + 1, m + r + 1, 2 * m),
    ),
}


def with_any_chunks() -> str:
    """The names of the schedules for which the number of chunks can be chosen."""
    return " or ".join(name for name, entry in SCHEDULES.items() if entry.any_chunks)


def forward_only(schedule: Schedule, m: int) -> Schedule:
    """The forwards of the first m microbatches. train_3d.py validates and samples with it."""
    return [[a for a in row if a.kind == "F" and a.microbatch < m] for row in schedule]


# --- time -----------------------------------------------------------------------------------------
# A simulation shows the bubble of a schedule, and whether its order can run at all, before anything
# is executed.


class Span(NamedTuple):
    """An action and its time, simulated or measured."""

    rank: int
    action: Action
    start: float
    end: float


class ScheduleError(ValueError):
    """The schedule is wrong at schedule[rank][place]. `place` is the length of the row if an action
    is missing. Both are 0 if the stages are wrong. read_schedule() reports them as line and
    column."""

    def __init__(self, rank: int, place: int, message: str):
        super().__init__(message)
        self.rank, self.place = rank, place


def dependency(action: Action, last: int) -> Action | None:
    """The action whose result this one needs, or None for F on stage 0. F needs F of the previous
    stage. B needs B of the next stage or, on the last stage, F of the same stage. (On all stages
    but the last, B needs F of the same stage, too. But B of the next stage can only run after this
    F.) W needs B of the same stage. last: the number of the last stage."""
    kind, microbatch, stage = action
    if kind == "F":
        return Action("F", microbatch, stage - 1) if stage > 0 else None
    if kind == "B" and stage < last:
        return Action("B", microbatch, stage + 1)
    return Action("F" if kind == "B" else "B", microbatch, stage)


def consumer(action: Action) -> Action:
    """The action on another stage that needs the result of this F or B: F of the next stage for F,
    B of the previous stage for B. F of the last stage and B of the first have no consumer: the
    action that is returned has the number of a stage that does not exist."""
    return action._replace(stage=action.stage + (1 if action.kind == "F" else -1))


def unit_time(schedule: Schedule) -> Callable[[Action], float]:
    """The default durations: 1 for F, W and a split B. A B that is not split takes 2, because it
    has twice as many matmuls as F."""
    backward = 1.0 if any(map(splits_backward, schedule)) else 2.0
    return lambda action: backward if action.kind == "B" else 1.0


def cycle(start: int, waits_for: Callable[[int], int]) -> list[int]:
    """Follows waits_for from rank `start` until a rank repeats. Returns the ranks of the cycle."""
    path = [start]
    while (rank := waits_for(path[-1])) not in path:
        path.append(rank)
    return path[path.index(rank) :]


def simulate(
    schedule: Schedule, time: Callable[[Action], float] | None = None, transfer: float = 0.0
) -> list[Span]:
    """The span of every action, sorted by start. An action starts when its rank is free and its
    dependency has finished.

    time(action): the duration, by default that of unit_time. transfer: the time to send a tensor to
    another rank. The schedule must contain the dependency of each of its actions, as check()
    verifies.
    Raises ScheduleError if ranks wait for each other in a cycle."""
    time, stages = time or unit_time(schedule), stages_of(schedule)
    rank_of = {stage: rank for rank, row in enumerate(stages) for stage in row}
    remaining = [collections.deque(row) for row in schedule]
    # The end of each action that has run. None stands for "no dependency".
    end: dict[Action | None, float] = {None: 0.0}
    free, spans = [0.0] * len(schedule), []

    def next_dependency(rank: int) -> Action | None:
        return dependency(remaining[rank][0], len(rank_of) - 1)

    progress = True
    while progress:
        progress = False
        for rank in range(len(schedule)):
            while remaining[rank] and (needed := next_dependency(rank)) in end:
                action = remaining[rank].popleft()
                sent = needed is not None and rank_of[needed.stage] != rank
                start = max(free[rank], end[needed] + transfer * sent)
                free[rank] = end[action] = start + time(action)
                spans.append(Span(rank, action, start, free[rank]))
                progress = True
    stuck = [rank for rank, row in enumerate(remaining) if row]
    if stuck:  # the action that a stuck rank needs has not run, so its rank is stuck too
        ranks = cycle(stuck[0], lambda rank: rank_of[next_dependency(rank).stage])
        lines = []
        for rank in ranks:
            action, needed = remaining[rank][0], next_dependency(rank)
            other = rank_of[needed.stage]
            names = label(action, stages[rank]), label(needed, stages[other])
            lines.append(f"rank {rank} cannot run {names[0]} before rank {other} runs {names[1]}")
        place = len(schedule[ranks[0]]) - len(remaining[ranks[0]])
        raise ScheduleError(ranks[0], place, "deadlock: " + "; ".join(lines))
    return sorted(spans, key=lambda span: (span.start, span.rank))


def check(schedule: Schedule, m: int) -> None:
    """Raises ScheduleError unless each stage is on one rank and has one F and one B (and one W, if
    the schedule has W) for each of the m microbatches, in an order that can run."""
    stages = stages_of(schedule)
    n = sum(map(len, stages))
    if not n or sorted(itertools.chain(*stages)) != [*range(n)]:
        remedy = "number them 0, 1, 2, ... without gaps, each on exactly one rank"
        raise ScheduleError(0, 0, f"stages by rank are {stages}: {remedy}")
    kinds = "FBW" if any(map(splits_backward, schedule)) else "FB"
    for rank, row in enumerate(schedule):
        missing = {Action(*action) for action in itertools.product(kinds, range(m), stages[rank])}
        for place, action in enumerate(row):
            if action not in missing:
                what = f"{label(action, stages[rank])} is a duplicate or unexpected"
                rule = f"exactly one {' and one '.join(kinds)} for each of microbatches 0..{m - 1}"
                raise ScheduleError(rank, place, f"{what}: each stage must have {rule}")
            missing.remove(action)
        if missing:
            names = ", ".join(label(action, stages[rank]) for action in sorted(missing))
            raise ScheduleError(rank, len(row), f"{names} missing")
    simulate(schedule)  # raises if the order cannot run


def bubble(spans: list[Span]) -> float:
    """Idle time / busy time over all ranks, from the first start to the last end."""
    busy = sum(span.end - span.start for span in spans)
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    return len({span.rank for span in spans}) * makespan / busy - 1


def draw(schedule: Schedule) -> str:
    """A picture of the schedule, with the durations of unit_time: one line per rank, one column per
    time unit."""
    spans, stages = simulate(schedule), stages_of(schedule)
    names = {span: label(span.action, stages[span.rank]) for span in spans}
    width, length = 1 + max(map(len, names.values())), int(max(span.end for span in spans))
    rows = [["." + " " * (width - 1)] * length for _ in schedule]
    for span in spans:
        start, end = int(span.start), int(span.end)
        fill = "-" if end - start > 1 else " "
        rows[span.rank][start] = names[span].ljust((end - start) * width - 1, fill) + " "
        rows[span.rank][start + 1 : end] = [""] * (end - start - 1)  # the padded name covers them
    return "\n".join(f"rank {rank} |{''.join(row)}".rstrip() for rank, row in enumerate(rows))


# --- a schedule from a text file ------------------------------------------------------------------


def read_schedule(path: str, p: int, m: int) -> Schedule:
    """Read a schedule from a text file with one line of actions per rank:

        # comment
        0 2: F0 F1 f0 b0 w0 ...
        1:   F0 F1 B0 W0 ...

    An action is a kind, a microbatch and a chunk, which is left out if it is 0: F0.2 has chunk 2.
    Chunk 1 may be written F0.1 or f0. The kinds are F (forward), B (backward) and W (weight
    gradients). If the file contains W, B leaves the weight gradients out. The numbers before the
    colon are the stages of the rank. Chunks are numbered in the order of their stages. Without the
    numbers, chunk c of rank r is stage c p + r. If the file or the schedule is invalid, raises
    ValueError with the line and the column."""

    def wrong(number: int, column: int, what: str) -> ValueError:
        return ValueError(f"--schedule {path}, line {number}, column {column}: {what}")

    try:
        with open(path) as file:
            lines = [line.partition("#")[0].rstrip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(SCHEDULES)
        raise ValueError(
            f"--schedule {path} is neither one of {known} nor a readable file: {error}"
        ) from None
    schedule, places = [], []  # places: (line, column) of each action, and of the line's end
    for number, line in enumerate(lines, 1):
        head, colon, _ = line.rpartition(":")
        if not line:
            continue
        if not re.fullmatch(r"[\d\s,]*", head):
            raise wrong(
                number, 1, f"{head!r} is not a list of stages: expected numbers, as in 0 3:"
            )
        stages = sorted(int(k) for k in re.findall(r"\d+", head))
        row, columns = [], []
        for word in re.compile(r"\S+").finditer(line, len(head + colon)):
            columns.append((number, word.start() + 1))
            action = re.fullmatch(r"([FBWfbw])(\d+)(?:\.(\d+))?", word.group())
            if not action:
                what = f"{word.group()!r} is not an action: expected F, B or W, a microbatch, and "
                raise wrong(*columns[-1], what + "optionally a chunk, as in B0 or B0.1")
            kind, i, chunk = action[1], int(action[2]), int(action[3] or action[1].islower())
            if stages and chunk >= len(stages):
                what = f"{word.group()} has chunk {chunk}: expected 0..{len(stages) - 1}"
                raise wrong(*columns[-1], what)
            stage = stages[chunk] if stages else chunk * p + len(schedule)
            row.append(Action(kind.upper(), i, stage))
        places.append([*columns, (number, len(line) + 1)])
        schedule.append(row)
    if len(schedule) != p:
        what = f"the file has {len(schedule)} ranks: expected one line for each of --pp {p}"
        raise wrong(max(1, len(lines)), 1, what)
    try:
        check(schedule, m)
    except ScheduleError as error:
        raise wrong(*places[error.rank][error.place], str(error)) from None
    return schedule
