"""The overlapped paths under delays: whoever is late, every bit of the result is the same.

    python -m tools.races --n 20 --seed 0

First once with everything as late as can be: what a collective or a receive brings is there when
somebody waits for it and not before, and what it was given must not have changed until then. Then
n times at random: each rank sleeps for a while before each collective, before some of its other
operations and before it writes its part of a checkpoint (saved after each step, while training goes
on); one rank of each run sleeps five times as long. Losses, norms, gradients, parameters and what
is on disk must then be, bit by bit, those of a run without delays: where somebody does not wait for
what it uses, or changes what is under way, they are not.
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
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import ddp
import gpt
import tensor_parallel
import zero
from tools.oracle import STEPS, Case, launch, trainer_of

SIZES = dict(n_layer=4, n_head=4, n_embd=16, vocab_size=19, seq_len=8, m=4, b=1, dtype="float32")
PATHS = {
    "DDP, buckets": Case(d=3, bucket_bytes=1000, **SIZES),
    "DDP, two hosts": Case(d=4, nodes=2, bucket_bytes=1000, **SIZES),
    "ZeRO-1": Case(d=3, zero=1, **SIZES),
    "ZeRO-2, hybrid": Case(d=4, zero=2, shard_size=2, **SIZES),
    "ZeRO-3": Case(d=3, zero=3, recompute="full", **SIZES),
    "ZeRO-3, kept": Case(d=2, zero=3, reshard=0, **SIZES),
    "1f1b": Case(p=3, **SIZES),
    "interleaved": Case(p=2, schedule="interleaved", recompute="full", **SIZES),
    "zb-h1": Case(p=3, schedule="zb-h1", tied=False, **SIZES),
    "zb-v": Case(p=2, schedule="zb-v", **SIZES),
    "TP": Case(t=2, **SIZES),
    "TP and SP": Case(t=2, sequence=True, **SIZES),
    "all together": Case(t=2, p=2, d=2, zero=3, schedule="zb-v", sequence=True, **SIZES),
}


class Delays(TorchDispatchMode):
    """Sleeps before every collective, and before one in a hundred of the others."""

    def __init__(self, rng: random.Random, longest: float):
        super().__init__()
        self.rng, self.longest = rng, longest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" or self.rng.random() < 0.01:
            time.sleep(self.rng.random() * self.longest)
        return function(*args, **(kwargs or {}))


class Late:
    """The handle of a collective that brings `arrived` to `to` when it is waited for."""

    changed = 0  # under way
    waiting = 0  # for somebody who waits

    def __init__(self, work: dist.Work, source: torch.Tensor, to=None, arrived=None):
        self.work, self.source, self.to, self.arrived = work, source, to, arrived
        self.before = source.clone()
        Late.waiting += 1

    def wait(self) -> None:
        self.work.wait()
        Late.waiting -= 1
        Late.changed += not torch.equal(self.source, self.before)
        if self.to is not None:
            self.to.copy_(self.arrived)


def deliver_late() -> None:
    """What this process starts from here on."""
    reduce, batch = dist.all_reduce, dist.batch_isend_irecv

    def all_reduce(x, *args, async_op=False, **kwargs):
        if not async_op:
            return reduce(x, *args, **kwargs)
        arrived = x.clone()
        return Late(reduce(arrived, *args, async_op=True, **kwargs), x, x, arrived)

    def into(real: Callable) -> Callable:
        def call(to, x, *args, async_op=False, **kwargs):
            if not async_op:
                return real(to, x, *args, **kwargs)
            arrived = torch.empty_like(to)
            return Late(real(arrived, x, *args, async_op=True, **kwargs), x, to, arrived)

        return call

    def batch_isend_irecv(operations):
        places = [(o.tensor, None, None) for o in operations]
        for i, o in enumerate(operations):
            if o.op is dist.irecv:
                o.tensor = torch.empty_like(o.tensor)
                places[i] = (o.tensor.new_empty(0), places[i][0], o.tensor)
        return [Late(work, *place) for work, place in zip(batch(operations), places, strict=True)]

    dist.all_reduce, dist.batch_isend_irecv = all_reduce, batch_isend_irecv
    for module in (ddp, zero, tensor_parallel):
        for name in ("all_gather", "reduce_scatter"):
            setattr(module, name, into(getattr(module, name)))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


def train(case: Case, seed: int | None, late: bool, longest: float, folder: str) -> dict[str, str]:
    """On each rank: a few steps, each saved during the next one. What is left, as digests by kind.
    seed None: without random delays."""
    rank, rng = dist.get_rank(), random.Random(f"{seed} {dist.get_rank()}")
    slow = seed is not None and seed % dist.get_world_size() == rank
    delays = Delays(rng, 0.0 if seed is None else longest * (5 if slow else 1))
    write = checkpoint.Writer.write_data

    def write_slowly(*args):
        time.sleep(100 * rng.random() * delays.longest)
        return write(*args)

    checkpoint.Writer.write_data = write_slowly
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
    dist.barrier()  # rank 0 has renamed it
    assert all(save.failed is None for save in disk.news()), disk.failed
    pieces = trainer.sync.pieces()
    gradients = {f"{piece.name} {piece.start}": piece.tensor.grad for piece in pieces}
    trainer.sync.gather()
    digests = {
        "losses and norms": digest({"": torch.stack(stats)}),
        "gradients": digest(gradients),
        "parameters": digest(dict(gpt.named_parameters(trainer.model))),
        "handles that nobody waited for": str(Late.waiting),
        "tensors changed under way": str(Late.changed),
    }
    for step in range(1, STEPS + 1):
        checkpoint.read(Path(folder) / f"step-{step}", states, dist.group.WORLD)
        digests[f"checkpoint {step}"] = digest({f"{r.index}": r.tensor for r in states})
    return digests


def race(
    case: Case, seed: int | None, late: bool = False, longest: float = 1e-3
) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        return launch(case.world_size, train, case, seed, late, longest, folder)


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--n", type=int, default=20, help="runs of each path")
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args(argv)
    since, wrong = time.monotonic(), 0
    for name, case in PATHS.items():
        expected, differ = race(case, None), set()
        for seed in (None, *range(args.n * args.seed, args.n * (args.seed + 1))):
            for rank, kinds in enumerate(race(case, seed, late=seed is None)):
                differ |= {kind for kind in kinds if kinds[kind] != expected[rank][kind]}
        wrong += bool(differ)
        said = f"{', '.join(sorted(differ))} DIFFER" if differ else "the same to the last bit"
        runs = f"{name:16s} {case.world_size} ranks, {args.n} + 1 runs with delays"
        print(f"{runs}: {said}", flush=True)
    print(f"{len(PATHS) - wrong} of {len(PATHS)} paths; {time.monotonic() - since:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
