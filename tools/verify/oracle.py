"""Compares a layout of train_3d.Trainer with a single process that uses none of the strategies.

    case = Case(t=2, p=2, d=2)
    judge(case)              Errors(loss=1e-16, norm=..., gradient=..., parameter=..., where=...)

The single process ("reference") trains the full model with torch's cross entropy, clip_grad_norm_
and optimizer on the full batch, in float64. The layout runs on forked ranks, which take a few
milliseconds to start and rendezvous through a FileStore. After the last step each rank compares
every tensor it holds with its shard of the reference's tensor.

Most tests, and tools/verify/parity.py, fuzz.py and races.py, are built on this module. It is not a
command.
"""

import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch._dynamo  # optimizers import it at their first step; import it once, before the fork
import torch.distributed as dist
from torch import Tensor

import checkpoint
import ddp
import gpt
import measure
import options
import train_3d

STEPS = 3
CPU = torch.device("cpu")
# AdamW divides a gradient by about its own size + EPS. Where the true gradient is 0 (the bias of
# the keys) the update is rounding, about 1e-17, times lr / EPS. With torch's default of 1e-8 that
# would look like an error of 1e-12.
EPS = 1e-5
FLOORS = {"float64": 1e-6, "float32": 1e-2}  # argument `floor` of measure.relative_errors


class Errors(NamedTuple):
    """The largest relative error of each kind over all ranks and tensors."""

    loss: float
    norm: float
    gradient: float
    parameter: float
    where: str  # kind and name of the tensor with the largest error

    @property
    def worst(self) -> float:
        return measure.largest(self[:4])

    def within(self, dtype: str) -> bool:
        """True if every error is within its tolerance."""
        return all(e <= tolerance for e, tolerance in zip(self[:4], TOLERANCES[dtype], strict=True))


# Tolerances of loss, norm, gradient and parameter. They exceed the effect of rounding. For bf16
# they were chosen from 295 random layouts of tools.verify.fuzz with n_embd >= 6: the errors were at
# most 0.005, 0.064, 0.20 and 0.12, and up to 0.13 in the norm with a single rank. (A LayerNorm of 4
# entries amplifies rounding further.) Bugs with smaller effects must be found in float64.
TOLERANCES = {
    "float64": (measure.TOLERANCE,) * 4,
    "float32": (1e-4,) * 4,
    "bf16": (0.01, 0.15, 0.3, 0.15),  # gradients and parameters as in errors_of_bf16
}


# A Case has a field for each option that affects the losses or the layout, with its name in args or
# a shorter one. The options in OTHERS are derived from other fields, see Case.arguments().
SHORT = {"sequence_parallel": "sequence", "zero_shard_size": "shard_size",
         "zero_reshard_after_forward": "reshard", "dp_nodes": "nodes", "recompute_every": "every",
         "recompute_layers": "layers", "sp_keep_gathered": "keep_gathered"}  # fmt: skip
OTHERS = ("tp", "cp", "pp", "micro_batch_size", "global_batch_size", "untied", "steps", "lr")
FIELDS = {SHORT.get(n, n): o for n, o in options.OPTIONS.items() if o.kind and n not in OTHERS}
Options = dataclasses.make_dataclass("Options", [(f, object, o.default) for f, o in FIELDS.items()])


@dataclasses.dataclass
class Case(Options):
    """A layout, a model and a training run.

    resume: if given, the run is saved after step `at` and resumed with these fields replaced. The
    model and the global batch size d m b must not change.
    """

    t: int = 1  # tensor-parallel ranks
    c: int = 1  # context-parallel ranks
    p: int = 1  # pipeline ranks
    d: int = 1  # replicas
    m: int = 2  # microbatches per replica and step
    b: int = 2  # rows (sequences) per microbatch
    tied: bool = True
    masked: bool = True  # ignore some targets, see reader()
    bucket_bytes: int = 3000  # several buckets at these sizes; DDP's default would make one
    steps: int = STEPS
    resume: dict | None = None
    # Fields of options, with other defaults.
    clip: float = 0.1  # far below the gradient norm, so clipping is active in every step
    n_layer: int = 5
    n_head: int = 12
    n_embd: int = 24
    vocab_size: int = 41
    seq_len: int = 7
    config: tuple[str, ...] = ()  # "FIELD=VALUE" of --config
    dtype: str = "float64"

    @property
    def world_size(self) -> int:
        return self.t * self.c * self.p * self.d

    @property
    def parts(self) -> list[tuple["Case", int, int]]:
        """(layout, first step, end step) of each part of the run, in order."""
        if self.resume is None:
            return [(self, 0, self.steps)]
        changed = {k: v for k, v in self.resume.items() if k != "at"}
        first = dataclasses.replace(self, resume=None)
        at = self.resume["at"]
        return [(first, 0, at), (dataclasses.replace(first, **changed), at, self.steps)]

    @property
    def batches(self) -> list[int]:
        """Global batch size of each part of the run; they must be equal."""
        return [part.d * part.m * part.b for part, _, _ in self.parts]

    def arguments(self) -> list[str]:
        """The flags of train_3d.py."""
        rows = self.d * self.m * self.b
        flags = f"--tp={self.t} --pp={self.p} --micro-batch-size={self.b} --device=cpu".split()
        flags += [f"--cp={self.c}"]
        flags += f"--global-batch-size={rows} --steps={self.steps} --lr=1e-3".split()
        flags += [] if self.tied else ["--untied"]
        flags += ["--config", *self.config] if self.config else []
        for field, option in FIELDS.items():
            name, value = option.option_strings[0], getattr(self, field)
            if option.nargs == 0:  # a switch
                flags += [name] * (value != option.default)
            elif value is not None:
                flags.append(f"{name}={value}")
        return flags

    def __str__(self) -> str:
        """The fields that differ from their defaults, as JSON."""
        default = dataclasses.asdict(Case())
        mine = dataclasses.asdict(self)
        return json.dumps({k: v for k, v in mine.items() if v != default[k]})


# --- ranks ----------------------------------------------------------------------------------------


def launch(
    world_size: int, function: Callable, *args, timeout: float = 120.0,
    before: Callable[[int], None] = lambda rank: None, device: torch.device = CPU,
) -> list:  # fmt: skip
    """Runs function(*args) on `world_size` forked ranks of a gloo group. Returns results by rank.

    before: called in each process with its rank, before the process group is initialised.
    device: a GPU that all ranks share, over NCCL. The calling process must not have initialised
    CUDA, which does not survive a fork.

    Raises RuntimeError with the traceback of the first rank that failed, or after `timeout`
    seconds. No process is left running.
    """
    context = multiprocessing.get_context("fork")
    results, ends, processes = [None] * world_size, {}, []
    with tempfile.TemporaryDirectory() as folder:
        # Ranks must not collect garbage of this process: the threads of its groups are not forked.
        gc.freeze()
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(sender, rank, world_size, f"{folder}/store", before, device, function, args),
            )
            process.start()
            sender.close()
            ends[receiver] = rank
            processes.append(process)
        gc.unfreeze()
        deadline = time.monotonic() + timeout
        try:
            while ends:
                left = deadline - time.monotonic()
                ready = multiprocessing.connection.wait(list(ends), max(0.0, left))
                if not ready:
                    raise RuntimeError(f"ranks {sorted(ends.values())} hang: {timeout} s are over")
                failed = []  # (time, message); the first failure causes the others
                for end in ready:
                    rank = ends.pop(end)
                    try:
                        when, ok, value = pickle.loads(end.recv_bytes())
                    except EOFError:
                        processes[rank].join()
                        code = processes[rank].exitcode
                        failed.append((0.0, f"rank {rank} died with exit code {code}"))
                        continue
                    if ok:
                        results[rank] = value
                    else:
                        failed.append((when, f"rank {rank} failed:\n{value}"))
                if failed:
                    raise RuntimeError(min(failed)[1])
        finally:
            for process in processes:
                if ends:  # after a failure, other ranks may block in a collective
                    process.kill()
                process.join()
    return results


def _child(
    end, rank: int, world_size: int, store: str, before: Callable, device: torch.device,
    function: Callable, args: tuple,
) -> None:  # fmt: skip
    try:
        before(rank)
        torch.set_num_threads(1)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=dist.FileStore(store, world_size), rank=rank,
            world_size=world_size, timeout=timedelta(seconds=60),
            device_id=device if on_gpu else None,
        )  # fmt: skip
        value = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        end.send_bytes(pickle.dumps((time.monotonic(), True, value)))
    except BaseException:
        end.send_bytes(pickle.dumps((time.monotonic(), False, traceback.format_exc())))
        os._exit(1)
    # Skip Python's exit handlers: those of pytest must run in the parent only.
    os._exit(0)


# --- the reference and the layout -----------------------------------------------------------------


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random initial values for all parameters: biases of 0 and norm weights of 1 hide mistakes."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
    return noise + 1.0 if len(shape) == 1 and name.endswith("weight") else noise


def reader(case: Case) -> Callable:
    """A function (step, rows) -> (inputs, targets) of random tokens.

    With case.masked, the first targets of each row are ignored. Their number differs from row to
    row, so ranks have different numbers of targets, and one row has none.
    """

    def read(step: int, rows: range) -> tuple[Tensor, Tensor]:
        xs, ys = [], []
        for r in rows:
            generator = torch.Generator().manual_seed(1000 * step + r)
            row = torch.randint(case.vocab_size, (case.seq_len + 1,), generator=generator)
            x, y = row[:-1].clone(), row[1:].clone()
            if case.masked:
                y[: (5 * r + 2) % (case.seq_len + 1)] = -1
            xs.append(x)
            ys.append(y)
        return torch.stack(xs), torch.stack(ys)

    return read


def reference(case: Case, model: Callable | None = None) -> dict:
    """Trains in one process without any strategy, in float64.

    Returns losses and gradient norms of all steps, the clipped gradients of the last step, the
    final and the initial parameters. Initial parameters are rounded to case.dtype, as in the
    layout.
    """
    args = options.parser().parse_args(case.arguments())
    config = options.check(args, case.world_size)
    with torch.device("meta"):
        full_model = model() if model else gpt.module_of(config).Model(config)
    dtype = options.DTYPES[case.dtype]
    gpt.init_weights(full_model, case.seed, dtype, "cpu", draw)
    full_model.double()
    named = dict(gpt.named_parameters(full_model))
    initial = {n: p.detach().clone() for n, p in named.items()}
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    sgd = case.optimizer == "sgd"
    optimizer = (
        torch.optim.SGD(groups, lr=0.0)
        if sgd
        else torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=EPS)
    )
    losses, norms, draws = [], [], gpt.draws_of(full_model)
    draws.seed = case.seed
    for step in range(case.steps):
        x, y = reader(case)(step, range(args.global_batch_size))
        starts = gpt.document_starts(x, case.document_mask)
        draws.at(step, range(args.global_batch_size), starts)
        optimizer.zero_grad()
        loss = gpt.cross_entropy(full_model(x), y) / (y >= 0).sum().clamp(min=1)
        loss.backward()
        clip = args.clip or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), clip))
        losses.append(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = gpt.learning_rate(step, args.steps, args.warmup_steps, args.lr)
        optimizer.step()
    return {
        "loss": torch.stack(losses),
        "norm": torch.stack(norms),
        "gradient": {n: p.grad for n, p in named.items()},
        "parameter": {n: p.detach() for n, p in named.items()},
        "initial": initial,
    }


def trainer_of(case: Case, **seams) -> train_3d.Trainer:
    """This rank's trainer, on the same data as the reference.

    seams: arguments of train_3d.Trainer that replace the defaults used here.
    """
    args = options.parser().parse_args(case.arguments())
    config = options.check(args, case.world_size)
    small = functools.partial(ddp.DDP, bucket_bytes=case.bucket_bytes)
    seams = {"draw": draw, "sync": None if case.zero else small} | seams
    device = seams.pop("device", CPU)
    trainer = train_3d.Trainer(args, config, reader(case), device, **seams)
    for group in trainer.optimizer.param_groups:
        group["eps"] = EPS
    return trainer


class Compared(NamedTuple):
    """The result of one rank.

    errors: relative errors by kind and tensor. elements: by parameter, the flat indices into the
    full gradient of the elements that this rank compared.
    """

    errors: dict[str, dict[str, float]]
    elements: dict[str, Tensor]


def layout(
    case: Case, expected: dict, seams: dict, first: int, end: int, folder: str
) -> Compared:  # fmt: skip
    """Runs on each rank: trains from step `first` to `end` and compares with the reference.

    Losses and norms are always compared; after the last step also every gradient and parameter that
    this rank holds. Starts from the checkpoint in `folder` if first > 0. Saves one there if `end`
    is not the last step.
    """
    seams = dict(seams)
    step_of = seams.pop("step", train_3d.Trainer.step)
    trainer = trainer_of(case, **seams)
    disk = checkpoint.Checkpoints(folder, 1, dist.group.WORLD)
    if first:
        (path, about), _ = checkpoint.newest_complete(checkpoint.find(folder)[0], dist.group.WORLD)
        assert about["step"] == first
        checkpoint.read(path, trainer.state_to_load(about["optimizer"]), dist.group.WORLD)
        trainer.loaded()
    stats = torch.stack([step_of(trainer, step) for step in range(first, end)])
    if end < case.steps:
        mine, numbers = trainer.state_to_save()
        disk.save(end, mine, {"optimizer": numbers})
        disk.wait()
        assert disk.failed is None, disk.failed
    wide = torch.promote_types(trainer.dtype, torch.float32)  # dtype of losses, norms and gradients
    errors = {
        kind: measure.relative_errors({"": mine}, {"": expected[kind][first:end]}, dtype=wide)
        for kind, mine in (("loss", stats[:, 0]), ("norm", stats[:, 1]))
    }
    if end < case.steps:
        return Compared(errors, {})

    pieces = trainer.sync.pieces()
    trainer.sync.gather()
    named = dict(gpt.named_parameters(trainer.model))
    _check_all_are_compared(trainer, named, pieces)

    def shard(kind: str) -> dict[str, Tensor]:
        """This rank's shards of the reference's tensors."""
        known = {n: p for n, p in named.items() if n in expected[kind]}
        return {n: p.distribution.shard(expected[kind][n])
                for n, p in known.items()}  # fmt: skip

    def ranges(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{n}[{at}:]": tensors[n].flatten()[at : at + t.numel()]
                for n, t, _, at in pieces if n in tensors}  # fmt: skip

    gradients = {f"{n}[{at}:]": piece.grad.flatten() for n, piece, _, at in pieces}
    true_gradients, true_parameters = ranges(shard("gradient")), shard("parameter")
    measure.check_alike(gradients, true_gradients, wide)
    measure.check_alike(named, true_parameters, trainer.dtype)
    if case.dtype == "bf16":
        initial, final = ranges(shard("initial")), ranges(true_parameters)
        full = expected["gradient"]
        rms = torch.cat([g.flatten() for g in full.values()]).square().mean().sqrt()
        scales = {n: torch.maximum(0.01 * rms, 0.1 * g.square().mean().sqrt())
                  for n, g in full.items()}  # fmt: skip
        errors |= errors_of_bf16(pieces, true_gradients, initial, final, scales)
        _check_equal_on_all(named, trainer.shard_group)
    else:
        floor = FLOORS[case.dtype]
        errors["gradient"] = measure.relative_errors(gradients, true_gradients, floor, wide)
        errors["parameter"] = measure.relative_errors(named, true_parameters, floor, wide)
    elements: dict[str, list[Tensor]] = {}
    for n, piece, p, at in pieces:
        index = torch.arange(expected["gradient"][n].numel(), device=trainer.device)
        index = index.view(expected["gradient"][n].shape)
        mine = p.distribution.shard(index)
        elements.setdefault(n, []).append(mine.flatten()[at : at + piece.numel()])
    return Compared(errors, {n: torch.cat(parts).cpu() for n, parts in elements.items()})


def errors_of_bf16(
    pieces: list, gradients: dict[str, Tensor], initial: dict[str, Tensor],
    final: dict[str, Tensor], scales: dict[str, Tensor],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Errors for bf16, which has 8 significant bits: norms are compared instead of elements.

    gradients, initial, final: values of the reference. scales: by parameter, 0.01 of the root mean
    square of all its gradients, or 0.1 of that of the parameter's gradient if it is larger.

    Gradients: |a - b| / |b| of each piece, where |b| is at least that of a piece whose elements all
    have the value in `scales`. A piece may be a few elements of a matrix, and their rounding errors
    are those of the sums that the whole matrix has. Parameters: |a - b| / |b| of the update (fp32
    master minus initial value) over all pieces and ranks together, because rounding decides the
    sign of AdamW's update where the true gradient is 0. Raises AssertionError if a bf16 parameter
    does not equal its fp32 master rounded to bf16.
    """

    def finite(error: Tensor) -> float:
        return error.item() if error.isfinite() else math.inf

    device = next(iter(scales.values())).device
    errors, sums = {}, torch.zeros(2, dtype=torch.float64, device=device)
    for n, piece, p, at in pieces:
        name, master = f"{n}[{at}:]", piece.detach().flatten()
        a, b = piece.grad.flatten().double(), gradients[name]
        least = (scales[n] * b.numel() ** 0.5).clamp(min=1e-300)
        errors[name] = finite((a - b).norm() / torch.maximum(b.norm(), least))
        rounded = p.detach().flatten()[at : at + piece.numel()]
        assert torch.equal(rounded, master.to(p.dtype)), f"{name} does not equal its rounded master"
        difference, update = master.double() - final[name], final[name] - initial[name]
        sums += torch.stack([difference.square().sum(), update.square().sum()])
    dist.all_reduce(sums)
    updates = finite((sums[0] / sums[1].clamp(min=1e-300)).sqrt())
    return {"gradient": errors, "parameter": {"updates": updates}}


def _check_equal_on_all(named: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    """Asserts that the gathered parameters are equal on all ranks of ZeRO's shard group."""
    for name, p in named.items():
        lowest, highest = p.detach().float(), p.detach().float()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        assert torch.equal(lowest, highest), f"{name} differs between the ranks that share it"


def _check_all_are_compared(trainer: train_3d.Trainer, named: dict, pieces: list) -> None:
    """Asserts that no parameter escapes the comparison.

    `named` must contain every parameter of this rank; ids are compared because two tensors can have
    one name. The optimizer must update all pieces. The pieces of the shard group must add up to the
    number of elements of all parameters.
    """
    held = {*map(id, trainer.model.parameters())}
    assert held == {*map(id, named.values())}, "two parameters have one name"
    missing = {n for n, _, p, _ in pieces if id(p) not in held}
    assert not missing, f"pieces of parameters that this rank does not hold: {missing}"
    updated = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    missing = {n for n, piece, _, _ in pieces if id(piece) not in updated}
    assert not missing, f"pieces that the optimizer does not update: {missing}"
    group, numel = trainer.shard_group, 0
    for _, piece, p, _ in pieces:
        # With ZeRO, p is sharded over a subgroup if its gradient is summed over one. Each of the
        # group's subgroups then holds a complete p.
        size = ddp.gradient_group(p, group).size() if trainer.args.zero else group.size()
        numel += piece.numel() * size
    owned = torch.tensor(numel, device=trainer.device)
    dist.all_reduce(owned, group=group)
    owned //= group.size()
    n = sum(p.numel() for p in trainer.model.parameters())
    assert owned == n, f"the ranks that shard the state hold {owned} of {n} elements"


def compared(case: Case, part: Case, seams: dict, first: int, end: int, folder: str) -> Compared:
    """layout() after the reference, which rank 0 trains in the first launch."""
    path = f"{folder}/expected"
    if first == 0 and dist.get_rank() == 0:
        torch.save(reference(case, seams.get("model")), path)
    dist.barrier()
    expected = torch.load(path, map_location=seams.get("device", CPU))
    return layout(part, expected, seams, first, end, folder)


def judge(
    case: Case, seams: dict | None = None, on_rank: Callable = compared, **how
) -> Errors:  # fmt: skip
    """Compares a case (if it is resumed: both of its layouts) with one process.

    seams: arguments of train_3d.Trainer; the additional key "step" is a function (trainer, step)
    that is called instead of Trainer.step. on_rank: called on each rank instead of compared().
    how: keyword arguments of launch().

    Raises ValueError if the layouts of a resumed run have different global batch sizes,
    RuntimeError if a rank failed, AssertionError if no rank compared some element of a gradient.
    """
    batches = case.batches
    if len({*batches}) > 1:
        raise ValueError(f"the run begins with {batches[0]} rows per batch and is resumed with "
                         f"{batches[-1]}: change m or b of one layout")  # fmt: skip
    ranks: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        for part, first, end in case.parts:
            ranks += launch(
                part.world_size, on_rank, case, part, seams or {}, first, end, folder, **how
            )
        shapes = {n: g.shape for n, g in torch.load(f"{folder}/expected")["gradient"].items()}
    for name, shape in shapes.items():
        seen = torch.zeros(shape.numel(), dtype=torch.bool)
        for rank in ranks:
            seen[rank.elements.get(name, [])] = True
        assert seen.all(), f"no rank compared {(~seen).sum()} elements of {name}'s gradient"
    worst = {
        kind: max(
            (error, f"{kind} {name}")
            for rank in ranks
            for name, error in rank.errors.get(kind, {}).items()
        )
        for kind in ("loss", "norm", "gradient", "parameter")
    }
    return Errors(*(error for error, _ in worst.values()), where=max(worst.values())[1])
