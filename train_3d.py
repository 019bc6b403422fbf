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
import dataclasses
import functools
import gc
import itertools
import math
import os
import re
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import activation_ckpt
import data
import ddp
import gpt
import measure
import pipeline
import tensor_parallel
import zero

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
SIZES = ("n-layer", "n-head", "n-embd", "vocab-size", "seq-len")


# --- command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line, from rank 0 only, and exit code 2 on every rank."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_3d.py: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def at_least(low: int, kind: type = int) -> Callable[[str], float]:
    def number(text: str):
        if not low <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"is {value}: give at least {low}")
        return value

    return number


def probability(text: str) -> float:
    if not 0.0 <= (value := float(text)) < 1.0:
        raise argparse.ArgumentTypeError(f"is {value}: give at least 0 and less than 1")
    return value


def parser() -> Parser:
    p = Parser("train_3d.py", description="Train a GPT over TP x PP x DP.", allow_abbrev=False)
    add, natural, amount = p.add_argument, at_least(1), at_least(0, float)
    add("--model", default="nano", choices=gpt.MODELS, help="named sizes, which these override:")
    for size in SIZES:
        add(f"--{size}", type=natural, metavar="N")
    add("--untied", action="store_true", help="a head of its own, not the embedding's matrix")
    add("--attention", choices=("sdpa", "explicit"), default="sdpa")
    add("--dropout", type=probability, default=0.0, metavar="P",
        help="on embedding, attention (which is explicit then) and residual")
    add("--data", metavar="PATH", help="text file or folder, or .npy/.bin token ids "
        "(default: the source of Python's standard library)")  # fmt: skip
    add("--global-batch-size", type=natural, default=32, help="rows a step, over all ranks")
    add("--micro-batch-size", type=natural, default=4, help="rows at a time on one rank")
    add("--steps", type=natural, default=300)
    add("--lr", type=amount, default=2e-3, help="peak learning rate; cosine down to a tenth")
    add("--warmup-steps", type=at_least(0), metavar="N", help="default: max(1, steps // 10)")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--weight-decay", type=amount, default=0.1, help="on matrices only")
    add("--clip", type=amount, default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--seed", type=at_least(0), default=0)
    add("--dtype", choices=DTYPES, default="float32",
        help="of parameters, activations and what travels; bf16 is updated in fp32")
    add("--grad-dtype", choices=("float32", "bf16"),
        help="with --dtype bf16: in which gradients add up (default float32)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if every local rank has a GPU of its own, else cpu")  # fmt: skip
    add("--tp", type=natural, default=1, help="t: ranks that split every matrix")
    add("--pp", type=natural, default=1, help="p: stages; data parallelism is world size / (t p)")
    add("--sequence-parallel", action="store_true",
        help="shard the residual stream and the norms over the sequence, among the tp ranks")
    add("--zero", type=int, choices=(0, *zero.STAGES), default=0,
        help="0: DDP, 1: optimizer states sharded, 2: gradients too, 3: parameters too")
    add("--zero-shard-size", type=natural, metavar="K", help="hybrid: shard within K of the d")
    add("--zero-reshard-after-forward", type=int, choices=(0, 1), default=1,
        help="ZeRO-3; 0: parameters stay whole until the step's last backward")  # fmt: skip
    add("--schedule", default="1f1b", metavar="NAME|FILE", help=f"{', '.join(pipeline.SCHEDULES)}; "
        "or a file, a line for each pp rank, as make draw ARGS=--text writes it: F0 B0 W0 F0.1 ...")
    add("--chunks", type=natural, metavar="V", help="stages a rank, of interleaved (default 2)")
    add("--recompute", choices=activation_ckpt.POLICIES, default="none")
    add("--recompute-every", type=natural, default=1, metavar="K", help="checkpoint 1 block of K")
    add("--recompute-layers", type=natural, metavar="N", help="only among a rank's first N")
    add("--val-every", type=at_least(0), default=100, metavar="N", help="steps; 0: never")
    add("--val-batches", type=natural, default=4, help="global batches in a validation")
    add("--print-every", type=natural, default=10, metavar="N", help="steps")
    add("--sample", type=at_least(0), default=0, metavar="N", help="tokens to generate at the end")
    add("--log", metavar="FILE", help="one JSON object a line: a step, or a validation")
    add("--trace", metavar="FILE", help="what each rank did, for ui.perfetto.dev; and the bubble")
    return p


def check(args: argparse.Namespace, world_size: int) -> gpt.GPTConfig:
    """The model's configuration. Raises ValueError, from the configuration and the world size
    alone, for everything that would otherwise fail later on some ranks and hang the others."""
    sizes = (size.replace("-", "_") for size in SIZES)
    given = {size: n for size in sizes if (n := getattr(args, size)) is not None}
    config = dataclasses.replace(
        gpt.MODELS[args.model], tied=not args.untied, attention=args.attention,
        dropout=args.dropout, **given
    )  # fmt: skip
    t, p, rows, k = args.tp, args.pp, args.micro_batch_size, args.zero_shard_size
    d, batch, every = max(1, world_size // (t * p)), args.global_batch_size, args.recompute_every
    for wrong, message in (
        (world_size % (t * p), f"world size {world_size} is not divisible by --tp {t} x --pp {p}: "
         f"start a multiple of {t * p} ranks (torchrun --nproc-per-node), or change --tp or --pp"),
        (config.n_embd % config.n_head, f"--n-embd {config.n_embd} is not divisible by --n-head "
         f"{config.n_head}: change one"),
        (config.n_head % t, f"--n-head {config.n_head} is not divisible by --tp {t}: heads are cut "
         "whole; change one"),
        (args.sequence_parallel and config.seq_len % t, f"--seq-len {config.seq_len} is not "
         f"divisible by --tp {t}, and --sequence-parallel cuts it: change one"),
        (batch % (d * rows), f"--global-batch-size {batch} is not divisible by d {d} x "
         f"--micro-batch-size {rows}: make it a multiple of {d * rows}"),
        (every > config.n_layer, f"--recompute-every {every} is more than the {config.n_layer} "
         "blocks: lower it"),
        ((args.recompute_layers or 1) > config.n_layer, f"--recompute-layers "
         f"{args.recompute_layers} is more than the {config.n_layer} blocks: lower it"),
        (k and not args.zero, f"--zero-shard-size {k} with --zero 0: nothing is sharded; give "
         "--zero 1, 2 or 3"),
        (k and d % k, f"--zero-shard-size {k} does not divide d {d}: give a divisor of {d}"),
        (args.zero < 3 and not args.zero_reshard_after_forward, "--zero-reshard-after-forward 0 "
         f"with --zero {args.zero}: only ZeRO-3 reshards; give --zero 3"),
        (args.grad_dtype and args.dtype != "bf16", f"--grad-dtype {args.grad_dtype} with --dtype "
         f"{args.dtype}: give --dtype bf16, or leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    schedule = make_schedule(args, batch // (d * rows))
    pipeline.split_layers(config.n_layer, sum(map(len, pipeline.stages_of(schedule))))
    tensor_parallel.check_width("--vocab-size", config.vocab_size, t)
    return config


def make_schedule(args: argparse.Namespace, m: int) -> pipeline.Schedule:
    """The one that --schedule and --chunks ask for, of m microbatches."""
    name, v = args.schedule, args.chunks
    if name not in pipeline.SCHEDULES:
        if v:
            raise ValueError(f"--chunks {v} with a schedule from a file: leave it out")
        return read_schedule(name, args.pp, m)
    own = {"interleaved": v or 2, "zb-v": 2}.get(name, 1)
    if v not in (None, own):
        raise ValueError(f"--chunks {v} with --schedule {name}, which has {own} a rank: leave it "
                         "out, or give --schedule interleaved")  # fmt: skip
    return pipeline.SCHEDULES[name](args.pp, m, own)


def read_schedule(path: str, p: int, m: int) -> pipeline.Schedule:
    """A line for each of p ranks: F, B or W, a microbatch, and the chunk, if not the first; small
    letters are short for chunk 1. Chunk c of rank r is stage c p + r, unless the line begins with
    its stages, as in `0 3: F0 f0 ...`. What follows # is a comment. Raises ValueError."""

    def wrong(number: int, column: int, what: str) -> ValueError:
        return ValueError(f"--schedule {path}, line {number}, column {column}: {what}")

    try:
        with open(path) as file:
            lines = [line.partition("#")[0].rstrip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(pipeline.SCHEDULES)
        raise ValueError(f"--schedule {path} is none of {known}, and no file that can be read: "
                         f"{error}") from None  # fmt: skip
    schedule, places = [], []
    for number, line in enumerate(lines, 1):
        head, colon, _ = line.rpartition(":")
        if not line:
            continue
        if not re.fullmatch(r"[\d\s,]*", head):
            raise wrong(number, 1, f"{head!r} are no stages: expected numbers, like 0 3:")
        stages = sorted(int(k) for k in re.findall(r"\d+", head))
        row, columns = [], []
        for word in re.compile(r"\S+").finditer(line, len(head + colon)):
            columns.append((number, word.start() + 1))
            parts = re.fullmatch(r"([FBWfbw])(\d+)(?:\.(\d+))?", word.group())
            if not parts:
                raise wrong(*columns[-1], f"{word.group()!r} is no action: expected F, B or W, a "
                            "microbatch, and perhaps a chunk, like B0 or B0.1")  # fmt: skip
            kind, i, chunk = parts[1], int(parts[2]), int(parts[3] or parts[1].islower())
            if stages and chunk >= len(stages):
                what = f"{word.group()}: expected a chunk of 0..{len(stages) - 1}"
                raise wrong(*columns[-1], what)
            stage = stages[chunk] if stages else chunk * p + len(schedule)
            row.append(pipeline.Action(kind.upper(), i, stage))
        places.append([*columns, (number, len(line) + 1)])
        schedule.append(row)
    if len(schedule) != p:
        what = f"{len(schedule)} ranks: expected a line for each of --pp {p}"
        raise wrong(max(1, len(lines)), 1, what)
    try:
        pipeline.check(schedule, m)
    except pipeline.ScheduleError as error:
        raise wrong(*places[error.rank][error.place], str(error)) from None
    return schedule


def pick_device(name: str) -> tuple[torch.device, str]:
    """(device of this rank, the line that says so). Raises ValueError where a GPU is missing."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    enough = gpus >= ranks
    if name == "cuda" and not enough:
        raise ValueError(
            f"--device cuda: {ranks} local ranks and {gpus} GPUs; every rank needs one of its own: "
            "start fewer ranks or use --device cpu"
        )
    if name == "cpu" or not enough:
        return torch.device("cpu"), f"device cpu ({gpus} GPUs for {ranks} local ranks)"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device, f"device cuda ({gpus} GPUs for {ranks} local ranks)"


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
        self.dtype = DTYPES[args.dtype]
        t, p = args.tp, args.pp
        d = dist.get_world_size() // (t * p)
        self.m = args.global_batch_size // (d * args.micro_batch_size)
        self.schedule = schedule(p, self.m) if schedule else make_schedule(args, self.m)
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
        self.draws.seed, remember = args.seed, self.draws.remember
        activation_ckpt.checkpoint_blocks(
            stage.h, args.recompute, args.recompute_every, args.recompute_layers, remember
        )
        self.model = stage

        chunks, mine = pipeline.chunks_of(stage, self.stages, split), self.schedule[self.pp_rank]
        apart = pipeline.splits(mine)
        self.pipe = pipeline.Pipeline(chunks, n, self.pp_group, self.dtype, device, apart)
        self.program = pipeline.derive_programs(self.schedule)[self.pp_rank]
        self.sync = self._attach(sync, self.pipe.accumulations(mine))
        self.span: Callable = lambda name: contextlib.nullcontext()  # who looks: see watch()
        # Their gradients meet over tp: the tp ranks must hold the same pieces of them.
        partial = [(f"{n}[{at}:]", t) for n, t, p, at in self.sync.pieces() if p.partial]
        ddp.check_same_parameters(partial, self.tp_group)
        self.optimizer = self._make_optimizer()

    def _make_groups(self, p: int, d: int, k: int, t: int, ends: list[int]) -> None:
        names = ("pp", "replica", "shard", "tp")  # dp is replica x shard
        mesh = dist.init_device_mesh(self.device.type, (p, d // k, k, t), mesh_dim_names=names)
        groups = (mesh[name].get_group() for name in names)
        self.pp_group, self.replica_group, self.shard_group, self.tp_group = groups
        self.dp_group = self._my_group(mesh.mesh.movedim(3, 1).flatten(2).flatten(0, 1))
        # The ranks with first and last stage of one pipeline: the holders of a tied wte.
        self.tied_group = self._my_group(mesh.mesh[ends].flatten(1).T)

    @staticmethod
    def _my_group(groups: Tensor) -> dist.ProcessGroup | None:
        mine = None
        for ranks in groups.tolist():
            group = dist.new_group(ranks)  # every rank must make every group
            mine = group if dist.get_rank() in ranks else mine
        return mine

    def _attach(self, sync: Callable | None, accumulations: dict[nn.Parameter, int]):
        stage, options = self.args.zero, {"grad_dtype": DTYPES.get(self.args.grad_dtype)}
        if sync or stage == 0:
            return (sync or ddp.DDP)(self.model, self.dp_group, accumulations, **options)
        options["replicas"] = self.replica_group if self.replica_group.size() > 1 else None
        if stage == 3:
            options["reshard_after_forward"] = self.args.zero_reshard_after_forward == 1
            options["starts"] = [zero.layers(chunk)[0] for chunk in self.pipe.chunks.values()]
        return zero.STAGES[stage](self.model, self.shard_group, accumulations, **options)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """Over the pieces that this rank updates; weight decay on matrices, embeddings included,
        and not on biases and norms."""
        groups = [{"params": [], "weight_decay": self.args.weight_decay},
                  {"params": [], "weight_decay": 0.0}]  # fmt: skip
        for _, piece, parameter, _ in self.sync.pieces():
            groups[parameter.ndim < 2]["params"].append(piece)
        groups = [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}]
        if self.args.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, foreach=True)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=True)

    def watch(self, trace: measure.Trace) -> None:
        """From now on, what this rank does goes into `trace`."""

        def span(action: pipeline.Action):
            step = {"step": self.current} if self.model.training else {}
            return trace.span(pipeline.spell(action, self.stages), action=action, **step)

        self.span, self.pipe.watch = trace.span, span

    def learning_rate(self, step: int) -> float:
        return gpt.learning_rate(step, self.args.steps, self.args.warmup_steps, self.args.lr)

    def step(self, step: int) -> Tensor:
        """One optimizer step on the global batch `step`. Returns [loss, gradient norm]: the mean
        over the batch's valid tokens, before the update, and the norm before clipping; the same
        numbers on every rank."""
        self.current = step
        self.sync.start()
        loss = self._run(self.program, self.read, step)
        with self.span("gradients meet"):
            self.sync.finish()  # over dp; then over tp, then a tied wte's two
            self.sync.before_step()
            pieces = self.sync.pieces()
            partial = [piece.grad for _, piece, p, _ in pieces if p.partial]
            tensor_parallel.all_reduce_partial(partial, self.tp_group)
            tied = [piece.grad for _, piece, p, _ in pieces if hasattr(p, "tied_name")]
            pipeline.all_reduce_tied(tied, self.tied_group)
            stats = self._global_stats(loss, pieces)
        with self.span("optimizer"):
            if self.args.clip > 0:
                factor = (self.args.clip / (stats[1] + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([piece.grad for _, piece, _, _ in pieces], factor)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimizer.step()
            self.sync.after_step()
        return stats

    def _run(self, program: pipeline.Program, read: Callable, step: int) -> Tensor:
        """This rank's share of the mean loss over the global batch `step` of read."""
        share, b = self.args.global_batch_size // self.dp_group.size(), self.args.micro_batch_size
        rows = range(self.dp_group.rank() * share, (self.dp_group.rank() + 1) * share)
        x, y = (tokens.to(self.device) for tokens in read(step, rows))
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
        that t ranks or d / k replicas hold alike counts on the first of them, a shard where it is,
        a tied matrix on the first stage. The loss is alike on the tp ranks of the last stage."""
        first_tp, first_replica = self.tp_group.rank() == 0, self.replica_group.rank() == 0
        mine = [
            piece.grad
            for _, piece, p, _ in pieces
            if (hasattr(p, "cut") or first_tp)
            and first_replica
            and not (hasattr(p, "tied_name") and 0 not in self.stages)
        ]
        norms = torch._foreach_norm(mine) if mine else [loss.new_zeros(())]
        stats = torch.stack([loss * first_tp, torch.stack(norms).square().sum()])
        dist.all_reduce(stats)  # payload: 2, over the world
        stats[1].sqrt_()
        return stats

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
    def sample(self, prompt: Tensor, n: int, temperature: float = 0.8) -> Tensor:
        """`prompt` [k] and n tokens more, one forward of the pipeline each; same on all ranks."""
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
                start, stop = self.model.lm_head.weight.cut.range(len(logits))
                logits[start:stop] = output[0, last] * (self.dp_group.rank() == 0)
                return output.new_zeros(())

            self.pipe.run(program, [x], place, self._boundary(*x.shape))
            dist.all_reduce(logits)  # payload: v, over the world
            p = torch.softmax(logits.double().cpu() / temperature, dim=0)
            token = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, token.to(self.device)])
        self.model.train()
        return tokens


def bubble_table(trainer: Trainer, everyone: list[list[tuple]]) -> str:
    """From the spans of all ranks: what an action takes in rank 0's pipeline, on average without
    the first step, and the bubble that follows if transfers took no time, beside the real one."""
    steps: dict[int, list[pipeline.Span]] = {}
    for pp_rank, rank in enumerate(dist.get_process_group_ranks(trainer.pp_group)):
        for _, start, end, known in everyone[rank]:
            if "step" in known:
                span = pipeline.Span(pp_rank, known["action"], start, end)
                steps.setdefault(known["step"], []).append(span)
    if len(steps) > 1:
        del steps[min(steps)]
    mean = pipeline.mean_times(itertools.chain(*steps.values()))
    simulated = pipeline.bubble(
        pipeline.simulate(trainer.schedule, lambda a: mean[a.kind, a.stage])
    )
    measured = statistics.median(pipeline.bubble(step) for step in steps.values())
    lines = ["stage" + "".join(f"{kind + ' ms':>9s}" for kind in "FBW")]
    for k in range(trainer.pipe.last + 1):
        lines.append(f"{k:5d}" + "".join(f"{1e3 * mean.get((kind, k), 0):9.2f}" for kind in "FBW"))
    lines.append(f"bubble: with these times {simulated:.3f} | measured {measured:.3f}")
    return "\n".join(lines)


# --- loop -----------------------------------------------------------------------------------------


def join_ranks(device: torch.device) -> None:
    """The process group of torchrun's ranks, or of this one process alone."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, device_id=device if on_gpu else None, **alone)


def train(
    args: argparse.Namespace, config: gpt.GPTConfig, corpus: tuple, device: torch.device,
    logger: measure.Logger,
) -> None:  # fmt: skip
    """The whole run, from the mesh to the sample."""
    tokens, held_out = corpus

    def read(step: int, rows: range) -> tuple[Tensor, Tensor]:
        return data.batch(tokens, step, rows, config.seq_len, args.seed)

    def read_held_out(index: int, rows: range) -> tuple[Tensor, Tensor]:
        start = index * args.global_batch_size
        shifted = range(start + rows.start, start + rows.stop)
        return data.validation_batch(held_out, shifted, config.seq_len)

    trainer = Trainer(args, config, read, device)
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    logger.say(
        f"{size / 1e6:.2f} M parameters in {args.dtype}; t={args.tp} p={args.pp} "
        f"d={trainer.dp_group.size()}; {trainer.m} microbatches of {args.micro_batch_size} x "
        f"{config.seq_len} tokens; {args.schedule}, ZeRO-{args.zero}, recompute {args.recompute}"
    )
    if args.zero and trainer.dp_group.size() == 1:
        logger.say(f"--zero {args.zero}: d is 1, so there is nobody to share with: as --zero 0")
    if args.sequence_parallel and args.tp == 1:
        logger.say("--sequence-parallel: t is 1, so there is nothing to shard: as without it")
    if args.dropout and args.attention == "sdpa":
        logger.say("--dropout: attention is explicit, since the fused kernel takes no mask of ours")
    if args.recompute == "selective" and args.attention == "sdpa" and not args.dropout:
        logger.say("--recompute selective: sdpa keeps no s x s, so this saves a log-sum-exp")
    if args.recompute == "offload" and device.type == "cpu":
        logger.say("--recompute offload: device and host are one here, so this gains nothing")
    val_loss, trace = None, measure.Trace(device) if args.trace else None
    if trace:
        trainer.watch(trace)
    logger.start()
    for step in range(args.steps):
        logger.step(step, trainer.step(step), trainer.learning_rate(step))
        if args.val_every and ((step + 1) % args.val_every == 0 or step + 1 == args.steps):
            logger.flush()
            val_loss = trainer.validate(read_held_out)
            logger.validation(step, val_loss)
    if trace:
        t, p, d = (g.rank() for g in (trainer.tp_group, trainer.pp_group, trainer.dp_group))
        spans = trace.write(args.trace, f"pp {p}, dp {d}, tp {t}")
        logger.say(bubble_table(trainer, spans) if spans else "")
    if args.sample:
        prompt = torch.from_numpy(held_out[:16].astype("int64"))
        tokens = trainer.sample(prompt, args.sample).tolist()
        prompt, text = data.decode(tokens[:16], args.data), data.decode(tokens[16:], args.data)
        logger.say(f"--- sample after {prompt!r} ---\n{text}\n--------------")
    if val_loss is not None:
        logger.say(f"val loss {val_loss.item():.2f}")


def main() -> None:
    args = parser().parse_args()
    try:
        config = check(args, int(os.environ.get("WORLD_SIZE", 1)))
        device, device_line = pick_device(args.device)
        corpus = data.load(args.data, config.seq_len, config.vocab_size)
        tokens_per_step = args.global_batch_size * config.seq_len
        measure.check_writable("--trace", args.trace)
        logger = measure.Logger(args.log, args.steps, args.print_every, tokens_per_step)
    except ValueError as error:
        parser().error(str(error))
    logger.say(device_line)
    join_ranks(device)
    train(args, config, corpus, device, logger)
    gc.collect()  # the trainer with its groups: gloo's threads must not outlive the interpreter
    dist.barrier()  # a rank that leaves early would break the others' connections
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
