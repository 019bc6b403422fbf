"""The step of any rank of any run, on this machine, without the others: bytes, traffic and FLOPs.

    python train_3d.py --dry-run --world-size 3072 --rank 1536 --model gpt-1t --tp 8 --pp 64 \\
        --global-batch-size 3072 --micro-batch-size 1
    python train_3d.py --dry-run --world-size 8 --all-ranks --tp 2 --pp 2      do they fit together?

The rank is real: train_3d.Trainer with its schedule, hooks and groups. What surrounds it is not:
tensors are on torch's meta device, so they have shapes and no numbers, and collectives are those of
torch's fake backend, which return at once. What this counts is compared with what the strategy
files' `predicted_*` and tools/cost.py say of the same rank; a line that differs is marked, and the
exit code is 1. Activations are compared where attention is explicit: on meta, sdpa runs as other
kernels than on a CPU or GPU, and keeps other tensors.
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

import activation_ckpt
import ddp
import gpt
import measure
import options
import pipeline
import tensor_parallel
import train_3d
import zero
from tools import cost

AXES = ("tp", "pp", "dp", "shard", "replica", "inside", "across", "tied")
Traffic = dict[tuple[str, str], tuple[int, int]]  # (group, operation) -> (calls, bytes)


class Transfer(NamedTuple):
    operation: str  # send | recv
    peer: int  # in the world
    payload: int


class Event(NamedTuple):
    """One collective or transfer in a rank's queue."""

    group: str
    members: tuple[int, ...]  # of the group, in the world; of a transfer: (from, to)
    operation: str
    payload: int
    dtype: torch.dtype


Queue = list[list[Event]]  # in the order of launch; a batch of transfers is one entry


@dataclasses.dataclass
class Seen:
    """What one rank did in a step, and what was predicted of it."""

    trainer: train_3d.Trainer
    rank: int
    bytes: dict[str, tuple[int, int]]  # by kind: (counted, predicted)
    activations: tuple[int, int]
    traffic: tuple[Traffic, Traffic]
    flops: tuple[int, int]
    transfers: list[Transfer]
    calls: dict[str, list[measure.Call]]  # by group
    members: dict[str, list[int]]  # of each group that this rank is in
    queue: Queue
    stats: torch.Tensor  # what the step returned

    def differences(self) -> dict:
        """{what: (counted, predicted)}, where they are not equal."""
        counted, predicted = self.traffic
        both = self.bytes | {"activations": self.activations, "FLOPs": self.flops}
        both |= {key: (counted.get(key), predicted.get(key)) for key in {*counted, *predicted}}
        return {what: pair for what, pair in both.items() if pair[0] != pair[1]}


def core_flops(q: torch.Size, k: torch.Size) -> int:
    """Scores, and what they weigh."""
    return 4 * math.prod(q) * k[-2]


# What torch has no formula for: sdpa on a CPU. Backward as two of its forwards: what it computes
# again inside is left out, as in activation_ckpt.predicted_flops.
_aten = torch.ops.aten
FLOPS = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, *rest, **more: core_flops(q.shape, k.shape),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, *rest, **more: 2 * core_flops(q.shape, k.shape),
}  # fmt: skip


class Flops(TorchDispatchMode):
    """Of the matmuls. torch's own FlopCounterMode has hooks on modules too: they keep the inputs,
    and so would show among the activations."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FLOPS.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Shapes(TorchDispatchMode):
    """An operation on shapes that it has met before gives what it gave: torch's rules for meta
    tensors are Python, and would take most of the time. Views and what is written to pass."""

    def __init__(self):
        super().__init__()
        self.known: dict = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        if function is torch.ops.aten._unsafe_view.default or any(
            a.alias_info for a in (*schema.arguments, *schema.returns)
        ):
            return function(*args, **kwargs)
        key = (function, self.about(args), *((name, self.about(x)) for name, x in kwargs.items()))
        if key in self.known:
            return self.anew(self.known[key])
        result = function(*args, **kwargs)
        if all(isinstance(x, torch.Tensor) and x.is_meta for x in pytree.tree_leaves(result)):
            self.known[key] = self.about(result)
        return result

    def about(self, x: object) -> object:
        if isinstance(x, torch.Tensor):
            return Shape(x.shape, x.stride(), x.dtype, x.device)
        return tuple(map(self.about, x)) if isinstance(x, tuple | list) else x

    def anew(self, x: object) -> object:
        if isinstance(x, Shape):
            return torch.empty_strided(*x[:2], dtype=x.dtype, device=x.device)
        return tuple(map(self.anew, x)) if isinstance(x, tuple) else x


class Shape(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Alone(ddp.DDP):
    """On meta, an order of buckets cannot be read; the ranks of a group have the same one."""

    def _learn(self) -> None:
        self._lay_out(dict.fromkeys([*self.ready, *range(len(self.parameters))]))
        self.learned = True


# --- one rank -------------------------------------------------------------------------------------


def trainer_of(args: argparse.Namespace, config: gpt.GPTConfig, **seams) -> train_3d.Trainer:
    def read(step: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.zeros(len(rows), config.seq_len, dtype=torch.long, device="meta")
        return tokens, tokens.clone()

    def draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    seams = {"sync": None if args.zero else Alone} | seams
    return train_3d.Trainer(args, config, read, torch.device("meta"), draw, **seams)


@contextlib.contextmanager
def fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank,
                            world_size=world_size)  # fmt: skip
    dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)  # or it warns
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def watched_transfers(batches: list[list[Transfer]]) -> Iterator[None]:
    """Fills `batches` with what goes through batch_isend_irecv."""
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
    """Leaves in peak[0] the most bytes that were kept between two actions."""
    saved, pipe, plain = measure.SavedActivations(trainer.model), trainer.pipe, trainer.pipe.watch

    def now() -> int:
        queues = pipe.pending.values()
        return saved.bytes([t for queue in queues for put_off in queue for t in put_off.args[1:3]])

    @contextlib.contextmanager
    def watch(action: pipeline.Action) -> Iterator[None]:
        peak[0] = max(peak[0], now())  # after the action before
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
    """One step of `rank`, after those before it. seams: arguments of train_3d.Trainer."""
    with fake_ranks(args.world_size, rank), Shapes():
        trainer = trainer_of(args, config, **seams)
        for before in range(step):
            trainer.step(before)
        return observe(trainer, rank, is_explicit(config), step)


def groups_of(trainer: train_3d.Trainer) -> dict[str, dist.ProcessGroup]:
    groups = {name: getattr(trainer, f"{name}_group", None) for name in AXES}
    return {name: group for name, group in groups.items() if group} | {"world": dist.group.WORLD}


def observe(
    trainer: train_3d.Trainer, rank: int, activations: bool = True, step: int = 0
) -> Seen:
    """A step of a trainer, real or not, counted and predicted; activations only if they are to be
    (it takes a third of the time)."""
    groups = groups_of(trainer)
    members = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
    batches, peak, counter = [], [0], Flops()
    watched = watched_activations(trainer, peak) if activations else contextlib.nullcontext()
    with (watched, watched_transfers(batches), counter,
          measure.Collectives(groups) as collectives):  # fmt: skip
        stats = trainer.step(step)
    calls, counted = collections.defaultdict(list), collections.Counter()
    for call in collectives.calls:
        calls[call.group].append(call)
        nbytes = call.payload * call.dtype.itemsize
        counted[call.group, call.operation] += torch.tensor([1, nbytes])
    counted = {key: tuple(both.tolist()) for key, both in counted.items()}
    held = measure.bytes_by_kind(trainer.sync.held(), trainer.optimizer)
    expected = predicted_bytes(trainer)
    return Seen(
        trainer, rank, {kind: (n, expected[kind]) for kind, n in held.items()},
        (peak[0], expected["activations"]), (counted, predicted_traffic(trainer)),
        (counter.total, predicted_flops(trainer)), [*itertools.chain(*batches)], calls, members,
        queue_of(rank, collectives.calls, batches, members), stats,
    )  # fmt: skip


def queue_of(
    rank: int, calls: list[measure.Call], batches: list[list[Transfer]],
    members: dict[str, list[int]],
) -> Queue:  # fmt: skip
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
        for _ in queue[-1][1:]:  # the others of this batch
            next(transfers)
    return queue


# --- predictions ----------------------------------------------------------------------------------


def layout_of(trainer: train_3d.Trainer) -> cost.Layout:
    args = trainer.args
    return cost.Layout(
        args.tp, args.pp, trainer.dp_group.size(), args.zero, args.micro_batch_size, trainer.m,
        args.recompute, args.schedule, len(trainer.stages), args.sequence_parallel,
        args.zero_shard_size or 0, bool(args.zero_reshard_after_forward), args.recompute_every,
        args.recompute_layers,
    )  # fmt: skip


def program_of(trainer: train_3d.Trainer) -> cost.Program:
    args, own = trainer.args, trainer.dtype
    wide = torch.promote_types(own, torch.float32)
    stat = own if trainer.device.type == "cpu" else wide
    grad = options.DTYPES.get(args.grad_dtype, wide)
    reduce = options.DTYPES.get(args.reduce_dtype, own)
    return cost.Program(own.itemsize, grad.itemsize, reduce.itemsize, stat=stat.itemsize)


def predicted_bytes(trainer: train_3d.Trainer) -> dict[str, int]:
    program = program_of(trainer)
    held = cost.predicted_rank_bytes(
        trainer.config, layout_of(trainer), trainer.pp_rank, program,
        tp_rank=trainer.tp_group.rank(), shard_rank=trainer.shard_group.rank(),
        schedule=trainer.schedule,
    )  # fmt: skip
    if trainer.args.optimizer == "sgd":  # no moments
        owned = sum(piece.tensor.numel() for piece in trainer.sync.pieces())
        held["optimizer"] -= 2 * owned * max(4, program.itemsize)
    return held


def predicted_zero(trainer: train_3d.Trainer) -> dict[str, cost.Payload]:
    """Collectives of the shard group. "all_reduce" runs over the replicas."""
    sync, args = trainer.sync, trainer.args
    tables = (nn.Embedding, tensor_parallel.VocabParallelEmbedding)
    uses = [cost.Use(sync.units.index(unit), matmul=True, table=isinstance(layer, tables))
            for (unit,), layer in zip(sync.needs, zero.layers(trainer.model), strict=True)]
    k = trainer.shard_group.size()
    sizes = [zero.padded([p.numel() for p in unit.place], k) for unit in sync.units]
    more = (args.zero, trainer.m, trainer.replica_group.size(),
            args.zero_reshard_after_forward == 1)  # fmt: skip
    predicted = cost.predicted_zero_payload(sizes, k, uses, *more)
    if args.zero == 3 and args.zero_reshard_after_forward:  # every chunk is a chain of its own
        of_layer = dict(zip(zero.layers(trainer.model), uses, strict=True))
        each = []
        for chunk in trainer.pipe.chunks.values():
            mine = [of_layer[layer] for layer in zero.layers(chunk)]
            its = sorted({use.unit for use in mine})
            mine = [use._replace(unit=its.index(use.unit)) for use in mine]
            payload = cost.predicted_zero_payload([sizes[i] for i in its], k, mine, *more)
            each.append(payload["all_gather"])
        predicted["all_gather"] = cost.Payload(*(sum(kind) for kind in zip(*each, strict=True)))
    return predicted


def predicted_traffic(trainer: train_3d.Trainer) -> Traffic:
    """Composed of the strategies' own: each knows its axis alone. What a rank sums of partial and
    tied gradients is what it owns of them, counted from its pieces."""
    args, config, stages = trainer.args, trainer.config, trainer.stages
    layout, program, groups = layout_of(trainer), program_of(trainer), groups_of(trainer)
    t, b, s, h, m = args.tp, args.micro_batch_size, config.seq_len, config.n_embd, trainer.m
    traffic: dict = collections.defaultdict(lambda: torch.zeros(2, dtype=torch.long))
    names = measure.Collectives(groups).names  # axes with the same ranks share a group

    def add(group: str, operation: str, calls: int, elements: int, itemsize: int) -> None:
        if calls and groups[group].size() > 1:  # one rank sends nothing
            name = names[groups[group].group_name]
            traffic[name, operation] += torch.tensor([calls, elements * itemsize])

    layers, end = [len(trainer.pipe.chunks[k].h) for k in stages], trainer.pipe.last
    recomputed = cost.under_policy(layout, layers)
    for k, n, again in zip(stages, layers, recomputed, strict=True) if t > 1 else ():
        costs = cost.tp_traffic(config, layout, program, n, again, k == 0, k == end, m)
        for (_, operation), (calls, nbytes) in costs.items():
            add("tp", operation, calls, nbytes, 1)
    pieces, wide = trainer.sync.pieces(), max(4, program.itemsize)  # masters are in fp32
    partial = sum(piece.numel() for _, piece, p, _ in pieces if p.partial)
    tied = sum(piece.numel() for _, piece, p, _ in pieces if hasattr(p, "tied_name"))
    add("tp", "all_reduce", t > 1 and partial > 0, partial, wide)
    add("tied", "all_reduce", tied > 0, tied, wide)

    shards = t if args.sequence_parallel else 1
    of_all = pipeline.stages_of(trainer.schedule)
    calls, payload = pipeline.predicted_sends(of_all, trainer.pp_rank, m, b, s // shards, h)
    for operation in ("send", "recv"):  # an output from each that a gradient goes to, and so on
        add("pp", operation, calls, payload, program.itemsize)

    if args.zero:
        for operation, total in predicted_zero(trainer).items():
            group = "replica" if operation == "all_reduce" else "shard"
            add(group, operation, total.calls, total.exposed + total.hidden,
                cost.dp_itemsize(program, operation))  # fmt: skip
    else:
        numel = sum(p.numel() for _, p in trainer.sync.parameters)
        calls, buckets = len(trainer.sync.buckets), [f.numel() for f in trainer.sync.buckets]
        payloads = {("dp", "all_reduce"): ddp.predicted_payload(numel)}
        if args.dp_nodes > 1 and trainer.inside_group.size() > 1:
            n = trainer.inside_group.size()
            payloads = ddp.predicted_hierarchical_payload(buckets, n)
        for key, payload in payloads.items():  # all of gradients, also the all-gather inside
            add(*key, calls, payload, cost.dp_itemsize(program, "all_reduce"))
    add("dp", "all_reduce", 1, 1, 8)  # how many tokens count
    add("world", "all_reduce", 1, 3, wide)  # loss, norm, who was asked to stop
    return {key: tuple(both.tolist()) for key, both in traffic.items()}


def predicted_flops(trainer: train_3d.Trainer) -> int:
    """Of the matmuls of a step, on this rank."""
    args, config = trainer.args, trainer.config
    b, s, h = args.micro_batch_size, config.seq_len, config.n_embd
    layers = [len(trainer.pipe.chunks[k].h) for k in trainer.stages]
    fused = not is_explicit(config) and trainer.device.type != "meta"
    deferred = any(map(pipeline.splits_backward, trainer.schedule))
    more = dict(dropout=config.dropout > 0, deferred=deferred, fused=fused)
    total = sum(
        activation_ckpt.predicted_flops(n, b, s, h, args.recompute, layers=again, **more)
        for n, again in zip(layers, cost.under_policy(layout_of(trainer), layers), strict=True)
    )  # fmt: skip
    words = cost.words(config, args.tp, trainer.tp_group.rank())
    head = 6 * b * s * h * words if trainer.pipe.last in trainer.stages else 0
    return trainer.m * (total // args.tp + head)


# --- what is said ---------------------------------------------------------------------------------


def lines_of(seen: Seen) -> Iterator[tuple[str, bool]]:
    """(a line, whether it is as predicted)."""
    trainer, explicit = seen.trainer, is_explicit(seen.trainer.config)
    places = ", ".join(f"{axis} {getattr(trainer, f'{axis}_group').rank()}"
                       for axis in ("pp", "dp", "tp"))  # fmt: skip
    blocks = ", ".join(f"{k} ({len(trainer.pipe.chunks[k].h)} blocks)" for k in trainer.stages)
    yield f"rank {seen.rank}: {places}; stage {blocks}; {trainer.m} microbatches", True

    def row(what: str, counted: int, predicted: int, compared: bool = True) -> tuple[str, bool]:
        same = counted == predicted or not compared
        mark = "" if same else "   <- differs"
        return f"  {what:32s}{counted:>26,d}{predicted:>26,d}{mark}", same

    yield f"  {'bytes held':32s}{'counted':>26s}{'predicted':>26s}", True
    for kind, (counted, predicted) in seen.bytes.items():
        yield row(kind, counted, predicted)
    counted, predicted = seen.activations
    if explicit:
        yield row("activations", counted, predicted)
    else:
        yield f"  {'activations (sdpa: by formula)':32s}{'':26s}{predicted:>26,d}", True
    yield "  collectives of a step: calls, then bytes", True
    for key in sorted({*seen.traffic[0], *seen.traffic[1]}):
        for i, what in enumerate((f"{key[0]} {key[1]}", "")):
            yield row(what, *(traffic.get(key, (0, 0))[i] for traffic in seen.traffic))
    peers = collections.Counter((op, peer) for op, peer, _ in seen.transfers)
    for (operation, peer), calls in sorted(peers.items()):
        yield f"  {operation} {'to' if operation == 'send' else 'from'} rank {peer}: {calls}", True
    yield row("FLOPs of matmuls", *seen.flops)


def is_explicit(config: gpt.GPTConfig) -> bool:
    return config.attention == "explicit" or config.dropout > 0


def deadlock(queues: list[Queue]) -> str | None:
    """Executes the queues of all ranks as the strictest network would. A rank has one queue for all
    its groups, and starts an entry when the one before is complete. A collective is complete when
    it is at the head of the queue of each member of its group, and a batch when each of its
    transfers is at the head of both ends. Returns None if all queues run to completion, else a
    message: which ranks wait in a cycle, or which calls disagree."""
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
                said = (f"rank {rank} calls {e.operation} of {e.payload} {e.dtype}"
                        for rank, e in ends.items())  # fmt: skip
                return f"in {place[0]} {[*place[1]]} " + ", ".join(said)
            for rank, event in ends.items():
                heads[rank].remove(event)
            moved = True
    if not any(heads):
        return None

    def other(rank: int) -> int:
        """A rank that this one waits for; itself, if it has finished."""
        for event in heads[rank]:
            for member in event.members:
                if event[:2] not in (e[:2] for e in heads[member]):
                    return member
        return rank

    lines, stuck = [], [rank for rank, head in enumerate(heads) if head]
    ranks = pipeline.cycle(stuck[0], other)
    if not heads[ranks[0]]:
        ranks = [next(rank for rank in stuck if other(rank) == ranks[0]), *ranks]
    for rank in ranks:
        event = next((e for e in heads[rank] if other(rank) in e.members), None)
        lines.append(f"rank {rank} waits for rank {other(rank)} in {event.operation} of "
                     f"{event.payload} over {event.group} {[*event.members]}" if event else
                     f"rank {rank} has finished")  # fmt: skip
    return "deadlock: " + "; ".join(lines)


def main() -> None:
    arguments = options.parser()
    args = arguments.parse_args()
    start = time.perf_counter()
    try:
        ranks = ranks_of(args)
        config = options.check(args, args.world_size)
    except ValueError as error:
        arguments.error(str(error))
    seen, good = [], True
    for rank in ranks:
        # From the second step on, DDP and ZeRO launch in backward.
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
    """Raises ValueError."""
    n = args.world_size = args.world_size or 1
    if args.recompute == "offload":
        raise ValueError("--dry-run with --recompute offload: there is no host to move to")
    if args.all_ranks:
        if n > 8:
            raise ValueError(f"--all-ranks with --world-size {n}: at most 8; give --rank R")
        return list(range(n))
    rank = args.rank or 0
    if rank >= n:
        raise ValueError(f"--rank {rank} of --world-size {n}: give 0 to {n - 1}")
    return [rank]


if __name__ == "__main__":
    main()
