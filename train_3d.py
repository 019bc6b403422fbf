"""Train a GPT with tensor, pipeline, data and context parallelism (TP x PP x DP x CP).

Each strategy transforms a plain model. They are applied in this order:

    build on the meta device   gpt.py                the full model: shapes only, no memory
    take_stages                pipeline.py           keep the layers of this rank's pipeline stages
    parallelize                tensor_parallel.py    keep this rank's shard of each weight matrix
    parallelize_attention      context_parallel.py   let attention use keys of other ranks' tokens
    init_weights               gpt.py                allocate and initialise the remaining weights
    checkpoint_blocks          activation_ckpt.py    recompute activations, or offload them
    DDP, Zero1, Zero2, Zero3   ddp, zero, zero3.py   reduce gradients; shard the training state

No strategy requires another: each can be left out. Stages and shards are taken on the meta device,
so no rank allocates the full model. DDP or ZeRO comes last: it attaches hooks to layers and
parameters, which must not be replaced afterwards. Activation checkpointing replaces forward().

This file assigns ranks to groups, applies the strategies and runs the training loop. It also
contains what depends on several strategies: gradients that are summed over tp or over two stages,
the global gradient norm, and who saves what.

tp, cp, pp, dp: tensor, context, pipeline and data parallelism. t, c, p, d: their sizes; d = world
size / (t * c * p). Stage: consecutive layers, on one pp rank. Replica: t * c * p ranks that process
the same rows. (replica_group below is something else: the dp and cp ranks that hold the same piece
of the training state.) World size 8 with t = p = d = 2 and c = 1:

                    stage 0                 stage 1
                 +-----------+           +-----------+      tp ({0, 1}, {2, 3}, ..): shards of each
    replica 0    |  0     1  |  -------> |  4     5  |          layer
                 +-----------+           +-----------+      pp ({0, 4}, {1, 5}, ..): consecutive
                       |                       |                layers; activations are sent
                 +-----------+           +-----------+      dp ({0, 2}, {1, 3}, ..): equal weights,
    replica 1    |  2     3  |  -------> |  6     7  |          different rows of the batch;
                 +-----------+           +-----------+          gradients are summed

tp communicates most, so it is the innermost axis: its ranks are consecutive, usually on one node.
cp is the next one. Its ranks have different tokens of the same rows and equal weights, so gradients
are summed over dp and cp. pp usually communicates least, and only between neighbours, so it is the
outermost axis.

b: rows of a microbatch. s: tokens per row. v: vocabulary size. m: microbatches per replica and
step, m = global batch size / (d * b). Gradients accumulate over the m microbatches. With m > 1,
different stages work on different microbatches at the same time.

    python train_3d.py                                                          one process
    torchrun --standalone --nproc-per-node 8 train_3d.py --tp 2 --pp 2 --zero 1

Narayanan et al. 2021, Megatron-LM on GPU clusters (arXiv 2104.04473), sections 2 and 3.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import math
import os
import sys
from collections.abc import Callable

try:
    import torch
except ModuleNotFoundError:
    sys.exit(f"{sys.executable} has no torch: use .venv/bin/python, which `make setup` creates")
import torch.distributed as dist
from torch import Tensor, nn

import activation_ckpt
import checkpoint
import context_parallel
import data
import ddp
import generate
import gpt
import huggingface
import measure
import options
import pipeline
import schedules
import startup
import tensor_parallel
import zero
import zero3
from logger import Logger, describe

# --- the model: transformations in order ----------------------------------------------------------


class Trainer:
    """The model, optimizer and process groups of one rank. Call init_process_group() first.

    args, config: from options.parse_args() and options.check(), which raises an error unless d * b
        divides the batch size and, with sequence or context parallelism, the ranks divide s.
    read: read(step, rows) -> (x, y): token ids and targets of these rows of the step's global
        batch, each [len(rows), s]. Targets below 0 are ignored.

    Optional arguments replace a component:
    draw: the function that returns a parameter's initial values, see gpt.init_weights().
    model: a function that builds the model; called on the meta device.
    plan: how each layer is sharded over tp, see tensor_parallel.parallelize().
        These three are by default those of the module of --arch, see gpt.py.
    tokens: the tokens of each row that this rank holds. Default: all. With c > 1 it is ignored.
    schedule: schedule(p, m) -> schedules.Schedule. Default: --schedule.
    sync: a class with the interface of ddp.DDP, used instead of DDP or ZeRO. The norm and
        checkpoints use its replicas_of(). step() sums gradients over tp of which each tp rank has
        computed only one addend. So all ranks of a tp group must divide the parameters that
        tensor_parallel.py marks as partial into the same pieces."""

    def __init__(
        self, args: argparse.Namespace, config: gpt.GPTConfig, read: Callable, device: torch.device,
        draw: Callable | None = None, model: Callable[[], nn.Module] | None = None,
        plan: dict | None = None, tokens: gpt.Subset = gpt.ALL,
        schedule: Callable | None = None, sync: Callable | None = None,
    ):  # fmt: skip
        self.args, self.config, self.read, self.device = args, config, read, device
        self.tokens, arch = tokens, gpt.module_of(config)
        self.dtype = options.DTYPES[args.dtype]
        self.span: Callable = lambda name: contextlib.nullcontext()  # replaced by watch()
        self.stop_requested = False  # set by a signal handler
        axes = options.axes(args, dist.get_world_size())
        self.m = args.global_batch_size // (axes["dp"] * args.micro_batch_size)
        p = axes["pp"]
        self.schedule = schedule(p, self.m) if schedule else options.make_schedule(args, self.m)
        schedules.check(self.schedule, self.m)
        self._make_groups(axes)

        # The transformations, in the order given in the module docstring.
        with torch.device("meta"):
            self.model = model() if model else arch.Model(config)
        # `draws` holds what dropout masks and document masks depend on: the seed, step, rows and
        # documents.
        self.draws = gpt.draws_of(self.model)
        self.draws.seed = args.seed
        if (c := axes["cp"]) > 1:
            self.tokens = gpt.Subset(context_parallel.zigzag(c, self.cp_group.rank()), 2 * c)
        for module in self.model.modules():
            if hasattr(module, "tokens"):  # its result depends on positions
                module.tokens = self.tokens

        # Keep the layers of this rank's pipeline stages. split_layers() balances their FLOPs. The
        # costs of embedding and head are in units of a block.
        stages, self.pp_rank = schedules.stages_of(self.schedule), self.pp_group.rank()
        self.stages = stages[self.pp_rank]
        embedding, block, head = arch.flops_per_token(config)
        split = pipeline.split_layers(
            len(self.model.h), sum(map(len, stages)), embedding / block, head / block
        )
        pipeline.take_stages(self.model, self.stages, split)

        # Keep this rank's shard of each weight matrix.
        plan = plan or arch.plan(config, args.tp)
        tensor_parallel.parallelize(
            self.model, plan, self.tp_group, args.sequence_parallel, args.sp_keep_gathered
        )

        # Let attention reach the keys and values of the tokens that other cp ranks hold.
        context_parallel.parallelize_attention(self.model, self.cp_group, args.cp_attention)

        # Allocate and initialise this rank's parameters. Values do not depend on t, p or d.
        draw = draw or functools.partial(arch.draw, config=config)
        gpt.init_weights(self.model, args.seed, self.dtype, device, draw)

        # Apply --compile and --recompute. The forward() of each block is compiled, but not the
        # hooks that ZeRO attaches. With --recompute selective, the attention core is not compiled,
        # so that it can be rerun alone.
        blocks = self.model.h
        if args.compile:
            for block in blocks.values():
                if args.recompute == "selective":
                    block.attn.core.forward = torch.compiler.disable(block.attn.core.forward)
                block.forward = torch.compile(block.forward)
        activation_ckpt.checkpoint_blocks(
            blocks, args.recompute, args.recompute_every, args.recompute_layers, self.draws.save
        )

        # Make self.pipe, which runs self.program: the actions and transfers of this rank in a
        # training step. chunks: {stage: the module that runs it}.
        chunks = pipeline.chunks_of(self.model, self.stages, split)
        self.program = pipeline.derive_programs(self.schedule)[self.pp_rank]
        self.pipe = pipeline.Pipeline(
            chunks, len(split), self.pp_group, self.dtype, self.device, self.program
        )

        # Attach DDP or ZeRO, which reduces gradients over dp and cp.
        self.sync = self._make_sync(sync)
        self.optimizer = self._make_optimizer()

    def _make_sync(self, sync: Callable | None):
        """Make the DDP or ZeRO object. Its pieces() are what the optimizer of this rank updates.
        The tensor of a piece is a parameter, its fp32 copy, or a shard of one of these."""
        args = self.args
        # How many times each parameter's gradient is accumulated per step before it is reduced.
        accumulations = self.pipe.accumulations()
        dtypes = ("grad_dtype", "reduce_dtype")
        how = {name: options.DTYPES.get(getattr(args, name)) for name in dtypes}
        if args.dp_nodes > 1 and self.inside_group.size() > 1:
            how["reduce"] = ddp.Hierarchical(self.inside_group, self.across_group)
        if sync or args.zero == 0:
            return (sync or ddp.DDP)(self.model, self.gradient_group, accumulations, **how)
        how["replicas"] = self.replica_group if self.replica_group.size() > 1 else None
        if args.zero == 3:
            how["reshard_after_forward"] = args.zero_reshard_after_forward == 1
            chunks = self.pipe.chunks.values()
            # ZeRO-3 gathers the next layer ahead of its use, but not across stage boundaries.
            how["starts"] = [next(iter(zero.layers(chunk))) for chunk in chunks]
        return zero3.STAGES[args.zero](self.model, self.shard_group, accumulations, **how)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer that updates self.sync.pieces(). Weight decay applies to matrices,
        embeddings included, but not to biases and norms."""
        groups = [{"params": [], "weight_decay": decay} for decay in (self.args.weight_decay, 0.0)]
        for piece in self.sync.pieces():
            is_vector = piece.parameter.ndim < 2  # not of piece.tensor: ZeRO's shards are 1-D
            groups[int(is_vector)]["params"].append(piece.tensor)
        # A dry run is on meta, which has no fused kernels.
        how = {"fused": True} if self.device.type != "meta" else {"foreach": True}
        if self.args.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, **how)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), **how)

    # --- the step ---

    def step(self, step: int) -> Tensor:
        """One optimizer step on the global batch `step`. Returns [loss, gradient norm, stop
        requests], the same on every rank. The loss is the mean over the valid tokens of the batch,
        computed with the parameters before the update. The norm is measured before clipping. If it
        is inf or nan, the update is skipped: parameters, moments and the optimizer's step count do
        not change. Stop requests: the number of ranks that have received a signal."""
        self.current_step = step
        self.sync.start()  # zero the gradients

        # Forward and backward of m microbatches. Communicates over tp and cp inside the layers, and
        # over pp between stages. ZeRO-3 gathers parameters. As soon as a gradient is complete, its
        # reduction over dp and cp starts.
        loss = self._run(self.program, self.read, step)

        with self.span("reduce gradients"):
            # Wait for the sums over dp and cp, whose ranks have processed different tokens.
            self.sync.finish()
            self.sync.before_step()  # sets piece.tensor.grad, in fp32 for bf16 parameters
            # A parameter that no rank used in this step has no gradient.
            pieces = [piece for piece in self.sync.pieces() if piece.tensor.grad is not None]
            # Each tp rank has computed only a part of some gradients, which tensor_parallel.py
            # marks as partial. Sum them over tp. For example, with sequence parallelism, the weight
            # of a LayerNorm has the gradient of this rank's tokens only.
            pairs = [(piece.parameter, piece.tensor.grad) for piece in pieces]
            tensor_parallel.all_reduce_partial(pairs)
            # If the embedding is tied, sum its gradient over the first and the last stage. Each has
            # a copy, whose gradient comes from only one use: as the embedding, or as the output
            # head. Both copies are divided into the same pieces, because ZeRO shards a tied matrix
            # separately from other parameters.
            tied = [piece.tensor.grad for piece in pieces if hasattr(piece.parameter, "tied_name")]
            pipeline.all_reduce_tied(tied, self.tied_group)
            # Sum losses, squared norms and stop requests over all ranks.
            stats = self._global_stats(loss, pieces)

        with self.span("optimizer"):  # no communication, except ZeRO's all-gather at the end
            norm = stats[1]
            if self.args.clip > 0:
                factor = (self.args.clip / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([piece.tensor.grad for piece in pieces], factor)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            if self.optimizer.defaults.get("fused"):
                # The kernel skips the update if this is 1. The host does not wait for the value.
                self.optimizer.found_inf = (~norm.isfinite()).float()
            self.optimizer.step()
            self.sync.after_step()  # copy pieces to parameters; ZeRO starts its all-gather
        return stats

    def _run(self, program: pipeline.Program, read: Callable, step: int) -> Tensor:
        """Run the pipeline on this replica's rows of the global batch `step`. Returns the
        contribution of this rank's tokens to the mean loss on ranks with the last stage, and 0 on
        the others."""
        rows_per_replica = self.args.global_batch_size // self.dp_group.size()
        first, b = self.dp_group.rank() * rows_per_replica, self.args.micro_batch_size
        rows = range(first, first + rows_per_replica)
        full, y = (data.to_device(ids, self.device) for ids in read(step, rows))
        x, y = (self.tokens.take(ids, 1) for ids in (full, y))  # this rank's tokens of each row
        count, targets = ddp.global_count(y, self.gradient_group), y.split(b)

        def before(microbatch: int) -> None:  # masks depend on the step, the rows and their tokens
            here = slice(microbatch * b, (microbatch + 1) * b)
            starts = gpt.document_starts(full[here], self.args.document_mask)
            self.draws.at(step, rows[here], starts)

        def loss_of(logits: Tensor, microbatch: int) -> Tensor:  # [b, s, v/t]
            total = tensor_parallel.vocab_parallel_cross_entropy(
                logits, targets[microbatch], self.model.lm_head, self.tp_group
            )
            return total / count

        shape = self.boundary_shape(b, x.size(1))
        return self.pipe.run(program, x.split(b), loss_of, shape, before)

    def boundary_shape(self, b: int, s: int) -> tuple[int, int, int]:
        """The shape of the activations that are sent between stages. s: tokens of this rank."""
        shards = self.tp_group.size() if self.args.sequence_parallel else 1
        return b, s // shards, self.config.n_embd

    def _global_stats(self, loss: Tensor, pieces: list) -> Tensor:
        """[loss, gradient norm, stop requests], computed with one all-reduce over the world. No
        value is counted twice. The loss is nonzero only on the last stage, where all tp ranks have
        the same value and tp rank 0 contributes it. If several dp or cp ranks have the same
        gradient, the first of them contributes it."""
        first_tp, owned = self.tp_group.rank() == 0, []
        for piece in pieces:
            replicas = self.sync.replicas_of(piece.parameter)
            if self._owns(piece.parameter) and (replicas is None or replicas.rank() == 0):
                owned.append(piece.tensor.grad)
        norms = torch._foreach_norm(owned) if owned else [loss.new_zeros(())]
        squared_norm = torch.stack(norms).square().sum()
        stop = loss.new_full((), float(self.stop_requested))
        stats = torch.stack([loss * first_tp, squared_norm, stop])
        if dist.get_world_size() > 1:
            dist.all_reduce(stats)  # payload: 3 elements, over the world
        stats[1].sqrt_()
        return stats

    def _owns(self, p: nn.Parameter) -> bool:
        """True if this rank is responsible for its elements of p in the global norm and in
        checkpoints. Several tp or pp ranks can hold the same elements, but only one of them owns
        them: a tp rank owns its shards, tp rank 0 owns replicated parameters, and the first stage
        owns a tied embedding, of which the last stage has a copy. The result does not depend on the
        dp or cp rank. Among the dp and cp ranks that hold the same piece, see replicas_of(), the
        first contributes to the norm, and all share the checkpoint writes."""
        sharded = p.distribution.is_split_over(self.tp_group)
        duplicate = hasattr(p, "tied_name") and 0 not in self.stages
        return (sharded or self.tp_group.rank() == 0) and not duplicate

    def learning_rate(self, step: int) -> float:
        return gpt.learning_rate(step, self.args.steps, self.args.warmup_steps, self.args.lr)

    def watch(self, trace: measure.Trace) -> None:
        """Record in `trace` the pipeline actions, reductions and optimizer steps of this rank."""

        def span(action: schedules.Action):
            step = {"step": self.current_step} if self.model.training else {}
            return trace.span(schedules.label(action, self.stages), action=action, **step)

        self.span, self.pipe.watch = trace.span, span

    # --- process groups ---

    def _make_groups(self, axes: dict[str, int]) -> None:
        """Make this rank's process groups. axes: see options.axes(). To add an axis, add it there,
        and make its group here.

        With ZeRO, every k consecutive ranks of gradient_group (--zero-shard-size, by default all)
        form a shard_group, which shards one copy of the training state. The ranks that hold the
        same shard, one per copy, form a replica_group. With DDP, k is 1, so replica_group is
        gradient_group.

        Axes with the same ranks share one group, which saves communicators. With more than one
        rank in the world, axes of size 1 use single_group, which never communicates."""
        # Maps a table of ranks, one row per group, to this rank's group.
        self.groups = {str([[*range(dist.get_world_size())]]): dist.group.WORLD}
        # gloo instead of NCCL, whose communicators cost GPU memory. None: the world's backend.
        backend = "gloo" if self.device.type == "cuda" else None
        self.single_group = dist.new_group(
            [dist.get_rank()], backend=backend, group_desc="one rank",
            use_local_synchronization=True,
        )  # fmt: skip
        self.tp_group = self._make_group(axes, "tp")
        self.dp_group = self._make_group(axes, "dp")  # its ranks have different rows of the batch
        self.cp_group = self._make_group(axes, "cp")  # its ranks have different tokens of the rows
        self.gradient_group = self._make_group(axes, "dp", "cp")  # gradients are summed over it
        self.pp_group = self._make_group(axes, "pp")
        p, t, d = axes["pp"], axes["tp"], axes["dp"] * axes["cp"]
        k = self.args.zero_shard_size or (d if self.args.zero else 1)
        state = {"pp": p, "replica": d // k, "shard": k, "tp": t}
        self.replica_group = self._make_group(state, "replica")
        self.shard_group = self._make_group(state, "shard")
        if (nodes := self.args.dp_nodes) > 1:  # for ddp.Hierarchical: per node, then across nodes
            hosts = {"pp": p, "across": nodes, "inside": d // nodes, "tp": t}
            self.inside_group = self._make_group(hosts, "inside")
            self.across_group = self._make_group(hosts, "across")
        # A tied embedding is on the pp ranks that hold the first and the last stage. In a V-shaped
        # schedule, one rank holds both.
        stages = schedules.stages_of(self.schedule)
        last = max(map(max, stages))
        ends = [rank for rank in range(p) if 0 in stages[rank] or last in stages[rank]]
        self.tied_group = self._make_group(axes, "pp", only=ends)

    def _make_group(
        self, axes: dict[str, int], *names: str, only: list[int] | None = None
    ) -> dist.ProcessGroup:
        """This rank's group along the named axes of the grid of ranks. axes: {name: size},
        outermost first. For axes of sizes pp 2, dp 2, tp 2, the groups of "dp" are [0, 2], [1, 3],
        [4, 6], [5, 7]. only: indices along a single axis; the other ranks get single_group. All
        ranks must make the same call."""
        dims = [[*axes].index(name) for name in names]
        ranks = torch.arange(math.prod(axes.values())).view(*axes.values())
        ranks = ranks.movedim(dims, [*range(-len(dims), 0)]).flatten(-len(dims))
        table = ranks.flatten(0, -2)[:, only or slice(None)].tolist()  # one group per row
        size, name = len(table[0]), "tied" if only else "-".join(names)
        if size == 1 and dist.get_world_size() > 1:
            return self.single_group
        if (key := str(table)) not in self.groups:
            limit = datetime.timedelta(seconds=self.args.timeout)
            if self.device.type == "cuda":  # one collective call for all rows of the table
                group = dist.split_group(split_ranks=table, timeout=limit, group_desc=name)
            else:
                group, _ = dist.new_subgroups_by_enumeration(table, limit, group_desc=name)
            # None: this rank is not in the table, as it has no tied embedding.
            self.groups[key] = self.single_group if group is None else group
        return self.groups[key]

    # --- checkpoints and validation ---

    def state_to_save(self) -> tuple[list[checkpoint.TensorSlice], dict]:
        """(slices of parameters and moments that this rank writes, scalars of the optimizer). The
        dp and cp ranks that hold the same slices write some of them each."""
        owned = [piece for piece in self.sync.pieces() if self._owns(piece.parameter)]
        numbers, mine = checkpoint.state_slices(owned, self.optimizer)[1], []
        by_replicas: dict[dist.ProcessGroup | None, list] = {}
        for piece in owned:
            by_replicas.setdefault(self.sync.replicas_of(piece.parameter), []).append(piece)
        for replicas, pieces in by_replicas.items():
            slices, _ = checkpoint.state_slices(pieces, self.optimizer)
            rank, size = (replicas.rank(), replicas.size()) if replicas else (0, 1)
            mine += checkpoint.split_between_replicas(slices, rank, size)
        return mine, numbers

    def state_to_load(self, numbers: dict) -> list[checkpoint.TensorSlice]:
        """The slices that this rank needs, whatever the layout that saved them. Fill them in place,
        then call loaded(). numbers: the saved scalars, from state_to_save()."""
        checkpoint.init_state(self.sync.pieces(), self.optimizer, numbers)
        return checkpoint.state_slices(self.sync.pieces(), self.optimizer)[0]

    def loaded(self) -> None:
        self.sync.after_step()  # copies the loaded pieces to the parameters

    def forward_program(self, m: int) -> pipeline.Program:
        """The actions and transfers of this rank in m forward passes without backward."""
        forwards = schedules.forward_only(self.schedule, m)
        return pipeline.derive_programs(forwards)[self.pp_rank]

    @torch.no_grad()
    def validate(self, read: Callable) -> Tensor:
        """Mean loss over --eval-iters global batches, equal on all ranks. read: see Trainer."""
        program = self.forward_program(self.m)
        self.model.eval()
        loss = sum(self._run(program, read, index) for index in range(self.args.val_batches))
        self.model.train()
        loss *= self.tp_group.rank() == 0  # all tp ranks have the same value: tp rank 0 adds it
        dist.all_reduce(loss)  # payload: 1, over the world
        return loss / self.args.val_batches


# --- the training loop ----------------------------------------------------------------------------


def resume(
    trainer: Trainer, found: list[checkpoint.Found], group: dist.ProcessGroup, run: dict,
    logger: Logger,
) -> int:  # fmt: skip
    """Load the newest undamaged checkpoint. All ranks load the same one, because newest_complete()
    exchanges what they have found. Returns its number of completed steps, or 0 if no checkpoint
    exists. If all are damaged, exits with a message that names each."""
    try:
        newest, damaged = checkpoint.newest_complete(found, group)
        if newest is None:
            return 0
        checkpoint.read(newest.path, trainer.state_to_load(newest.about["optimizer"]), group)
    except ValueError as error:
        options.parser().error(f"--resume: {error}")
    trainer.loaded()
    for line in damaged:
        logger.say(f"--resume: skipped a damaged checkpoint: {line}")
    step, changed = newest.about["step"], newest.about["corpus"] != run["corpus"]
    note = "; the corpus has changed since this checkpoint was saved" if changed else ""
    logger.say(f"--resume: continued from {newest.path} after step {step}{note}")
    return step


def is_asynchronous(device: torch.device) -> bool:
    """Whether operations are queued on the device, so that the host can run ahead of it."""
    return device.type != "cpu"


def train(trainer: Trainer, corpus: tuple, logger: Logger, found: list[checkpoint.Found]) -> bool:
    """Train, validate, save and sample. Returns False if the last save failed."""
    args, config, device = trainer.args, trainer.config, trainer.device
    tokens, held_out = corpus

    def read_held_out(index: int, rows: range) -> tuple[Tensor, Tensor]:
        start = index * args.global_batch_size
        shifted = range(start + rows.start, start + rows.stop)
        return data.validation_batch(held_out, shifted, config.seq_len)

    run = options.run_of(args, config) | {"corpus": data.fingerprint(tokens)}
    disk = None
    if args.checkpoint_dir:
        # A separate group, because a thread uses it while training communicates.
        limit = datetime.timedelta(seconds=args.timeout)
        group = dist.new_group(None, limit, "gloo", group_desc="checkpoint")
        disk = checkpoint.Checkpoints(args.checkpoint_dir, args.keep, group)
    first = resume(trainer, found, disk.group, run, logger) if args.resume else 0
    val_loss = None
    trace = measure.Trace(device) if args.trace else None
    if trace:
        trainer.watch(trace)
    # A signal on any rank stops all ranks after the same step: each step sums the stop requests of
    # all ranks. They are copied to the host asynchronously, and read after the next step has been
    # launched. So a GPU always has work queued. The event `copied` marks the end of the copy.
    stop_requests, copied = torch.zeros(()), torch.get_device_module(device).Event()

    def stop() -> None:
        trainer.stop_requested = True
        logger.say("stopping after this step; again to quit now")

    gc.freeze()  # exclude existing objects from garbage collection: scanning them takes time
    end, stopped = logger.end, False
    with startup.stop_signals(stop):
        logger.start()
        for step in range(first, end):
            stats = trainer.step(step)
            logger.step(step, stats, trainer.learning_rate(step))
            done = step + 1  # completed steps
            last = done == end
            if not last:
                if not is_asynchronous(device):
                    stop_requests = stats[2]  # of this step: nothing is queued
                # On a GPU, stop_requests are those of the previous step: wait for their copy.
                copied.synchronize()
                stopped = last = stop_requests.item() > 0
                stop_requests = stats[2].to("cpu", non_blocking=True)  # into pinned memory
                copied.record()
            if args.val_every and (done % args.val_every == 0 or done == args.steps):
                logger.flush()
                val_loss = trainer.validate(read_held_out)
                logger.validation(step, val_loss)
            if disk:
                if last or (args.save_every and done % args.save_every == 0):
                    logger.flush()  # the log then has every step that the checkpoint includes
                    slices, numbers = trainer.state_to_save()
                    disk.save(done, slices, run | {"optimizer": numbers})
                if last:
                    disk.wait()
                for result in disk.completed():
                    logger.saved(result)
            if stopped:
                logger.flush()
                logger.say(f"stopped by a signal after step {done}")
                break
        if trace:
            pp, dp, tp = trainer.pp_rank, trainer.dp_group.rank(), trainer.tp_group.rank()
            cp = f"cp {trainer.cp_group.rank()}, " if args.cp > 1 else ""
            trace.write(args.trace, f"pp {pp}, dp {dp}, {cp}tp {tp}")
            command = f"python -m tools.plan.bubble {args.trace}"
            logger.say(f"--trace: wrote {args.trace}. To measure the bubble, run: {command}")
    if first >= end:
        logger.say(f"nothing to train: the run is at step {first} and ends at step {end}")
    if args.sample and not stopped:
        logger.say(generate.sample_text(trainer, held_out))
    if val_loss is not None and not stopped:
        logger.say(f"val loss {val_loss.item():.2f}")
    return disk is None or disk.failed is None


def main() -> None:
    try:
        # Checks that need no communication.
        args, found, notes = options.parse_args()
        source = huggingface.GPT2Folder(args.init_from) if args.init_from else None
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        config = options.check(args, world_size, source)
        if found:
            notes += options.compare(options.run_of(args, config), found[0].about)
        device, device_line = startup.pick_device(args.device)
        corpus = data.load(args.data, config.seq_len, config.vocab_size)
        startup.check_writable("--metrics", args.log)
        startup.check_writable("--trace", args.trace)
        checkpoint.check_writable(args.checkpoint_dir)
        peak = args.peak_tflops or startup.peak_tflops(device, args.dtype)
        logger = Logger(args, config, world_size, peak, bool(found), device)
    except ValueError as error:
        options.parser().error(str(error))
    for line in (device_line, *notes, *describe(args, config, world_size, device)):
        logger.say(line)
    try:
        startup.join_ranks(device, args.timeout)
        seen = {"corpus": data.fingerprint(corpus[0]), "device": startup.device_name(device)}
        startup.check_same(vars(args) | seen)
        read = functools.partial(data.batch, corpus[0], seq_len=config.seq_len, seed=args.seed)
        draw = source.draw if source else None
        saved = train(Trainer(args, config, read, device, draw), corpus, logger, found)
        # Free the trainer's groups now: gloo's threads must end before the interpreter does.
        gc.unfreeze()
        gc.collect()
        dist.barrier()  # a rank that exits early would close connections that others still use
    except RuntimeError as error:
        measure.exit_if_lost("train_3d.py", error)
        raise
    dist.destroy_process_group()
    gc.freeze()  # Python's exit then scans no objects: it takes 0.2 CPU seconds per rank, not 0.9
    if not saved:
        sys.exit(1)


if __name__ == "__main__":
    main()
