"""Runs one step of any rank of any run in one process, and counts its memory, traffic and FLOPs.

    make dry-run
    python -m tools.plan.dry_run --world-size 3072 --rank 1536 --model gpt-1t --tp 8 --pp 64 \\
        --global-batch-size 3072 --micro-batch-size 1
    python -m tools.plan.dry_run --world-size 8 --all-ranks --tp 2 --pp 2

All other options are those of train_3d.py.

The trainer is that of a real run, with its schedule, hooks and process groups. Its tensors are on
torch's meta device, so they have shapes but no values and take no memory. Its collectives use
torch's fake backend and return immediately.

For each rank it prints counted | predicted: bytes of memory, calls and bytes of each collective,
FLOPs of the matmuls. The predictions are the formulas `predicted_*` of the strategy files and of
tools/plan/cost.py. A line that differs is marked and makes the exit code 1. --all-ranks (up to 8
ranks) also checks that the collectives and transfers of all ranks match and cannot deadlock.

Activations are compared only for gpt.py with explicit attention: on the meta device,
scaled_dot_product_attention uses other kernels than on a CPU or GPU and saves other tensors.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import math
import resource
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ddp
import gpt
import measure
import options
import pipeline
import schedules
import tensor_parallel
import train_3d
import zero
from tools.plan import cost
from tools.verify import counting

AXES = ("tp", "cp", "pp", "dp", "gradient", "shard", "replica", "inside", "across", "tied")
Traffic = dict[tuple[str, str], tuple[int, int]]  # (group, operation) -> (calls, bytes)


class Transfer(NamedTuple):
    operation: str  # "send" or "recv"
    peer: int  # global rank
    payload: int


class Event(NamedTuple):
    """One collective or transfer in the queue of a rank."""

    group: str
    members: tuple[int, ...]  # global ranks of the group, or (sender, receiver) of a transfer
    operation: str
    payload: int
    dtype: torch.dtype


Queue = list[list[Event]]  # in order of launch; a batch of transfers is one entry


@dataclasses.dataclass
class Seen:
    """What was counted and predicted for one step of one rank. Pairs are (counted, predicted)."""

    trainer: train_3d.Trainer
    rank: int
    bytes: dict[str, tuple[int, int]]  # by kind
    activations: tuple[int, int]
    traffic: tuple[Traffic, Traffic]
    flops: tuple[int, int]
    transfers: list[Transfer]
    calls: dict[str, list[measure.Call]]  # by group
    members: dict[str, list[int]]  # of each group that this rank is in
    queue: Queue
    stats: torch.Tensor  # the return value of Trainer.step

    def differences(self) -> dict:
        """{what: (counted, predicted)} of all pairs that are not equal."""
        counted, predicted = self.traffic
        both = self.bytes | {"activations": self.activations, "FLOPs": self.flops}
        both |= {key: (counted.get(key), predicted.get(key)) for key in {*counted, *predicted}}
        if gpt.module_of(self.trainer.config) is not gpt:  # no formula
            del both["activations"]
        return {what: pair for what, pair in both.items() if pair[0] != pair[1]}


def core_flops(q: torch.Size, k: torch.Size) -> int:
    """FLOPs of attention: q k^T, and the product of its softmax with v."""
    return 4 * math.prod(q) * k[-2]


# torch has no formula for scaled_dot_product_attention on a CPU. Backward counts as two forwards:
# its internal recomputation is left out, as in cost.predicted_flops.
_aten = torch.ops.aten
FLOPS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, *rest, **more: core_flops(q.shape, k.shape),
} | dict.fromkeys((_aten._scaled_dot_product_flash_attention_for_cpu_backward,
                   _aten._scaled_dot_product_flash_attention_backward),
                  lambda grad, q, k, *rest, **more: 2 * core_flops(q.shape, k.shape))  # fmt: skip


class Counter(measure.Collectives):
    """Also counts the FLOPs of matmuls. One mode for both, because each takes time in each call.

    torch's FlopCounterMode is not used because its module hooks keep inputs alive, which would be
    counted as activations.
    """

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if formula := FLOPS.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Shapes(TorchDispatchMode):
    """Caches the result of each operation by the shapes of its inputs.

    torch computes meta tensors in Python, which would take most of the time. Views and in-place
    operations are not cached.
    """

    def __init__(self):
        super().__init__()
        self.known: dict = {}
        self.cached: dict = {}  # operation -> whether its results are cached

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # see measure.Collectives
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self.cached:
            schema = function._schema
            self.cached[function] = function is not torch.ops.aten._unsafe_view.default and not any(
                a.alias_info for a in (*schema.arguments, *schema.returns)
            )
        if not self.cached[function]:
            return function(*args, **kwargs)
        key = (function, self.about(args), *((name, self.about(x)) for name, x in kwargs.items()))
        if key in self.known:
            return self.new_tensors(self.known[key])
        result = function(*args, **kwargs)
        if all(isinstance(x, torch.Tensor) and x.is_meta for x in pytree.tree_leaves(result)):
            self.known[key] = self.about(result)
        return result

    def about(self, x: object) -> object:
        """x with each tensor replaced by its Shape, and lists by tuples."""
        if isinstance(x, torch.Tensor):
            return Shape(x.shape, x.stride(), x.dtype, x.device)
        return tuple(map(self.about, x)) if isinstance(x, tuple | list) else x

    def new_tensors(self, x: object) -> object:
        """x with each Shape replaced by a new tensor."""
        if isinstance(x, Shape):
            return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device)
        return tuple(map(self.new_tensors, x)) if isinstance(x, tuple) else x


class Shape(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Alone(ddp.DDP):
    """DDP that takes the bucket order of this rank, since a broadcast of meta tensors has no
    values.

    All ranks of a group have the same order anyway.
    """

    def _learn(self) -> None:
        self._lay_out(dict.fromkeys([*self.ready, *range(len(self.parameters))]))
        self.learned = True


# --- one rank -------------------------------------------------------------------------------------


def trainer_of(args: argparse.Namespace, config: gpt.GPTConfig, **seams) -> train_3d.Trainer:
    """A trainer on the meta device. seams: arguments of train_3d.Trainer."""

    def read(step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(rows), config.seq_len, dtype=torch.long, device="meta")
        return tokens, tokens.clone()

    def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    seams = {"sync": None if args.zero else Alone} | seams
    return train_3d.Trainer(args, config, read, torch.device("meta"), draw, **seams)


@contextlib.contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """Makes this process `rank` of `world_size`, with collectives that do nothing."""
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank,
                            world_size=world_size)  # fmt: skip
    dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)  # avoids a warning
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def watched_transfers(batches: list[list[Transfer]]) -> Iterator[None]:
    """Records every call of batch_isend_irecv in `batches`."""
    plain = dist.batch_isend_irecv

    def watched(operations: list[dist.P2POp]) -> list:
        batches.append([])
        for op in operations:
            name = "send" if op.op is dist.isend else "recv"
            peer = dist.get_global_rank(op.group, op.group_peer)
            batches[-1].append(Transfer(name, peer, op.tensor.numel()))
        return plain(operations)

    dist.batch_isend_irecv = watched
    try:
        yield
    finally:
        dist.batch_isend_irecv = plain


@contextlib.contextmanager
def watched_activations(trainer: train_3d.Trainer, peak: list[int]) -> Iterator[None]:
    """Stores in peak[0] the largest number of saved bytes between two actions of the pipeline."""
    saved, pipe, plain = measure.SavedActivations(trainer.model), trainer.pipe, trainer.pipe.watch

    def now() -> int:
        queues = pipe.pending.values()
        return saved.bytes([t for queue in queues for put_off in queue for t in put_off.args[1:3]])

    @contextlib.contextmanager
    def watch(action: schedules.Action) -> Iterator[None]:
        peak[0] = max(peak[0], now())  # after the previous action
        with saved if action.kind == "F" else contextlib.nullcontext():
            yield
        peak[0] = max(peak[0], now() if action.kind == "F" else 0)

    pipe.watch = watch
    try:
        yield
    finally:
        pipe.watch = plain


def dry_run(
    args: argparse.Namespace, config: gpt.GPTConfig, rank: int, step: int = 0, **seams
) -> Seen:
    """Runs `rank` up to `step` and observes that step. seams: arguments of train_3d.Trainer."""
    with fake_ranks(args.world_size, rank), Shapes():
        trainer = trainer_of(args, config, **seams)
        for before in range(step):
            trainer.step(before)
        return observe(trainer, rank, counts_activations(config), step)


def groups_of(trainer: train_3d.Trainer) -> dict[str, dist.ProcessGroup]:
    """The process groups of the trainer, by the name of their axis."""
    groups = {name: getattr(trainer, f"{name}_group", None) for name in AXES}
    return {name: group for name, group in groups.items() if group} | {"world": dist.group.WORLD}


def observe(trainer: train_3d.Trainer, rank: int, activations: bool = True, step: int = 0) -> Seen:
    """Runs one step of a trainer, real or on meta; returns what was counted and predicted.

    activations: count saved activations, which takes a third of the time.
    """
    groups = groups_of(trainer)
    members = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    batches, peak, counter = [], [0], Counter(groups)
    watched = watched_activations(trainer, peak) if activations else contextlib.nullcontext()
    with watched, watched_transfers(batches), counter:
        stats = trainer.step(step)
    calls, counted = collections.defaultdict(list), collections.Counter()
    for call in counter.calls:
        calls[call.group].append(call)
        nbytes = call.payload * call.dtype.itemsize
        counted[call.group, call.operation] += torch.tensor([1, nbytes])
    counted = {key: tuple(both.tolist()) for key, both in counted.items()}
    held = counting.bytes_by_kind(trainer.sync.held(), trainer.optimizer)
    expected = predicted_bytes(trainer)
    return Seen(
        trainer, rank, {kind: (n, expected[kind]) for kind, n in held.items()},
        (peak[0], expected["activations"]), (counted, predicted_traffic(trainer)),
        (counter.flops, predicted_flops(trainer)), [*itertools.chain(*batches)], calls, members,
        queue_of(rank, counter.calls, batches, members), stats,
    )  # fmt: skip


def queue_of(
    rank: int, calls: list[measure.Call], batches: list[list[Transfer]],
    members: dict[str, list[int]],
) -> Queue:  # fmt: skip
    """Merges the collectives and the batches of transfers of a rank, in order of launch."""
    queue, transfers, coming = [], iter(calls), iter(batches)
    for call in transfers:
        if call.operation not in ("send", "recv"):
            members_ = tuple(members[call.group])
            queue.append([Event(call.group, members_, call.operation, call.payload, call.dtype)])
            continue
        queue.append([])
        for operation, peer, payload in next(coming):
            way = (rank, peer) if operation == "send" else (peer, rank)
            queue[-1].append(Event(call.group, way, "transfer", payload, call.dtype))
        for _ in queue[-1][1:]:  # skip the other transfers of this batch
            next(transfers)
    return queue


# --- predictions ----------------------------------------------------------------------------------


def layout_of(trainer: train_3d.Trainer) -> cost.Layout:
    """The trainer's layout, as tools/plan/cost.py describes it."""
    args = trainer.args
    return cost.Layout(
        args.tp, args.pp, trainer.dp_group.size(), args.zero, args.micro_batch_size, trainer.m,
        args.recompute, args.schedule, len(trainer.stages), args.sequence_parallel,
        args.cp, args.zero_shard_size or 0, bool(args.zero_reshard_after_forward),
        args.recompute_every, args.recompute_layers, args.cp_attention, args.sp_keep_gathered,
    )  # fmt: skip


def program_of(trainer: train_3d.Trainer) -> cost.Program:
    """The trainer's dtypes, as tools/plan/cost.py describes them."""
    args, own = trainer.args, trainer.dtype
    wide = torch.promote_types(own, torch.float32)
    stat = own if trainer.device.type == "cpu" else wide
    grad = options.DTYPES.get(args.grad_dtype, wide)
    reduce = options.DTYPES.get(args.reduce_dtype, own)
    return cost.Program(own.itemsize, grad.itemsize, reduce.itemsize, stat=stat.itemsize)


def predicted_bytes(trainer: train_3d.Trainer) -> dict[str, int]:
    """Bytes of this rank by kind."""
    program = program_of(trainer)
    held = cost.predicted_rank_bytes(
        trainer.config, layout_of(trainer), trainer.pp_rank, program,
        tp_rank=trainer.tp_group.rank(), shard_rank=trainer.shard_group.rank(),
        schedule=trainer.schedule,
    )  # fmt: skip
    if trainer.args.optimizer == "sgd":  # SGD has no moments
        owned = sum(piece.tensor.numel() for piece in trainer.sync.pieces())
        held["optimizer"] -= 2 * owned * max(4, program.itemsize)
    return held


def predicted_zero(trainer: train_3d.Trainer) -> dict[str, cost.Payload]:
    """Payload by collective: "all_reduce" over the replica group, the others over the shards."""
    sync, args = trainer.sync, trainer.args
    # Not gpt.PositionEmbedding, whose input is not token ids.
    tables = (nn.Embedding, tensor_parallel.VocabParallelEmbedding)
    uses = {
        layer: [cost.Use(sync.units.index(unit), True, type(layer) in tables) for unit in units]
        for units, layer in zip(sync.needs, zero.layers(trainer.model), strict=True)
    }
    k = trainer.shard_group.size()
    sizes = [zero.padded([p.numel() for p in unit.place], k) for unit in sync.units]
    more = (args.zero, trainer.m, trainer.replica_group.size(),
            args.zero_reshard_after_forward == 1)  # fmt: skip
    predicted = cost.predicted_zero_payload(sizes, k, sum(uses.values(), []), *more)
    if args.zero == 3 and args.zero_reshard_after_forward:  # each chunk gathers separately
        each = []
        for chunk in trainer.pipe.chunks.values():
            mine = [use for layer in zero.layers(chunk) for use in uses[layer]]
            its = sorted({use.unit for use in mine})
            mine = [use._replace(unit=its.index(use.unit)) for use in mine]
            payload = cost.predicted_zero_payload([sizes[i] for i in its], k, mine, *more)
            each.append(payload["all_gather"])
        predicted["all_gather"] = cost.Payload(*(sum(kind) for kind in zip(*each, strict=True)))
    return predicted


def predicted_traffic(trainer: train_3d.Trainer) -> Traffic:
    """(group, operation) -> (calls, bytes) of a step, from the formulas of the strategy files.

    A rank all-reduces its shards of partial gradients over tp, and its shards of tied gradients
    over the stages that tie them. The sizes of these shards are counted from its pieces.
    """
    args, config, stages = trainer.args, trainer.config, trainer.stages
    layout, program, groups = layout_of(trainer), program_of(trainer), groups_of(trainer)
    t, b, h, m = args.tp, args.micro_batch_size, config.n_embd, trainer.m
    s = config.seq_len // args.cp
    traffic: dict = collections.defaultdict(lambda: torch.zeros(2, dtype=torch.long))
    names = measure.Collectives(groups).names  # axes with the same ranks share a group

    def add(group: str, operation: str, calls: int, elements: int, itemsize: int) -> None:
        if calls and groups[group].size() > 1:  # a group of one rank sends nothing
            name = names[groups[group].group_name]
            traffic[name, operation] += torch.tensor([calls, elements * itemsize])

    layers, end = [len(trainer.pipe.chunks[k].h) for k in stages], trainer.pipe.last
    recomputed = cost.under_policy(layout, layers)
    for k, n, again in zip(stages, layers, recomputed, strict=True) if t > 1 else ():
        costs = cost.tp_traffic(config, layout, program, n, again, k == 0, k == end, m)
        for (_, operation), (calls, nbytes) in costs.items():
            add("tp", operation, calls, nbytes, 1)
    for n, again in zip(layers, recomputed, strict=True):
        costs = cost.cp_traffic(config, layout, program, n, again, m)
        for (_, operation), (calls, nbytes) in costs.items():
            for each in ("send", "recv") if operation == "send" else (operation,):
                add("cp", each, calls, nbytes, 1)
    pieces, wide = trainer.sync.pieces(), max(4, program.itemsize)  # masters are in fp32
    partial = sum(piece.numel() for _, piece, p, _ in pieces if p.distribution.partial)
    tied = sum(piece.numel() for _, piece, p, _ in pieces if hasattr(p, "tied_name"))
    add("tp", "all_reduce", t > 1 and partial > 0, partial, wide)
    add("tied", "all_reduce", tied > 0, tied, wide)

    shards = t if args.sequence_parallel else 1
    of_all = schedules.stages_of(trainer.schedule)
    calls, payload = pipeline.predicted_sends(of_all, trainer.pp_rank, m, b, s // shards, h)
    # A rank receives as much as it sends: a gradient for each output, an output for each gradient.
    for operation in ("send", "recv"):
        add("pp", operation, calls, payload, program.itemsize)

    if args.zero:
        for operation, total in predicted_zero(trainer).items():
            group = "replica" if operation == "all_reduce" else "shard"
            add(group, operation, total.calls, total.exposed + total.hidden,
                cost.dp_itemsize(program, operation))  # fmt: skip
    else:
        numel = sum(p.numel() for _, p in trainer.sync.parameters)
        calls, buckets = len(trainer.sync.buckets), [f.numel() for f in trainer.sync.buckets]
        payloads = {("gradient", "all_reduce"): ddp.predicted_payload(numel)}
        if args.dp_nodes > 1 and trainer.inside_group.size() > 1:
            n = trainer.inside_group.size()
            payloads = ddp.predicted_hierarchical_payload(buckets, n)
        for key, payload in payloads.items():  # gradients, also in the all-gather inside a host
            add(*key, calls, payload, cost.dp_itemsize(program, "all_reduce"))
    add("gradient", "all_reduce", 1, 1, 8)  # number of target tokens
    add("world", "all_reduce", 1, 3, wide)  # loss, gradient norm, request to stop
    return {key: tuple(both.tolist()) for key, both in traffic.items()}


def predicted_flops(trainer: train_3d.Trainer) -> int:
    """FLOPs of the matmuls in a step of this rank."""
    args, config = trainer.args, trainer.config
    b, tp_rank = args.micro_batch_size, trainer.tp_group.rank()
    layers = [len(trainer.pipe.chunks[k].h) for k in trainer.stages]
    ring = args.cp > 1 and args.cp_attention == "ring"
    fused = not is_explicit(config) and (trainer.device.type != "meta" or ring)
    deferred = any(map(schedules.splits_backward, trainer.schedule))
    more = dict(deferred=deferred, fused=fused, t=args.tp, tp_rank=tp_rank, c=args.cp,
                method=args.cp_attention)  # fmt: skip
    total = sum(
        cost.predicted_flops(config, n, b, args.recompute, layers=again, **more)
        for n, again in zip(layers, cost.under_policy(layout_of(trainer), layers), strict=True)
    )  # fmt: skip
    if trainer.pipe.last in trainer.stages:
        rows = cost.vocab_rows(config, args.tp, tp_rank)
        total += 6 * b * config.seq_len // args.cp * config.n_embd * rows
    return trainer.m * total


# --- the report -----------------------------------------------------------------------------------


def lines_of(seen: Seen) -> Iterator[tuple[str, bool]]:
    """Pairs (line of the report, whether counted = predicted)."""
    trainer, compared = seen.trainer, counts_activations(seen.trainer.config)
    axes = ("pp", "dp", "cp", "tp") if trainer.args.cp > 1 else ("pp", "dp", "tp")
    places = ", ".join(f"{axis} {getattr(trainer, f'{axis}_group').rank()}" for axis in axes)
    blocks = ", ".join(f"{k} ({len(trainer.pipe.chunks[k].h)} blocks)" for k in trainer.stages)
    yield f"rank {seen.rank}: {places}; stage {blocks}; {trainer.m} microbatches", True

    def row(what: str, counted: int, predicted: int, compared: bool = True) -> tuple[str, bool]:
        same = counted == predicted or not compared
        mark = "" if same else "   <- differs"
        return f"  {what:32s}{counted:>26,d}{predicted:>26,d}{mark}", same

    yield f"  {'bytes of memory':32s}{'counted':>26s}{'predicted':>26s}", True
    for kind, (counted, predicted) in seen.bytes.items():
        yield row(kind, counted, predicted)
    counted, predicted = seen.activations
    if compared:
        yield row("activations", counted, predicted)
    elif gpt.module_of(trainer.config) is not gpt:
        yield "  activations (compared for --arch gpt only)", True
    else:
        yield f"  {'activations (sdpa: not counted)':32s}{'':26s}{predicted:>26,d}", True
    yield "  collectives per step: calls, then bytes", True
    for key in sorted({*seen.traffic[0], *seen.traffic[1]}):
        for i, what in enumerate((f"{key[0]} {key[1]}", "")):
            yield row(what, *(traffic.get(key, (0, 0))[i] for traffic in seen.traffic))
    peers = collections.Counter((op, peer) for op, peer, _ in seen.transfers)
    for (operation, peer), calls in sorted(peers.items()):
        yield f"  {operation} {'to' if operation == 'send' else 'from'} rank {peer}: {calls}", True
    yield row("FLOPs of matmuls", *seen.flops)


def is_explicit(config: gpt.Config) -> bool:
    return config.attention == "explicit" or getattr(config, "dropout", 0) > 0


def counts_activations(config: gpt.Config) -> bool:
    return is_explicit(config) and gpt.module_of(config) is gpt


def deadlock(queues: list[Queue]) -> str | None:
    """Executes the queues of all ranks under the strictest rules; None if all of them complete.

    A rank has one queue for all its groups and starts an entry when the previous one is complete. A
    collective completes when it is at the head of the queue of every member of its group. A batch
    completes when each of its transfers has been at the head of the queues of both ranks. Otherwise
    returns a message: which ranks wait in a cycle, or which calls disagree.
    """
    rest, heads = [iter(queue) for queue in queues], [[] for _ in queues]
    moved = True
    while moved:
        for rank, head in enumerate(heads):
            head.extend(() if head else next(rest[rank], ()))
        moved = False
        for place in sorted({event[:2] for head in heads for event in head}):
            ends = {rank: next((e for e in heads[rank] if e[:2] == place), None)
                    for rank in place[1]}  # fmt: skip
            if None in ends.values():
                continue
            if len({*ends.values()}) > 1:
                calls = (f"rank {rank} calls {e.operation} of {e.payload} {e.dtype}"
                         for rank, e in ends.items())  # fmt: skip
                return f"in {place[0]} {[*place[1]]} " + ", ".join(calls)
            for rank, event in ends.items():
                heads[rank].remove(event)
            moved = True
    if not any(heads):
        return None

    def other(rank: int) -> int:
        """A rank that `rank` waits for; `rank` itself if it has finished."""
        for event in heads[rank]:
            for member in event.members:
                if event[:2] not in (e[:2] for e in heads[member]):
                    return member
        return rank

    lines, stuck = [], [rank for rank, head in enumerate(heads) if head]
    ranks = schedules.cycle(stuck[0], other)
    if not heads[ranks[0]]:
        ranks = [next(rank for rank in stuck if other(rank) == ranks[0]), *ranks]
    for rank in ranks:
        event = next((e for e in heads[rank] if other(rank) in e.members), None)
        lines.append(f"rank {rank} waits for rank {other(rank)} in {event.operation} of "
                     f"{event.payload} over {event.group} {[*event.members]}" if event else
                     f"rank {rank} has finished")  # fmt: skip
    return "deadlock: " + "; ".join(lines)


def parser() -> options.Parser:
    """The options of train_3d.py, and those of the dry run."""
    p = options.parser("tools.plan.dry_run")
    p.description = "Count what one rank of a run stores, sends and computes in a step."
    add = p.add_argument_group("dry run").add_argument
    add("--world-size", type=options.at_least(1), default=1, metavar="N", help="number of ranks")
    add("--rank", type=options.at_least(0), metavar="R", help="the rank to count (default: 0)")
    add("--all-ranks", action="store_true",
        help="count every rank, and check that their communication matches")  # fmt: skip
    return p


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    start = time.perf_counter()
    try:
        ranks = ranks_of(args)
        config = options.check(args, args.world_size)
    except ValueError as error:
        arguments.error(str(error))
    seen, good = [], True
    for rank in ranks:
        # Deadlocks are checked in the second step: in the first, DDP and ZeRO do not yet launch
        # collectives during backward.
        seen.append(dry_run(args, config, rank, step=int(args.all_ranks)))
        for line, same in lines_of(seen[-1]):
            print(line, flush=True)
            good &= same
    if args.all_ranks:
        wrong = deadlock([each.queue for each in seen])
        print(wrong or "with one queue per rank over all groups, every queue completes")
        good &= wrong is None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{time.perf_counter() - start:.0f} s, {peak:.2f} GB of memory")
    if not good:
        raise SystemExit(1)


def ranks_of(args: argparse.Namespace) -> list[int]:
    """The ranks to run. Raises ValueError if the flags are not valid."""
    n = args.world_size
    if args.recompute == "offload":
        raise ValueError(
            "--recompute offload: meta tensors cannot be offloaded: use another policy"
        )
    if args.document_mask is not None:
        raise ValueError("--document-mask: the formulas do not know it: leave it out")
    if args.all_ranks:
        if n > 8:
            raise ValueError(
                f"--all-ranks with --world-size {n}: it supports at most 8 ranks; use --rank R"
            )
        return list(range(n))
    rank = args.rank or 0
    if rank >= n:
        raise ValueError(f"--rank {rank} with --world-size {n}: give 0 to {n - 1}")
    return [rank]


if __name__ == "__main__":
    main()
