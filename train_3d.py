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
import datetime
import functools
import gc
import itertools
import math
import os
import re
import signal
import statistics
import sys
import time
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
import pipeline
import tensor_parallel
import zero

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "seq_len")
# What makes a run what it is; the rest of the flags says how and where it is computed.
RUN = ("untied", "attention", "dropout", "data", "global_batch_size", "steps", "lr", "warmup_steps",
       "optimizer", "weight_decay", "clip", "seed", "dtype", "grad_dtype")  # fmt: skip


# --- command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line, from rank 0 only, and exit code 2 on every rank."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_3d.py: error: {message}", file=sys.stderr, flush=True)
        elif dist.is_torchelastic_launched():
            time.sleep(3)  # when a rank leaves, torchrun ends the others: rank 0 speaks first
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
    add("--model", choices=gpt.MODELS, help="named sizes (default nano), which these override:")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=natural, metavar="N")
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
    add("--timeout", type=natural, default=600, metavar="SECONDS",
        help="that a rank waits for another in a collective, before the job ends with an error")
    add("--checkpoint-dir", metavar="DIR", help="save there (default: nothing is saved)")
    add("--save-every", type=at_least(0), default=100, metavar="N", help="steps; 0: at the end")
    add("--keep", type=natural, default=2, metavar="K", help="checkpoints, the newest")
    add("--resume", action="store_true", help="from the newest checkpoint (default DIR: "
        "checkpoints), in whatever layout; what makes the run (model, data, batch, optimizer) is "
        "as it was, where it is not given")  # fmt: skip
    add("--stop-after", type=natural, metavar="N", help="end, saved, after step N of --steps")
    add("--init-from", metavar="DIR", help="begin with the GPT-2 of a Hugging Face folder")
    add("--export", metavar="DIR", help="with --resume: write the checkpoint as such a folder; end")
    return p


def check(
    args: argparse.Namespace, world_size: int, source: checkpoint.GPT2Folder | None = None
) -> gpt.GPTConfig:
    """The model's configuration, that of `source` if there is one. Raises ValueError, from the
    configuration and the world size alone, for everything that would otherwise fail later on some
    ranks and hang the others."""
    given = {size: n for size in SIZES if (n := getattr(args, size)) is not None}
    own = source.sizes if source else dataclasses.asdict(gpt.MODELS[args.model or "nano"])
    args.untied |= not own["tied"]
    config = gpt.GPTConfig(**own | given | {"tied": not args.untied, "attention": args.attention,
                                            "dropout": args.dropout})  # fmt: skip
    for size, n in given.items() if source else ():
        if n != own[size] and not (size == "seq_len" and n < own[size]):
            raise ValueError(f"--{size.replace('_', '-')} {n}, and --init-from {args.init_from} "
                             f"has {own[size]}: leave it out")  # fmt: skip
    if source:
        with torch.device("meta"):
            source.check(gpt.GPT(config))
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


# --- before the first step ------------------------------------------------------------------------


def look_back(
    argv: list[str] | None = None,
) -> tuple[argparse.Namespace, list[checkpoint.Found], list[str]]:
    """(arguments, completed by what the run was; checkpoints to go on from, newest first; what to
    say of others). Without a checkpoint the run begins. Raises ValueError."""
    args = parser().parse_args(argv)
    folder = args.checkpoint_dir or ("checkpoints" if args.resume or args.export else None)
    try:
        found, wrong = checkpoint.find(folder) if folder else ([], [])
    except FileNotFoundError as error:
        # Where torchrun starts a run again by itself, it has the flag from the beginning.
        if args.resume and not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise ValueError(f"--resume: {error}; leave it out to begin") from None
        found, wrong = [], []
    if found and not args.resume:
        raise ValueError(f"--checkpoint-dir {folder} holds {found[0].path.name}: give --resume to "
                         "go on from it, or another directory to begin")  # fmt: skip
    if args.export and not found:
        raise ValueError("--export writes a checkpoint: give --resume")
    if found:
        was, complete = found[0].about, parser()
        complete.set_defaults(**was["arguments"], **({} if args.model else was["sizes"]))
        args = complete.parse_args(argv)
    args.checkpoint_dir = folder
    return args, found, wrong


def run_of(args: argparse.Namespace, config: gpt.GPTConfig) -> dict:
    """What a checkpoint says of the run."""
    return {"sizes": {size: getattr(config, size) for size in SIZES},
            "arguments": {name: getattr(args, name) for name in RUN}}  # fmt: skip


def compare(run: dict, was: dict) -> list[str]:
    """What to say of a run that goes on as another. Raises ValueError if it cannot."""
    for name in ("optimizer", "untied"):
        if run["arguments"][name] != was["arguments"][name]:
            raise ValueError(f"--resume: {name} is {run['arguments'][name]}, and the checkpoint is "
                             f"of {was['arguments'][name]}")  # fmt: skip
    if run["sizes"] != was["sizes"]:
        mine, theirs = (", ".join(f"{k} {v}" for k, v in x["sizes"].items()) for x in (run, was))
        raise ValueError(f"--resume: the model has {mine}, and the checkpoint {theirs}: leave the "
                         "sizes out")  # fmt: skip
    changed = [f"--{name.replace('_', '-')} {was['arguments'][name]} -> {value}"
               for name, value in run["arguments"].items() if value != was["arguments"][name]]
    return [f"--resume: as before but for {', '.join(changed)}"] if changed else []


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
        self.asked_to_stop = False  # by a signal
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
        ranks = torch.arange(p * d * t).view(p, d // k, k, t)  # tp innermost: neighbours
        self.pp_group = self._my_group("pp", ranks.movedim(0, 3).flatten(0, 2))
        self.replica_group = self._my_group("replica", ranks.movedim(1, 3).flatten(0, 2))
        self.shard_group = self._my_group("shard", ranks.movedim(2, 3).flatten(0, 2))
        self.tp_group = self._my_group("tp", ranks.flatten(0, 2))
        self.dp_group = self._my_group("dp", ranks.movedim(3, 1).flatten(2).flatten(0, 1))
        # The ranks with first and last stage of one pipeline: the holders of a tied wte.
        self.tied_group = self._my_group("tied", ranks[ends].flatten(1).T)

    def _my_group(self, name: str, groups: Tensor) -> dist.ProcessGroup | None:
        mine, limit = None, datetime.timedelta(seconds=self.args.timeout)
        for ranks in groups.tolist():
            group = dist.new_group(ranks, limit, group_desc=name)  # every rank must make every one
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
        """One optimizer step on the global batch `step`. Returns [loss, gradient norm, asked]: the
        mean over the batch's valid tokens, before the update; the norm before clipping; how many
        ranks were asked to stop. The same numbers on every rank."""
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
        that d / k replicas hold alike counts on the first of them. The loss is alike on the tp
        ranks of the last stage."""
        first_tp, first_replica = self.tp_group.rank() == 0, self.replica_group.rank() == 0
        mine = [piece.grad for _, piece, p, _ in pieces if first_replica and self._answers_for(p)]
        norms = torch._foreach_norm(mine) if mine else [loss.new_zeros(())]
        asked = loss.new_full((), float(self.asked_to_stop))
        stats = torch.stack([loss * first_tp, torch.stack(norms).square().sum(), asked])
        dist.all_reduce(stats)  # payload: 3, over the world
        stats[1].sqrt_()
        return stats

    def _answers_for(self, p: nn.Parameter) -> bool:
        """A parameter that is whole on t ranks is the first one's, a tied matrix the first stage's;
        what is cut is where it is. (On each replica: these are not looked at.)"""
        alone = hasattr(p, "cut") or self.tp_group.rank() == 0
        return alone and not (hasattr(p, "tied_name") and 0 not in self.stages)

    # A checkpoint: pieces and their moments, by where they lie in whole tensors.

    def state_to_save(self) -> tuple[list[checkpoint.Rectangle], dict]:
        """(what this rank writes, the optimizer's numbers)."""
        pieces = [piece for piece in self.sync.pieces() if self._answers_for(piece[2])]
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
                start, stop = self.model.lm_head.weight.cut.range(len(logits))
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


def join_ranks(device: torch.device, timeout: int) -> None:
    """The process group of torchrun's ranks, or of this one process alone."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store outlives a restart, with the addresses of ranks that are dead
            # (pytorch#135712). With several nodes this count differs between them: see the README.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout), device_id=device if on_gpu else None,
    )  # fmt: skip


def describe(trainer: Trainer, logger: measure.Logger) -> None:
    """What runs; and of options that have no effect here, that."""
    args, config, d = trainer.args, trainer.config, trainer.dp_group.size()
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(config).parameters())
    logger.say(
        f"{size / 1e6:.2f} M parameters in {args.dtype}; t={args.tp} p={args.pp} d={d}; "
        f"{trainer.m} microbatches of {args.micro_batch_size} x {config.seq_len} tokens; "
        f"{args.schedule}, ZeRO-{args.zero}, recompute {args.recompute}"
    )
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
    run, disk, first = run_of(args, config) | {"corpus": data.fingerprint(tokens)}, None, 0
    if args.checkpoint_dir:
        limit = datetime.timedelta(seconds=args.timeout)
        group = dist.new_group(None, limit, "gloo", group_desc="checkpoint")
        disk = checkpoint.Checkpoints(args.checkpoint_dir, args.keep, group)
    if found:
        newest, wrong = checkpoint.newest_whole(found, disk.group)
        checkpoint.read(newest.path, trainer.state_to_load(newest.about["optimizer"]), disk.group)
        trainer.loaded()
        first, other = newest.about["step"], newest.about["corpus"] != run["corpus"]
        for line in wrong:
            logger.say(f"--resume: {line}; so from the one before")
        logger.say(f"--resume: {newest.path} after step {first}"
                   + (", on another corpus than before" if other else ""))  # fmt: skip

    val_loss, trace = None, measure.Trace(device) if args.trace else None
    if trace:
        trainer.watch(trace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(trainer, "asked_to_stop", True))
    asked, stop = torch.zeros(()), min(args.steps, args.stop_after or args.steps)
    gc.freeze()  # what is here now stays, so a collection need not look at it (0.1 s each)
    logger.start()
    for step in range(first, stop):
        stats = trainer.step(step)
        logger.step(step, stats, trainer.learning_rate(step))
        # Asked in the step before: that is over, so nothing waits for this number.
        stopped = step + 1 < stop and asked.item() > 0
        asked, last = stats[2], stopped or step + 1 == stop
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
        spans = trace.write(args.trace, f"pp {p}, dp {d}, tp {t}")
        logger.say(bubble_table(trainer, spans) if spans else "")
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
    newest, wrong = checkpoint.newest_whole(found, dist.group.WORLD)
    checkpoint.export_gpt2(newest, args.export, dist.group.WORLD)
    print(*wrong, f"{args.export} is {newest.path} as Hugging Face's GPT2LMHeadModel", sep="\n")


def main() -> None:
    try:
        args, found, notes = look_back()
        source = checkpoint.GPT2Folder(args.init_from) if args.init_from else None
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        config = check(args, world_size, source)
        if found:
            notes += compare(run_of(args, config), found[0].about)
        if args.export:
            if world_size > 1:
                raise ValueError(f"--export with {world_size} ranks: start one process")
            return export(args, found)
        device, device_line = pick_device(args.device)
        corpus = data.load(args.data, config.seq_len, config.vocab_size)
        measure.check_writable("--trace", args.trace)
        checkpoint.check_writable(args.checkpoint_dir)
        logger = measure.Logger(
            args.log, args.steps, args.print_every, args.global_batch_size * config.seq_len,
            args.stop_after, append=bool(found),
        )  # fmt: skip
    except ValueError as error:
        parser().error(str(error))
    for line in (device_line, *notes):
        logger.say(line)
    try:
        join_ranks(device, args.timeout)
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
    except ValueError as error:
        parser().error(str(error))
    dist.destroy_process_group()
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
