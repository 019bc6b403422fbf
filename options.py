"""What a run may be asked for, and why it cannot be: the command line of train_3d.py.

Everything here depends on the arguments and the world size alone (and on files that every rank can
read), so that all ranks come to the same answer before any of them talks to another. What cannot
work raises ValueError, with both numbers and a remedy.

    args, found, notes = parse_args()            arguments, completed by the run that is resumed
    config = check(args, world_size)            the model's configuration, or a ValueError
"""

import argparse
import dataclasses
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import activation_ckpt
import checkpoint
import gpt
import pipeline
import tensor_parallel
import zero

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "seq_len")
# What makes a run what it is; the rest of the flags says how and where it is computed.
RUN = ("untied", "attention", "dropout", "data", "global_batch_size", "steps", "lr", "warmup_steps",
       "optimizer", "weight_decay", "clip", "seed", "dtype", "grad_dtype",
       "reduce_dtype")  # fmt: skip


# TFLOP/s of dense bf16 matmuls, by how torch.cuda.get_device_name begins: NVIDIA's data sheets. Of
# a part of a GPU (MIG), and of other kinds, it is not known.
PEAKS = {"NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA A100": 312}
PEAKS |= {"NVIDIA H200": 989, "NVIDIA B200": 2250}


class Parser(argparse.ArgumentParser):
    """One line, from rank 0 only, and exit code 2 on every rank."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_3d.py: error: {message}", file=sys.stderr, flush=True)
        elif dist.is_torchelastic_launched():
            # When a rank leaves, torchrun ends the others: rank 0 speaks first. Who is still here
            # after that is wrong where rank 0 is not; of those the first on each node speaks.
            local = int(os.environ.get("LOCAL_RANK", 0))
            time.sleep(3 + local / 4)
            print(f"train_3d.py: rank {os.environ['RANK']}: error: {message}", file=sys.stderr)
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
    add(
        "--dropout",
        type=probability,
        default=0.0,
        metavar="P",
        help="on embedding, attention (which is explicit then) and residual",
    )
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
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of parameters, activations and what travels; bf16 is updated in fp32",
    )
    add("--grad-dtype", choices=("float32", "bf16"),
        help="with --dtype bf16: in which gradients add up (default float32)")  # fmt: skip
    add(
        "--reduce-dtype",
        choices=("float32", "bf16"),
        help="with --dtype bf16: in which gradients are sent and summed over ranks (default bf16)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if every local rank has a GPU of its own, else cpu")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--peak-tflops", type=at_least(1e-3, float), metavar="X",
        help="of a rank, for the MFU (default: known of some GPUs in bf16)")  # fmt: skip
    add("--tp", type=natural, default=1, help="t: ranks that split every matrix")
    add("--pp", type=natural, default=1, help="p: stages; data parallelism is world size / (t p)")
    add(
        "--sequence-parallel",
        action="store_true",
        help="shard the residual stream and the norms over the sequence, among the tp ranks",
    )
    add(
        "--zero",
        type=int,
        choices=(0, *zero.STAGES),
        default=0,
        help="0: DDP, 1: optimizer states sharded, 2: gradients too, 3: parameters too",
    )
    add(
        "--dp-nodes",
        type=natural,
        default=1,
        metavar="K",
        help="hosts that hold the d replicas: DDP's gradients meet inside each first",
    )
    add("--zero-shard-size", type=natural, metavar="K", help="hybrid: shard within K of the d")
    add("--zero-reshard-after-forward", type=int, choices=(0, 1), default=1,
        help="ZeRO-3; 0: parameters stay whole until the step's last backward")  # fmt: skip
    add(
        "--schedule",
        default="1f1b",
        metavar="NAME|FILE",
        help=f"{', '.join(pipeline.SCHEDULES)}; "
        "or a file, a line for each pp rank, as make draw ARGS=--text writes it: F0 B0 W0 F0.1 ...",
    )
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
    add(
        "--timeout",
        type=natural,
        default=600,
        metavar="SECONDS",
        help="that a rank waits for another in a collective, before the job ends with an error",
    )
    add("--checkpoint-dir", metavar="DIR", help="save there (default: nothing is saved)")
    add("--save-every", type=at_least(0), default=100, metavar="N", help="steps; 0: at the end")
    add("--keep", type=natural, default=2, metavar="K", help="checkpoints, the newest")
    add("--resume", action="store_true", help="from the newest checkpoint (default DIR: "
        "checkpoints), in whatever layout; what makes the run (model, data, batch, optimizer) is "
        "as it was, where it is not given")  # fmt: skip
    add("--stop-after", type=natural, metavar="N", help="end, saved, after step N of --steps")
    add("--init-from", metavar="DIR", help="begin with the GPT-2 of a Hugging Face folder")
    add("--dry-run", action="store_true", help="count what a rank of a step would hold and send")
    add("--world-size", type=natural, metavar="N", help="of the dry run")
    add("--rank", type=at_least(0), metavar="R", help="of the dry run (default 0)")
    add("--all-ranks", action="store_true", help="of the dry run, and that they fit together")
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
    given = {"world-size": args.world_size, "rank": args.rank, "all-ranks": args.all_ranks or None}
    alone = next((flag for flag, n in given.items() if n is not None and not args.dry_run), None)
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
        (args.dp_nodes > 1 and args.zero, f"--dp-nodes {args.dp_nodes} with --zero {args.zero}: "
         "that is DDP's; give --zero-shard-size, the ranks of a host among the d"),
        (d % args.dp_nodes, f"--dp-nodes {args.dp_nodes} does not divide d {d}: give a divisor of "
         f"{d}"),
        (args.zero < 3 and not args.zero_reshard_after_forward, "--zero-reshard-after-forward 0 "
         f"with --zero {args.zero}: only ZeRO-3 reshards; give --zero 3"),
        (args.compile and args.recompute == "offload", "--compile with --recompute offload: "
         "compiled kernels want what they keep back in its own memory order; leave one out"),
        (alone, f"--{alone} is of --dry-run: give that too"),
        (args.grad_dtype and args.dtype != "bf16", f"--grad-dtype {args.grad_dtype} with --dtype "
         f"{args.dtype}: give --dtype bf16, or leave it out"),
        (args.reduce_dtype and args.dtype != "bf16", f"--reduce-dtype {args.reduce_dtype} with "
         f"--dtype {args.dtype}: give --dtype bf16, or leave it out"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    schedule = make_schedule(args, batch // (d * rows))
    pipeline.split_layers(config.n_layer, sum(map(len, pipeline.stages_of(schedule))))
    tensor_parallel.check_width("--vocab-size", config.vocab_size, t)
    return config


def check_same(args: argparse.Namespace, about: dict) -> None:
    """Ends the job, if a rank was asked for another run than rank 0, or sees other data. Over the
    world, before anything of the run that could hang."""
    mine = vars(args) | about | {"torch": torch.__version__}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    wrong = [f"rank {rank} has {name} {theirs[name]}, and rank 0 {everyone[0][name]}"
             for rank, theirs in enumerate(everyone) for name in mine
             if theirs.get(name) != everyone[0].get(name)]  # fmt: skip
    if wrong:
        if dist.get_rank() == 0:
            more = f"; and {len(wrong) - 1} more" * (len(wrong) > 1)
            print(f"train_3d.py: error: {wrong[0]}{more}: start all ranks with one command line, "
                  "the same files and alike devices", file=sys.stderr, flush=True)  # fmt: skip
        dist.barrier()  # it has spoken: when a rank leaves, torchrun ends the others
        sys.exit(2)


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
    """(device of this rank, the line that says so). Raises ValueError where a GPU is missing, or
    the interface that gloo was told to use."""
    known = [name for _, name in socket.if_nameindex()]
    for interface in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if interface not in known:
            raise ValueError(f"GLOO_SOCKET_IFNAME {interface}: this host has {', '.join(known)}: "
                             "give the one that leads to the other hosts")  # fmt: skip
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
    tf32 = "without TF32" if torch.get_float32_matmul_precision() == "highest" else "with TF32"
    return device, (f"device cuda ({gpus} GPUs for {ranks} local ranks), {device_name(device)}; "
                    f"float32 matmuls {tf32}")  # fmt: skip


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_tflops(args: argparse.Namespace, device: torch.device) -> float | None:
    """Of this rank, if that is known."""
    mine = device_name(device)
    known = (peak for name, peak in PEAKS.items()
             if mine.startswith(name) and not re.search("MIG|NVL", mine))  # fmt: skip
    return args.peak_tflops or (next(known, None) if args.dtype == "bf16" else None)


# --- a run that goes on ---------------------------------------------------------------------------


def parse_args(
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
        before = was["arguments"] | ({} if args.model else was["sizes"])
        complete.set_defaults(**{name: before[name] for name in (*RUN, *SIZES) if name in before})
        if complete.parse_args(argv).dtype != "bf16":
            complete.set_defaults(grad_dtype=None, reduce_dtype=None)  # apply to bf16 only
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
    before = was["arguments"]
    changed = [
        f"--{name.replace('_', '-')} {before[name]} -> {value}"
        for name, value in run["arguments"].items()
        if before.get(name, value) != value
    ]
    return [f"--resume: as before but for {', '.join(changed)}"] if changed else []
