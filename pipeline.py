"""Pipeline parallelism: consecutive blocks on consecutive ranks, microbatches flowing through.

1F1B on 3 ranks, 4 microbatches (F forward, B backward, which takes twice as long):

    >>> print(draw(one_f_one_b(3, 4)))
    rank 0 |F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
    rank 1 |.  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
    rank 2 |.  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .

A schedule is data: for each rank a list of actions, from a pure function of (p, m). The picture
above, the bubble, the check and the execution all read that list; to try a schedule, write a
function that returns lists. Nothing else knows its name: transfers between ranks are derived.

    schedule   bubble     microbatches in flight on rank r   p2p per rank and step
    gpipe      (p-1)/m    m                                  [b,s,h] to and from each neighbour,
    1f1b       (p-1)/m    min(m, p-r)                        m times forward, m times backward

Bubble = idle time over the ideal time of a step; 1F1B does not shrink it, it bounds the memory, so
that m can grow. A pipeline of one rank is gradient accumulation (F0 B0 F1 B1 ...): same executor.

    torchrun --standalone --nproc-per-node 2 pipeline.py

Huang et al. 2018, GPipe (arXiv 1811.06965); Narayanan et al. 2021, PipeDream-flush and 1F1B
(arXiv 2104.04473), section 2.2.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# Point to point, derived from the schedule, and one all-reduce where the embedding is tied.


def all_reduce_tied(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """The tied embedding is held by the first stage (lookup) and the last (head), and each has the
    gradient of its own use. `group`: these two ranks. Call when the gradients have met over dp."""
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)  # payload: v h, or the shard of it


# --- strategy -------------------------------------------------------------------------------------
# Schedules: pure functions.


class Action(NamedTuple):
    """F: forward, B: backward, of one microbatch through one chunk (a rank may hold several
    pieces of the model; `chunk` is its own number for them)."""

    kind: str
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}" + (f".{self.chunk}" if self.chunk else "")


Schedule = list[list[Action]]  # by rank


def gpipe(p: int, m: int) -> Schedule:
    """All forwards, then all backwards."""
    forwards, backwards = [Action("F", i) for i in range(m)], [Action("B", i) for i in range(m)]
    return [forwards + backwards for _ in range(p)]


def one_f_one_b(p: int, m: int) -> Schedule:
    """Warm up with as many forwards as there are ranks behind, then one forward, one backward."""
    schedule = []
    for rank in range(p):
        warmup = min(m, p - 1 - rank)
        actions = [Action("F", i) for i in range(warmup)]
        for i in range(m - warmup):  # steady
            actions += [Action("F", warmup + i), Action("B", i)]
        actions += [Action("B", i) for i in range(m - warmup, m)]  # cooldown
        schedule.append(actions)
    return schedule


def forward_only(p: int, m: int) -> Schedule:
    """For validation and sampling."""
    return [[Action("F", i) for i in range(m)] for _ in range(p)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


def looped_stages(p: int, v: int = 1) -> list[list[int]]:
    """[rank][chunk] -> stage: which piece of the model a rank's chunk is, along the model."""
    return [[chunk * p + rank for chunk in range(v)] for rank in range(p)]


# From the lists to time: who waits for whom.


class Span(NamedTuple):
    rank: int
    action: Action
    start: float
    end: float


UNIT = {"F": 1.0, "B": 2.0}  # a backward has twice a forward's matmuls


def simulate(
    schedule: Schedule, stages: list[list[int]] | None = None, cost: dict[str, float] = UNIT
) -> list[Span]:
    """When every action runs if transfers take no time, in order of start. F of stage k needs F of
    stage k-1; B of stage k needs B of stage k+1, and on the last its own F. Raises ValueError for a
    list that is incomplete, or whose actions wait for each other in a circle."""
    stages = stages or looped_stages(len(schedule))
    _check_complete(schedule, stages)
    last = max(max(row) for row in stages)
    done: dict[tuple[str, int, int], float] = {}  # (kind, microbatch, stage) -> when
    position, free, spans = [0] * len(schedule), [0.0] * len(schedule), []

    def needs(rank: int) -> tuple[str, int, int] | None:
        kind, microbatch, chunk = schedule[rank][position[rank]]
        k = stages[rank][chunk]
        if kind == "F":
            return ("F", microbatch, k - 1) if k > 0 else None
        return ("B", microbatch, k + 1) if k < last else ("F", microbatch, k)

    while waiting := [r for r in range(len(schedule)) if position[r] < len(schedule[r])]:
        ready = [
            (max(free[r], done.get(needs(r), 0.0)), r)
            for r in waiting
            if needs(r) is None or needs(r) in done
        ]
        if not ready:
            blocked = "; ".join(
                f"rank {r} at {schedule[r][position[r]]} waits for {needs(r)[0]}{needs(r)[1]} "
                f"of stage {needs(r)[2]}"
                for r in waiting
            )
            raise ValueError(f"the schedule cannot run: {blocked}")
        start, r = min(ready)
        action = schedule[r][position[r]]
        free[r] = start + cost[action.kind]
        done[action.kind, action.microbatch, stages[r][action.chunk]] = free[r]
        spans.append(Span(r, action, start, free[r]))
        position[r] += 1
    return spans


def _check_complete(schedule: Schedule, stages: list[list[int]]) -> None:
    """Every chunk runs F of the same microbatches, once each; B of all of them or none; after F."""
    wanted = {a.microbatch for a in schedule[0]}
    backward = {"F", "B"} if any(a.kind == "B" for a in schedule[0]) else {"F"}
    for rank, actions in enumerate(schedule):
        chunks = range(len(stages[rank]))
        whole = {Action(*action) for action in itertools.product(backward, wanted, chunks)}
        for action in actions:
            if action not in whole:
                raise ValueError(f"rank {rank}: {action} is unknown, or there twice")
            if action.kind == "B" and action._replace(kind="F") in whole:
                raise ValueError(f"rank {rank}: {action} comes before its forward")
            whole.remove(action)
        if whole:
            raise ValueError(f"rank {rank}: {', '.join(map(str, sorted(whole)))} is missing")


def draw(schedule: Schedule, stages: list[list[int]] | None = None) -> str:
    """The timeline, a rank a line; a forward is one column wide, a backward two."""
    spans = simulate(schedule, stages)
    width = 1 + max(len(str(span.action)) for span in spans)
    columns = int(max(span.end for span in spans))
    lines = []
    for rank in range(len(schedule)):
        cells = [".".ljust(width)] * columns
        for span in (s for s in spans if s.rank == rank):
            length = int(span.end - span.start)
            text = str(span.action).ljust(width * length - 1, "-" if length > 1 else " ") + " "
            cells[int(span.start) : int(span.end)] = [text] + [""] * (length - 1)
        lines.append(f"rank {rank} |" + "".join(cells).rstrip())
    return "\n".join(lines)


# From the lists to transfers, in an order that cannot deadlock.


class Transfer(NamedTuple):
    """F: the output of `stage` goes one stage up; B: the gradient of its input one stage down."""

    kind: str
    microbatch: int
    stage: int
    src: int
    dst: int


Program = list[Action | tuple[Transfer, ...]]  # a tuple is posted as one batch


def derive_programs(schedule: Schedule, stages: list[list[int]] | None = None) -> list[Program]:
    """What each rank does, transfers included. All actions and transfers are put in one global
    order: by simulated time, a transfer at the end of the action that made it. Each rank's program
    is its part of that order, and both ends of a transfer post it there. So nothing can deadlock,
    even if a post were to block until the other end has posted too: the earliest event that is
    not done is at the head of every rank that takes part in it. (Posting each send and receive
    where one happens to need it does deadlock: `rendezvous` shows it.)"""
    stages = stages or looped_stages(len(schedule))
    holder = {k: rank for rank, row in enumerate(stages) for k in row}
    events = []  # (time, transfers first, position, ranks, event)
    for n, (rank, action, start, end) in enumerate(simulate(schedule, stages)):
        events.append((start, 1, n, (rank,), action))
        k = stages[rank][action.chunk]
        dst = holder.get(k + 1 if action.kind == "F" else k - 1)
        if dst is not None and dst != rank:  # none beyond the ends; a hand-over on one rank is free
            transfer = Transfer(action.kind, action.microbatch, k, rank, dst)
            events.append((end, 0, n, (rank, dst), transfer))
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


def rendezvous(programs: list[Program]) -> None:
    """Run the programs as the strictest network would: a batch holds its rank until each of its
    transfers has met its other end, and between two ranks transfers meet in the order posted, as
    with NCCL. Raises ValueError, with who waits for whom, if they deadlock."""
    position = [0] * len(programs)
    open_: list[list[Transfer]] = [[] for _ in programs]  # what the current batch still waits for

    def advance(rank: int) -> bool:
        moved = False
        while not open_[rank] and position[rank] < len(programs[rank]):
            step = programs[rank][position[rank]]
            position[rank] += 1
            open_[rank] = [] if isinstance(step, Action) else list(step)
            moved = True
        return moved

    moved = True
    while moved:
        moved = any([advance(rank) for rank in range(len(programs))])
        for rank, batch in enumerate(open_):
            for transfer in list(batch):
                other = transfer.dst if transfer.src == rank else transfer.src
                lane = (transfer.src, transfer.dst)
                mine = next(t for t in batch if (t.src, t.dst) == lane)
                theirs = next((t for t in open_[other] if (t.src, t.dst) == lane), None)
                if theirs is not None and mine != theirs:
                    raise ValueError(f"ranks {lane} post in different orders: {mine}, {theirs}")
                if theirs == transfer:
                    batch.remove(transfer)
                    open_[other].remove(transfer)
                    moved = True
    if any(open_):
        stuck = "; ".join(
            f"rank {rank} waits for rank {t.dst if t.src == rank else t.src} "
            f"({'to take' if t.src == rank else 'to send'} {t.kind}{t.microbatch})"
            for rank, batch in enumerate(open_)
            for t in batch[:1]
        )
        raise ValueError(f"deadlock: {stuck}")


# From the whole model to a stage of it.


def split_layers(n_layer: int, n_stages: int) -> list[range]:
    """Which blocks each stage gets: as even as it goes, earlier stages one more (the last has the
    head to compute as well)."""
    if n_stages > n_layer:
        raise ValueError(f"{n_stages} stages for {n_layer} blocks: lower --pp or raise --n-layer")
    sizes = [n_layer // n_stages + (k < n_layer % n_stages) for k in range(n_stages)]
    return [range(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(n_stages)]


def take_stage(
    model: nn.Module, stage: int, n_stages: int, first: tuple[str, ...] = ("wte", "wpe", "drop"),
    blocks: str = "h", last: tuple[str, ...] = ("ln_f", "lm_head"),
) -> nn.Module:  # fmt: skip
    """Cut `model` down, in place, to one stage. The layers `first` stay on stage 0, the layers
    `last` on the last one; `blocks` names an nn.ModuleDict, whose blocks keep their names. What
    another stage holds becomes nn.Identity, so the model's own forward runs the stage."""
    for name in (first if stage > 0 else ()) + (last if stage < n_stages - 1 else ()):
        setattr(model, name, nn.Identity())
    all_blocks = model.get_submodule(blocks)
    mine = split_layers(len(all_blocks), n_stages)[stage]
    for i, name in enumerate(list(all_blocks)):
        if i not in mine:
            del all_blocks[name]
    return model


# The executor: one for every schedule.


class Pipeline:
    """Runs programs. chunks: this rank's pieces of the model, by chunk. dtype, device: of what
    crosses a boundary. The group's first call must not be a transfer that some ranks skip (NCCL
    would wait for all of them), hence the all-reduce here."""

    def __init__(
        self, chunks: list[nn.Module], group: dist.ProcessGroup, dtype: torch.dtype,
        device: torch.device | str, stages: list[list[int]] | None = None,
    ):  # fmt: skip
        self.chunks, self.group = chunks, group
        self.dtype, self.device = dtype, device
        stages = stages or looped_stages(group.size())
        self.stages = stages[group.rank()]
        self.last = max(max(row) for row in stages)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # payload: 1, once

    def run(
        self, program: Program, inputs: Sequence[Tensor], loss_of: Callable,
        shape: tuple[int, ...], before: Callable[[int], None] = lambda microbatch: None,
    ) -> Tensor:  # fmt: skip
        """One step of this rank's program. inputs: what the first stage reads, by microbatch.
        loss_of(output of the last stage, microbatch) -> scalar. shape: of what crosses a boundary,
        (b, s, h). before(microbatch) is called ahead of each forward. Returns the sum of the
        losses, which is 0 where the last stage is not. Gradients are left in `.grad`,
        accumulated."""
        self.inputs, self.loss_of, self.shape, self.before = inputs, loss_of, shape, before
        dtype = torch.promote_types(self.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=dtype, device=self.device)
        self.inbox: dict = {}  # (kind, microbatch, stage) -> (tensor, handle or None)
        self.outbox: dict = {}  # (kind, microbatch, stage that made it) -> tensor
        self.sending: dict = {}  # the same, once posted -> (tensor, handle)
        self.gradient_sent: dict = {}  # stage -> the microbatch whose gradient it sent last
        self.in_flight: dict = {}  # (microbatch, chunk) -> (input, output) with its graph
        for step in program:
            if isinstance(step, Action):
                (self._forward if step.kind == "F" else self._backward)(*step[1:])
            else:
                self._post(step)
        for _, handle in self.sending.values():
            handle.wait()
        assert not (self.inbox or self.outbox or self.in_flight), "the program left work undone"
        return self.loss

    def _post(self, batch: tuple[Transfer, ...]) -> None:
        """Start these transfers; none is waited for here."""
        operations, places = [], []
        for t in batch:
            up = 1 if t.kind == "F" else -1
            if t.src == self.group.rank():
                call, peer = dist.isend, t.dst
                tensor = self.outbox.pop((t.kind, t.microbatch, t.stage))
                places.append((self.sending, (t.kind, t.microbatch, t.stage), tensor))
            else:
                call, peer = dist.irecv, t.src
                tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                places.append((self.inbox, (t.kind, t.microbatch, t.stage + up), tensor))
            operations.append(dist.P2POp(call, tensor, group=self.group, group_peer=peer))
        handles = dist.batch_isend_irecv(operations)  # payload: b s h each
        if len(handles) < len(operations):  # NCCL has one handle for the batch
            handles = handles[:1] * len(operations)
        for (box, key, tensor), handle in zip(places, handles, strict=True):
            box[key] = (tensor, handle)

    def _take(self, *key) -> Tensor:
        tensor, handle = self.inbox.pop(key)
        if handle is not None:
            handle.wait()
        return tensor

    def _hand_over(self, kind: str, microbatch: int, stage: int, tensor: Tensor) -> None:
        """To the next stage: at once if this rank holds it too, else by the coming _post."""
        to = stage + 1 if kind == "F" else stage - 1
        if to in self.stages:
            self.inbox[kind, microbatch, to] = (tensor, None)
        else:
            self.outbox[kind, microbatch, stage] = tensor.contiguous()

    def _settle(self, *key) -> None:
        """Wait for a send, so that its tensor can go."""
        if key in self.sending:
            self.sending.pop(key)[1].wait()

    def _forward(self, microbatch: int, chunk: int) -> None:
        k = self.stages[chunk]
        x = self.inputs[microbatch] if k == 0 else self._take("F", microbatch, k)
        if k > 0 and torch.is_grad_enabled():
            x.requires_grad_()
        self.before(microbatch)
        y = self.chunks[chunk](x)
        if k == self.last:
            y = self.loss_of(y, microbatch)
            self.loss += y.detach()
        else:
            self._hand_over("F", microbatch, k, y.detach())
        if torch.is_grad_enabled():
            self.in_flight[microbatch, chunk] = (x, y)

    def _backward(self, microbatch: int, chunk: int) -> None:
        k = self.stages[chunk]
        x, y = self.in_flight.pop((microbatch, chunk))
        gradient = None if k == self.last else self._take("B", microbatch, k)
        self._settle("F", microbatch, k)  # its gradient came back: it has arrived
        self._settle("B", self.gradient_sent.get(k), k)
        torch.autograd.backward(y, gradient)
        if k > 0:
            self._hand_over("B", microbatch, k, x.grad)
            self.gradient_sent[k] = microbatch


# --- cost -----------------------------------------------------------------------------------------


def peak_in_flight(actions: list[Action]) -> int:
    """The most microbatches forwarded and not yet backwarded, of one rank's list."""
    flying = peak = 0
    for action in actions:
        flying += 1 if action.kind == "F" else -1
        peak = max(peak, flying)
    return peak


def predicted_bubble(p: int, m: int) -> float:
    """Idle over ideal time of a step, for GPipe and 1F1B (2104.04473, section 2.2)."""
    return (p - 1) / m


def predicted_in_flight(schedule: str, p: int, m: int, rank: int) -> int:
    """peak_in_flight in closed form (2104.04473, section 2.2)."""
    return m if schedule == "gpipe" else min(m, p - rank)


def predicted_sends(p: int, m: int, rank: int, b: int, s: int, h: int) -> tuple[int, int]:
    """(calls, payload in elements) that `rank` sends in a step: outputs up, gradients down."""
    calls = m * ((rank < p - 1) + (rank > 0))
    return calls, calls * b * s * h


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    steps, m, b = 3, 5, 2
    with measure.Proof("pipeline.py") as proof:
        group, p, rank = proof.group, proof.group.size(), proof.group.rank()
        config = gpt.GPTConfig(p + 1, 2, 32, 251, 32)  # one block more than stages: an uneven cut
        tied_group = dist.new_group(sorted({0, p - 1}))
        tokens, _ = data.load(__file__, config.seq_len)

        def train(schedule: Callable | None):
            """schedule None: one process, the whole model, the whole batch at once."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            if schedule:
                take_stage(model, rank, p)
                pipe = Pipeline([model], group, torch.float64, "cpu")
                program = derive_programs(schedule(p, m))[rank]
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
            for step in range(steps):
                optimizer.zero_grad()
                x, y = data.batch(tokens, step, range(m * b), config.seq_len, seed=0)
                if schedule:

                    def loss_of(output: Tensor, microbatch: int, y=y) -> Tensor:
                        return gpt.cross_entropy(output, y.chunk(m)[microbatch]) / y.numel()

                    shape = (b, config.seq_len, config.n_embd)
                    losses.append(pipe.run(program, x.chunk(m), loss_of, shape))
                    if rank in (0, p - 1):
                        held = [q.grad for q in model.parameters() if hasattr(q, "tied_name")]
                        all_reduce_tied(held, tied_group)
                else:
                    loss = gpt.cross_entropy(model(x), y) / y.numel()
                    loss.backward()
                    losses.append(loss.detach())
                optimizer.step()
            return losses, dict(gpt.named_parameters(model))

        losses, whole = train(None)
        for name, schedule in SCHEDULES.items():
            with measure.Collectives({"pp": group}) as seen:
                mine, held = train(schedule)
            for loss in mine:
                dist.all_reduce(loss)  # the last stage has it, the others 0
            proof.losses(name, mine, losses)
            gradients = {n: q.grad for n, q in whole.items()}
            proof.close(f"{name} max |d gradient|", {n: q.grad for n, q in held.items()}, gradients)
            proof.close(f"{name} max |d parameter|", held, whole)
            calls, elements = predicted_sends(p, m, rank, b, config.seq_len, config.n_embd)
            sent = tuple(seen.total("pp", "send"))
            proof.equal(f"{name} sends, elements", (steps * calls, steps * elements), sent)
            peak = peak_in_flight(schedule(p, m)[rank])
            proof.equal(f"{name} in flight", predicted_in_flight(name, p, m, rank), peak)
            ends = max(span.end for span in simulate(schedule(p, m)))
            bubble = round(ends / (m * sum(UNIT.values())) - 1, 9)
            proof.equal(f"{name} bubble, simulated", round(predicted_bubble(p, m), 9), bubble)


if __name__ == "__main__":
    main()
