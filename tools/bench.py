"""What this code costs beside PyTorch's own, on this machine: step times in pairs, as ratios.

    python -m tools.bench dp --out bench.json          2 ranks x 1 thread, gloo, float32, AdamW
    python -m tools.bench tp                           ranks share the matrices and not the rows
    python -m tools.bench pp                           8 microbatches of a row through 2 ranks
    python -m tools.bench ckpt                         one rank, explicit attention
    python -m tools.bench 3d                           train_3d.py's loop on t 2 x p 2 x d 2 ranks

Every variant trains the same model from the same weights on the same global batches, in processes
of its own (pp: all in the same ones, step by step in turn: a launch is 5% faster or slower than the
next), once a round, in turn with the others; the one-process baseline runs between them. There
are as many rounds as fit into `--minutes`, and at least two. Where there are enough cores, each
rank, with the threads of its collectives, is bound to one of its own. A number is the median over
rounds of the median step (of the slower rank); the spread is over rounds.

    ratio        our step over the best of PyTorch's settings for the same strategy; below 1: faster
    efficiency   step of one process over (ranks x step), or, with fewer cores than ranks, over
                 (cores x step); of ckpt, the share that is not recompute
    by FLOPs     the efficiency that would be, were every FLOP as quick (ckpt)
    bubble       idle over busy time: simulated with the mean F, B and W of the same step, transfers
                 taking no time, and measured (pp)
    none         ranks that never speak (and so drift apart): what two ranks can reach at best
    links        what the collectives would take if nothing ran beside them, by tools/links.py: with
                 one core a rank, gloo's threads take it from the computation, hidden or not
    wire         bytes that a ring sends per rank and step
    CPU          share of a core that a rank used
    loop         share of what is around the strategies: of the CPU time of a rank's main thread in
                 a step, since a wait (for the slowest rank, in the norm) is the layout's (3d)
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch._dynamo  # once here, not in every forked rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import activation_ckpt
import data
import ddp
import gpt
import measure
import options
import pipeline
import tensor_parallel
import train_3d
import zero
from tools import links
from tools.oracle import launch

RANKS, ROWS, WARMUP, ROUNDS = 2, 8, 2, 2  # ranks along each axis that there is; rounds at least
SIZES = {256: gpt.GPTConfig(8, 4, 256, 256, 256), 768: gpt.GPTConfig(2, 12, 768, 256, 128)}
adamw = functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True)


# --- variants -------------------------------------------------------------------------------------
# Each takes the model and returns step(microbatches, tokens of the batch): F, B and update.


def backward(model: nn.Module, x: Tensor, y: Tensor, valid: int) -> Tensor:
    loss = gpt.cross_entropy(model(x), y) / valid
    loss.backward()
    return loss.detach()


def ladder(model: nn.Module, meet: Callable) -> Callable:
    """all_reduce_gradients or all_reduce_flat of ddp.py: meet(parameters, group) after backward."""
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        loss = sum(backward(model, x, y, valid) for x, y in batch)
        meet(model.parameters(), dist.group.WORLD)
        optimizer.step()
        return loss

    return step


one_process = functools.partial(ladder, meet=lambda *_: None)


def ours(model: nn.Module, attach: Callable, m: int = 1) -> Callable:
    sync = attach(model, dist.group.WORLD, m)
    optimizer = adamw([piece.tensor for piece in sync.pieces()])

    def step(batch: list, valid: int) -> Tensor:
        sync.start()
        loss = sum(backward(model, x, y, valid) for x, y in batch)
        sync.finish()
        sync.before_step()
        optimizer.step()
        sync.after_step()
        return loss

    return step


def hybrid(model: nn.Module, group: dist.ProcessGroup, m: int) -> zero.Zero3:
    """Shards of one rank, so that all ranks replicate: ZeRO-3's code does what DDP does."""
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    return zero.Zero3(model, alone, m, replicas=group)


# PyTorch divides gradients by the number of ranks, so its loss is multiplied by it.


def world_mesh(model: nn.Module) -> DeviceMesh:
    return dist.init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))


def torch_ddp(model: nn.Module, bucket_mb: int, sharded: bool) -> Callable:
    n = dist.get_world_size()
    wrapped = DistributedDataParallel(
        model, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=not sharded
    )
    if sharded:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), torch.optim.AdamW, lr=1e-3, foreach=True,
            parameters_as_bucket_view=True,
        )  # fmt: skip
    else:
        optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad(set_to_none=sharded)
        *first, last = batch
        with wrapped.no_sync():  # gradients meet once a step, as ours
            loss = sum(backward(wrapped, x, y, valid / n) for x, y in first)
        loss = (loss + backward(wrapped, *last, valid / n)) / n
        optimizer.step()
        return loss

    return step


def torch_fsdp(model: nn.Module, reshard: bool) -> Callable:
    mesh, n = world_mesh(model), dist.get_world_size()
    for block in model.h.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        loss = sum(backward(model, x, y, valid / n) for x, y in batch) / n
        optimizer.step()
        return loss

    return step


def ours_tp(model: nn.Module, sequence: bool) -> Callable:
    group = dist.group.WORLD
    tensor_parallel.parallelize(model, tensor_parallel.GPT_PLAN, group, sequence)
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        for x, y in batch:
            loss = tensor_parallel.vocab_parallel_cross_entropy(model(x), y, model.lm_head, group)
            (loss / valid).backward()
            total = total + loss.detach() / valid
        partial = [p.grad for p in model.parameters() if p.partial]
        tensor_parallel.all_reduce_partial(partial, group)
        optimizer.step()
        return total

    return step


def distribute(model: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    """DTensor's plan for the same cuts, of the layers that are here. Its columns are contiguous, so
    each rank's q, k and v are put side by side first; positions of a shard it has no style for, so
    ours stands in."""
    outside = Shard(1) if sequence else Replicate()
    plan = {
        "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "lm_head": ColwiseParallel(
            input_layouts=outside, output_layouts=Shard(-1), use_local_output=False
        ),
    }
    for name, block in model.h.items():
        for p in block.attn.c_attn.parameters():
            with torch.no_grad():
                p.copy_(p.unflatten(0, (3, mesh.size(), -1)).transpose(0, 1).flatten(0, 2))
        for layer in ("attn.c_attn", "mlp.c_fc"):
            plan[f"h.{name}.{layer}"] = ColwiseParallel(input_layouts=outside)
        for layer in ("attn.c_proj", "mlp.c_proj"):
            plan[f"h.{name}.{layer}"] = RowwiseParallel(output_layouts=outside)
        if sequence:
            plan |= {f"h.{name}.{norm}": SequenceParallel() for norm in ("ln_1", "ln_2")}
    if sequence:
        plan["ln_f"] = SequenceParallel()
        model.wpe = tensor_parallel.PositionShard(model.wpe, 1, mesh.get_group(), True)
    here = (name for name, module in model.named_modules() if not isinstance(module, nn.Identity))
    parallelize_module(model, mesh, {name: plan[name] for name in here if name in plan})


def adamw_by_mesh(model: nn.Module) -> torch.optim.Optimizer:
    """foreach takes DTensors of one mesh at a time."""
    kinds: dict[DeviceMesh | None, list] = {}
    for p in model.parameters():
        kinds.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return adamw([{"params": ps} for ps in kinds.values()])


def torch_tp(model: nn.Module, sequence: bool) -> Callable:
    group = dist.group.WORLD
    distribute(model, world_mesh(model), sequence)
    if model.config.tied:
        model.lm_head.weight = model.wte.weight
    optimizer = adamw_by_mesh(model)

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        with loss_parallel():
            loss = sum(backward(model, x, y, valid) for x, y in batch)
        if sequence:
            dist.all_reduce(model.wpe.weight.grad, group=group)
        optimizer.step()
        return loss

    return step


def ours_pp(model: nn.Module, name: str, m: int = ROWS) -> Callable:
    group, p, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    schedule = pipeline.SCHEDULES[name](p, m)
    stages = pipeline.stages_of(schedule)
    n = sum(map(len, stages))
    split = pipeline.split_layers(len(model.h), n)
    width, dtype = model.wte.embedding_dim, torch.float32
    pipeline.take_stages(model, stages[rank], split)
    chunks, program = (pipeline.chunks_of(model, stages[rank], split),
                       pipeline.derive_programs(schedule)[rank])  # fmt: skip
    split_backward = pipeline.splits_backward(schedule[rank])
    pipe = pipeline.Pipeline(chunks, n, group, dtype, "cpu", split_backward)
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        xs, ys = zip(*batch, strict=True)
        shape = (*xs[0].shape, width)
        loss = pipe.run(program, xs, lambda y, i: gpt.cross_entropy(y, ys[i]) / valid, shape)
        optimizer.step()
        return loss

    step.pipe, step.schedule = pipe, schedule
    return step


def torch_pp(model: nn.Module, kind: type, v: int, fold: bool, m: int = ROWS) -> Callable:
    """Stages looped over the ranks, or folded to a V."""
    p, rank = dist.get_world_size(), dist.get_rank()
    device = model.wte.weight.device
    mine = [rank, 2 * p - 1 - rank] if fold else range(rank, v * p, p)
    split = pipeline.split_layers(len(model.h), v * p)
    chunks = pipeline.chunks_of(pipeline.take_stages(model, mine, split), mine, split)
    stages = [PipelineStage(chunk, k, v * p, device, group=dist.group.WORLD)
              for k, chunk in chunks.items()]  # fmt: skip
    return run_stages(stages, kind, m, adamw(model.parameters()))


def run_stages(
    stages: list[PipelineStage], kind: type, m: int, optimizer: torch.optim.Optimizer, d: int = 1
) -> Callable:
    """The step of a rank that holds these, in one of d replicas."""
    tokens = 0
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        return gpt.cross_entropy(logits, y) / (tokens / d)

    schedule = kind(stages if issubclass(kind, PipelineScheduleMulti) else stages[0], m,
                    loss_fn=loss_fn, scale_grads=False)  # fmt: skip

    def step(batch: list, valid: int) -> Tensor:
        nonlocal tokens
        tokens, losses = valid, []
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
        goal = {"target": y, "losses": losses} if last else {}
        schedule.step(*([x] if first else []), **goal)
        optimizer.step()
        return sum((loss.detach() / d for loss in losses), torch.zeros(()))

    return step


def ours_ckpt(model: nn.Module, policy: str) -> Callable:
    activation_ckpt.checkpoint_blocks(model.h, policy)
    return one_process(model)


def torch_ckpt(model: nn.Module, core: bool, reentrant: bool) -> Callable:
    for block in model.h.values():
        module = block.attn.core if core else block
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=reentrant)
    return one_process(model)


def make_trainer(config: gpt.GPTConfig, read: Callable, stage: str) -> train_3d.Trainer:
    """The real loop's, on microbatches of a row, with the optimizer of the other variants. stage:
    ZeRO's, and perhaps more of its flags."""
    flags = f"--tp {RANKS} --pp {RANKS} --clip 0 --micro-batch-size 1 --zero {stage}"
    args = options.parser().parse_args([*flags.split(), f"--global-batch-size={ROWS}"])
    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"))
    trainer.optimizer = adamw([piece.tensor for piece in trainer.sync.pieces()])
    trainer.learning_rate = lambda step: adamw.keywords["lr"]
    return trainer


def ours_3d(model: nn.Module, stage: str) -> Callable:
    tokens = []  # of this replica
    trainer = make_trainer(model.config, lambda step, rows: tokens, stage)

    def step(batch: list, valid: int) -> Tensor:
        tokens[:] = (torch.cat(parts) for parts in zip(*batch, strict=True))
        return trainer.step(0)[0] / RANKS**2  # the whole loss is on every rank

    return step


def torch_3d(model: nn.Module, reshard: bool, m: int = ROWS // RANKS) -> Callable:
    """A stage whose layers are cut by DTensor, then sharded by fully_shard, which sums gradients in
    the last microbatch only, as pipelining tells it to. There is no gradient norm in its step."""
    device = model.wte.weight.device
    mesh = dist.init_device_mesh(device.type, (RANKS,) * 3, mesh_dim_names=("pp", "dp", "tp"))
    group, k = mesh["pp"].get_group(), mesh["pp"].get_local_rank()
    pipeline.take_stages(model, [k], pipeline.split_layers(len(model.h), RANKS))
    distribute(model, mesh["tp"], sequence=False)
    for module in (*model.h.values(), model):
        fully_shard(module, mesh=mesh["dp"], reshard_after_forward=reshard)
    stage = PipelineStage(model, k, RANKS, device, group=group)
    step = run_stages([stage], Schedule1F1B, m, adamw_by_mesh(model), d=RANKS)
    return loss_parallel()(step)


def _zero(stage: int, m: int = 1, **options) -> Callable:
    attach = functools.partial(zero.STAGES[stage], **options)
    return functools.partial(ours, attach=attach, m=m)


def _ddp(megabytes: int) -> Callable:
    return functools.partial(
        ours, attach=functools.partial(ddp.DDP, bucket_bytes=megabytes * 2**20)
    )


KEPT = {"reshard_after_forward": False}
# (strategy, variant) -> (microbatches, ours)
OURS = {
    ("none", "m 1"): (1, one_process),
    ("none", "m 4"): (4, one_process),
    ("ddp", "naive"): (1, functools.partial(ladder, meet=ddp.all_reduce_gradients)),
    ("ddp", "flat"): (1, functools.partial(ladder, meet=ddp.all_reduce_flat)),
    ("ddp", "bucketed 25 MB"): (1, _ddp(25)),
    ("ddp", "bucketed 4 MB"): (1, _ddp(4)),
    ("zero-1", "m 1"): (1, _zero(1)),
    ("zero-2", "m 1"): (1, _zero(2)),
    ("zero-2", "m 4"): (4, _zero(2, 4)),
    ("zero-3", "m 1"): (1, _zero(3)),
    ("zero-3", "m 4"): (4, _zero(3, 4)),
    ("zero-3", "kept, m 1"): (1, _zero(3, **KEPT)),
    ("zero-3", "kept, m 4"): (4, _zero(3, 4, **KEPT)),
    ("hybrid", "2 replicas x 1"): (1, functools.partial(ours, attach=hybrid)),
}
# PyTorch's: name -> (microbatches, variant, whom of ours it stands beside)
BUCKETED = [("ddp", "bucketed 25 MB"), ("ddp", "bucketed 4 MB")]
THEIRS = {
    "DDP 25 MB": (1, functools.partial(torch_ddp, bucket_mb=25, sharded=False), BUCKETED),
    "DDP 4 MB": (1, functools.partial(torch_ddp, bucket_mb=4, sharded=False), BUCKETED),
    "ZeroRedundancyOptimizer 25 MB": (
        1, functools.partial(torch_ddp, bucket_mb=25, sharded=True), [("zero-1", "m 1")]),
    "ZeroRedundancyOptimizer 4 MB": (
        1, functools.partial(torch_ddp, bucket_mb=4, sharded=True), [("zero-1", "m 1")]),
    "fully_shard": (1, functools.partial(torch_fsdp, reshard=True), [("zero-3", "m 1")]),
    "fully_shard, m 4": (4, functools.partial(torch_fsdp, reshard=True), [("zero-3", "m 4")]),
    "fully_shard kept": (1, functools.partial(torch_fsdp, reshard=False),
                         [("zero-2", "m 1"), ("zero-3", "kept, m 1")]),
    "fully_shard kept, m 4": (4, functools.partial(torch_fsdp, reshard=False),
                              [("zero-2", "m 4"), ("zero-3", "kept, m 4")]),
}  # fmt: skip
TP_OURS = {
    (kind, f"m {m}"): (m, functools.partial(ours_tp, sequence=kind == "tp+sp"))
    for kind in ("tp", "tp+sp")
    for m in (1, 8)
}
TP_THEIRS = {
    f"DTensor {kind}, {m}": (build, functools.partial(torch_tp, sequence=kind == "tp+sp"),
                             [(kind, m)])
    for (kind, m), (build, _) in TP_OURS.items()
}  # fmt: skip
PP_OURS = {
    (name, f"m {ROWS}"): (ROWS, functools.partial(ours_pp, name=name))
    for name in pipeline.SCHEDULES
}
PP_THEIRS = {
    f"pipelining {kind.__name__.removeprefix('Schedule')}": (
        ROWS, functools.partial(torch_pp, kind=kind, v=v, fold=fold),
        [(name, f"m {ROWS}") for name in names])
    for kind, v, fold, names in (
        (ScheduleGPipe, 1, False, ["gpipe"]), (Schedule1F1B, 1, False, ["1f1b", "zb-h1"]),
        (ScheduleInterleaved1F1B, 2, False, ["interleaved"]),
        (ScheduleZBVZeroBubble, 2, True, ["zb-v"]),
    )
}  # fmt: skip
CKPT_OURS = {
    ("recompute", policy): (1, functools.partial(ours_ckpt, policy=policy))
    for policy in ("full", "selective", "offload")
}
CKPT_THEIRS = {
    f"checkpoint of {what}{', reentrant' * reentrant}": (
        1, functools.partial(torch_ckpt, core=policy == "selective", reentrant=reentrant),
        [("recompute", policy)])
    for policy, what in (("full", "blocks"), ("selective", "attention"))
    for reentrant in (False, True)
}  # fmt: skip
LOOP_OURS = {
    ("3d", f"ZeRO-{name}"): (ROWS // RANKS, functools.partial(ours_3d, stage=stage))
    for name, stage in {
        "0": "0", "1": "1", "3": "3", "3 kept": "3 --zero-reshard-after-forward 0"
    }.items()
}
LOOP_THEIRS = {
    f"pipelining, DTensor, fully_shard{kept}": (
        ROWS // RANKS, functools.partial(torch_3d, reshard=not kept), list(LOOP_OURS))
    for kept in ("", " kept")
}  # fmt: skip
BASELINE = "one process"


class Suite(NamedTuple):
    ours: dict
    theirs: dict
    t: int = 1
    p: int = 1
    d: int = 1
    attention: str = "sdpa"
    together: bool = False  # all variants in one launch

    @property
    def ranks(self) -> int:
        return self.t * self.p * self.d

    def config(self, h: int) -> gpt.GPTConfig:
        """With blocks for two stages a rank, and untied where PyTorch's cannot tie."""
        return dataclasses.replace(
            SIZES[h], attention=self.attention, n_layer=max(SIZES[h].n_layer, 2 * self.p),
            tied=self.p == 1,
        )  # fmt: skip


SUITES = {
    "dp": Suite(OURS, THEIRS, d=RANKS),
    "tp": Suite(TP_OURS, TP_THEIRS, t=RANKS),
    "pp": Suite(PP_OURS, PP_THEIRS, p=RANKS, together=True),
    "ckpt": Suite(CKPT_OURS, CKPT_THEIRS, attention="explicit"),
    "3d": Suite(LOOP_OURS, LOOP_THEIRS, t=RANKS, p=RANKS, d=RANKS),
}


# --- one launch -----------------------------------------------------------------------------------


def on_rank(suite: Suite, variants: dict, h: int, steps: int, count: bool) -> dict:
    """Train on this rank's rows, every variant in turn at each step. By variant: seconds and losses
    by step, CPU seconds per second; if `count`, calls and wire bytes of one more step."""
    config = suite.config(h)
    bind()
    d = min(suite.d, dist.get_world_size())  # 1 of the one process
    share, replica = ROWS // d, dist.get_rank() // suite.t % d
    mine = slice(replica * share, (replica + 1) * share)
    built = {key: (m, build(gpt.build(config, seed=0))) for key, (m, build) in variants.items()}
    results = {key: {"seconds": [], "losses": [], "cpu": 0.0, "wire": {},
                     "spans": [] if hasattr(step, "pipe") else None}
               for key, (_, step) in built.items()}  # fmt: skip
    for i in range(WARMUP + steps + count):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(config.vocab_size, (ROWS, config.seq_len + 1), generator=generator)
        x, y = tokens[mine, :-1], tokens[mine, 1:]
        for key, (m, step) in built.items():
            result, seen = results[key], measure.Collectives()
            batch = list(zip(x.chunk(m), y.chunk(m), strict=True))
            if WARMUP <= i < WARMUP + steps and result["spans"] is not None:
                trace = measure.Trace(torch.device("cpu"))
                step.pipe.watch = lambda action, trace=trace: trace.span("", action=action)
                result["spans"].append(trace.spans)
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            with seen if i == WARMUP + steps and not unseen(key) else contextlib.nullcontext():
                loss = step(batch, ROWS * config.seq_len)
            if i == WARMUP + steps:
                result["wire"] = wire_of(seen)
                continue
            result["losses"].append(float(loss))
            if i >= WARMUP:
                result["seconds"].append(time.perf_counter() - start)
                result["cpu"] += (time.process_time() - cpu_start) / steps
    for key, (_, step) in built.items():
        results[key]["cpu"] /= statistics.mean(results[key]["seconds"])
        if results[key]["spans"] is not None:
            results[key]["schedule"] = step.schedule
    return results


def unseen(key) -> bool:
    """DTensor's collectives are of another kind, which measure.py does not see."""
    return "DTensor" in str(key)


def wire_of(seen: measure.Collectives) -> dict[str, tuple[int, float]]:
    """(calls, bytes that a ring sends) by collective."""
    wire: dict[str, tuple[int, float]] = {}
    for call in seen.calls:
        if call.ranks > 1:
            # A broadcast is a tree: about the payload, once.
            operation = call.operation if call.operation in links.WIRE else "p2p"
            calls, sent = wire.get(operation, (0, 0.0))
            sent += links.WIRE[operation](call.ranks) * call.payload * call.dtype.itemsize
            wire[operation] = (calls + 1, sent)
    return wire


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def bind() -> None:
    """This rank to a core of its own, if there is one for each."""
    mine = cores()[dist.get_rank() : dist.get_rank() + 1]
    if len(cores()) >= dist.get_world_size() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)


def link_costs() -> list[dict]:
    """Latency and bandwidth of each operation between the ranks."""
    bind()
    return links.fit(links.table([64, 25 * 1024], 10, torch.device("cpu"), lambda line: None))


def other_cpu_seconds() -> float:
    """CPU seconds that this machine has spent, by everyone (0 where /proc/stat is not)."""
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        user, nice, system = (int(n) for n in file.readline().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return 0.0


def run(suite: Suite, variants: dict, h: int, steps: int, ranks: int, count: bool) -> dict:
    """One launch. By variant: the slower rank's median step and what else is reported."""
    before, children = other_cpu_seconds(), sum(os.times()[2:4])
    start = time.perf_counter()
    launched = launch(ranks, on_rank, suite, variants, h, steps, count, timeout=600)
    wall = time.perf_counter() - start
    foreign = other_cpu_seconds() - before - (sum(os.times()[2:4]) - children)

    def summary(results: list[dict]) -> dict:
        each = [max(times) for times in zip(*(r["seconds"] for r in results), strict=True)]
        losses, spans = (zip(*(r[kind] or () for r in results), strict=True)
                         for kind in ("losses", "spans"))  # fmt: skip
        return {
            "ms": 1e3 * statistics.median(each),
            "losses": [sum(parts[:: suite.t]) for parts in losses],  # the same on tp ranks
            "cpu": statistics.mean(r["cpu"] for r in results),
            "wire": results[0]["wire"],
            "foreign": max(0.0, foreign / wall),
            "bubble": bubbles(results[0]["schedule"], spans) if results[0]["spans"] else None,
        }

    return {key: summary([r[key] for r in launched]) for key in variants}


def bubbles(schedule: pipeline.Schedule, spans: Iterable) -> tuple[float, float]:
    """Medians over steps: (simulated, measured). spans: [step][rank]."""
    both = []
    for ranks in spans:
        step = [pipeline.Span(rank, known["action"], start, end) for rank, mine in enumerate(ranks)
                for _, start, end, known in mine]  # fmt: skip
        mean = pipeline.mean_times(step)
        simulated = pipeline.simulate(schedule, lambda a, mean=mean: mean[a.kind, a.stage])
        both.append((pipeline.bubble(simulated), pipeline.bubble(step)))
    return tuple(statistics.median(side) for side in zip(*both, strict=True))


def overhead(name: str, m: int = 64) -> float:
    """Microseconds an action, of a pipeline whose stages compute next to nothing."""
    p, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    schedule = pipeline.SCHEDULES[name](p, m)
    split_backward = pipeline.splits_backward(schedule[rank])
    bind()
    chunks = {rank: nn.Linear(1, 1)}
    pipe = pipeline.Pipeline(chunks, p, group, torch.float32, "cpu", split_backward)
    program, x = pipeline.derive_programs(schedule)[rank], torch.ones(m, 1, 1, requires_grad=True)
    each = []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        pipe.run(program, x, lambda y, i: y.sum(), (1, 1))
        each.append(1e6 * (time.perf_counter() - start) / len(schedule[rank]))
    return statistics.median(each)


def loop_shares(config: gpt.GPTConfig, steps: int = 10) -> dict[str, float]:
    """What reading, norm and log take of this rank's step, with ZeRO-1; every rank logs, though in
    the real loop only rank 0 does."""
    tokens, _ = data.load(None, config.seq_len, config.vocab_size)
    spent: dict[str, float] = {}

    def timed(kind: str, function: Callable) -> Callable:
        def call(*args):
            start = time.thread_time()
            result = function(*args)
            spent[kind] = spent.get(kind, 0.0) + time.thread_time() - start
            return result

        return call

    read = functools.partial(data.batch, tokens, seq_len=config.seq_len, seed=0)
    trainer = make_trainer(config, timed("data", read), stage="1")
    trainer._global_stats = timed("norm", trainer._global_stats)
    with tempfile.NamedTemporaryFile("w") as file, contextlib.redirect_stdout(file):
        logger = measure.Logger(file.name, steps, steps, ROWS * config.seq_len, 1.0)
        log = timed("log", logger.step)
        whole = timed("step", lambda i: log(i, trainer.step(i), trainer.learning_rate(i)))
        for i in range(WARMUP):
            trainer.step(i)
        spent.clear()
        logger.start()
        for i in range(steps):
            whole(i)
    return {kind: seconds / spent["step"] for kind, seconds in spent.items() if kind != "step"}


# --- the table ------------------------------------------------------------------------------------


def collect(
    suite: Suite, sizes: list[int], minutes: float, steps: int, say: Callable
) -> dict[int, dict]:
    """All launches, in turn: by size, by variant, one a round. A round that would end after
    `minutes` is not begun, once there are ROUNDS of them."""
    variants = {key: (m, build) for key, (m, build) in suite.ours.items()}
    variants |= {name: (m, build) for name, (m, build, _) in suite.theirs.items()}
    runs: dict[int, dict] = {h: {key: [] for key in (BASELINE, *variants)} for h in sizes}
    start, rounds, longest = time.perf_counter(), 0, 0.0
    while rounds < ROUNDS or time.perf_counter() - start + longest < 60 * minutes:
        began = time.perf_counter()
        for h in sizes:
            order = sorted(variants, key=str)
            order = order[rounds % 2 :: 2] + order[1 - rounds % 2 :: 2]  # another one before it
            alone = {BASELINE: (ROWS if suite.p > 1 else 1, one_process)}
            launches = [order] if suite.together else [[key] for key in order]
            for j, keys in enumerate(launches):
                for group, ranks in [({key: variants[key] for key in keys}, suite.ranks)] + [
                    (alone, 1)
                ] * (j % 8 == 0):
                    results = run(suite, group, h, steps, ranks, count=rounds == 0)
                    for key, result in results.items():
                        runs[h][key].append(result)
            say(f"round {rounds + 1}, h {h}: done after {time.perf_counter() - start:.0f} s")
        rounds, longest = rounds + 1, max(longest, time.perf_counter() - began)
    return runs


def rows_of(
    suite: Suite, h: int, runs: dict[object, list[dict]], costs: list[dict]
) -> list[dict]:
    """A row for each variant of ours, beside the fastest of PyTorch's for the same strategy."""
    ms = {key: statistics.median(r["ms"] for r in rs) for key, rs in runs.items()}
    one, expected = ms[BASELINE], runs[BASELINE][0]["losses"]
    fit = {c["operation"]: (c["latency_us"] / 1e6, c["gb_per_s"]) for c in costs}

    def describe(key) -> dict:
        wire, times = runs[key][0]["wire"], [r["ms"] for r in runs[key]]
        links_s = sum(
            calls * fit[op][0] + (sent / fit[op][1] / 1e9 if fit[op][1] else 0.0)
            for op, (calls, sent) in wire.items()
        )
        losses = (r["losses"] for r in runs[key])
        bubble = [r["bubble"] for r in runs[key] if r["bubble"]]
        return {
            "spread_ms": max(times) - min(times),
            "efficiency": one / (min(suite.ranks, len(cores())) * ms[key]),
            "wire_bytes": None if unseen(key) else sum(sent for _, sent in wire.values()),
            "links_ms": None if unseen(key) else 1e3 * links_s,
            "cpu_share": statistics.median(r["cpu"] for r in runs[key]),
            "foreign_cpu": statistics.median(r["foreign"] for r in runs[key]),
            "bubble": [statistics.median(side) for side in zip(*bubble, strict=True)],
            "max_loss_difference": measure.largest(
                abs(a - b) for ls in losses for a, b in zip(ls, expected, strict=True)
            ),
        }  # fmt: skip

    rows = []
    for key in suite.ours:
        beside = [name for name, (_, _, keys) in suite.theirs.items() if key in keys]
        best = min(beside, key=ms.get, default=None)
        rows.append({
            "strategy": key[0], "variant": key[1], "h": h, "ours_ms": ms[key],
            "torch": best, "torch_ms": ms[best] if best else None,
            "ratio": ms[key] / ms[best] if best else None,
        } | describe(key))  # fmt: skip
        if key[0] == "recompute":
            c = suite.config(h)
            flops = [activation_ckpt.predicted_flops(c.n_layer, ROWS, c.seq_len, h, policy)
                     + 6 * ROWS * c.seq_len * h * c.vocab_size for policy in ("none", key[1])]
            rows[-1]["efficiency_by_flops"] = flops[0] / flops[1]  # fmt: skip
    for name in suite.theirs:
        rows.append({
            "strategy": "torch", "variant": name, "h": h, "ours_ms": None, "torch": name,
            "torch_ms": ms[name], "ratio": None,
        } | describe(name))  # fmt: skip
    return rows


COLUMNS = ("strategy", "variant", "h", "step", "+-", "PyTorch's best", "its step", "ratio",
           "efficiency", "by FLOPs", "bubble", "wire", "links", "CPU", "others' CPU",
           "d loss")  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        mine = r["ours_ms"] or r["torch_ms"]
        beside = r["ratio"] is not None
        cells = (
            r["strategy"], r["variant"], r["h"], f"{mine:.0f} ms", f"{r['spread_ms']:.0f}",
            r["torch"] if beside else "", f"{r['torch_ms']:.0f} ms" if beside else "",
            f"{r['ratio']:.2f}" if beside else "", f"{r['efficiency']:.2f}",
            f"{r['efficiency_by_flops']:.2f}" if "efficiency_by_flops" in r else "",
            "{:.3f}, {:.3f}".format(*r["bubble"]) if r["bubble"] else "",
            "" if r["links_ms"] is None else f"{r['wire_bytes'] / 1e6:.1f} MB",
            "" if r["links_ms"] is None else f"{r['links_ms']:.0f} ms", f"{r['cpu_share']:.2f}",
            f"{r['foreign_cpu']:.2f}", f"{r['max_loss_difference']:.0e}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("suite", choices=SUITES)
    add("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES, metavar="H",
        help=f"hidden sizes, of {', '.join(map(str, SIZES))}")  # fmt: skip
    add("--minutes", type=float, default=9, metavar="N", help="no round begins that ends later")
    add("--steps", type=int, default=3, metavar="N", help="timed steps of a launch")
    add("--out", metavar="FILE", help="the rows as JSON")
    args = arguments.parse_args()
    suite = SUITES[args.suite]

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"{suite.ranks} ranks x 1 thread on {len(cores())} cores, gloo, torch {torch.__version__}, "
        f"float32, global batch {ROWS} rows")  # fmt: skip
    costs, rows = launch(RANKS, link_costs)[0], []
    for name in ("1f1b", "zb-h1") if args.suite == "pp" else ():
        us = [max(launch(p, overhead, name)) for p in (1, RANKS)]
        say(f"executor, {name}: {us[0]:.0f} us an action with autograd's share; {us[1]:.0f} with "
            f"transfers between {RANKS} ranks")  # fmt: skip
    for h in args.sizes if args.suite == "3d" else ():
        shares = launch(suite.ranks, loop_shares, suite.config(h))
        most = max(shares, key=lambda of: sum(of.values()))
        parts = ", ".join(f"{kind} {share:.2%}" for kind, share in most.items())
        say(f"h {h}: loop {sum(most.values()):.2%} of a step's CPU time, where it is most: {parts}")
    for h, runs in collect(suite, args.sizes, args.minutes, args.steps, say).items():
        one = [r["ms"] for r in runs[BASELINE]]
        say(f"h {h}: one process {statistics.median(one):.0f} ms, from {min(one):.0f} to "
            f"{max(one):.0f} in {len(one)} launches")  # fmt: skip
        rows += rows_of(suite, h, runs, costs)
    say("\n" + markdown(rows))
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"ranks": suite.ranks, "cores": len(cores()), "torch": torch.__version__,
                       "backend": "gloo", "links": costs, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
