"""Pipeline parallelism: consecutive blocks on consecutive ranks, microbatches flowing through.

1F1B on 3 ranks, 4 microbatches (F forward, B backward, which takes twice as long); and ZB-H1, which
takes a backward apart: B, the gradient of the input, for which the rank before waits, and W, the
gradient of the weights, for which nobody waits, so that it fills gaps:

    >>> print(draw(one_f_one_b(3, 4)), draw(zb_h1(3, 4)), sep="\\n\\n")
    rank 0 |F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
    rank 1 |.  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
    rank 2 |.  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .
    <BLANKLINE>
    rank 0 |F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3
    rank 1 |.  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    rank 2 |.  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

A schedule is data: for each rank a list of actions, from a pure function of (p, m, v). Picture,
bubble, memory, check and execution all read that list; to try a schedule, write a function that
returns lists. Transfers between ranks are derived, and the executor runs any list.

    per rank     bubble      held by rank r, in microbatches    sends of [b,s,h] (not at the ends)
    gpipe        (p-1)/m     m                                  m outputs, m gradients
    1f1b         (p-1)/m     p-r                                the same
    interleaved  (p-1)/(vm)  p + (p-1-2r)/v, if p divides m     v m, v m: v stages a rank, in turn
    zb-h1        (p-1)/(3m)  p                                  m, m
    zb-v         (p-1)/(6m)  p                                  2 m, 2 m: 2 stages a rank, in a V

Bubble: idle time over busy time, all ranks together, for m >= p (zb-v: 2p-1) and F = B = W. In zb-v
rank r starts r units late and never pauses; so Zero Bubble says 0, if each rank updates its weights
and goes on as soon as it is through. Clipping by the global norm has to wait for the last. Held:
forwarded, with its last B or W still to come. On one rank 1F1B is gradient accumulation, F0 B0 F1..

    torchrun --standalone --nproc-per-node 2 pipeline.py

Huang et al. 2018, GPipe (arXiv 1811.06965); Narayanan et al. 2021, 1F1B, interleaved (arXiv
2104.04473), section 2.2; Qi et al. 2023, Zero Bubble (arXiv 2401.10241), section 2; Qi et al. 2024,
V schedules (arXiv 2405.15362).
"""

import collections
import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# Point to point, derived from the schedule, and one all-reduce where the embedding is tied.


def all_reduce_tied(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """The tied embedding is held by the first stage (lookup) and the last (head), and each has the
    gradient of its own use. `group`: the ranks of these two; if that is one rank, it has one matrix
    and the sum already. Call when gradients have met over dp."""
    for gradient in gradients if group.size() > 1 else ():
        dist.all_reduce(gradient, group=group)  # payload: v h, or the shard of it


# --- strategy -------------------------------------------------------------------------------------
# 1. Schedules: pure functions. Whoever knows these knows the idea.


class Action(NamedTuple):
    """F: forward, B: backward, W: the weights' part of a backward, of one microbatch through one
    stage. A stage is a piece of the model, numbered along it; a rank has one, or several (chunks).
    In a schedule without W, B is the whole backward."""

    kind: str
    microbatch: int
    stage: int


Schedule = list[list[Action]]  # by rank


def stages_of(schedule: Schedule) -> list[list[int]]:
    """[rank][chunk] -> stage."""
    return [sorted({action.stage for action in row}) for row in schedule]


def splits_backward(actions: list[Action]) -> bool:
    """Whether these take backwards apart. Wherever one stage does, all do (see check)."""
    return any(action.kind == "W" for action in actions)


def label(action: Action, stages: Sequence[int]) -> str:
    """How pictures, files and errors write an action of a rank with these stages: F0; f0, the same
    of its second chunk; F0.2 of the third."""
    chunk = stages.index(action.stage)
    kind = action.kind.lower() if chunk == 1 else action.kind
    return f"{kind}{action.microbatch}" + (f".{chunk}" if chunk > 1 else "")


def from_phases(m: int, phases: list[tuple[int, str]], stages: Sequence[int]) -> list[Action]:
    """One rank's list, from phases like (3, "FBW"): three times a forward, a backward and a weight
    gradient, each of the next microbatch in line for it. Small letters: of the second chunk. What
    all m microbatches are through with is skipped."""
    turn: dict[str, int] = collections.Counter()  # of which microbatch
    actions = []
    for letter in itertools.chain(*(letters * times for times, letters in phases)):
        if turn[letter] < m:
            stage = stages[letter.islower()]
            actions.append(Action(letter.upper(), turn[letter], stage))
            turn[letter] += 1
    return actions


def require_chunks(name: str, v: int, n: int) -> None:
    """Raises ValueError unless v is n, the number of chunks per rank of this schedule."""
    if v != n:
        raise ValueError(f"{name} has {n} chunk{'s' * (n > 1)} per rank, not {v}: pass v={n}, or "
                         "use interleaved")  # fmt: skip


def gpipe(p: int, m: int, v: int = 1) -> Schedule:
    """All forwards, then all backwards."""
    require_chunks("gpipe", v, 1)
    return [from_phases(m, [(m, "F"), (m, "B")], [r]) for r in range(p)]


def one_f_one_b(p: int, m: int, v: int = 1) -> Schedule:
    """As many forwards as there are ranks behind, then one forward, one backward."""
    require_chunks("1f1b", v, 1)
    return [from_phases(m, [(p - 1 - r, "F"), (m, "FB")], [r]) for r in range(p)]


def interleaved(p: int, m: int, v: int = 2) -> Schedule:
    """1F1B on v chunks a rank (r, p + r, ...), each of 1/v of the model, so that it fills v times
    as fast. Chunks take turns with groups of p microbatches; where p does not divide m, of more
    (below 2 p): a smaller group would be back before the ranks ahead of it are free."""
    n = max(1, m // p)
    groups = [range(-(-m * j // n), -(-m * (j + 1) // n)) for j in range(n)]
    schedule = []
    for r in range(p):
        order = [(g, c) for g in groups for c in range(v)]
        forwards = [Action("F", i, c * p + r) for g, c in order for i in g]
        backwards = [Action("B", i, (v - 1 - c) * p + r) for g, c in order for i in g]
        warmup = min(len(forwards), (v - 1) * len(groups[0]) + (p - 1 - r) * min(v, 2))
        pairs = itertools.chain(*zip(forwards[warmup:], backwards, strict=False))
        schedule.append(forwards[:warmup] + [*pairs] + backwards[len(forwards) - warmup :])
    return schedule


def zb_h1(p: int, m: int, v: int = 1) -> Schedule:
    """1F1B in which r weight gradients wait on rank r, so that all hold what 1F1B's first does."""
    require_chunks("zb-h1", v, 1)
    return [
        from_phases(m, [(p - 1 - r, "F"), (r, "FB"), (m, "FBW"), (m, "W")], [r]) for r in range(p)
    ]


def zb_v(p: int, m: int, v: int = 2) -> Schedule:
    """Two chunks a rank, down the ranks and up again: rank 0 has the first and the last stage, so
    the first backward is soon there, and a rank has always something to do."""
    require_chunks("zb-v", v, 2)
    n = max(m, 2 * p - 1)  # what fills it; a smaller batch leaves gaps
    schedule = [
        from_phases(n, [(2 * (p - r) - 1, "F"), (r, "fF"), (p - r, "fbw"), (n - p, "FBWfbw"),
                        (r, "Bb"), (p - r, "BW"), (n, "wW")], [r, 2 * p - 1 - r])
        for r in range(p)
    ]  # fmt: skip
    return [[action for action in row if action.microbatch < m] for row in schedule]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb-h1": zb_h1,
             "zb-v": zb_v}  # fmt: skip


def forward_only(schedule: Schedule, m: int) -> Schedule:
    """The forwards of its first m microbatches: for validation and sampling."""
    return [[a for a in row if a.kind == "F" and a.microbatch < m] for row in schedule]


# 2. From the lists to time: who waits for whom.


class Span(NamedTuple):
    rank: int
    action: Action
    start: float
    end: float


class ScheduleError(ValueError):
    """At schedule[rank][place], which is behind its end where something is missing."""

    def __init__(self, rank: int, place: int, message: str):
        super().__init__(message)
        self.rank, self.place = rank, place


def dependency(action: Action, last: int) -> Action | None:
    """What must have run before: F the stage before; B the stage behind, and on the last its own
    F; W its own B."""
    kind, i, k = action
    if kind == "F":
        return Action("F", i, k - 1) if k > 0 else None
    if kind == "B" and k < last:
        return Action("B", i, k + 1)
    return Action("F" if kind == "B" else "B", i, k)


def consumer(made: Action) -> Action:
    """What runs on what F or B has made: the next F, or the B before."""
    return made._replace(stage=made.stage + (1 if made.kind == "F" else -1))


def unit_time(schedule: Schedule) -> Callable[[Action], float]:
    """F 1, B 1, W 1; a B that is the whole backward 2: it has twice a forward's matmuls."""
    whole = 1.0 if any(map(splits_backward, schedule)) else 2.0
    return lambda action: whole if action.kind == "B" else 1.0


def cycle(start: int, after: Callable[[int], int]) -> list[int]:
    """The ranks that one comes to again and again, going from each to the one it waits for."""
    way = [start]
    while (rank := after(way[-1])) not in way:
        way.append(rank)
    return way[way.index(rank) :]


def simulate(
    schedule: Schedule, time: Callable[[Action], float] | None = None, transfer: float = 0.0
) -> list[Span]:
    """When every action runs, in order of start, if none is missing (see check). time(action),
    default unit_time; transfer: from the end of an action until another rank has what it made.
    Raises ScheduleError, with who waits for whom, if actions wait for each other in a cycle."""
    time, stages = time or unit_time(schedule), stages_of(schedule)
    rank_of = {k: rank for rank, row in enumerate(stages) for k in row}
    done: dict[Action | None, float] = {None: 0.0}
    position, free, spans = [0] * len(schedule), [0.0] * len(schedule), []

    def awaited(r: int) -> Action | None:
        """What the next action of rank r needs."""
        return dependency(schedule[r][position[r]], len(rank_of) - 1)

    moved = True
    while moved:
        moved = False
        for r, row in enumerate(schedule):
            while position[r] < len(row) and (need := awaited(r)) in done:
                way = transfer if need and rank_of[need.stage] != r else 0.0
                start = max(free[r], done[need] + way)
                free[r] = done[row[position[r]]] = start + time(row[position[r]])
                spans.append(Span(r, row[position[r]], start, free[r]))
                position[r] += 1
                moved = True
    stuck = [r for r, row in enumerate(schedule) if position[r] < len(row)]
    if stuck:
        ranks, lines = cycle(stuck[0], lambda r: rank_of[awaited(r).stage]), []
        for r in ranks:
            here, q = schedule[r][position[r]], rank_of[awaited(r).stage]
            lines.append(f"rank {r} at {label(here, stages[r])} waits for "
                         f"{label(awaited(r), stages[q])} of rank {q}")  # fmt: skip
        raise ScheduleError(ranks[0], position[ranks[0]], "; ".join(lines))
    return sorted(spans, key=lambda span: (span.start, span.rank))


def check(schedule: Schedule, m: int) -> None:
    """Raises ScheduleError unless every stage has F and B of each of m microbatches once, and W too
    if any has one, in an order that can be. (Derived transfers cannot deadlock; if they did, it
    would raise a ValueError.)"""
    stages = stages_of(schedule)
    n = sum(map(len, stages))
    if not n or sorted(itertools.chain(*stages)) != [*range(n)]:
        raise ScheduleError(0, 0, f"stages by rank are {stages}: each of 0..{n - 1} belongs on one")
    kinds = "FBW" if any(map(splits_backward, schedule)) else "FB"
    for rank, row in enumerate(schedule):
        whole = {Action(*action) for action in itertools.product(kinds, range(m), stages[rank])}
        for place, action in enumerate(row):
            if action not in whole:
                what = f"is there twice, or is no {' or '.join(kinds)} of microbatches 0..{m - 1}"
                raise ScheduleError(rank, place, f"{label(action, stages[rank])} {what}")
            whole.remove(action)
        if whole:
            missing = ", ".join(label(action, stages[rank]) for action in sorted(whole))
            raise ScheduleError(rank, len(row), f"{missing} missing")
    check_no_deadlock(derive_programs(schedule))


def bubble(spans: list[Span]) -> float:
    """Idle time over busy time, of all ranks together, from the first start to the last end; of a
    simulation, or of what really was."""
    busy = sum(span.end - span.start for span in spans)
    makespan = max(span.end for span in spans) - min(span.start for span in spans)
    return len({span.rank for span in spans}) * makespan / busy - 1


def mean_times(spans: Iterable[Span]) -> dict[tuple[str, int], float]:
    """(kind, stage) -> what it took on average."""
    took: dict[tuple[str, int], list[float]] = {}
    for _, (kind, _, stage), start, end in spans:
        took.setdefault((kind, stage), []).append(end - start)
    return {key: sum(times) / len(times) for key, times in took.items()}


def draw(schedule: Schedule, columns: int = 10**6) -> str:
    """The timeline in unit_time, a rank a line. What is wider than `columns` goes on below."""
    spans, stages = simulate(schedule), stages_of(schedule)
    names = {span: label(span.action, stages[span.rank]) for span in spans}
    width, length = 1 + max(map(len, names.values())), int(max(span.end for span in spans))
    lines = []
    for rank in range(len(schedule)):
        text = ("." + " " * (width - 1)) * length
        for span in (span for span in spans if span.rank == rank):
            start, end = (int(t) * width for t in (span.start, span.end))
            fill_ = "-" if span.end - span.start > 1 else " "
            text = text[:start] + names[span].ljust(end - start - 1, fill_) + " " + text[end:]
        lines.append(text)
    staves = -(-length // max(1, (columns - 8) // width))
    step = -(-length // staves) * width
    return "\n\n".join(
        "\n".join(f"rank {r} |{line[at : at + step]}".rstrip() for r, line in enumerate(lines))
        for at in range(0, width * length, step)
    )


# 3. From the lists to transfers, in an order that cannot deadlock.


class Transfer(NamedTuple):
    """F: the output of `stage` goes one stage up; B: the gradient of its input one stage down."""

    kind: str
    microbatch: int
    stage: int
    src: int
    dst: int


Program = list[Action | tuple[Transfer, ...]]  # a tuple is posted as one batch


def derive_programs(schedule: Schedule) -> list[Program]:
    """What each rank does, transfers included. All actions and transfers are put in one global
    order: by simulated time, a transfer at the end of the action that made it. Each rank's program
    is its part of that order, and both ends of a transfer post it there. So nothing can deadlock,
    even if a post were to block until the other end has posted too: the earliest event that is
    not done is at the head of every rank that takes part in it. (Posting each send and receive
    where one happens to need it does deadlock: `check_no_deadlock` shows it.)"""
    rank_of = {k: rank for rank, row in enumerate(stages_of(schedule)) for k in row}
    events = []  # (time, transfers first, position, ranks, event)
    for n, (rank, action, start, end) in enumerate(simulate(schedule)):
        events.append((start, 1, n, (rank,), action))
        dst = rank_of.get(consumer(action).stage) if action.kind != "W" else None
        if dst is not None and dst != rank:  # none beyond the ends; a hand-over on one rank is free
            events.append((end, 0, n, (rank, dst), Transfer(*action, rank, dst)))
    programs: list[Program] = [[] for _ in schedule]
    for *_, ranks, event in sorted(events):
        for rank in ranks:
            program = programs[rank]
            if isinstance(event, Action):
                program.append(event)
            elif program and not isinstance(program[-1], Action):
                program[-1] += (event,)  # no action between them: one batch
            else:
                program.append((event,))
    return programs


def receive_ahead(program: Program, rank: int) -> Program:
    """The same, with each receive one batch earlier than its turn: so what a rank will wait for
    arrives while it computes, and no message has to ask a busy rank whether it may come. For gloo,
    where nothing waits behind a receive but other receives from the same rank. Under NCCL all
    transfers of a group wait in one line, and two ranks that both receive early would each keep
    back what the other waits for."""
    ahead: Program = [()]
    last = 0  # where the batch before stands
    for step in program:
        if isinstance(step, Action):
            ahead.append(step)
        else:
            ahead[last] += tuple(t for t in step if t.dst == rank)
            last = len(ahead)
            ahead.append(tuple(t for t in step if t.src == rank))
    return [step for step in ahead if step]


def check_no_deadlock(programs: list[Program]) -> None:
    """Run the programs as the strictest network would: a batch holds its rank until each of its
    transfers has met its other end, and between two ranks transfers meet in the order posted, as
    with NCCL. Raises ValueError, with the cycle of who waits for whom, if they deadlock."""
    rest = [list(program) for program in programs]
    batch: list[list[Transfer]] = [[] for _ in programs]  # what a rank still waits for
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(rest):
            while program and not batch[rank]:
                step = program.pop(0)
                batch[rank] = [] if isinstance(step, Action) else list(step)
                moved = True
        for lane in {t[3:] for transfers in batch for t in transfers}:
            ends = [next((t for t in batch[rank] if t[3:] == lane), None) for rank in lane]
            if None not in ends:
                if ends[0] != ends[1]:
                    raise ValueError(f"ranks {lane} post in different orders: {ends}")
                for rank in lane:
                    batch[rank].remove(ends[0])
                moved = True
    if any(batch):

        def other(rank: int) -> int:  # itself, if it is through
            return next((t.dst if t.src == rank else t.src for t in batch[rank]), rank)

        lines = []
        for rank in cycle(next(r for r, transfers in enumerate(batch) if transfers), other):
            t = next(iter(batch[rank]), None)
            what = t and f"{'to take' if t.src == rank else 'to send'} {t.kind}{t.microbatch}"
            lines.append(f"rank {rank} waits for rank {other(rank)} ({what})" if t else
                         f"rank {rank} is through")  # fmt: skip
        raise ValueError("deadlock: " + "; ".join(lines))


# 4. From the whole model to the stages of a rank.


def split_layers(n_layer: int, n_stages: int, first: float = 0, last: float = 0) -> list[range]:
    """Which blocks each stage gets, at least one, so that the slowest has as little as can be.
    first, last: what embedding and head cost, in blocks. Raises ValueError for too many stages."""
    if n_stages > n_layer:
        raise ValueError(f"{n_stages} stages for {n_layer} blocks: lower --pp or --chunks, or "
                         "raise --n-layer")  # fmt: skip
    cost, ends = [1.0] * n_stages, [1] * n_stages
    cost[0] += first
    cost[-1] += last
    for _ in range(n_layer - n_stages):
        least = cost.index(min(cost))
        cost[least] += 1
        ends[least] += 1
    ends = [0, *itertools.accumulate(ends)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


def take_stages(
    model: nn.Module, mine: Sequence[int], split: list[range],
    first: tuple[str, ...] = ("wte", "wpe", "drop"), blocks: str = "h",
    last: tuple[str, ...] = ("ln_f", "lm_head"),
) -> nn.Module:  # fmt: skip
    """Cut `model` down, in place, to the stages `mine`; split: blocks by stage. `first` and `last`
    name children of the model for the first and the last stage; `blocks` names its nn.ModuleDict or
    nn.ModuleList, whose keys are the block numbers. Children on other stages become nn.Identity, or
    are left out, so that the model's own forward runs what is here. It must call these children in
    order and iterate over `blocks`: anything else it computes runs on every stage, enumerate()
    starts at 0 on each, and an index may fail. Raises ValueError for a parameter outside of these
    children, and for a block on no stage."""
    container = getattr(model, blocks)
    others = [n for n, _ in model.named_parameters()
              if n.split(".")[0] not in (*first, blocks, *last)]  # fmt: skip
    if others:
        raise ValueError(f"{', '.join(others)} of {type(model).__name__} would be on every stage: "
                         "name their child in `first` or `last`")  # fmt: skip
    numbers = {str(i) for stage in split for i in stage}
    kept = {str(i) for k in mine for i in split[k]}
    if not kept <= {*container._modules} <= numbers:
        raise ValueError(f"{blocks} has blocks {', '.join(container._modules)}, and split {split}: "
                         "names must be numbers, each of them in one stage of split")  # fmt: skip
    elsewhere = (() if 0 in mine else first) + (() if len(split) - 1 in mine else last)
    for name in elsewhere:
        setattr(model, name, nn.Identity())
    part = copy.copy(container)
    part._modules = {n: block for n, block in container._modules.items() if n in kept}
    setattr(model, blocks, part)
    return model


def chunks_of(model: nn.Module, mine: Sequence[int], split: list[range], **names) -> dict:
    """{stage: a module that runs it}. They share their layers with `model`, which holds all stages
    of a rank: parameters, hooks and what replaced them are the model's own. So is `training`, and
    model.eval() reaches them."""

    class Chunk(type(model)):
        @property
        def training(self) -> bool:
            return model.training

        @training.setter
        def training(self, mode: bool) -> None:
            model.training = mode

    chunks = {}
    for k in mine:
        chunks[k] = copy.copy(model)
        chunks[k].__class__ = Chunk
        chunks[k]._modules = dict(model._modules)
        take_stages(chunks[k], [k], split, **names)
    return chunks


# 5. Split backward: B computes the input gradients of the linear layers and puts the rest of their
# work, the weight gradients, into a queue that W empties. Embeddings, norms and biases finish in B,
# because their gradients are cheap.


class DeferredLinear(torch.autograd.Function):
    """F.linear whose backward does not compute the gradient of layer.weight: it appends that work
    to layer.weight_grad_queue, as a function without arguments.

    The weight is not an input of this Function. Otherwise autograd would call the weight's hooks in
    B, before its gradient exists. `layer` is an nn.Linear or a layer as in defer_weight_gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)  # before gather_input, so that a shard of the sequence is saved
        return F.linear(gather_input(layer, x), layer.weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), layer = ctx.saved_tensors, ctx.layer
        # Detached: the queue must not keep the graph that computed x. Under autocast the gradient
        # has a lower dtype than x and the weight.
        work = functools.partial(add_weight_gradient, layer, x.detach().to(grad.dtype), grad)
        layer.weight_grad_queue.append(work)
        d_x = grad @ layer.weight.to(grad.dtype)
        if hasattr(layer, "reduce_input_gradient"):
            d_x = layer.reduce_input_gradient(d_x)
        d_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return d_x, d_bias, None


def gather_input(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.gather_input(x) if hasattr(layer, "gather_input") else x


def add_weight_gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """The work of W. x: the saved input. grad: the gradient of the output. backward() is called on
    the weight, because assigning to .grad would not call the hooks of DDP and ZeRO."""
    x = gather_input(layer, x)
    layer.weight.backward(grad.flatten(0, -2).T @ x.flatten(0, -2))


def deferred_multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """x @ layer.weight.T + bias. Not deferred if x or the weight needs no gradient."""
    if x.requires_grad and layer.weight.requires_grad:
        return DeferredLinear.apply(x, bias, layer)
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight, bias)
    return type(layer).multiply(layer, x, bias)


def deferred_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return deferred_multiply(linear, x, linear.bias)


def defer_weight_gradients(model: nn.Module, queue: list) -> None:
    """From now on, backward appends the weight gradients of the model's linear layers to `queue`,
    as functions to be called.

    This replaces the forward of each nn.Linear. A layer of another class takes part if it has a
    method multiply(x, bias) -> x @ weight.T + bias, which is replaced. Such a layer may communicate
    its input: gather_input(x) returns the input of the matmul, and reduce_input_gradient(d_x)
    returns the gradient of x from that of the gathered input. tensor_parallel.py has two such
    layers. A forward or multiply that was replaced on the instance before is left alone. Calling
    this a second time replaces the queue."""
    for module in model.modules():
        if "weight_grad_queue" in vars(module):
            module.weight_grad_queue = queue
        elif type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = functools.partial(deferred_forward, module)
            module.weight_grad_queue = queue
        elif hasattr(module, "multiply") and "multiply" not in vars(module):
            module.multiply = functools.partial(deferred_multiply, module)
            module.weight_grad_queue = queue


# 6. The executor: one for every schedule. Measured (2 ranks x 1 thread, 2 cores, gloo, h 256 and
# 768, 8 microbatches): of 1F1B's step interleaved takes 0.94 to 0.99, zb-h1 0.94 to 1.03, zb-v 0.91
# to 0.96. W reads inputs and gradients that have left the cache: part of the gain goes there.


class Pipeline:
    """Runs schedules. chunks: this rank's pieces of the model, by stage, of n_stages in all. dtype,
    device: of what crosses a boundary. split_backward: a backward is B and W. watch(action) -> a
    context around its computation, for who wants to look. program: this rank's; one tensor is
    exchanged with each of its peers at construction, since NCCL connects two ranks at their first
    transfer, which can hang in the middle of a schedule (pytorch#160210)."""

    def __init__(
        self, chunks: dict[int, nn.Module], n_stages: int, group: dist.ProcessGroup,
        dtype: torch.dtype, device: torch.device | str, split_backward: bool = False,
        program: Program = (),
    ):  # fmt: skip
        self.chunks, self.last, self.group = chunks, n_stages - 1, group
        self.dtype, self.device, self.split_backward = dtype, device, split_backward
        # See receive_ahead. NCCL takes the programs as they are.
        self.is_gloo = group.size() > 1 and dist.get_backend(group) == "gloo"
        self.watch: Callable = lambda action: contextlib.nullcontext()
        self.running = False  # still True if an exception ended the last run
        self.queue: list[Callable] = []  # what the B that runs now leaves to its W
        for chunk in chunks.values() if split_backward else ():
            defer_weight_gradients(chunk, self.queue)
        if group.size() > 1:
            self._connect(program)

    def _connect(self, program: Program) -> None:
        """Every rank visits its pairs in the same global order, so this cannot deadlock. NCCL
        requires all ranks of the group in its first call, hence the all-reduce."""
        zero, rank = torch.zeros(1, device=self.device), self.group.rank()
        dist.all_reduce(zero, group=self.group)  # payload: 1, once
        transfers = [t for step in program if not isinstance(step, Action) for t in step]
        for pair in sorted({tuple(sorted(t[3:])) for t in transfers}):
            peer = dict(group=self.group, group_peer=sum(pair) - rank)
            calls = [(dist.isend, zero), (dist.irecv, torch.empty_like(zero))]
            handles = dist.batch_isend_irecv([dist.P2POp(*call, **peer) for call in calls])
            for handle in handles:  # payload: 1 each way, once
                handle.wait()

    def accumulations(self, actions: list[Action]) -> dict[nn.Parameter, int]:
        """How often each parameter's gradient is added to in a step, for DDP and ZeRO: in every B
        of a stage that holds it, or in every W, if its linear defers. A tied matrix may have both,
        or be held by two stages. Frozen parameters are left out."""
        kinds: dict[nn.Parameter, set] = {}
        for k, chunk in self.chunks.items():
            for module in chunk.modules():
                defers = getattr(module, "weight_grad_queue", None) is not None
                for name, p in module.named_parameters(recurse=False):
                    kind = "W" if defers and name == "weight" else "B"
                    if p.requires_grad:
                        kinds.setdefault(p, set()).add((kind, k))
        count = collections.Counter((action.kind, action.stage) for action in actions)
        return {p: sum(count[kind] for kind in kinds[p]) for p in kinds}

    def run(
        self, program: Program, inputs: Sequence[Tensor], loss_of: Callable,
        shape: tuple[int, ...], before: Callable[[int], None] = lambda microbatch: None,
    ) -> Tensor:  # fmt: skip
        """One step of this rank's program. inputs: what the first stage reads, by microbatch.
        loss_of(output of the last stage, microbatch) -> scalar. shape: of what crosses a boundary,
        (b, s, h). before(microbatch) is called ahead of each forward. Returns the sum of the
        losses, which is 0 where the last stage is not. Gradients are left in `.grad`,
        accumulated. With p > 1, raises RuntimeError if an exception interrupted the last run.
        Raises ValueError, before anything is sent, if the program does not fit the chunks, the
        inputs, the grad mode or `split_backward`; and during the run, if a stage returns another
        shape or dtype. Only the ranks that see the mistake raise; others wait for the timeout."""
        if self.running and self.group.size() > 1:
            raise RuntimeError(
                "the last pipeline run was interrupted, and its messages may still be in flight "
                "between the stages: restart all ranks and resume from the newest checkpoint"
            )
        self._check([step for step in program if isinstance(step, Action)], len(inputs))
        self.running = True
        self.queue.clear()
        self.inputs, self.loss_of, self.shape, self.before = inputs, loss_of, tuple(shape), before
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=dtype, device=self.device)
        self.inbox: dict = {}  # F or B to run -> (tensor, handle or None)
        self.outbox: dict = {}  # F or B that made it -> tensor
        self.sending: dict = {}  # (kind, stage) -> (tensor, handle) of what it sent last
        self.in_flight: dict = {}  # (microbatch, stage) -> (input, root of the graph)
        self.pending: dict = {}  # (microbatch, stage) -> its queue
        work = {"F": self._forward, "B": self._backward, "W": self._weights}
        if self.is_gloo:
            program = receive_ahead(program, self.group.rank())
        for step in program:
            if isinstance(step, Action):
                work[step.kind](step)
            else:
                self._post(step)
        for _, handle in self.sending.values():
            handle.wait()
        left = (self.inbox, self.outbox, self.in_flight, self.pending)
        assert not any(left), "the program left work undone"
        self.running = False
        return self.loss

    def _check(self, actions: list[Action], n_inputs: int) -> None:
        kinds, stages = {action.kind for action in actions}, {action.stage for action in actions}
        m, wrong = 1 + max(action.microbatch for action in actions), None
        if stages != {*self.chunks}:
            wrong = f"is of stages {sorted(stages)}, and the chunks are of {sorted(self.chunks)}"
        elif 0 in stages and n_inputs != m:
            wrong = f"has {m} microbatches, and there are {n_inputs} inputs"
        elif "B" in kinds and not torch.is_grad_enabled():
            wrong = "has B actions, and gradients are disabled: enable them, or use forward_only()"
        elif "B" not in kinds and torch.is_grad_enabled():
            wrong = "has no B actions: run it under torch.no_grad()"
        elif "B" in kinds and ("W" in kinds) != self.split_backward:
            wrong = (f"has {'W' if 'W' in kinds else 'no W'} actions, and the Pipeline was made "
                     f"with split_backward={self.split_backward}: pass "
                     "split_backward=splits_backward(actions)")  # fmt: skip
        if wrong:
            raise ValueError(f"the program {wrong}")

    def _post(self, batch: tuple[Transfer, ...]) -> None:
        """Start these transfers. Waited for is only what the same stage sent before, so that its
        tensor is let go: that is earlier in the global order, so it cannot close a cycle. Under
        NCCL it is the compute stream that waits, and always for a whole batch, here and in _take.
        Simulated (tools/waits.py), waiting for sends adds at most 0.001 to the bubble, and waiting
        for whole batches up to 0.03 (zb-h1, times varied by 20 %)."""
        operations, places = [], []
        for t in batch:
            made = Action(*t[:3])
            if t.src == self.group.rank():
                call, peer, tensor = dist.isend, t.dst, self.outbox.pop(made)
                box, key = self.sending, (t.kind, t.stage)
                if key in self.sending:
                    _, handle = self.sending.pop(key)
                    handle.wait()
            else:
                call, peer = dist.irecv, t.src
                tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                box, key = self.inbox, consumer(made)
            places.append((box, key, tensor))
            operations.append(dist.P2POp(call, tensor, group=self.group, group_peer=peer))
        handles = dist.batch_isend_irecv(operations)  # payload: b s h each
        if len(handles) < len(operations):  # NCCL has one handle for the batch
            handles = handles[:1] * len(operations)
        for (box, key, tensor), handle in zip(places, handles, strict=True):
            box[key] = (tensor, handle)

    def _take(self, action: Action) -> Tensor:
        tensor, handle = self.inbox.pop(action)
        if handle is not None:
            handle.wait()
        return tensor

    def _hand_over(self, made: Action, tensor: Tensor) -> None:
        """To the next stage: at once if this rank holds it too, else by the coming _post."""
        of = (getattr(tensor, "shape", type(tensor)), getattr(tensor, "dtype", None))
        if of != (self.shape, self.dtype):
            raise ValueError(
                f"{made.kind}{made.microbatch} of stage {made.stage} made {of}, not "
                f"{self.shape, self.dtype}: a stage must return one tensor, of run()'s shape and "
                "the Pipeline's dtype, that depends on its input"
            )
        if consumer(made).stage in self.chunks:
            self.inbox[consumer(made)] = (tensor.detach(), None)
        else:
            self.outbox[made] = tensor.detach().contiguous()

    def _forward(self, action: Action) -> None:
        _, i, k = action
        x = self.inputs[i] if k == 0 else self._take(action)
        with self.watch(action):
            if k > 0 and torch.is_grad_enabled():
                x.requires_grad_()
            self.before(i)
            y = self.chunks[k](x)
            if k == self.last:
                y = self.loss_of(y, i)
                self.loss += y.detach()
        if k < self.last:
            self._hand_over(action, y)
        if torch.is_grad_enabled():  # the graph is kept, but not its output: that is the next's
            root = None  # a frozen first stage has nothing to do in backward
            if k == self.last:
                root = y
            elif y.requires_grad:
                root = torch.autograd.graph.get_gradient_edge(y)
            self.in_flight[i, k] = x, root

    def _backward(self, action: Action) -> None:
        _, i, k = action
        x, root = self.in_flight.pop((i, k))
        gradient = self._take(action) if k < self.last else None
        with self.watch(action):
            if root is not None:
                torch.autograd.backward(root, gradient)
        if self.queue:
            self.pending[i, k] = self.queue[:]
            self.queue.clear()
        if k > 0:
            self._hand_over(action, x.grad)

    def _weights(self, action: Action) -> None:
        with self.watch(action):
            queue = self.pending.pop(action[1:], [])
            while queue:
                queue.pop(0)()  # and what it held is free


# --- cost -----------------------------------------------------------------------------------------


def predicted_bubble(name: str, p: int, m: int, v: int = 1) -> float:
    """Idle over ideal time of a step, if F = B = W; for interleaved and zb-h1 with m >= p, for zb-v
    with m >= 2p-1. 2104.04473, section 2.2; 2401.10241, section 2.3, where ZB-H1 has a third of
    1F1B's; ours of zb-v is what is left when all ranks wait for the last one's end."""
    return (p - 1) / m / {"gpipe": 1, "1f1b": 1, "interleaved": v, "zb-h1": 3, "zb-v": 6}[name]


def predicted_held(name: str, p: int, m: int, v: int, rank: int) -> int:
    """The most that a rank holds, in chunks of microbatches that are forwarded and not through with
    their last action; for zb-v with m >= 2p-1."""
    if name == "interleaved":
        turn = -(-m // max(1, m // p))
        return min(v * m, (v - 1) * turn + (p - 1 - rank) * min(v, 2) + 1)
    return {"gpipe": m, "1f1b": min(m, p - rank), "zb-h1": min(m, p), "zb-v": 2 * p}[name]


def predicted_sends(
    stages: list[list[int]], rank: int, m: int, b: int, s: int, h: int
) -> tuple[int, int]:
    """(calls, payload in elements) that `rank` sends in a step: outputs up, gradients down, unless
    it holds the other stage too."""
    last = max(map(max, stages))
    ways = [k + up for k in stages[rank] for up in (1, -1)]
    calls = m * sum(0 <= k <= last and k not in stages[rank] for k in ways)
    return calls, calls * b * s * h


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    steps, b = 3, 2
    with measure.Report("pipeline.py") as report:
        group, p, rank = report.group, report.group.size(), report.group.rank()
        m = 2 * p + 1
        config = gpt.GPTConfig(2 * p + 1, 2, 32, 251, 32)  # an uneven cut
        tokens = data.example()

        def train(schedule: Schedule | None):
            """schedule None: one process, the whole model, the whole batch at once."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            if schedule:
                stages = stages_of(schedule)
                n = sum(map(len, stages))
                split = split_layers(config.n_layer, n)
                take_stages(model, stages[rank], split)
                chunks = chunks_of(model, stages[rank], split)
                split_backward = splits_backward(schedule[rank])
                pipe = Pipeline(chunks, n, group, torch.float64, "cpu", split_backward)
                program = derive_programs(schedule)[rank]
                holders = [r for r in range(p) if {0, n - 1} & {*stages[r]}]
                tied_group = dist.new_group(holders)
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
            for step in range(steps):
                optimizer.zero_grad()
                x, y = data.batch(tokens, step, range(m * b), config.seq_len, seed=0)
                if schedule:

                    def loss_of(output: Tensor, microbatch: int, y=y) -> Tensor:
                        return gpt.cross_entropy(output, y.chunk(m)[microbatch]) / y.numel()

                    shape = (b, config.seq_len, config.n_embd)
                    losses.append(pipe.run(program, x.chunk(m), loss_of, shape))
                    if rank in holders:
                        held = [q.grad for q in model.parameters() if hasattr(q, "tied_name")]
                        all_reduce_tied(held, tied_group)
                else:
                    loss = gpt.cross_entropy(model(x), y) / y.numel()
                    loss.backward()
                    losses.append(loss.detach())
                optimizer.step()
            return losses, dict(gpt.named_parameters(model))

        losses, whole = train(None)
        for name, function in SCHEDULES.items():
            schedule = function(p, m)
            check(schedule, m)
            stages = stages_of(schedule)
            v = len(stages[rank])
            with measure.Collectives({"pp": group}) as seen:
                mine, held = train(schedule)
            for loss in mine:
                dist.all_reduce(loss)  # the last stage has it, the others 0
            report.losses(name, mine, losses)
            expected = {n: whole[n] for n in held}
            gradients, expected_gradients = (
                {n: q.grad for n, q in named.items()} for named in (held, expected)
            )
            report.close(f"{name} max |d gradient|", gradients, expected_gradients)
            report.close(f"{name} max |d parameter|", held, expected)
            calls, elements = predicted_sends(stages, rank, m, b, config.seq_len, config.n_embd)
            sent = tuple(seen.total("pp", "send"))
            report.equal(f"{name} sends, elements", (steps * calls, steps * elements), sent)
            last = "W" if splits_backward(schedule[rank]) else "B"
            change = [(kind == "F") - (kind == last) for kind, *_ in schedule[rank]]
            most = max(itertools.accumulate(change))
            report.equal(f"{name} chunks held", predicted_held(name, p, m, v, rank), most)
            simulated = round(bubble(simulate(schedule)), 9)
            predicted = round(predicted_bubble(name, p, m, v), 9)
            report.equal(f"{name} bubble, simulated", predicted, simulated)


if __name__ == "__main__":
    main()
