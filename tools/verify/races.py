"""Looks for race conditions: runs each overlapped path with delays and compares all results.

    make races N=20 SEED=0    python -m tools.verify.races --n 20 --seed 0

A path is one configuration that overlaps communication with computation. Its losses, gradient
norms, gradients, parameters and checkpoints must be equal, bit by bit, to those of a run without
delays. They differ if a rank uses a result before waiting for it, or changes a tensor that is still
being sent. There are two kinds of delayed runs:

- One run with late delivery. The output of each asynchronous collective or transfer is NaN from its
  launch until wait(). Its inputs must not be written to before wait(), and no tensor of it may be
  freed, moved or resized. tests/test_races.py does the same by judge_late().
- N runs with random delays. Each rank sleeps before each collective, before some of its other
  operations, and before writing its shard of a checkpoint, which is saved asynchronously after each
  step. In each run one rank sleeps five times as long.

It prints one line per path. The exit code is 1 if a result differs.
"""

import argparse
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import checkpoint_dcp
import ddp
import gpt
import schedules
import tensor_parallel
import zero
from tools.verify.oracle import STEPS, Case, Compared, Errors, compared, judge, launch, trainer_of

SIZES = dict(n_layer=4, n_head=4, n_embd=16, vocab_size=19, seq_len=8, m=4, b=1, dtype="float32")
PATHS = {
    "DDP, buckets": Case(d=3, bucket_bytes=1000, **SIZES),
    "DDP, two hosts": Case(d=4, nodes=2, bucket_bytes=1000, **SIZES),
    "ZeRO-1": Case(d=3, zero=1, **SIZES),
    "ZeRO-2, hybrid": Case(d=4, zero=2, shard_size=2, **SIZES),
    "ZeRO-3": Case(d=3, zero=3, recompute="full", **SIZES),
    "ZeRO-3, kept": Case(d=2, zero=3, reshard=0, **SIZES),
    **{name: Case(p=3, schedule=name, **SIZES | {"n_layer": 6}) for name in schedules.SCHEDULES},
    "PP, untied": Case(p=2, schedule="interleaved", recompute="full", tied=False, **SIZES),
    "TP": Case(t=2, **SIZES),
    "TP and SP": Case(t=2, sequence=True, **SIZES),
    "CP, ring": Case(c=4, **SIZES),
    "CP, PP, ZeRO-3": Case(c=2, p=2, zero=3, schedule="zb-v", recompute="full", **SIZES),
    "all together": Case(t=2, p=2, d=2, zero=3, schedule="zb-v", sequence=True, **SIZES),
}


class Delays(TorchDispatchMode):
    """Sleeps before every collective and before one in a hundred of the other operations."""

    def __init__(self, rng: random.Random, longest: float):
        super().__init__()
        self.rng, self.longest = rng, longest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" or self.rng.random() < 0.01:
            time.sleep(self.rng.random() * self.longest)
        return function(*args, **(kwargs or {}))


class Late:
    """The handle of a collective or of a batch of transfers.

    outputs: pairs of a tensor and the result that wait() copies to it; None if the result is
    already there. wait() raises AssertionError if an input or output was freed, moved or resized
    since the launch, and counts the inputs that were written to.
    """

    # Number of inputs written to before wait(). On a GPU a tensor, to avoid a synchronisation.
    changed = 0
    waiting: set["Late"] = set()  # handles without wait(); kept alive: gloo's destructors block

    def __init__(
        self, works: list[dist.Work], inputs: list[Tensor],
        outputs: list[tuple[Tensor, Tensor | None]],
    ):  # fmt: skip
        self.works, self.outputs = works, outputs
        self.inputs = [(x, x.detach().clone(), x._version) for x in inputs]
        tensors = [*inputs, *(to for to, _ in outputs)]
        self.storages = [(tensor, storage_of(tensor)) for tensor in tensors]
        Late.waiting.add(self)

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for tensor, storage in self.storages:
            now = storage_of(tensor)
            assert now == storage, (
                f"the storage of a tensor of shape {tuple(tensor.shape)} had (address, bytes) = "
                f"{storage} at the launch and has {now} at wait(): call wait() before resize_()"
            )
        if self not in Late.waiting:  # NCCL returns one handle for a batch
            return
        Late.waiting.remove(self)
        for x, before, version in self.inputs:
            # Compare _version, too: x += 1 does not change the bits of NaN.
            other_bits = (bits(x) != bits(before)).any()
            Late.changed = Late.changed + (other_bits | (x._version != version))
        for to, result in self.outputs:
            if result is not None:
                to.copy_(result)


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of the tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def bits(tensor: Tensor) -> Tensor:
    """Raw bytes, so that NaN equals NaN."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fill_with_nan(to: Tensor, source: Tensor | None = None) -> None:
    """Fills `to` with NaN, except for `source`, which may be a view of it (in-place all-gather)."""
    with torch.no_grad():
        copy = None if source is None else source.clone()
        if to.is_floating_point():
            to.fill_(float("nan"))
        if copy is not None:
            source.copy_(copy)


def deliver_late(direct: bool = False, delay: Callable[[], None] = lambda: None) -> None:
    """Patches the collectives and transfers of this process to deliver their results late.

    The output of an asynchronous call is NaN from its launch until wait(), which delivers it.

    direct: fill outputs (that are not also inputs) with NaN before the launch, and let the call
    write to them when it runs. For a GPU, where the call runs on another stream. delay: called
    before each launch.
    """
    reduce, batch = dist.all_reduce, dist.batch_isend_irecv

    def all_reduce(x, *args, async_op=False, **kwargs):
        delay()
        if not async_op:
            return reduce(x, *args, **kwargs)
        result = x if direct else x.detach().clone()
        work = reduce(result, *args, async_op=True, **kwargs)
        if direct:
            return Late([work], [], [(x, None)])
        fill_with_nan(x)
        return Late([work], [x], [(x, result)])

    def into(real: Callable, gathers: bool) -> Callable:
        def call(to, x, *args, async_op=False, **kwargs):
            delay()
            if not async_op:
                return real(to, x, *args, **kwargs)
            if direct:
                in_place = storage_of(to) == storage_of(x)
                if not in_place:
                    fill_with_nan(to)
                work = real(to, x, *args, async_op=True, **kwargs)
                return Late([work], [] if in_place else [x], [(to, None)])
            result = torch.empty_like(to)
            work = real(result, x.detach().clone(), *args, async_op=True, **kwargs)
            fill_with_nan(to, x if gathers else None)
            return Late([work], [x], [(to, result)])

        return call

    def batch_isend_irecv(operations):
        delay()
        ends: list[tuple[list, list]] = []  # (inputs, outputs) by operation
        for o in operations:
            if o.op is dist.irecv:
                fill_with_nan(o.tensor)
                to, o.tensor = o.tensor, o.tensor if direct else torch.empty_like(o.tensor)
                ends.append(([], [(to, None if direct else o.tensor)]))
            else:
                ends.append(([o.tensor], []))
        works = batch(operations)
        if len(works) < len(operations):  # NCCL returns one handle for a batch
            return [Late(works, *(sum(kind, []) for kind in zip(*ends, strict=True)))]
        return [Late([work], *end) for work, end in zip(works, ends, strict=True)]

    dist.all_reduce, dist.batch_isend_irecv = all_reduce, batch_isend_irecv
    for module in (ddp, zero, tensor_parallel):
        module.all_gather = into(module.all_gather, gathers=True)
        module.reduce_scatter = into(module.reduce_scatter, gathers=False)


def judge_late(
    case: Case, seams: dict | None = None, direct: bool = False,
    delay: Callable[[], None] = lambda: None, **how,
) -> Errors:  # fmt: skip
    """oracle.judge(case, seams, **how) with deliver_late(direct, delay) on each rank.

    Raises RuntimeError if a handle was not waited for or an input was written to before wait().
    """

    def on_rank(*args) -> Compared:
        deliver_late(direct, delay)
        found = compared(*args)
        assert not Late.waiting, f"{len(Late.waiting)} handles were not waited for"
        assert Late.changed == 0, f"{int(Late.changed)} inputs were written to before wait()"
        return found

    return judge(case, seams, on_rank, **how)


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of all names and values."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


def train(case: Case, seed: int | None, late: bool, longest: float, folder: str) -> dict[str, str]:
    """Trains a few steps on each rank; each step is saved while the next one runs.

    Returns digests of the results by kind. seed: None for no random delays. late: deliver results
    late. longest: upper bound of a delay in seconds.
    """
    rank, rng = dist.get_rank(), random.Random(f"{seed} {dist.get_rank()}")
    slow = seed is not None and seed % dist.get_world_size() == rank
    delays = Delays(rng, 0.0 if seed is None else longest * (5 if slow else 1))
    write = checkpoint_dcp.Writer.write_data

    def write_slowly(*args):
        time.sleep(100 * rng.random() * delays.longest)
        return write(*args)

    checkpoint_dcp.Writer.write_data = write_slowly
    if late:
        deliver_late()
    trainer = trainer_of(case)
    disk = checkpoint.Checkpoints(folder, STEPS, dist.new_group(backend="gloo"))
    stats = []
    for step in range(STEPS):
        with delays:
            stats.append(trainer.step(step))
        states, numbers = trainer.state_to_save()
        disk.save(step + 1, states, {"optimizer": numbers})
    disk.wait()
    dist.barrier()  # rank 0 has renamed the last checkpoint
    assert all(save.failed is None for save in disk.completed()), disk.failed
    pieces = trainer.sync.pieces()
    gradients = {f"{piece.name} {piece.start}": piece.tensor.grad for piece in pieces}
    trainer.sync.gather()
    digests = {
        "losses and norms": digest({"": torch.stack(stats)}),
        "gradients": digest(gradients),
        "parameters": digest(dict(gpt.named_parameters(trainer.model))),
        "handles without wait()": str(len(Late.waiting)),
        "inputs changed before wait()": str(int(Late.changed)),
    }
    for step in range(1, STEPS + 1):
        checkpoint.read(Path(folder) / f"step-{step}", states, dist.group.WORLD)
        digests[f"checkpoint {step}"] = digest({f"{s.name} {s.offsets}": s.tensor for s in states})
    return digests


def race(
    case: Case, seed: int | None, late: bool = False, longest: float = 1e-3
) -> list[dict[str, str]]:
    """One run of train(). Returns the digests of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return launch(case.world_size, train, case, seed, late, longest, folder)


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--n", type=int, default=20, help="runs with random delays per path")
    arguments.add_argument("--seed", type=int, default=0, help="of the random delays")
    args = arguments.parse_args(argv)
    since, wrong = time.monotonic(), 0
    for name, case in PATHS.items():
        expected, differ = race(case, None), set()
        for seed in (None, *range(args.n * args.seed, args.n * (args.seed + 1))):
            for rank, kinds in enumerate(race(case, seed, late=seed is None)):
                differ |= {kind for kind in kinds if kinds[kind] != expected[rank][kind]}
        wrong += bool(differ)
        result = f"{', '.join(sorted(differ))} DIFFER" if differ else "equal bit by bit"
        runs = f"{name:16s} {case.world_size} ranks, {args.n} + 1 runs with delays"
        print(f"{runs}: {result}", flush=True)
    print(f"{len(PATHS) - wrong} of {len(PATHS)} paths are equal; {time.monotonic() - since:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
