"""Compares the step times of this repository with those of PyTorch's implementations.

    make bench-dp      python -m tools.bench.compare dp      2 ranks, data parallelism and ZeRO
    make bench-tp      python -m tools.bench.compare tp      2 ranks, tensor parallelism
    make bench-cp  python -m tools.bench.compare cp  2 ranks, context parallelism, one long row
    make bench-pp  python -m tools.bench.compare pp  2 ranks, pipelines, 8 microbatches of one row
    make bench-ckpt  python -m tools.bench.compare ckpt  1 rank, recomputation, explicit attention
    make bench-3d  python -m tools.bench.compare 3d  8 ranks, t = p = d = 2, train_3d.py's step

t, c, p and d are the sizes of tensor, context, pipeline and data parallelism, m is the number of
microbatches, h the hidden size, s the sequence length. Ranks are forked processes of one thread
that communicate through gloo. All variants train the same model in float32 with AdamW, from the
same weights and on the same global batches, and their losses are compared with those of one
process.

A round launches each variant once, in separate processes, with one-process runs in between. The
variants of `pp` and `cp` share one launch and alternate step by step, because launches differ by
more than variants do. Rounds are repeated for `--minutes`, and at least twice. If there are enough
cores, each rank is bound to one of them. The result is a Markdown table; `--out` writes it as JSON.
A row named "torch" is one of PyTorch's variants. The variant "none" does not communicate, so it is
a lower bound of the step time. The columns:

    step             time of a step on its slowest rank: median per launch, median over rounds
    +-               largest minus smallest median of a launch
    PyTorch's best   PyTorch's fastest variant of the same strategy
    ratio            step / PyTorch's best step; below 1, this repository is faster
    efficiency       step of one process / (n x step), n = min(ranks, cores)
    by FLOPs         efficiency expected from the FLOPs of recomputation alone (ckpt)
    bubble           idle time / busy time (pp): simulated with the measured duration of F, B and W
                     and with instantaneous transfers, then measured
    wire             bytes that a ring sends, per rank and step
    links            predicted time of the collectives without overlap, from tools/bench/links.py
    CPU              CPU time of a rank / wall time
    other CPU        CPU time of other processes on this machine / wall time
    d loss           largest difference from the losses of one process

`cp` also prints the step of each variant over that of one process, and that of ring attention over
gathered keys and values: the median and the range of the rounds. context_parallel() of PyTorch does
not run on a CPU. The ring attention that it calls does, if it is given the CPU's kernels.

`3d` also prints which fraction of a step's CPU time is spent outside the strategies, on data,
gradient norm and log. It is CPU time of the main thread, so waiting for other ranks is excluded.
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
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch._dynamo  # imported before the fork: otherwise every rank would import it
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
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
import context_parallel
import data
import ddp
import gpt
import measure
import options
import pipeline
import schedules
import tensor_parallel
import train_3d
import zero3
from logger import Logger
from tools.bench import links
from tools.plan import bubble, cost
from tools.verify.oracle import launch

# RANKS: ranks along each parallel axis of a suite. ROUNDS: the least number of rounds.
RANKS, ROWS, WARMUP, ROUNDS = 2, 8, 2, 2
SIZES = {256: gpt.GPTConfig(8, 4, 256, 256, 256), 768: gpt.GPTConfig(2, 12, 768, 256, 128)}
LONG = {s: gpt.GPTConfig(1, 4, 256, 256, s) for s in (2048, 8192)}  # of `cp`, one row
adamw = functools.partial(torch.optim.AdamW, lr=1e-3, foreach=True)


# --- variants -------------------------------------------------------------------------------------
# A variant takes the model and returns step(microbatches, tokens of the global batch), which runs
# forward, backward and the optimizer, and returns this rank's share of the loss.


def backward(model: nn.Module, x: Tensor, y: Tensor, valid: int) -> Tensor:
    loss = gpt.cross_entropy(model(x), y) / valid
    loss.backward()
    return loss.detach()


def plain_step(model: nn.Module, reduce: Callable) -> Callable:
    """Calls reduce(parameters, group) once per step, after the last backward."""
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        loss = sum(backward(model, x, y, valid) for x, y in batch)
        reduce(model.parameters(), dist.group.WORLD)
        optimizer.step()
        return loss

    return step


one_process = functools.partial(plain_step, reduce=lambda *_: None)


def repo_dp(model: nn.Module, attach: Callable, m: int = 1) -> Callable:
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


def hybrid(model: nn.Module, group: dist.ProcessGroup, m: int) -> zero3.Zero3:
    """ZeRO-3 with shard groups of one rank: every rank is a replica, as with DDP."""
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    return zero3.Zero3(model, alone, m, replicas=group)


# PyTorch averages gradients over ranks where this repository sums them. Its variants multiply the
# loss by the number of ranks, so that the gradients are equal.


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
        with wrapped.no_sync():  # reduce gradients once per step, as ddp.py does
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


def repo_tp(model: nn.Module, sequence: bool) -> Callable:
    group = dist.group.WORLD
    tensor_parallel.parallelize(model, gpt.PLAN, group, sequence)
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        for x, y in batch:
            loss = tensor_parallel.vocab_parallel_cross_entropy(model(x), y, model.lm_head, group)
            (loss / valid).backward()
            total = total + loss.detach() / valid
        tensor_parallel.all_reduce_partial((p, p.grad) for p in model.parameters())
        optimizer.step()
        return total

    return step


def distribute(model: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    """Shard the layers of this stage with DTensor, as tensor_parallel.py does.

    DTensor splits a matrix into contiguous rows, so the fused q, k, v matrix is reordered first:
    the q, k and v of one rank become neighbours. DTensor has no style for a position embedding
    under sequence parallelism, so gpt.PositionEmbedding slices the table.
    """
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
        model.wpe.tokens = gpt.Subset().chunk(mesh.get_local_rank(), mesh.size())
    here = (name for name, module in model.named_modules() if not isinstance(module, nn.Identity))
    parallelize_module(model, mesh, {name: plan[name] for name in here if name in plan})


def adamw_by_mesh(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with one parameter group per mesh: foreach cannot mix DTensors of two meshes."""
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


def zigzag_step(model: nn.Module, attach: Callable) -> Callable:
    """attach(model) makes attention context-parallel. DDP sums the gradients."""
    c, rank = dist.get_world_size(), dist.get_rank()
    tokens = gpt.Subset(context_parallel.zigzag(c, rank), 2 * c)
    for module in model.modules():
        if hasattr(module, "tokens"):
            module.tokens = tokens
    attach(model)
    step = repo_dp(model, ddp.DDP)
    return lambda batch, valid: step([[tokens.take(t, 1) for t in pair] for pair in batch], valid)


def repo_cp(model: nn.Module, method: str) -> Callable:
    how = {"group": dist.group.WORLD, "method": method}
    return zigzag_step(model, functools.partial(context_parallel.parallelize_attention, **how))


class TorchRing(torch.autograd.Function):
    """PyTorch's ring attention over a zigzag, with the kernels of the CPU."""

    @staticmethod
    def forward(ctx, *qkv: Tensor) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        ring = torch_ring._templated_ring_attention
        out, lse = ring(dist.group.WORLD, 2, kernel, *qkv, is_causal=True)
        ctx.save_for_backward(*qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        ring = torch_ring._templated_ring_attention_backward
        how = {"is_causal": True, "dropout_p": 0.0}
        return ring(dist.group.WORLD, 2, kernel, grad, "grad_out", *ctx.saved_tensors, **how)


def torch_cp(model: nn.Module, rotate: str) -> Callable:
    def core(*qkv: Tensor) -> Tensor:
        torch_ring.set_rotate_method(rotate)  # a global setting
        return TorchRing.apply(*qkv)

    def attach(model: nn.Module) -> None:
        for block in model.h.values():
            block.attn.core.forward = core

    return zigzag_step(model, attach)


def repo_pp(model: nn.Module, name: str, m: int = ROWS) -> Callable:
    group, p, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    schedule = schedules.SCHEDULES[name](p, m)
    stages = schedules.stages_of(schedule)
    n = sum(map(len, stages))
    split = pipeline.split_layers(len(model.h), n)
    width, dtype = model.wte.embedding_dim, torch.float32
    pipeline.take_stages(model, stages[rank], split)
    chunks, program = (pipeline.chunks_of(model, stages[rank], split),
                       pipeline.derive_programs(schedule)[rank])  # fmt: skip
    pipe = pipeline.Pipeline(chunks, n, group, dtype, "cpu", program)
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


def torch_pp(model: nn.Module, kind: type, chunks: int, fold: bool, m: int = ROWS) -> Callable:
    """Schedule `kind` with `chunks` stages per rank, assigned round-robin or (`fold`) in a V."""
    p, rank = dist.get_world_size(), dist.get_rank()
    device = model.wte.weight.device
    mine = [rank, 2 * p - 1 - rank] if fold else range(rank, chunks * p, p)
    split = pipeline.split_layers(len(model.h), chunks * p)
    modules = pipeline.chunks_of(pipeline.take_stages(model, mine, split), mine, split)
    stages = [PipelineStage(module, k, chunks * p, device, group=dist.group.WORLD)
              for k, module in modules.items()]  # fmt: skip
    return run_stages(stages, kind, m, adamw(model.parameters()))


def run_stages(
    stages: list[PipelineStage], kind: type, m: int, optimizer: torch.optim.Optimizer, d: int = 1
) -> Callable:
    """The step of a rank that holds `stages` and is in one of d replicas."""
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
        targets = {"target": y, "losses": losses} if last else {}
        schedule.step(*([x] if first else []), **targets)
        optimizer.step()
        return sum((loss.detach() / d for loss in losses), torch.zeros(()))

    return step


def repo_ckpt(model: nn.Module, policy: str) -> Callable:
    activation_ckpt.checkpoint_blocks(model.h, policy)
    return one_process(model)


def torch_ckpt(model: nn.Module, core: bool, reentrant: bool) -> Callable:
    for block in model.h.values():
        module = block.attn.core if core else block
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=reentrant)
    return one_process(model)


def make_trainer(config: gpt.GPTConfig, read: Callable, stage: str) -> train_3d.Trainer:
    """train_3d.py's trainer, with microbatches of one row and the optimizer of the other variants.

    stage: the value of --zero, possibly followed by more flags.
    """
    flags = f"--tp {RANKS} --pp {RANKS} --grad-clip 0 --micro-batch-size 1 --zero {stage}"
    args = options.parser().parse_args([*flags.split(), f"--global-batch-size={ROWS}"])
    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"))
    trainer.optimizer = adamw([piece.tensor for piece in trainer.sync.pieces()])
    trainer.learning_rate = lambda step: adamw.keywords["lr"]
    return trainer


def repo_3d(model: nn.Module, stage: str) -> Callable:
    tokens = []  # inputs and targets of this replica
    trainer = make_trainer(model.config, lambda step, rows: tokens, stage)

    def step(batch: list, valid: int) -> Tensor:
        tokens[:] = (torch.cat(parts) for parts in zip(*batch, strict=True))
        return trainer.step(0)[0] / RANKS**2  # every pp and dp rank returns the full loss

    return step


def torch_3d(model: nn.Module, reshard: bool, m: int = ROWS // RANKS) -> Callable:
    """PyTorch's composition: 1F1B over pp, DTensor over tp, fully_shard over dp.

    `torch.distributed.pipelining` makes fully_shard reduce gradients in the last microbatch only.
    The step has no gradient norm.
    """
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
    attach = functools.partial(zero3.STAGES[stage], **options)
    return functools.partial(repo_dp, attach=attach, m=m)


def _ddp(megabytes: int) -> Callable:
    return functools.partial(
        repo_dp, attach=functools.partial(ddp.DDP, bucket_bytes=megabytes * 2**20)
    )


KEEP = {"reshard_after_forward": False}
# This repository: (strategy, variant) -> (microbatches, builder).
DP_VARIANTS = {
    ("none", "m 1"): (1, one_process),
    ("none", "m 4"): (4, one_process),
    ("ddp", "naive"): (1, functools.partial(plain_step, reduce=ddp.all_reduce_gradients)),
    ("ddp", "flat"): (1, functools.partial(plain_step, reduce=ddp.all_reduce_flat)),
    ("ddp", "bucketed 25 MB"): (1, _ddp(25)),
    ("ddp", "bucketed 4 MB"): (1, _ddp(4)),
    ("zero-1", "m 1"): (1, _zero(1)),
    ("zero-2", "m 1"): (1, _zero(2)),
    ("zero-2", "m 4"): (4, _zero(2, 4)),
    ("zero-3", "m 1"): (1, _zero(3)),
    ("zero-3", "m 4"): (4, _zero(3, 4)),
    ("zero-3", "kept, m 1"): (1, _zero(3, **KEEP)),
    ("zero-3", "kept, m 4"): (4, _zero(3, 4, **KEEP)),
    ("hybrid", "2 replicas x 1"): (1, functools.partial(repo_dp, attach=hybrid)),
}
# PyTorch: name -> (microbatches, builder, the variants above that are compared with it).
BUCKETED = [("ddp", "bucketed 25 MB"), ("ddp", "bucketed 4 MB")]
DP_TORCH = {
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
TP_VARIANTS = {
    (kind, f"m {m}"): (m, functools.partial(repo_tp, sequence=kind == "tp+sp"))
    for kind in ("tp", "tp+sp")
    for m in (1, 8)
}
TP_TORCH = {
    f"DTensor {kind}, {m}": (build, functools.partial(torch_tp, sequence=kind == "tp+sp"),
                             [(kind, m)])
    for (kind, m), (build, _) in TP_VARIANTS.items()
}  # fmt: skip
CP_VARIANTS = {
    ("cp", method): (1, functools.partial(repo_cp, method=method))
    for method in ("gathered", "ring", "ulysses")
}
CP_TORCH = {
    f"torch ring, {rotate}": (1, functools.partial(torch_cp, rotate=rotate), [*CP_VARIANTS])
    for rotate in ("allgather", "alltoall")
}
CP_PAIRS = [
    *((key, "one process") for key in (*CP_VARIANTS, *CP_TORCH)),
    (("cp", "ring"), ("cp", "gathered")),
]
PP_VARIANTS = {
    (name, f"m {ROWS}"): (ROWS, functools.partial(repo_pp, name=name))
    for name in schedules.SCHEDULES
}
PP_TORCH = {
    f"pipelining {kind.__name__.removeprefix('Schedule')}": (
        ROWS, functools.partial(torch_pp, kind=kind, chunks=chunks, fold=fold),
        [(name, f"m {ROWS}") for name in names])
    for kind, chunks, fold, names in (
        (ScheduleGPipe, 1, False, ["gpipe"]), (Schedule1F1B, 1, False, ["1f1b", "zb-h1"]),
        (ScheduleInterleaved1F1B, 2, False, ["interleaved"]),
        (ScheduleZBVZeroBubble, 2, True, ["zb-v"]),
        (ScheduleDualPipeV, 2, True, ["dualpipe-v"]),
    )
}  # fmt: skip
CKPT_VARIANTS = {
    ("recompute", policy): (1, functools.partial(repo_ckpt, policy=policy))
    for policy in ("full", "selective", "offload")
}
CKPT_TORCH = {
    f"checkpoint of {what}{', reentrant' * reentrant}": (
        1, functools.partial(torch_ckpt, core=policy == "selective", reentrant=reentrant),
        [("recompute", policy)])
    for policy, what in (("full", "blocks"), ("selective", "attention"))
    for reentrant in (False, True)
}  # fmt: skip
LOOP_VARIANTS = {
    ("3d", f"ZeRO-{name}"): (ROWS // RANKS, functools.partial(repo_3d, stage=stage))
    for name, stage in {
        "0": "0",
        "1": "1",
        "3": "3",
        "3 kept": "3 --no-reshard-after-forward",
    }.items()
}
LOOP_TORCH = {
    f"pipelining, DTensor, fully_shard{kept}": (
        ROWS // RANKS, functools.partial(torch_3d, reshard=not kept), list(LOOP_VARIANTS))
    for kept in ("", " kept")
}  # fmt: skip
BASELINE = "one process"


class Suite(NamedTuple):
    variants: dict
    torch: dict
    t: int = 1
    p: int = 1
    d: int = 1
    c: int = 1
    attention: str = "sdpa"
    together: bool = False  # run all variants in one launch
    pairs: Sequence = ()  # variants whose ratio is printed

    @property
    def ranks(self) -> int:
        return self.t * self.c * self.p * self.d

    @property
    def axis(self) -> str:
        """What the sizes are: hidden sizes, or sequence lengths."""
        return "s" if self.c > 1 else "h"

    @property
    def sizes(self) -> dict[int, gpt.GPTConfig]:
        return LONG if self.c > 1 else SIZES

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return 1 if self.c > 1 else ROWS

    def config(self, size: int) -> gpt.GPTConfig:
        """At least two blocks per stage. Untied with p > 1: PyTorch's stages cannot tie weights."""
        config = self.sizes[size]
        layers = max(config.n_layer, 2 * self.p if self.p > 1 else 1)
        return dataclasses.replace(
            config, attention=self.attention, n_layer=layers, tied=self.p == 1
        )


SUITES = {
    "dp": Suite(DP_VARIANTS, DP_TORCH, d=RANKS),
    "tp": Suite(TP_VARIANTS, TP_TORCH, t=RANKS),
    "cp": Suite(CP_VARIANTS, CP_TORCH, c=RANKS, together=True, pairs=CP_PAIRS),
    "pp": Suite(PP_VARIANTS, PP_TORCH, p=RANKS, together=True),
    "ckpt": Suite(CKPT_VARIANTS, CKPT_TORCH, attention="explicit"),
    "3d": Suite(LOOP_VARIANTS, LOOP_TORCH, t=RANKS, p=RANKS, d=RANKS),
}


# --- one launch -----------------------------------------------------------------------------------


def on_rank(suite: Suite, variants: dict, h: int, steps: int, count: bool) -> dict:
    """Trains on this rank's rows; in each step the variants run one after another.

    Returns by variant: seconds per timed step, losses, CPU seconds per second, and for pipelines
    the spans of all actions. With `count`, one more step counts the calls and wire bytes.
    """
    config = suite.config(h)
    bind()
    d = min(suite.d, dist.get_world_size())  # 1 for the one-process baseline
    share, replica = suite.rows // d, dist.get_rank() // suite.t % d
    mine = slice(replica * share, (replica + 1) * share)
    built = {key: (m, build(gpt.build(config, seed=0))) for key, (m, build) in variants.items()}
    results = {key: {"seconds": [], "losses": [], "cpu": 0.0, "wire": {},
                     "spans": [] if hasattr(step, "pipe") else None}
               for key, (_, step) in built.items()}  # fmt: skip
    for i in range(WARMUP + steps + count):
        generator = torch.Generator().manual_seed(i)
        shape = suite.rows, config.seq_len + 1
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
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
            with seen if i == WARMUP + steps and not uncounted(key) else contextlib.nullcontext():
                loss = step(batch, suite.rows * config.seq_len)
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


def uncounted(key) -> bool:
    """measure.Collectives does not see functional collectives, as in DTensor."""
    return "DTensor" in str(key) or key in CP_TORCH


def wire_of(seen: measure.Collectives) -> dict[str, tuple[int, float]]:
    """Collective -> (calls, bytes that a ring sends)."""
    wire: dict[str, tuple[int, float]] = {}
    for call in seen.calls:
        if call.ranks > 1 and call.operation != "recv":
            # A broadcast is a tree: a rank sends about one payload, as in a transfer.
            operation = call.operation if call.operation in links.WIRE else "p2p"
            calls, sent = wire.get(operation, (0, 0.0))
            share = links.WIRE[operation](call.ranks)
            if call.operation == "all_to_all":  # a rank keeps 1/n of it
                share = 1 - 1 / call.ranks
            sent += share * call.payload * call.dtype.itemsize
            wire[operation] = (calls + 1, sent)
    return wire


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def bind() -> None:
    """Binds this rank to one core, if there are at least as many cores as ranks."""
    mine = cores()[dist.get_rank() : dist.get_rank() + 1]
    if len(cores()) >= dist.get_world_size() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine)


def link_costs() -> list[dict]:
    """Latency and bandwidth of each collective between the ranks."""
    bind()
    return links.fit(links.table([64, 25 * 1024], 10, torch.device("cpu"), lambda line: None))


def machine_cpu_seconds() -> float:
    """CPU seconds of all processes since boot; 0 on systems without /proc/stat."""
    with contextlib.suppress(OSError), open("/proc/stat") as file:
        user, nice, system = (int(n) for n in file.readline().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return 0.0


def run(suite: Suite, variants: dict, h: int, steps: int, ranks: int, count: bool) -> dict:
    """One launch. Returns by variant the median step of the slowest rank and the other results."""
    before, children = machine_cpu_seconds(), sum(os.times()[2:4])
    start = time.perf_counter()
    launched = launch(ranks, on_rank, suite, variants, h, steps, count, timeout=600)
    wall = time.perf_counter() - start
    foreign = machine_cpu_seconds() - before - (sum(os.times()[2:4]) - children)

    def summary(results: list[dict]) -> dict:
        each = [max(times) for times in zip(*(r["seconds"] for r in results), strict=True)]
        losses, spans = (zip(*(r[kind] or () for r in results), strict=True)
                         for kind in ("losses", "spans"))  # fmt: skip
        return {
            "ms": 1e3 * statistics.median(each),
            "losses": [sum(parts[:: suite.t]) for parts in losses],  # tp ranks return equal losses
            "cpu": statistics.mean(r["cpu"] for r in results),
            "wire": results[0]["wire"],
            "foreign": max(0.0, foreign / wall),
            "bubble": bubbles(results[0]["schedule"], spans) if results[0]["spans"] else None,
        }

    return {key: summary([r[key] for r in launched]) for key in variants}


def bubbles(schedule: schedules.Schedule, spans: Iterable) -> tuple[float, float]:
    """(simulated, measured) bubble, medians over steps. spans: [step][rank]."""
    both = []
    for ranks in spans:
        step = [schedules.Span(rank, known["action"], start, end) for rank, mine in enumerate(ranks)
                for _, start, end, known in mine]  # fmt: skip
        mean = bubble.mean_times(step)
        simulated = schedules.simulate(schedule, lambda a, mean=mean: mean[a.kind, a.stage])
        both.append((schedules.bubble(simulated), schedules.bubble(step)))
    return tuple(statistics.median(side) for side in zip(*both, strict=True))


def overhead(name: str, m: int = 64) -> float:
    """Microseconds per action of a pipeline whose stages are 1 x 1 matrices."""
    p, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    schedule = schedules.SCHEDULES[name](p, m)
    program, x = pipeline.derive_programs(schedule)[rank], torch.ones(m, 1, 1, requires_grad=True)
    bind()
    pipe = pipeline.Pipeline({rank: nn.Linear(1, 1)}, p, group, torch.float32, "cpu", program)
    each = []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        pipe.run(program, x, lambda y, i: y.sum(), (1, 1))
        each.append(1e6 * (time.perf_counter() - start) / len(schedule[rank]))
    return statistics.median(each)


def loop_shares(config: gpt.GPTConfig, steps: int = 10) -> dict[str, float]:
    """Fractions of a step's CPU time (main thread of this rank, ZeRO-1): data, norm, log.

    Every rank logs here. In train_3d.py only rank 0 does.
    """
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
        args = vars(trainer.args) | {"log": file.name, "steps": steps, "print_every": steps}
        logger = Logger(argparse.Namespace(**args), config)
        log = timed("log", logger.step)
        timed_step = timed("step", lambda i: log(i, trainer.step(i), trainer.learning_rate(i)))
        for i in range(WARMUP):
            trainer.step(i)
        spent.clear()
        logger.start()
        for i in range(steps):
            timed_step(i)
    return {kind: seconds / spent["step"] for kind, seconds in spent.items() if kind != "step"}


# --- the table ------------------------------------------------------------------------------------


def collect(
    suite: Suite, sizes: list[int], minutes: float, steps: int, report: Callable
) -> dict[int, dict]:
    """Runs all launches. Returns, by hidden size and variant, one result per round.

    After ROUNDS rounds, another one starts only if it is expected to end within `minutes`.
    """
    variants = {key: (m, build) for key, (m, build) in suite.variants.items()}
    variants |= {name: (m, build) for name, (m, build, _) in suite.torch.items()}
    runs: dict[int, dict] = {h: {key: [] for key in (BASELINE, *variants)} for h in sizes}
    start, rounds, longest = time.perf_counter(), 0, 0.0
    while rounds < ROUNDS or time.perf_counter() - start + longest < 60 * minutes:
        began = time.perf_counter()
        for h in sizes:
            order = sorted(variants, key=str)
            # Each round has another order, so that no variant always follows the same one.
            order = order[rounds % 2 :: 2] + order[1 - rounds % 2 :: 2]
            alone = {BASELINE: (ROWS if suite.p > 1 else 1, one_process)}
            launches = [order] if suite.together else [[key] for key in order]
            for j, keys in enumerate(launches):
                for group, ranks in [({key: variants[key] for key in keys}, suite.ranks)] + [
                    (alone, 1)
                ] * (j % 8 == 0):
                    results = run(suite, group, h, steps, ranks, count=rounds == 0)
                    for key, result in results.items():
                        runs[h][key].append(result)
            took = time.perf_counter() - start
            report(f"round {rounds + 1}, {suite.axis} {h}: done after {took:.0f} s")
        rounds, longest = rounds + 1, max(longest, time.perf_counter() - began)
    return runs


def rows_of(suite: Suite, h: int, runs: dict[object, list[dict]], costs: list[dict]) -> list[dict]:
    """One row per variant, compared with PyTorch's fastest variant of the same strategy.

    costs: latency and bandwidth by collective, as links.fit returns them.
    """
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
            "wire_bytes": None if uncounted(key) else sum(sent for _, sent in wire.values()),
            "links_ms": None if uncounted(key) else 1e3 * links_s,
            "cpu_share": statistics.median(r["cpu"] for r in runs[key]),
            "foreign_cpu": statistics.median(r["foreign"] for r in runs[key]),
            "bubble": [statistics.median(side) for side in zip(*bubble, strict=True)],
            "max_loss_difference": measure.largest(
                abs(a - b) for ls in losses for a, b in zip(ls, expected, strict=True)
            ),
        }  # fmt: skip

    rows = []
    for key in suite.variants:
        comparable = [name for name, (_, _, keys) in suite.torch.items() if key in keys]
        best = min(comparable, key=ms.get, default=None)
        rows.append({
            "strategy": key[0], "variant": key[1], suite.axis: h, "ours_ms": ms[key],
            "torch": best, "torch_ms": ms[best] if best else None,
            "ratio": ms[key] / ms[best] if best else None,
        } | describe(key))  # fmt: skip
        if key[0] == "recompute":
            c = suite.config(h)
            flops = [
                cost.predicted_flops(c, c.n_layer, ROWS, policy)
                + 6 * ROWS * c.seq_len * h * c.vocab_size
                for policy in ("none", key[1])
            ]
            rows[-1]["efficiency_by_flops"] = flops[0] / flops[1]  # fmt: skip
    for name in suite.torch:
        rows.append({
            "strategy": "torch", "variant": name, suite.axis: h, "ours_ms": None, "torch": name,
            "torch_ms": ms[name], "ratio": None,
        } | describe(name))  # fmt: skip
    return rows


def ratios(suite: Suite, size: int, runs: dict[object, list[dict]]) -> list[dict]:
    """The steps of suite.pairs over each other: median, lowest and highest ratio of the rounds."""
    rows = []
    for pair in suite.pairs:
        each = [a["ms"] / b["ms"] for a, b in zip(*(runs[key] for key in pair), strict=True)]
        names = [key if isinstance(key, str) else key[1] for key in pair]
        ratio = {"ratio": statistics.median(each), "range": [min(each), max(each)]}
        rows.append({suite.axis: size, "of": names} | ratio)
    return rows


COLUMNS = ("strategy", "variant", "size", "step", "+-", "PyTorch's best", "its step", "ratio",
           "efficiency", "by FLOPs", "bubble", "wire", "links", "CPU", "other CPU",
           "d loss")  # fmt: skip


def markdown(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        ms = r["ours_ms"] or r["torch_ms"]
        compared = r["ratio"] is not None
        cells = (
            r["strategy"], r["variant"], r.get("h") or r["s"], f"{ms:.0f} ms",
            f"{r['spread_ms']:.0f}",
            r["torch"] if compared else "", f"{r['torch_ms']:.0f} ms" if compared else "",
            f"{r['ratio']:.2f}" if compared else "", f"{r['efficiency']:.2f}",
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
    add("--sizes", type=int, nargs="+", metavar="N", help="some of the suite's sizes: hidden sizes "
        f"{[*SIZES]}, or for cp sequence lengths {[*LONG]}")  # fmt: skip
    add("--minutes", type=float, default=9, metavar="N", help="time limit (at least two rounds)")
    add("--steps", type=int, default=3, metavar="N", help="timed steps per launch")
    add("--out", metavar="FILE", help="write the rows as JSON")
    args = arguments.parse_args()
    suite = SUITES[args.suite]
    sizes = args.sizes or [*suite.sizes]
    if unknown := {*sizes} - {*suite.sizes}:
        arguments.error(f"--sizes {min(unknown)}: choose from {[*suite.sizes]}")

    def report(line: str) -> None:
        print(line, flush=True)

    report(f"{suite.ranks} ranks x 1 thread on {len(cores())} cores, gloo, "
           f"torch {torch.__version__}, float32, global batch {suite.rows} rows")  # fmt: skip
    costs, rows, pairs = launch(RANKS, link_costs)[0], [], []
    for name in ("1f1b", "zb-h1") if args.suite == "pp" else ():
        us = [max(launch(p, overhead, name)) for p in (1, RANKS)]
        report(f"executor, {name}: {us[0]:.0f} us per action, including autograd; {us[1]:.0f} us "
               f"with transfers between {RANKS} ranks")  # fmt: skip
    for h in sizes if args.suite == "3d" else ():
        shares = launch(suite.ranks, loop_shares, suite.config(h))
        most = max(shares, key=lambda of: sum(of.values()))
        parts = ", ".join(f"{kind} {share:.2%}" for kind, share in most.items())
        report(f"h {h}: data, norm and log take {sum(most.values()):.2%} of a step's CPU time on "
               f"the rank where they take most: {parts}")  # fmt: skip
    for h, runs in collect(suite, sizes, args.minutes, args.steps, report).items():
        one = [r["ms"] for r in runs[BASELINE]]
        report(f"{suite.axis} {h}: one process {statistics.median(one):.0f} ms ({min(one):.0f} to "
               f"{max(one):.0f} ms in {len(one)} launches)")  # fmt: skip
        rows += rows_of(suite, h, runs, costs)
        pairs += ratios(suite, h, runs)
    for pair in pairs:
        size, (over, under) = pair[suite.axis], pair["of"]
        low, high = pair["range"]
        report(
            f"{suite.axis} {size}: {over} / {under} {pair['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
    report("\n" + markdown(rows))
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {
                    "ranks": suite.ranks,
                    "cores": len(cores()),
                    "torch": torch.__version__,
                    "backend": "gloo",
                    "links": costs,
                    "pairs": pairs,
                    "rows": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
