"""TP x PP x DP training of a GPT: the five strategies on one model, and the loop around them.

                       tp: the ranks of a pair split every matrix      (innermost: one machine)
                 .-----------.    .-----------.
       dp 0      | r0     r1 | -> | r4     r5 |     pp: stage 0 -> stage 1, activations flow
                 '-----------'    '-----------'         (outermost: the least traffic)
                       |                |
       dp 1      | r2     r3 | -> | r6     r7 |     dp: the same stage on other rows; gradients meet
                 '-----------'    '-----------'

The model is plain; the strategies transform it in one order, each seeing what the one before left:

    GPT on meta -> take_stages -> parallelize -> weights drawn -> checkpoint_blocks -> DDP | ZeRO
                   pipeline       tensor_parallel                 activation_ckpt     ddp | zero

global_batch_size = d * m * micro_batch_size; m microbatches per step is derived, and is both the
gradient accumulation and what fills the pipeline. What crosses axes stands here and nowhere else:
the gradient norm, the tied embedding, where the loss is, who samples.

    python train_3d.py                                       one process
    torchrun --standalone --nproc-per-node 8 -- train_3d.py --tp 2 --pp 2 --zero 1       d = 8/4
    (the lone -- keeps torchrun from taking our --log for a short form of its own --log-dir)

Narayanan et al. 2021, Megatron-LM on GPU clusters (arXiv 2104.04473), sections 2 and 3.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import os
import runpy
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import activation_ckpt
import checkpoint
import data
import ddp
import gpt
import measure
import options
import pipeline
import tensor_parallel
import zero

# --- trainer --------------------------------------------------------------------------------------


class Trainer:
    """One rank's part of the run. Needs an initialised default process group.

    read(step, rows) -> (x, y): the rows of a step's global batch, each [len(rows), s].
    The other arguments are seams for a fork: the initialisation, the model (built on meta), the
    plan by which it is cut, the schedule, and how gradients meet."""

    def __init__(
        self, args: argparse.Namespace, config: gpt.GPTConfig, read: Callable, device: torch.device,
        draw: Callable | None = None, model: Callable[[], nn.Module] | None = None,
        plan: dict = tensor_parallel.GPT_PLAN, schedule: Callable | None = None,
        sync: Callable | None = None,
    ):  # fmt: skip
        self.args, self.config, self.read, self.device = args, config, read, device
        self.dtype = options.DTYPES[args.dtype]
        self.asked_to_stop = False  # by a signal
        t, p = args.tp, args.pp
        d = dist.get_world_size() // (t * p)
        self.m = args.global_batch_size // (d * args.micro_batch_size)
        self.schedule = schedule(p, self.m) if schedule else options.make_schedule(args, self.m)
        pipeline.check(self.schedule, self.m)
        stages = pipeline.stages_of(self.schedule)
        n = sum(map(len, stages))
        ends = [rank for rank in range(p) if 0 in stages[rank] or n - 1 in stages[rank]]
        self._make_groups(p, d, args.zero_shard_size or (d if args.zero else 1), t, ends)
        self.pp_rank = self.pp_group.rank()
        self.stages = stages[self.pp_rank]

        with torch.device("meta"):  # a whole model that takes no memory
            stage = model() if model else gpt.GPT(config)
        embedding, block, head = gpt.flops_per_token(config)
        split = pipeline.split_layers(len(stage.h), n, embedding / block, head / block)
        pipeline.take_stages(stage, self.stages, split)
        tensor_parallel.parallelize(stage, plan, self.tp_group, args.sequence_parallel)
        draw = draw or functools.partial(gpt.gpt2_draw, n_layer=config.n_layer)
        gpt.init_weights(stage, args.seed, self.dtype, device, draw)
        self.draws = getattr(stage, "draws", gpt.Draws())  # a fork's model may have no dropout
        self.draws.seed = args.seed
        if args.compile:
            compile_blocks(stage.h, args.recompute)
        activation_ckpt.checkpoint_blocks(
            stage.h,
            args.recompute,
            args.recompute_every,
            args.recompute_layers,
            self.draws.save,
        )
        self.model = stage
        chunks, mine = pipeline.chunks_of(stage, self.stages, split), self.schedule[self.pp_rank]
        split_backward = pipeline.splits_backward(mine)
        self.program = pipeline.derive_programs(self.schedule)[self.pp_rank]
        self.pipe = pipeline.Pipeline(
            chunks, n, self.pp_group, self.dtype, device, split_backward, self.program
        )
        self.sync = self._attach(sync, self.pipe.accumulations(mine))
        self.span: Callable = lambda name: contextlib.nullcontext()  # who looks: see watch()
        # Their gradients meet over tp: the tp ranks must hold the same pieces of them.
        partial = [(f"{piece.name}[{piece.start}:]", piece.tensor)
                   for piece in self.sync.pieces() if piece.parameter.partial]  # fmt: skip
        ddp.check_same_parameters(partial, self.tp_group)
        self.optimizer = self._make_optimizer()

    def _make_groups(self, p: int, d: int, k: int, t: int, ends: list[int]) -> None:
        """self.groups: this rank's group by table of ranks. Axes with equal tables share one group:
        fewer communicators, and one order of their calls. Axes of size 1 share self.single_group,
        which never communicates: in gloo, it needs no communicator of NCCL."""
        self.groups = {str([[*range(dist.get_world_size())]]): dist.group.WORLD}
        backend = "gloo" if self.device.type == "cuda" else None  # None: that of the world
        self.single_group = dist.new_group(
            [dist.get_rank()], backend=backend, group_desc="one rank",
            use_local_synchronization=True,
        )  # fmt: skip
        ranks = torch.arange(p * d * t).view(p, d // k, k, t)  # tp innermost: neighbours
        self.tp_group = self._my_group("tp", ranks.flatten(0, 2))
        self.dp_group = self._my_group("dp", ranks.movedim(3, 1).flatten(2).flatten(0, 1))
        self.pp_group = self._my_group("pp", ranks.movedim(0, 3).flatten(0, 2))
        self.replica_group = self._my_group("replica", ranks.movedim(1, 3).flatten(0, 2))
        self.shard_group = self._my_group("shard", ranks.movedim(2, 3).flatten(0, 2))
        if self.args.dp_nodes > 1:
            hosts = ranks.view(p, self.args.dp_nodes, -1, t)
            self.inside_group = self._my_group("inside", hosts.movedim(2, 3).flatten(0, 2))
            self.across_group = self._my_group("across", hosts.movedim(1, 3).flatten(0, 2))
        # The ranks with first and last stage of one pipeline: the holders of a tied wte.
        self.tied_group = self._my_group("tied", ranks[ends].flatten(1).T)

    def _my_group(self, name: str, groups: Tensor) -> dist.ProcessGroup:
        """This rank's group among `groups` [n, size], a row of ranks each, or the single-rank
        group. Every rank must pass the same `groups`."""
        limit, table = datetime.timedelta(seconds=self.args.timeout), groups.tolist()
        if groups.size(1) == 1 and dist.get_world_size() > 1:
            return self.single_group
        if (key := str(table)) not in self.groups:
            if self.device.type == "cuda":  # one split of the world per axis, not one per group
                mine = dist.split_group(split_ranks=table, timeout=limit, group_desc=name)
            else:
                mine, _ = dist.new_subgroups_by_enumeration(table, limit, group_desc=name)
            self.groups[key] = self.single_group if mine is None else mine
        return self.groups[key]

    def _attach(self, sync: Callable | None, accumulations: dict[nn.Parameter, int]):
        stage, dtypes = self.args.zero, ("grad_dtype", "reduce_dtype")
        how = {name: options.DTYPES.get(getattr(self.args, name)) for name in dtypes}
        if self.args.dp_nodes > 1 and self.inside_group.size() > 1:
            how["reduce"] = ddp.Hierarchical(self.inside_group, self.across_group)
        if sync or stage == 0:
            return (sync or ddp.DDP)(self.model, self.dp_group, accumulations, **how)
        how["replicas"] = self.replica_group if self.replica_group.size() > 1 else None
        if stage == 3:
            how["reshard_after_forward"] = self.args.zero_reshard_after_forward == 1
            how["starts"] = [next(iter(zero.layers(chunk))) for chunk in self.pipe.chunks.values()]
        return zero.STAGES[stage](self.model, self.shard_group, accumulations, **how)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Over the pieces that this rank updates; weight decay on matrices, embeddings included,
        and not on biases and norms."""
        groups = [{"params": [], "weight_decay": self.args.weight_decay},
                  {"params": [], "weight_decay": 0.0}]  # fmt: skip
        for piece in self.sync.pieces():
            groups[piece.parameter.ndim < 2]["params"].append(piece.tensor)
        groups = [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}]
        how = {"fused": True} if self.device.type != "meta" else {"foreach": True}  # a dry run
        if self.args.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, **how)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), **how)

    def watch(self, trace: measure.Trace) -> None:
        """From now on, what this rank does goes into `trace`."""

        def span(action: pipeline.Action):
            step = {"step": self.current} if self.model.training else {}
            return trace.span(pipeline.label(action, self.stages), action=action, **step)

        self.span, self.pipe.watch = trace.span, span

    def learning_rate(self, step: int) -> float:
        return gpt.learning_rate(step, self.args.steps, self.args.warmup_steps, self.args.lr)

    def step(self, step: int) -> Tensor:
        """One optimizer step on the global batch `step`. Returns [loss, gradient norm, asked]: the
        mean over the batch's valid tokens, before the update; the norm before clipping; how many
        ranks were asked to stop. The same numbers on every rank. If the norm is inf or nan, the
        update is skipped: parameters, moments and the optimizer's step count keep their values."""
        self.current = step
        self.sync.start()
        loss = self._run(self.program, self.read, step)
        with self.span("gradients meet"):
            self.sync.finish()  # over dp; then over tp, then a tied wte's two
            self.sync.before_step()
            # One that no rank used in this step has no gradient.
            pieces = [piece for piece in self.sync.pieces() if piece.tensor.grad is not None]
            partial = [piece.tensor.grad for piece in pieces if piece.parameter.partial]
            tensor_parallel.all_reduce_partial(partial, self.tp_group)
            tied = [piece.tensor.grad for piece in pieces if hasattr(piece.parameter, "tied_name")]
            pipeline.all_reduce_tied(tied, self.tied_group)
            stats = self._global_stats(loss, pieces)
        with self.span("optimizer"):
            if self.args.clip > 0:
                factor = (self.args.clip / (stats[1] + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([piece.tensor.grad for piece in pieces], factor)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            if self.optimizer.defaults.get("fused"):  # the device skips the update: no sync
                self.optimizer.found_inf = (~stats[1].isfinite()).float()
            self.optimizer.step()
            self.sync.after_step()
        return stats

    def _run(self, program: pipeline.Program, read: Callable, step: int) -> Tensor:
        """This rank's share of the mean loss over the global batch `step` of read."""
        share, b = self.args.global_batch_size // self.dp_group.size(), self.args.micro_batch_size
        rows = range(self.dp_group.rank() * share, (self.dp_group.rank() + 1) * share)
        x, y = (to_device(tokens, self.device) for tokens in read(step, rows))
        count, targets = ddp.global_count(y, self.dp_group), y.split(b)

        def before(microbatch: int) -> None:
            self.draws.at(step, rows[microbatch * b : (microbatch + 1) * b])

        def loss_of(logits: Tensor, microbatch: int) -> Tensor:  # [b, s, v/t]
            total = tensor_parallel.vocab_parallel_cross_entropy(
                logits, targets[microbatch], self.model.lm_head, self.tp_group
            )
            return total / count

        shape = self._boundary(b, self.config.seq_len)
        return self.pipe.run(program, x.split(b), loss_of, shape, before)

    def _boundary(self, b: int, s: int) -> tuple[int, int, int]:
        """The shape of what one stage hands to the next."""
        shards = self.tp_group.size() if self.args.sequence_parallel else 1
        return b, s // shards, self.config.n_embd

    def _global_stats(self, loss: Tensor, pieces: list) -> Tensor:
        """Each rank adds what it alone answers for, and the world's sum is the whole: a gradient
        that d / k replicas hold alike counts on the first of them. The loss is alike on the tp
        ranks of the last stage."""
        first_tp, first_replica = self.tp_group.rank() == 0, self.replica_group.rank() == 0
        mine = [piece.tensor.grad for piece in pieces
                if first_replica and self._owns(piece.parameter)]  # fmt: skip
        norms = torch._foreach_norm(mine) if mine else [loss.new_zeros(())]
        asked = loss.new_full((), float(self.asked_to_stop))
        stats = torch.stack([loss * first_tp, torch.stack(norms).square().sum(), asked])
        if dist.get_world_size() > 1:
            dist.all_reduce(stats)  # payload: 3, over the world
        stats[1].sqrt_()
        return stats

    def _owns(self, p: nn.Parameter) -> bool:
        """A parameter that is whole on t ranks is the first one's, a tied matrix the first stage's;
        what is cut is where it is. (On each replica: these are not looked at.)"""
        alone = hasattr(p, "sharding") or self.tp_group.rank() == 0
        return alone and not (hasattr(p, "tied_name") and 0 not in self.stages)

    # A checkpoint: pieces and their moments, by where they lie in whole tensors.

    def state_to_save(self) -> tuple[list[checkpoint.Rectangle], dict]:
        """(what this rank writes, the optimizer's numbers)."""
        pieces = [piece for piece in self.sync.pieces() if self._owns(piece.parameter)]
        held, numbers = checkpoint.state_of(pieces, self.optimizer)
        return checkpoint.share(held, self.replica_group.rank(), self.replica_group.size()), numbers

    def state_to_load(self, numbers: dict) -> list[checkpoint.Rectangle]:
        """What this rank needs; call loaded() when it is there."""
        checkpoint.begin_state(self.sync.pieces(), self.optimizer, numbers)
        return checkpoint.state_of(self.sync.pieces(), self.optimizer)[0]

    def loaded(self) -> None:
        self.sync.after_step()  # from pieces to parameters

    def _forward_program(self, m: int) -> pipeline.Program:
        forwards = pipeline.forward_only(self.schedule, m)
        return pipeline.derive_programs(forwards)[self.pp_rank]

    @torch.no_grad()
    def validate(self, read: Callable) -> Tensor:
        """Mean loss over `val_batches` global batches read(index, rows) of held-out text."""
        program = self._forward_program(self.m)
        loss = 0.0
        self.model.eval()
        for index in range(self.args.val_batches):
            loss = loss + self._run(program, read, index)
        self.model.train()
        loss *= self.tp_group.rank() == 0
        dist.all_reduce(loss)  # payload: 1, over the world
        return loss / self.args.val_batches

    @torch.no_grad()
    def sample(
        self, prompt: Tensor, n: int, temperature: float = 0.8, top_k: int | None = None
    ) -> Tensor:
        """`prompt` [k] and n tokens more, one forward of the pipeline each; same on all ranks.
        top_k: of the likeliest alone. Temperature 0: the likeliest."""
        program = self._forward_program(1)
        generator, tokens = torch.Generator().manual_seed(self.args.seed), prompt.to(self.device)
        self.model.eval()
        for _ in range(n):
            x = tokens[None, -self.config.seq_len :]
            last = x.size(1) - 1  # what is behind it, so that t divides the length, it cannot see
            x = nn.functional.pad(x, (0, -x.size(1) % self.tp_group.size()))
            logits = torch.zeros(self.config.vocab_size, dtype=self.dtype, device=self.device)

            def place(output: Tensor, _: int, logits: Tensor = logits, last: int = last) -> Tensor:
                # Its own rows of the vocabulary, from each tp rank of one pipeline's last stage.
                start, stop = self.model.lm_head.weight.sharding.bounds(len(logits))
                logits[start:stop] = output[0, last] * (self.dp_group.rank() == 0)
                return output.new_zeros(())

            self.pipe.run(program, [x], place, self._boundary(*x.shape))
            dist.all_reduce(logits)  # payload: v, over the world
            best, which = logits.double().cpu().topk(min(top_k or len(logits), len(logits)))
            p = torch.softmax((best - best[0]) / max(temperature, 1e-9), dim=0)
            token = which[torch.multinomial(p, 1, generator=generator)]
            tokens = torch.cat([tokens, token.to(self.device)])
        self.model.train()
        return tokens


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copies t from pinned memory: a copy from pageable memory would block the host."""
    if t.device.type != device.type:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def start_to_host(t: Tensor) -> Callable[[], Tensor]:
    """Start to copy t to the host. Returns a function that waits for this copy only, not for work
    that is queued after it."""
    host = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda).copy_(t, non_blocking=True)
    event = torch.get_device_module(t.device).Event()
    event.record()

    def finish() -> Tensor:
        event.synchronize()
        return host

    return finish


# With these options torch.compile (2.13) splits a block's forward into several graphs: (how many,
# what it cannot trace). Dropout and selective recomputation add more.
GRAPHS_WITH_TP = (7, "the asynchronous collectives in the backward of 2 linear layers")
GRAPHS_WITH_ZERO_BUBBLE = (15, "the backward of 4 linear layers, which queues weight gradients")


def compile_blocks(blocks: nn.ModuleDict, recompute: str) -> None:
    """Of each block its forward alone: hooks, names and what comes to stand around it stay outside;
    and so does a core that is to be recomputed by itself."""
    for block in blocks.values():
        if recompute == "selective":
            block.attn.core.forward = torch.compiler.disable(block.attn.core.forward)
        block.forward = torch.compile(block.forward)


# --- loop -----------------------------------------------------------------------------------------


def join_ranks(device: torch.device, timeout: int = 600) -> None:
    """The process group of torchrun's ranks, or of this one process alone. Raises SystemExit if
    they do not all come within `timeout` seconds, or some have a GPU and some have none."""
    on_gpu, limit = device.type == "cuda", datetime.timedelta(seconds=timeout)
    store, rank, world_size = dist.HashStore(), 0, 1
    try:
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun's store outlives a restart, with the addresses of ranks that are dead
                # (pytorch#135712). With several nodes this count differs between them: README.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(restart, store)
        if rank == 0:
            store.set("device", device.type)
        elif (first := store.get("device").decode()) != device.type:
            sys.exit(f"train_3d.py: rank {rank} has device {device.type}, and rank 0 {first}; "
                     "NCCL and gloo do not meet: give --device cpu, or nodes alike")  # fmt: skip
        if on_gpu:
            torch.cuda.set_device(device)
            # NCCL 2.26: kernels of all communicators run in the order in which the host launched.
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
            timeout=limit, device_id=device if on_gpu else None,
        )  # fmt: skip
    except dist.DistError as error:
        where = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
        sys.exit(f"train_3d.py: rank {os.environ.get('RANK', 0)}: the ranks did not meet at "
                 f"{where} within {timeout} s: {str(error).splitlines()[0]}")  # fmt: skip


def describe(trainer: Trainer, logger: measure.Logger) -> None:
    """Prints what runs, which options have no effect here, and what --compile does not compile."""
    args, config, d = trainer.args, trainer.config, trainer.dp_group.size()
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    logger.say(
        f"{size / 1e6:.2f} M parameters in {args.dtype}; t={args.tp} p={args.pp} d={d}; "
        f"{trainer.m} microbatches of {args.micro_batch_size} x {config.seq_len} tokens; "
        f"{args.schedule}, ZeRO-{args.zero}, recompute {args.recompute}"
        + ", compiled"
        * args.compile
    )
    if args.compile and (args.tp > 1 or trainer.pipe.split_backward):
        n, what = GRAPHS_WITH_ZERO_BUBBLE if trainer.pipe.split_backward else GRAPHS_WITH_TP
        least = "at least " * (args.dropout > 0 or args.recompute == "selective")
        logger.say(f"--compile: {least}{n} graphs per block, not 1: it cannot trace {what}")
    if args.zero and d == 1:
        logger.say(f"--zero {args.zero}: d is 1, so there is nobody to share with: as --zero 0")
    if args.sequence_parallel and args.tp == 1:
        logger.say("--sequence-parallel: t is 1, so there is nothing to shard: as without it")
    if args.dropout and args.attention == "sdpa":
        logger.say("--dropout: attention is explicit, since the fused kernel takes no mask of ours")
    if args.recompute == "selective" and args.attention == "sdpa" and not args.dropout:
        logger.say("--recompute selective: sdpa keeps no s x s, so this saves a log-sum-exp")
    if args.recompute == "offload" and trainer.device.type == "cpu":
        logger.say("--recompute offload: device and host are one here, so this gains nothing")


def resume(
    trainer: Trainer, found: list[checkpoint.Found], group: dist.ProcessGroup, run: dict,
    logger: measure.Logger,
) -> int:  # fmt: skip
    """From the newest checkpoint that is whole, if there is any; returns the step to begin with."""
    try:
        newest, wrong = checkpoint.newest_complete(found, group)
        if newest is None:
            return 0
        checkpoint.read(newest.path, trainer.state_to_load(newest.about["optimizer"]), group)
    except ValueError as error:
        options.parser().error(f"--resume: {error}")
    trainer.loaded()
    for line in wrong:
        logger.say(f"--resume: {line}; so from the one before")
    other = ", on another corpus than before" * (newest.about["corpus"] != run["corpus"])
    logger.say(f"--resume: {newest.path} after step {newest.about['step']}{other}")
    return newest.about["step"]


def train(
    args: argparse.Namespace, config: gpt.GPTConfig, corpus: tuple, device: torch.device,
    logger: measure.Logger, draw: Callable | None, found: list[checkpoint.Found],
) -> bool:  # fmt: skip
    """The whole run, from the mesh to the sample. False if its end could not be saved."""
    tokens, held_out = corpus

    def read(step: int, rows: range) -> tuple[Tensor, Tensor]:
        return data.batch(tokens, step, rows, config.seq_len, args.seed)

    def read_held_out(index: int, rows: range) -> tuple[Tensor, Tensor]:
        start = index * args.global_batch_size
        shifted = range(start + rows.start, start + rows.stop)
        return data.validation_batch(held_out, shifted, config.seq_len)

    trainer = Trainer(args, config, read, device, draw)
    describe(trainer, logger)
    run = options.run_of(args, config) | {"corpus": data.fingerprint(tokens)}
    disk = None
    if args.checkpoint_dir:
        limit = datetime.timedelta(seconds=args.timeout)
        group = dist.new_group(None, limit, "gloo", group_desc="checkpoint")
        disk = checkpoint.Checkpoints(args.checkpoint_dir, args.keep, group)
    first = resume(trainer, found, disk.group, run, logger) if args.resume else 0
    val_loss, trace = None, measure.Trace(device) if args.trace else None
    if trace:
        trainer.watch(trace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(trainer, "asked_to_stop", True))
    asked, stop = start_to_host(torch.zeros(())), min(args.steps, args.stop_after or args.steps)
    gc.freeze()  # what is here now stays, so a collection need not look at it (0.1 s each)
    logger.start()
    for step in range(first, stop):
        stats = trainer.step(step)
        logger.step(step, stats, trainer.learning_rate(step))
        # The count of the previous step: the host waits for that step, not for the one just queued.
        stopped = step + 1 < stop and asked().item() > 0
        asked, last = start_to_host(stats[2]), stopped or step + 1 == stop
        if args.val_every and ((step + 1) % args.val_every == 0 or step + 1 == args.steps):
            logger.flush()
            val_loss = trainer.validate(read_held_out)
            logger.validation(step, val_loss)
        if disk and (last or (args.save_every and (step + 1) % args.save_every == 0)):
            logger.flush()
            mine, numbers = trainer.state_to_save()
            disk.save(step + 1, mine, run | {"optimizer": numbers})
        if disk and last:
            disk.wait()
        for saved in disk.news() if disk else ():
            logger.saved(saved)
        if stopped:
            logger.flush()
            logger.say(f"stopped by a signal after step {step + 1}")
            return disk is None or disk.failed is None
    if first >= stop:
        logger.say(f"step {first} of {stop} is done: nothing to train")
    if trace:
        t, p, d = (g.rank() for g in (trainer.tp_group, trainer.pp_group, trainer.dp_group))
        trace.write(args.trace, f"pp {p}, dp {d}, tp {t}")
        logger.say(f"--trace: wrote {args.trace}; for its bubble: python -m tools.bubble {args.trace}")
    if args.sample:
        prompt = torch.from_numpy(held_out[:16].astype("int64"))
        tokens = trainer.sample(prompt, args.sample).tolist()
        prompt, text = data.decode(tokens[:16], args.data), data.decode(tokens[16:], args.data)
        logger.say(f"--- sample after {prompt!r} ---\n{text}\n--------------")
    if val_loss is not None:
        logger.say(f"val loss {val_loss.item():.2f}")
    return disk is None or disk.failed is None


def export(args: argparse.Namespace, found: list[checkpoint.Found]) -> None:
    join_ranks(torch.device("cpu"), args.timeout)
    try:
        newest, wrong = checkpoint.newest_complete(found, dist.group.WORLD)
        checkpoint.export_gpt2(newest, args.export, dist.group.WORLD)
    except (OSError, ValueError) as error:
        options.parser().error(f"--export: {error}")
    print(*wrong, f"{args.export} is {newest.path} as Hugging Face's GPT2LMHeadModel", sep="\n")


def main() -> None:
    if "--dry-run" in sys.argv:
        return runpy.run_module("tools.dry_run", run_name="__main__") and None
    try:
        args, found, notes = options.parse_args()
        source = checkpoint.GPT2Folder(args.init_from) if args.init_from else None
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        config = options.check(args, world_size, source)
        if found:
            notes += options.compare(options.run_of(args, config), found[0].about)
        if args.export:
            if world_size > 1:
                raise ValueError(f"--export with {world_size} ranks: start one process")
            return export(args, found)
        device, device_line = options.pick_device(args.device)
        corpus = data.load(args.data, config.seq_len, config.vocab_size)
        measure.check_writable("--trace", args.trace)
        checkpoint.check_writable(args.checkpoint_dir)
        tokens = args.global_batch_size * config.seq_len
        logger = measure.Logger(
            args.log, args.steps, args.print_every, tokens,
            3e-12 * gpt.forward_flops_per_token(config) * tokens / world_size,
            options.peak_tflops(args, device), args.stop_after, append=bool(found),
        )  # fmt: skip
    except ValueError as error:
        options.parser().error(str(error))
    for line in (device_line, *notes):
        logger.say(line)
    try:
        join_ranks(device, args.timeout)
        options.check_same(args, {"corpus": data.fingerprint(corpus[0]),
                                  "device": options.device_name(device)})  # fmt: skip
        draw = source.draw if source else None
        good = train(args, config, corpus, device, logger, draw, found)
        gc.unfreeze()
        gc.collect()  # the trainer with its groups: gloo's threads must not outlive the interpreter
        dist.barrier()  # a rank that leaves early would break the others' connections
    except RuntimeError as error:
        if (line := measure.lost_collective(error)) is None:
            raise
        rank = os.environ.get("RANK", 0)
        print(f"train_3d.py: rank {rank}: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # what is under way waits for nobody
    dist.destroy_process_group()
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
