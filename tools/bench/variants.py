"""The variants that tools/bench/compare.py compares: each strategy here and in PyTorch.

A variant is built by build(model, group) and returns step(microbatches, tokens of the global
batch), which runs forward, backward and the optimizer, and returns this rank's share of the loss. A
Comparison holds the variants of one strategy, which take turns in the same processes:

    ours          this repository
    torch         PyTorch's implementation, once for each of its settings that may be the fastest
    silent        the first of these over torch's fake backend, whose collectives return at once and
                  leave wrong values: a lower bound of the time with any communication
    one process   rank 0 processes the global batch alone

All train the same model in float32 with torch's fused AdamW. PyTorch averages gradients over
data-parallel ranks where this repository sums them. Its variants multiply the loss by the number of
ranks, so that the gradients are equal.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable import replicate_with_fsdp
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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the fake backend
from torch.utils.checkpoint import checkpoint

import activation_ckpt
import context_parallel
import ddp
import gpt
import options
import pipeline
import schedules
import tensor_parallel
import train_3d
import zero3

RANKS, ROWS = 2, 8  # ranks along each parallel axis of a suite; rows of the global batch
SIZES = {256: gpt.GPTConfig(4, 4, 256, 256, 256), 768: gpt.GPTConfig(2, 12, 768, 256, 64)}
LONG = {s: gpt.GPTConfig(1, 4, 256, 256, s) for s in (2048, 8192)}  # of `cp`, one row
Group = dist.ProcessGroup
adamw = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)


def backward(model: nn.Module, x: Tensor, y: Tensor, valid: float) -> Tensor:
    loss = gpt.cross_entropy(model(x), y) / valid
    loss.backward()
    return loss.detach()


# --- data parallelism and ZeRO --------------------------------------------------------------------


def plain_step(model: nn.Module, group: Group, reduce: Callable = lambda *_: None) -> Callable:
    """Calls reduce(parameters, group) once per step, after the last backward."""
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        loss = sum(backward(model, x, y, valid) for x, y in batch)
        reduce(model.parameters(), group)
        optimizer.step()
        return loss

    return step


def repo_dp(model: nn.Module, group: Group, attach: Callable, m: int = 1) -> Callable:
    sync = attach(model, group, m)
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


def world_mesh(model: nn.Module) -> DeviceMesh:
    return dist.init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))


def torch_ddp(
    model: nn.Module, group: Group, view: bool = True, zero: bool = False,
    sharded: bool | None = None,
) -> Callable:  # fmt: skip
    """view: gradients are views of the buckets. zero: zero_grad() writes zeros, instead of dropping
    the gradients. sharded: with ZeroRedundancyOptimizer, and the value of
    parameters_as_bucket_view."""
    n = group.size()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    if sharded is None:
        optimizer = adamw(model.parameters())
    else:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), adamw.func, parameters_as_bucket_view=sharded, **adamw.keywords
        )

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad(set_to_none=not zero)
        *first, last = batch
        with wrapped.no_sync():  # reduce gradients once per step, as ddp.py does
            loss = sum(backward(wrapped, x, y, valid / n) for x, y in first)
        loss = (loss + backward(wrapped, *last, valid / n)) / n
        optimizer.step()
        return loss

    return step


def torch_fsdp(
    model: nn.Module, group: Group, reshard: bool, ahead: bool = False, policy=None
) -> Callable:
    """reshard: free the parameters of a block after its forward. After backward, they are freed in
    the last microbatch only. ahead: all-gather the next block before this one needs it. policy: a
    MixedPrecisionPolicy."""
    n, how = group.size(), {"mesh": world_mesh(model)} | ({"mp_policy": policy} if policy else {})
    blocks = [*model.h.values()]
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **how)
    fully_shard(model, **how)
    if ahead:
        model._set_unshard_async_op(True)
        for block, following in zip(blocks, blocks[1:], strict=False):
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])
    optimizer = adamw(model.parameters())

    def step(batch: list, valid: int) -> Tensor:
        optimizer.zero_grad()
        total = 0.0
        for i, (x, y) in enumerate(batch):
            last = i == len(batch) - 1
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last)
            total = total + backward(model, x, y, valid / n) / n
        optimizer.step()
        return total

    return step


# --- tensor parallelism ---------------------------------------------------------------------------


def repo_tp(model: nn.Module, group: Group, sequence: bool, **how) -> Callable:
    tensor_parallel.parallelize(model, gpt.PLAN, group, sequence, **how)
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
    """AdamW with one parameter group per mesh: an operator cannot mix DTensors of two meshes."""
    kinds: dict[DeviceMesh | None, list] = {}
    for p in model.parameters():
        kinds.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return adamw([{"params": ps} for ps in kinds.values()])


def reduce_norms(model: nn.Module, group: Group) -> None:
    """All-reduces the gradients of the norms, which each rank computes from its tokens, in one
    call. Otherwise each operator of the optimizer would all-reduce each of them."""
    partial = [p for p in model.parameters() if isinstance(p.grad, DTensor)
               and any(where.is_partial() for where in p.grad.placements)]  # fmt: skip
    flat = torch.cat([p.grad.to_local().flatten() for p in partial])
    dist.all_reduce(flat, group=group)
    parts = flat.split([p.numel() for p in partial])
    for p, part in zip(partial, parts, strict=True):
        p.grad = DTensor.from_local(part.view(p.shape), p.device_mesh, p.placements)


def torch_tp(model: nn.Module, group: Group, sequence: bool) -> Callable:
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
            reduce_norms(model, group)
        optimizer.step()
        return loss

    return step


# --- context parallelism --------------------------------------------------------------------------


def zigzag_step(model: nn.Module, group: Group, attach: Callable) -> Callable:
    """attach(model) makes attention context-parallel. DDP sums the gradients."""
    c, rank = group.size(), group.rank()
    tokens = gpt.Subset(context_parallel.zigzag(c, rank), 2 * c)
    for module in model.modules():
        if hasattr(module, "tokens"):
            module.tokens = tokens
    attach(model)
    step = repo_dp(model, group, ddp.DDP)
    return lambda batch, valid: step([[tokens.take(t, 1) for t in pair] for pair in batch], valid)


def repo_cp(model: nn.Module, group: Group, method: str) -> Callable:
    how = {"group": group, "method": method}
    attach = functools.partial(context_parallel.parallelize_attention, **how)
    return zigzag_step(model, group, attach)


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


def torch_cp(model: nn.Module, group: Group, rotate: str) -> Callable:
    def core(*qkv: Tensor) -> Tensor:
        torch_ring.set_rotate_method(rotate)  # a global setting
        return TorchRing.apply(*qkv)

    def attach(model: nn.Module) -> None:
        for block in model.h.values():
            block.attn.core.forward = core

    return zigzag_step(model, group, attach)


# --- pipelines ------------------------------------------------------------------------------------


def repo_pp(model: nn.Module, group: Group, name: str, m: int = ROWS) -> Callable:
    p, rank = group.size(), group.rank()
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


def torch_pp(
    model: nn.Module, group: Group, kind: type, chunks: int, fold: bool, m: int = ROWS
) -> Callable:
    """Schedule `kind` with `chunks` stages per rank, assigned round-robin or (`fold`) in a V."""
    p, rank = group.size(), group.rank()
    device = model.wte.weight.device
    mine = [rank, 2 * p - 1 - rank] if fold else range(rank, chunks * p, p)
    split = pipeline.split_layers(len(model.h), chunks * p)
    modules = pipeline.chunks_of(pipeline.take_stages(model, mine, split), mine, split)
    stages = [PipelineStage(module, k, chunks * p, device, group=group)
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

    # torch 2.11 cannot leave out the outputs, which no variant needs.
    can_omit = "return_outputs" in inspect.signature(PipelineScheduleMulti.step).parameters
    options = {"return_outputs": False} if can_omit else {}
    schedule = kind(stages if issubclass(kind, PipelineScheduleMulti) else stages[0], m,
                    loss_fn=loss_fn, scale_grads=False)  # fmt: skip

    def step(batch: list, valid: int) -> Tensor:
        nonlocal tokens
        tokens, losses = valid, []
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
        targets = {"target": y, "losses": losses} if last else {}
        schedule.step(*([x] if first else []), **targets, **options)
        optimizer.step()
        return sum((loss.detach() / d for loss in losses), torch.zeros(()))

    return step


# --- recomputation --------------------------------------------------------------------------------


def repo_ckpt(model: nn.Module, group: Group, policy: str) -> Callable:
    activation_ckpt.checkpoint_blocks(model.h, policy)
    return plain_step(model, group)


def torch_ckpt(model: nn.Module, group: Group, core: bool, reentrant: bool) -> Callable:
    for block in model.h.values():
        module = block.attn.core if core else block
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=reentrant)
    return plain_step(model, group)


def copy(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x)


def torch_offload(model: nn.Module, group: Group) -> Callable:
    """What save_on_cpu() does for a GPU: copies each tensor that a block saves, and copies it back.
    On a CPU it copies nothing, because the tensors are there already."""
    for block in model.h.values():

        def forward(*inputs, run: Callable = block.forward):
            with torch.autograd.graph.saved_tensors_hooks(copy, copy):
                return run(*inputs)

        block.forward = forward
    return plain_step(model, group)


# --- the complete loop ----------------------------------------------------------------------------


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


def repo_3d(model: nn.Module, group: Group, stage: str) -> Callable:
    tokens = []  # inputs and targets of this replica
    fake = dist.get_backend(group) == "fake"  # then the groups of the trainer are fake, too
    new_group = functools.partial(dist.new_group, backend="fake")
    with mock.patch.object(dist, "new_group", new_group) if fake else contextlib.nullcontext():
        trainer = make_trainer(model.config, lambda step, rows: tokens, stage)

    def step(batch: list, valid: int) -> Tensor:
        tokens[:] = (torch.cat(parts) for parts in zip(*batch, strict=True))
        return trainer.step(0)[0] / RANKS**2  # every pp and dp rank returns the full loss

    return step


def torch_3d(
    model: nn.Module, group: Group, reshard: bool | None, m: int = ROWS // RANKS
) -> Callable:
    """PyTorch's composition: 1F1B over pp, DTensor over tp, and over dp fully_shard, or for
    reshard=None replicate. `pipelining` makes these reduce gradients in the last microbatch only.
    The step has no gradient norm."""
    device = model.wte.weight.device
    mesh = dist.init_device_mesh(device.type, (RANKS,) * 3, mesh_dim_names=("pp", "dp", "tp"))
    k = mesh["pp"].get_local_rank()
    pipeline.take_stages(model, [k], pipeline.split_layers(len(model.h), RANKS))
    distribute(model, mesh["tp"], sequence=False)
    for module in (*model.h.values(), model):
        if reshard is None:
            replicate_with_fsdp.replicate(module, mesh=mesh["dp"])
        else:
            fully_shard(module, mesh=mesh["dp"], reshard_after_forward=reshard)
    stage = PipelineStage(model, k, RANKS, device, group=mesh["pp"].get_group())
    step = run_stages([stage], Schedule1F1B, m, adamw_by_mesh(model), d=RANKS)
    return loss_parallel()(step)


# --- suites ---------------------------------------------------------------------------------------

ONE, SILENT = "one process", "silent"
part = functools.partial


class Comparison(NamedTuple):
    """Variants that take turns: name -> builder. m: microbatches per rank and step."""

    ours: dict[str, Callable]
    torch: dict[str, Callable] = {}
    m: int = 1
    one: bool = False  # also one process with the global batch
    schedules: bool = False  # of pipelines, whose bubble is measured

    def variants(self, ranks: int) -> dict[str, tuple[str, Callable]]:
        """name -> (side, builder)."""
        found = {name: ("ours", build) for name, build in self.ours.items()}
        found |= {name: ("torch", build) for name, build in self.torch.items()}
        if self.torch and ranks > 1:
            found[SILENT] = (SILENT, next(iter(self.ours.values())))
        if self.one:
            found[ONE] = (ONE, plain_step)
        return found


class Suite(NamedTuple):
    comparisons: dict[str, Comparison]
    t: int = 1
    p: int = 1
    d: int = 1
    c: int = 1
    attention: str = "sdpa"

    @property
    def ranks(self) -> int:
        return self.t * self.c * self.p * self.d

    @property
    def axis(self) -> str:
        """What the sizes are: hidden sizes, or sequence lengths."""
        return "s" if self.c > 1 else "h"

    @property
    def sizes(self) -> dict[int, gpt.GPTConfig]:
        if self.ranks == 8:  # 4 ranks per core
            return {256: SIZES[256]}
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


def _zero(stage: int, m: int = 1, **how) -> Callable:
    return part(repo_dp, attach=part(zero3.STAGES[stage], **how), m=m)


def _fsdp(reshard: bool) -> dict[str, Callable]:
    name = "fully_shard" if reshard else "fully_shard, not resharded"
    return {name: part(torch_fsdp, reshard=reshard),
            f"{name}, prefetch": part(torch_fsdp, reshard=reshard, ahead=True)}  # fmt: skip


TORCH_DDP = {
    "DistributedDataParallel": part(torch_ddp, view=False),
    "DistributedDataParallel, views of buckets": torch_ddp,
    "DistributedDataParallel, views, zeroed": part(torch_ddp, zero=True),
}
DP = {
    "DDP": Comparison(
        {
            "DDP": part(repo_dp, attach=ddp.DDP),
            "all_reduce_flat": part(plain_step, reduce=ddp.all_reduce_flat),
            "all_reduce_gradients": part(plain_step, reduce=ddp.all_reduce_gradients),
        },
        TORCH_DDP,
    ),
    "ZeRO-1": Comparison(
        {"Zero1": _zero(1)},
        {
            f"ZeroRedundancyOptimizer{', views of buckets' * view}": part(
                torch_ddp, sharded=view, view=False
            )
            for view in (False, True)
        },
    ),
}
for m in (1, 4):
    also = f", {m} microbatches" if m > 1 else ""
    DP[f"ZeRO-2{also}"] = Comparison({"Zero2": _zero(2, m)}, _fsdp(False), m)
    DP[f"ZeRO-3{also}"] = Comparison({"Zero3": _zero(3, m)}, _fsdp(True), m)

TP = {}
for m in (1, 8):
    also = f", {m} microbatches" if m > 1 else ""
    TP[f"TP{also}"] = Comparison(
        {"tensor parallel": part(repo_tp, sequence=False)},
        {"DTensor": part(torch_tp, sequence=False)},
        m,
        one=m == 1,
    )
    TP[f"TP+SP{also}"] = Comparison(
        {
            "sequence parallel": part(repo_tp, sequence=True),
            "sequence parallel, gathered inputs kept": part(
                repo_tp, sequence=True, keep_gathered=True
            ),
        },
        {"DTensor": part(torch_tp, sequence=True)},
        m,
    )

CP = {
    "context parallelism": Comparison(
        {method: part(repo_cp, method=method) for method in ("ring", "gathered", "ulysses")},
        {f"PyTorch's ring, {how}": part(torch_cp, rotate=how) for how in ("allgather", "alltoall")},
        one=True,
    )
}

TORCH_PP = {
    "gpipe": (ScheduleGPipe, 1, False),
    "1f1b": (Schedule1F1B, 1, False),
    "interleaved": (ScheduleInterleaved1F1B, 2, False),
    "zb-v": (ScheduleZBVZeroBubble, 2, True),
    "dualpipe-v": (ScheduleDualPipeV, 2, True),
}
PP = {
    name: Comparison(
        {name: part(repo_pp, name=name)},
        {kind.__name__: part(torch_pp, kind=kind, chunks=chunks, fold=fold)},
        ROWS,
    )
    for name, (kind, chunks, fold) in TORCH_PP.items()
}
PP["schedules"] = Comparison(
    {name: part(repo_pp, name=name) for name in schedules.SCHEDULES}, m=ROWS, one=True,
    schedules=True,
)  # fmt: skip

CKPT = {
    policy: Comparison(
        {policy: part(repo_ckpt, policy=policy)},
        {
            f"checkpoint of {what}{', reentrant' * reentrant}": part(
                torch_ckpt, core=policy == "selective", reentrant=reentrant
            )
            for reentrant in (False, True)
        },
        one=True,
    )
    for policy, what in (("full", "blocks"), ("selective", "attention"))
}
CKPT["offload"] = Comparison(
    {"offload": part(repo_ckpt, policy="offload")},
    {"copies of saved tensors": torch_offload},
    one=True,
)

LOOP_TORCH = {
    f"pipelining, DTensor, {name}": part(torch_3d, reshard=reshard)
    for name, reshard in {
        "replicate": None, "fully_shard": True, "fully_shard, not resharded": False
    }.items()
}  # fmt: skip
LOOP = {
    "replicated parameters": Comparison(
        {"ZeRO-0": part(repo_3d, stage="0"), "ZeRO-1": part(repo_3d, stage="1")},
        LOOP_TORCH,
        ROWS // RANKS,
        one=True,
    ),
    "sharded parameters": Comparison(
        {
            "ZeRO-3": part(repo_3d, stage="3"),
            "ZeRO-3, not resharded": part(repo_3d, stage="3 --no-reshard-after-forward"),
        },
        {name: build for name, build in LOOP_TORCH.items() if "replicate" not in name},
        ROWS // RANKS,
    ),
}

SUITES = {
    "dp": Suite(DP, d=RANKS),
    "tp": Suite(TP, t=RANKS),
    "cp": Suite(CP, c=RANKS),
    "pp": Suite(PP, p=RANKS),
    "ckpt": Suite(CKPT, attention="explicit"),
    "3d": Suite(LOOP, t=RANKS, p=RANKS, d=RANKS),
}
