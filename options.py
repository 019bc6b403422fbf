"""The command line of train_3d.py: options, checks of their values, and options of resumed runs.

    args, found, notes = parse_args()            options, completed from a checkpoint with --resume
    config = check(args, world_size)             the model's configuration
    schedule = make_schedule(args, m)            the schedule of --schedule and --virtual-stages

The checks use only the options, the world size and files that every rank can read. All ranks reach
the same result, so an error ends the run before the first communication. A failed check raises a
ValueError with one line: what is wrong, with the numbers that do not fit, and a remedy. train_3d.py
passes it to Parser.error().

t, c, p, d: sizes of tensor, context, pipeline and data parallelism. m: microbatches per step of one
data-parallel rank.
Stage: consecutive layers on one pipeline-parallel rank. Chunk: one of the stages of a rank.
"""

import argparse
import dataclasses
import difflib
import importlib
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

import activation_ckpt
import checkpoint
import context_parallel
import gpt
import huggingface
import pipeline
import schedules
import zero3

HIDDEN = argparse.SUPPRESS
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}
# Fields of a model's Config that have separate options. So --config refuses them.
FIELDS = {"tied", "attention", "dropout"}
# Former options, and the commands that replaced them or have them now.
MOVED = {
    "--dry-run": "tools.plan.dry_run", "--world-size": "tools.plan.dry_run",
    "--rank": "tools.plan.dry_run", "--all-ranks": "tools.plan.dry_run",
    "--export": "tools.convert",
}  # fmt: skip
# Names that other programs use, for did_you_mean().
SYNONYMS = {
    "--batch-size": "--global-batch-size", "--learning-rate": "--lr", "--max-steps": "--steps",
    "--max-iters": "--steps", "--train-iters": "--steps", "--warmup-iters": "--warmup-steps",
    "--num-layers": "--n-layer", "--num-attention-heads": "--n-head", "--hidden-size": "--n-embd",
    "--block-size": "--seq-len", "--seq-length": "--seq-len", "--clip-grad": "--grad-clip",
    "--tensor-model-parallel-size": "--tp", "--pipeline-model-parallel-size": "--pp",
    "--load": "--resume", "--save": "--checkpoint-dir", "--precision": "--dtype",
    "bfloat16": "bf16", "fp32": "float32", "float": "float32", "fp64": "float64",
    "double": "float64", "gpu": "cuda", "adam": "adamw",
}  # fmt: skip


# --- options --------------------------------------------------------------------------------------


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the entry of `known` that is most similar to `name`, or an empty string."""
    known, name = [*known], name.lower()
    meant = SYNONYMS.get(name)
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(name, known, n=1)), None)
    return f"; did you mean {meant}?" if meant else ""


class Parser(argparse.ArgumentParser):
    """Reports an error as one line, normally from rank 0 only, and exits with code 2."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        argv = sys.argv[1:] if args is None else [*args]
        found, unknown = self.parse_known_args(argv, namespace)
        for name in unknown:
            if module := MOVED.get(name.split("=")[0]):
                rest = (
                    [x for x in argv if x != "--dry-run"] if "dry_run" in module else ["--out DIR"]
                )
                self.error(f"{name} has become a command: python -m {module} {' '.join(rest)}")
        if unknown:
            listed = [a for a in self._actions if getattr(a, "full_help", a.help) != HIDDEN]
            known = [name for action in listed for name in action.option_strings]
            hints = (did_you_mean(name.split("=")[0], known) for name in unknown)
            hint = next(filter(None, hints), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        elif dist.is_torchelastic_launched():
            # torchrun stops the ranks of a node when one of them exits. So on the node of rank 0,
            # a rank that still runs after 3 s has an error that rank 0 does not have, for example a
            # file that only it cannot read. On other nodes it may be the same error.
            local = int(os.environ.get("LOCAL_RANK", 0))
            time.sleep(3 + local / 4)
            print(f"{self.prog}: rank {os.environ['RANK']}: error: {message}", file=sys.stderr)
        sys.exit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each option's default to its help text, unless the default is None or the option
    is a switch."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class HelpAll(argparse.Action):
    """--help-all: like --help, but with the options that --help leaves out."""

    def __call__(self, parser: argparse.ArgumentParser, *_):
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.epilog = None
        parser.print_help()
        parser.exit()


class Recompute(argparse.Action):
    """--recompute POLICY[:K] sets `recompute` and, if K is given, `recompute_every`."""

    def __call__(self, parser, namespace: argparse.Namespace, text: str, option_string=None):
        policy, colon, every = text.partition(":")
        if policy not in activation_ckpt.POLICIES:
            names = ", ".join(activation_ckpt.POLICIES)
            hint = did_you_mean(policy, activation_ckpt.POLICIES)
            raise argparse.ArgumentError(
                self, f"invalid choice: {policy!r} (choose from {names}){hint}"
            )
        namespace.recompute = policy
        if colon and not (every.isdecimal() and int(every) > 0):
            raise argparse.ArgumentError(self, f"{text}: K must be at least 1, got {every or None}")
        if colon:
            namespace.recompute_every = int(every)


def at_least(low: int, kind: type = int, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type for numbers that are at least `low` and less than `below`."""
    upper = f" and less than {below}" if below < math.inf else ""

    def number(text: str):
        if not low <= (value := kind(text)) < below:
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, got {value}")
        return value

    return number


def parser(prog: str = "train_3d.py") -> Parser:
    """All options. Besides the arguments of argparse, add() takes

    kind: "size" (a size of the model) or "run": the option affects the losses. Checkpoints store
        its value. A resumed run uses that, unless the option (or, for a size, --model) is given.
        "layout": it affects how and where the run is computed, and checkpoints do not store it.
        None: the others, and --model, --config and --init-from, which set sizes or weights.
        If omitted, the kind of the group. Tests vary "size", "run" and "layout".
    needs: {name: values}. The option is refused unless args.name has one of these values.
    was: its former name, which is also accepted, and is the name in args.
    rare: True if only --help-all lists it."""
    p = Parser(
        prog,
        usage="%(prog)s [options]",
        description="Train a GPT with tensor, context, pipeline and data parallelism.",
        allow_abbrev=False,
        formatter_class=Help,
    )
    count, count0, amount = at_least(1), at_least(0), at_least(0, float)
    p.options = {}

    def group(title: str, kind: str | None) -> Callable:
        """A function that adds an option to this group of --help."""
        add_argument = p.add_argument_group(title).add_argument

        def add(name: str, help: str, kind=kind, needs=None, was="", rare=False, **how) -> None:
            if was:
                how["dest"] = was
                add_argument(f"--{was.replace('_', '-')}", help=HIDDEN, **how)
            option = add_argument(name, help=HIDDEN if rare else help, **how)
            option.kind, option.needs, option.full_help = kind, needs or {}, help
            p.options.setdefault(option.dest, option)

        return add

    # fmt: off
    add = group("model", "run")
    add("--arch", default="gpt", metavar="MODULE", help="the model: gpt, examples.llama, or "
        "another Python module, see gpt.py")
    add("--model", kind=None, metavar="NAME", help="one of its sizes (default: the first); gpt: "
        f"{', '.join(gpt.MODELS)}")
    add("--config", kind=None, rare=True, nargs="+", action="extend", default=[],
        metavar="FIELD=VALUE", help="other fields of the Config of --arch (default: as --model)")
    add("--untied", rare=True, action="store_true",
        help="do not share the embedding with the output head")
    add("--dropout", type=at_least(0, float, below=1), default=0.0, metavar="P",
        help="dropout probability; above 0, attention is explicit")
    add("--init-from", kind=None, metavar="DIR", help="start from this Hugging Face GPT-2 folder")
    add("--attention", rare=True, choices=("sdpa", "explicit"), default="sdpa",
        help="sdpa: PyTorch's fused attention; explicit: separate matmuls and softmax")

    add = group("model sizes (default: those of --model)", "size")
    add("--n-layer", type=count, metavar="N", help="number of blocks")
    add("--n-head", type=count, metavar="N", help="attention heads per block")
    add("--n-embd", type=count, metavar="N", help="hidden size")
    add("--vocab-size", type=count, metavar="N", help="number of token ids")
    add("--seq-len", type=count, metavar="N", help="tokens per row")

    add = group("data", "run")
    add("--data", metavar="PATH", help="a text file, a folder of text files, or token ids as .npy "
        "or .bin (default: the source code of Python's standard library)")
    add("--document-mask", rare=True, type=count0, metavar="ID", help="the token id that ends a "
        "document; attention does not cross the ends of documents (default: it does)")
    add("--global-batch-size", type=count, default=32, metavar="ROWS", help="rows per step")
    add("--micro-batch-size", kind="layout", type=count, default=4, metavar="ROWS",
        help="rows per forward pass of one rank")
    add("--seed", type=count0, default=0, metavar="N",
        help="determines initial weights, batches and dropout")

    add = group("layout: which rank holds and computes what", "layout")
    add("--tp", type=count, default=1, metavar="T", help="tensor-parallel size t")
    add("--cp", type=count, default=1, metavar="C", help="context-parallel size c: number of ranks "
        "that hold the tokens of a row")
    add("--pp", type=count, default=1, metavar="P",
        help="pipeline-parallel size p; the data-parallel size is d = world size / (t c p)")
    add("--cp-attention", rare=True, choices=context_parallel.METHODS, default="ring",
        help="how attention reaches the keys of other cp ranks")
    add("--sequence-parallel", action="store_true", help="shard the residual stream and the norms "
        "along the sequence, over the tp ranks")
    add("--sp-keep-gathered", rare=True, action="store_true", needs={"sequence_parallel": [True]},
        help="with --sequence-parallel: store the gathered inputs of column-parallel layers, "
        "instead of gathering them again in backward")
    add("--zero", type=int, choices=(0, *zero3.STAGES), default=0, help="0: DDP; 1: shard the "
        "optimizer state over dp; 2: gradients too; 3: parameters too")
    add("--zero-shard-size", type=count, metavar="K", needs={"zero": [1, 2, 3]},
        help="ZeRO: number of ranks that hold one sharded copy of the state (default: d x c)")
    add("--no-reshard-after-forward", dest="zero_reshard_after_forward", action="store_const",
        const=0, default=1, needs={"zero": [3]}, help="ZeRO-3: keep gathered parameters until the "
        "step's last backward, instead of freeing them after each forward")
    add("--zero-reshard-after-forward", type=int, choices=(0, 1), default=1,
        help=HIDDEN)  # a former name
    add("--dp-nodes", rare=True, type=count, default=1, metavar="K", needs={"zero": [0]},
        help="DDP: number of nodes; gradients are summed within each node first")

    add = group("pipeline schedule", "layout")
    add("--schedule", default="1f1b", metavar="NAME|FILE", help="pipeline schedule: "
        f"{', '.join(schedules.SCHEDULES)}, or a text file with one line of actions per pp rank, "
        "as `make draw ARGS=--text` prints it")
    add("--virtual-stages", was="chunks", type=count, metavar="N",
        help=f"stages per rank of the schedule {schedules.with_any_chunks()} (default: 2)")

    add = group("steps and optimizer", "run")
    add("--steps", type=count, default=300, metavar="N", help="number of optimizer steps")
    add("--lr", type=amount, default=2e-3, metavar="X",
        help="peak learning rate; decays to a tenth of it")
    add("--warmup-steps", type=count0, metavar="N", help="steps until the peak learning rate "
        "(default: a tenth of --steps, at least 10)")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="the optimizer")
    add("--weight-decay", type=amount, default=0.1, metavar="X",
        help="weight decay of matrices and embeddings")
    add("--grad-clip", was="clip", type=amount, default=1.0, metavar="X",
        help="largest global gradient norm; 0: do not clip")

    add = group("precision", "run")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of parameters, activations and "
        "communication; bf16 keeps fp32 master weights")
    add("--grad-dtype", rare=True, choices=("float32", "bf16"), needs={"dtype": ["bf16"]},
        help="with --dtype bf16: dtype in which gradients are summed over microbatches "
        "(default: float32)")
    add("--reduce-dtype", choices=("float32", "bf16"), needs={"dtype": ["bf16"]}, help="with "
        "--dtype bf16: dtype in which gradients are summed over ranks (default: bf16)")

    add = group("memory and device", "layout")
    add("--recompute", action=Recompute, default="none", metavar="POLICY[:K]", help="none: save "
        "all activations; selective: recompute attention scores; full: recompute blocks; offload: "
        "move activations to host memory; with :K, in one block of K only")
    add("--recompute-every", type=count, default=1, help=HIDDEN)  # :K of --recompute
    add("--recompute-layers", rare=True, type=count, metavar="N",
        help="apply --recompute only to the first N blocks of each rank (default: all)")
    add("--compile", action="store_true", help="compile each block with torch.compile: one graph, "
        "or several with --tp > 1 or a zero-bubble schedule, which it cannot trace completely")
    add("--device", kind=None, choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if every local rank has its own GPU, else cpu")
    add("--timeout", kind=None, rare=True, type=count, default=600, metavar="SECONDS",
        help="time that a collective waits for other ranks before the run fails")

    add = group("logging and evaluation", None)
    add("--log-interval", was="print_every", type=count, default=10, metavar="N",
        help="steps per line of output")
    add("--eval-interval", was="val_every", type=count0, default=100, metavar="N",
        help="steps between two validations; 0: never validate")
    add("--eval-iters", was="val_batches", type=count, default=4, metavar="N",
        help="global batches per validation")
    add("--sample", type=count0, default=0, metavar="N", help="tokens to generate after training")
    add("--metrics", was="log", metavar="FILE",
        help="write a JSON object per step and per validation")
    add("--trace", metavar="FILE", help="write a timeline of all ranks, for ui.perfetto.dev")
    add("--peak-tflops", rare=True, type=at_least(1e-3, float), metavar="X",
        help="peak TFLOP/s of one rank, for the MFU (default: known for some GPUs)")

    add = group("checkpoints", None)
    add("--checkpoint-dir", metavar="DIR", help="save checkpoints there (default: do not save; "
        "with --resume: checkpoints)")
    add("--save-interval", was="save_every", type=count0, default=100, metavar="N",
        help="steps between two checkpoints; 0: save only at the end")
    add("--keep-latest", was="keep", type=count, default=2, metavar="K",
        help="number of checkpoints to keep")
    add("--resume", action="store_true", help="continue from the newest checkpoint, in any layout; "
        "options of the model, data and optimizer default to the checkpoint's")
    add("--stop-after", rare=True, type=count, metavar="N",
        help="save and exit after step N (default: after --steps)")
    # fmt: on
    p.add_argument("--help-all", action=HelpAll, nargs=0, help=HIDDEN)
    rare = sorted(o.option_strings[0] for o in p.options.values() if o.help != o.full_help)
    p.epilog = f"--help-all also explains {', '.join(rare)}."
    return p


OPTIONS = parser().options  # {attribute of args: the argparse action of its option}
SIZES = tuple(name for name, option in OPTIONS.items() if option.kind == "size")
RUN = tuple(name for name, option in OPTIONS.items() if option.kind == "run")


def flag(name: str) -> str:
    """The option that sets an attribute of args, or a field of the model: "--grad-clip" sets
    "clip"."""
    return OPTIONS[name].option_strings[0] if name in OPTIONS else f"--config {name}"


# --- checks ---------------------------------------------------------------------------------------


def unmet(args: argparse.Namespace) -> dict[str, str]:
    """What each option needs but args do not have, such as {"zero_shard_size": "--zero 1, 2 or 3"},
    whether or not the option is given."""
    return {
        name: flag(other)
        + f" {' or '.join(', '.join(map(str, values)).rsplit(', ', 1))}" * (values != [True])
        for name, option in OPTIONS.items()
        for other, values in option.needs.items()
        if getattr(args, other) not in values
    }


def require_multiple(
    name: str, n: int, divisor_name: str, divisor: int, remedy: str | None = None
) -> None:
    if n % divisor:
        remedy = remedy or f"make it a multiple of {divisor}"
        raise ValueError(f"{name} {n} is not divisible by {divisor_name}: {remedy}")


def axes(args: argparse.Namespace, world_size: int) -> dict[str, int]:
    """The axes of the grid of ranks, outermost first: {name: size}. The last axis varies
    fastest. dp has the ranks that the other axes leave."""
    d = world_size // (args.pp * args.cp * args.tp)
    return {"pp": args.pp, "dp": d, "cp": args.cp, "tp": args.tp}


def architecture(name: str) -> types.ModuleType:
    """The module of --arch. Raises ValueError if it does not define a model."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--arch {name}: {error}: give a module, such as examples.llama") from None
    needed = ("Config", "MODELS", "Model", "plan", "draw", "flops_per_token")
    missing = [x for x in needed if not hasattr(module, x)]
    if missing or gpt.module_of(next(iter(module.MODELS.values()))) is not module:
        what = ", ".join(missing) or "a Config class of its own"
        raise ValueError(f"--arch {name}: it does not define {what}: see the docstring of gpt.py")
    return module


def fields_of(args: argparse.Namespace, arch: types.ModuleType) -> dict:
    """The fields of arch.Config that options set. Raises ValueError."""
    kinds = {f.name: f.type for f in dataclasses.fields(arch.Config)}
    values = {"tied": not args.untied, "attention": args.attention, "dropout": args.dropout}
    for name in values.keys() - kinds.keys():
        option = "untied" if name == "tied" else name
        if getattr(args, option) != parser().get_default(option):
            raise ValueError(f"--arch {args.arch} has no {name}: leave out {flag(option)}")
        del values[name]
    known = sorted(kinds.keys() - FIELDS)
    parse = {bool: lambda text: {"true": True, "false": False}[text.lower()]}
    for name, _, text in (entry.partition("=") for entry in args.config):
        if name not in known:
            hint = did_you_mean(name, known) or f"; use one of {', '.join(known)}"
            raise ValueError(f"--config {name}: --arch {args.arch} has no such field{hint}")
        try:
            values[name] = parse.get(kinds[name], kinds[name])(text)
        except (KeyError, ValueError):
            kind = kinds[name].__name__
            raise ValueError(f"--config {name}={text}: expected a value of type {kind}") from None
    return values | {size: n for size in SIZES if (n := getattr(args, size)) is not None}


def check(
    args: argparse.Namespace, world_size: int, source: huggingface.GPT2Folder | None = None
) -> gpt.GPTConfig:
    """The model's configuration: that of `source`, if given, else that of --model, changed by the
    options of the model. Sets args.untied if that model is untied.

    Raises ValueError if options do not fit together. Without this check, some ranks would fail
    later, and the others would wait for them."""
    arch = architecture(args.arch)
    name = args.model or next(iter(arch.MODELS))
    if name not in arch.MODELS:
        names = ", ".join(arch.MODELS)
        hint = did_you_mean(name, arch.MODELS)
        raise ValueError(f"--model: invalid choice: {name!r} (choose from {names}){hint}")
    if source and arch is not gpt:
        raise ValueError(f"--init-from loads a GPT-2: leave out it or --arch {args.arch}")
    base = source.sizes if source else dataclasses.asdict(arch.MODELS[name])
    args.untied |= not base.get("tied", True)
    given = fields_of(args, arch)
    for size in SIZES if source else ():
        n = given.get(size, base[size])
        if n != base[size] and not (size == "seq_len" and n < base[size]):
            raise ValueError(
                f"{flag(size)} is {n}, but --init-from {args.init_from} has "
                f"{base[size]}: leave out the option"
            )
    config = arch.Config(**base | given)
    if source:
        with torch.device("meta"):
            source.check(gpt.GPT(config))

    t, p, c, b = args.tp, args.pp, args.cp, args.micro_batch_size
    remedy = f"start a multiple of {t * c * p} ranks (torchrun --nproc-per-node)"
    if "world_size" in args:  # tools/plan/dry_run.py
        remedy = f"give a --world-size that is a multiple of {t * c * p}"
    product = f"--tp {t} x --pp {p}" + (f" x --cp {c}" if c > 1 else "")
    require_multiple("world size", world_size, product, t * c * p, remedy)
    d, k, nodes = axes(args, world_size)["dp"], args.zero_shard_size, args.dp_nodes
    require_multiple("--n-embd", config.n_embd, f"--n-head {config.n_head}", config.n_head)
    require_multiple("--n-head", config.n_head, f"--tp {t}", t)
    if args.sequence_parallel and c == 1:
        require_multiple("--sequence-parallel with --seq-len", config.seq_len, f"--tp {t}", t)
    if c > 1:  # a row has 2 c parts, 2 per cp rank. With sequence parallelism, t ranks divide these
        n = math.lcm(2 * c, t * c) if args.sequence_parallel else 2 * c
        require_multiple("--cp with --seq-len", config.seq_len, f"{n}", n)
        if args.cp_attention == "ulysses":
            require_multiple("--n-head", config.n_head, f"--tp {t} x --cp {c}", t * c)
    rows = args.global_batch_size
    require_multiple("--global-batch-size", rows, f"d {d} x --micro-batch-size {b}", d * b)
    replicas = "d" if c == 1 else "d x c"
    for asked, n in ((f"--zero-shard-size {k}", k or 1), (f"--dp-nodes {nodes}", nodes)):
        require_multiple(replicas, d * c, asked, n, f"give a divisor of {d * c}")
    arch.plan(config, t)  # raises ValueError if the model cannot be sharded over t ranks
    for name, needed in unmet(args).items():
        value = getattr(args, name)
        if value != OPTIONS[name].default:
            given = flag(name) if OPTIONS[name].nargs == 0 else f"{flag(name)} {value}"
            raise ValueError(f"{given} needs {needed}: give that too, or leave out {flag(name)}")
    if args.compile and args.recompute == "offload":
        raise ValueError(
            "--compile with --recompute offload: compiled kernels expect saved tensors in their "
            "original strides; leave out one of the two"
        )
    end, selective = args.document_mask, args.recompute == "selective"
    if end is not None or c > 1 or selective:
        with torch.device("meta"):
            modules = dict(arch.Model(config).named_modules())
        uses_core = any(isinstance(module, gpt.Core) for module in modules.values())
        if (end is not None or c > 1) and not uses_core:
            given = f"--cp {c}" if end is None else "--document-mask"
            raise ValueError(f"--arch {args.arch} does not use gpt.Core: leave out {given}")
        if selective and not all(f"h.{i}.attn.core" in modules for i in range(config.n_layer)):
            raise ValueError(
                f"--arch {args.arch} has a block without attn.core: give --recompute full instead "
                "of --recompute selective"
            )
    if end is not None and end >= config.vocab_size:
        raise ValueError(
            f"--document-mask {end} is outside the vocabulary 0..{config.vocab_size - 1}: give "
            "the id of the token that ends a document"
        )
    schedule = make_schedule(args, rows // (d * b))
    stages = sum(map(len, schedules.stages_of(schedule)))
    pipeline.split_layers(config.n_layer, stages)  # raises ValueError if there are too few layers
    if config.vocab_size < t:
        raise ValueError(f"--vocab-size {config.vocab_size} is smaller than --tp {t}: lower --tp")
    return config


# --- schedules ------------------------------------------------------------------------------------


def make_schedule(args: argparse.Namespace, m: int) -> schedules.Schedule:
    """The schedule of --schedule and --virtual-stages for m microbatches. Raises ValueError."""
    name, chunks = args.schedule, args.chunks
    if name not in schedules.SCHEDULES:
        if chunks:
            raise ValueError(
                f"--virtual-stages {chunks} with a schedule from a file: leave out --virtual-stages"
            )
        try:
            return schedules.read_schedule(name, args.pp, m)
        except ValueError as error:
            hint = "" if os.path.exists(name) else did_you_mean(name, schedules.SCHEDULES)
            raise ValueError(f"{error}{hint}") from None
    entry = schedules.SCHEDULES[name]
    if chunks not in (None, entry.chunks) and not entry.any_chunks:
        raise ValueError(
            f"--virtual-stages {chunks} with --schedule {name}, which has {entry.chunks} per rank: "
            f"leave out --virtual-stages, or give --schedule {schedules.with_any_chunks()}"
        )
    return entry(args.pp, m, chunks)


# --- resumed runs ---------------------------------------------------------------------------------


def parse_args(
    argv: list[str] | None = None,
) -> tuple[argparse.Namespace, list[checkpoint.Found], list[str]]:
    """Returns (options; checkpoints to resume from, with the newest first; messages about
    unreadable checkpoints). With --resume, options of RUN that are not given have the values of the
    newest checkpoint. Its sizes go into args.config, unless --model is given. Raises ValueError."""
    args = parser().parse_args(argv)
    folder = args.checkpoint_dir or ("checkpoints" if args.resume else None)
    found, wrong = [], []
    try:
        if folder:
            found, wrong = checkpoint.find(folder)
    except FileNotFoundError as error:
        # torchrun --max-restarts repeats the same command, so the first start, when there is no
        # checkpoint yet, has --resume too.
        if args.resume and not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise ValueError(f"--resume: {error}; leave out --resume to start a new run") from None
    if found and not args.resume:
        raise ValueError(
            f"--checkpoint-dir {folder} already contains {found[0].path.name}: give --resume to "
            "continue that run, or another directory to start a new one"
        )
    if found:
        saved, completed = found[0].about, parser()
        # If --model is given, it sets all sizes, and the saved ones are not used.
        recorded, sizes = saved["arguments"], {} if args.model else saved["sizes"]
        recorded.setdefault("arch", "gpt")  # older checkpoints do not have it
        if recorded["warmup_steps"] is None:  # in older checkpoints: a tenth of the steps
            recorded["warmup_steps"] = max(1, recorded["steps"] // 10)
        config = [f"{name}={value}" for name, value in sizes.items()]
        completed.set_defaults(**recorded, config=config)
        # An option is not taken over if this run does not have what it needs.
        unused = unmet(completed.parse_args(argv))
        completed.set_defaults(**{name: OPTIONS[name].default for name in unused})
        args = completed.parse_args(argv)
        if args.arch != recorded["arch"]:
            raise ValueError(
                f"--resume: --arch is {args.arch}, but the checkpoint has {recorded['arch']}: "
                "leave out --arch, or give another --checkpoint-dir"
            )
    args.checkpoint_dir = folder
    if args.warmup_steps is None:  # checkpoints record the number
        args.warmup_steps = gpt.default_warmup(args.steps)
    return args, found, wrong


def run_of(args: argparse.Namespace, config: gpt.GPTConfig) -> dict:
    """What a checkpoint stores about its run: the fields of the model without those in FIELDS, and
    the options of RUN."""
    fields = dataclasses.asdict(config)
    return {
        "sizes": {name: fields[name] for name in fields if name not in FIELDS},
        "arguments": {name: getattr(args, name) for name in RUN},
    }


def compare(run: dict, saved: dict) -> list[str]:
    """Compare a resumed run with the one that was saved. Returns a message if options of RUN have
    changed. Raises ValueError if the checkpoint does not fit: another model or optimizer."""
    now, before = (x["sizes"] | x["arguments"] for x in (run, saved))
    fixed = (*run["sizes"], "untied", "optimizer")
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    for name in changed:
        if name in fixed:
            raise ValueError(
                f"--resume: {flag(name)} is {now[name]}, but the checkpoint has {before[name]}: "
                "leave out the options of the model and the optimizer"
            )
    if not changed:
        return []
    listed = (f"{flag(name)} {before[name]} -> {now[name]}" for name in changed)
    return [f"--resume: changed options: {', '.join(listed)}"]
