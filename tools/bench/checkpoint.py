"""Measures the time of checkpoint.py's saves, compared with torch.save of the same tensors.

    make bench-checkpoint    python -m tools.bench.checkpoint [--folder DIR] [--out FILE]

A layout has t tensor-parallel ranks or d replicas; h is the hidden size. For each layout it
measures the following ROUNDS times and reports medians:

- torch.save of all tensors of the layout by rank 0, with fsync, while the other ranks wait;
- a save by checkpoint.py, from the call until it is complete on the disk;
- the pause of an asynchronous save, that is, the time until training continues;
- a training step without a save, and a step during a save.

The columns of the table, one row per layout and size:

    state        bytes of parameters and optimizer state
    torch.save   time of torch.save
    save         time of checkpoint.py until the save is complete
    ratio        save / torch.save; below 1, writing in parallel pays
    pause        time for which an asynchronous save stops training
    of a save    pause / save
    slowdown     step during a save / step without; writing uses the same cores as training
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

import checkpoint
import gpt
import options
import train_3d
from tools.bench.stats import bind, cores
from tools.verify.oracle import Case, launch, reader

ROUNDS = 5
CASES = {
    "one rank": Case(),
    "d 2, DDP": Case(d=2),
    "d 2, ZeRO-1": Case(d=2, zero=1),
    "t 2": Case(t=2),
}
SIZES = {256: (8, 4, 256), 768: (4, 12, 768)}  # h: layers, heads, h


def measure(name: str, h: int, folder: str) -> dict[str, float]:
    """Runs on each rank. Returns the medians in seconds and the bytes of all tensors."""
    bind(dist.get_rank(), dist.get_world_size())
    case, (layers, heads, _) = CASES[name], SIZES[h]
    flags = [*case.arguments(), f"--n-layer={layers}", f"--n-head={heads}", f"--n-embd={h}",
             "--vocab-size=256", "--seq-len=64", "--dtype=float32"]  # fmt: skip
    args = options.parser().parse_args(flags)
    case.seq_len = 64
    trainer = train_3d.Trainer(
        args, options.check(args, case.world_size), reader(case), torch.device("cpu")
    )
    trainer.step(0)
    gc.freeze()  # as in train_3d.py
    disk = checkpoint.Checkpoints(folder, 1, dist.new_group(backend="gloo"))
    mine, numbers = trainer.state_to_save()
    size = torch.tensor(float(sum(r.tensor.nbytes for r in mine)))
    dist.all_reduce(size)
    with torch.device("meta"):
        shapes = [p.shape for p in gpt.GPT(trainer.config).parameters()]
    tensors = [torch.empty(shape) for shape in 3 * shapes]  # parameters and AdamW's two moments
    assert sum(t.nbytes for t in tensors) == size
    seconds: dict[str, list[float]] = {
        kind: [] for kind in ("torch", "save", "pause", "step", "step during a save")
    }

    about = {"optimizer": numbers}

    def timed(kind: str, function) -> None:
        dist.barrier()
        start = time.perf_counter()
        function()
        dist.barrier()
        seconds[kind].append(time.perf_counter() - start)

    def by_torch() -> None:
        if dist.get_rank() == 0:
            path = os.path.join(folder, "torch.pt")
            with open(path, "wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())
            os.remove(path)

    for i in range(1, ROUNDS + 2):
        timed("torch", by_torch)
        timed("step", functools.partial(trainer.step, i))
        disk.save(2 * i, mine, about)
        timed("step during a save", functools.partial(trainer.step, i))
        disk.wait()
        seconds["pause"].append(disk.completed()[-1].pause)
        timed("save", lambda i=i: (disk.save(2 * i + 1, mine, about), disk.wait()))
        assert disk.failed is None, disk.failed
    return {"bytes": size.item()} | {
        kind: statistics.median(times[1:]) for kind, times in seconds.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES, metavar="H")
    add("--folder", help="a folder on the disk to measure (default: a temporary folder)")
    add("--out", metavar="FILE", help="write the rows as JSON")
    args = arguments.parse_args()
    print(f"{len(cores())} cores, gloo, torch {torch.__version__}, float32, AdamW; with fsync")
    print("| layout | h | state | torch.save | save | ratio | pause | of a save | slowdown |")
    print("|" + " --- |" * 9)
    rows = []
    for h in args.sizes:
        for name, case in CASES.items():
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                ranks = launch(case.world_size, measure, name, h, folder, timeout=300)
            row = {kind: max(r[kind] for r in ranks) for kind in ranks[0]}
            rows.append({"layout": name, "h": h} | row)
            print(f"| {name} | {h} | {row['bytes'] / 1e6:.0f} MB | {1e3 * row['torch']:.0f} ms | "
                  f"{1e3 * row['save']:.0f} ms | {row['save'] / row['torch']:.2f} | "
                  f"{1e3 * row['pause']:.0f} ms | {row['pause'] / row['save']:.0%} | "
                  f"{row['step during a save'] / row['step']:.2f} |", flush=True)  # fmt: skip
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
