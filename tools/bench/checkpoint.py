"""Compares checkpoint.py with torch.distributed.checkpoint (DCP) and with torch.save.

    make bench-checkpoint    python -m tools.bench.checkpoint [--folder DIR] [--out FILE]

A layout has t tensor-parallel ranks or d replicas; h is the hidden size. In each launch, the ways
to save take turns in the same processes and in the same folder, forwards and then backwards:

    torch.save   all tensors of the layout by rank 0, while the other ranks wait
    save         checkpoint.py, until the save is complete on the disk
    dcp.save     DCP with 1 or 2 threads per rank; the faster one is compared
    pause        checkpoint.py, until training continues; then a step, while a thread writes
    async_save   DCP, until training continues; then a step, while a thread writes
    no save      only the step

All write the same tensors, with fsync. Deleting a checkpoint is not timed. DCP gets the layout of
PyTorch's strategies: plain tensors for DDP, of which it saves one replica, and DTensors for `t 2`
and for ZeRO-1 (sharded along dimension 0, as in FSDP2). It reuses its plan and, in async_save, its
copies in memory; it copies before async_save returns. A save by checkpoint.py also copies the
state, computes a crc32 of each file and renames the folder. In the first launch, each checkpoint is
loaded and compared.

A ratio is the median over n pairs of turns (the time forwards + the time backwards). In brackets:
its 95 % bootstrap interval, see tools/bench/stats.py. The columns of the table:

    state, save, pause   bytes of parameters and moments; median times of checkpoint.py
    save / torch.save    below 1, writing in parallel pays
    save / dcp.save      below 1, checkpoint.py completes a save faster than DCP
    pause / async_save   below 1, checkpoint.py stops training for less time than DCP
    step / DCP's         step during a save by checkpoint.py / step during async_save
    step / no save       step during a save by checkpoint.py / step without a save
"""

import argparse
import dataclasses
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # imported before the fork: otherwise every rank would import it
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import checkpoint
import train_3d
from tools.bench import stats
from tools.verify.oracle import Case, launch, trainer_of

DDP, ZERO1, TP = Case(d=2), Case(d=2, zero=1), Case(t=2)
CASES = {"one rank": Case(), "d 2, DDP": DDP, "d 2, ZeRO-1": ZERO1, "t 2": TP}
SIZES = {256: {"n_layer": 4, "n_head": 4}, 768: {"n_layer": 2, "n_head": 12}}  # by h
THREADS = {"dcp.save": 1, "dcp.save, 2 threads": 2, "async_save": 1}
KINDS = ("torch.save", "save", "pause", *THREADS, "no save")
RATIOS = {  # column of the table: (numerator, denominator)
    "save / torch.save": ("save", "torch.save"),
    "save / dcp.save": ("save", "dcp.save"),
    "pause / async_save": ("pause", "async_save"),
    "step / DCP's": ("pause, step", "async_save, step"),
    "step / no save": ("pause, step", "no save, step"),
}


def dcp_state(trainer: train_3d.Trainer) -> dict[str, Tensor]:
    """What DCP saves. A shard of our ZeRO-1 is a range of a flattened parameter, which no DTensor
    can describe, so there DCP gets random values of the same size."""
    rank, n, state = dist.get_rank(), dist.get_world_size(), {}
    mesh = init_device_mesh("cpu", (n,))
    for name, p in trainer.model.named_parameters():
        if trainer.args.zero:
            tensors, dim = [torch.rand(p.shape).chunk(n)[rank].clone() for _ in range(3)], 0
        else:
            moments, dim = trainer.optimizer.state[p], None
            tensors = [p.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
        for split in p.distribution.splits if trainer.args.tp > 1 else ():
            dim, fused = split.dim, len(split.sizes)
            if fused > 1:  # [3 h/t, h] -> [3, h/t, h]
                tensors, dim = [t.unflatten(dim, (fused, -1)) for t in tensors], dim + 1
        if dim is not None:
            tensors = [DTensor.from_local(t, mesh, [Shard(dim)]) for t in tensors]
        state |= {f"{name}/{i}": t for i, t in enumerate(tensors)}
    return state


def measure(name: str, h: int, folder: str, pairs: int, check: bool) -> dict:
    """Runs on each rank. Returns seconds by kind and turn, and, with `check`, bytes on disk."""
    model = {"n_embd": h, "vocab_size": 256, "seq_len": 64, "dtype": "float32"} | SIZES[h]
    trainer = trainer_of(dataclasses.replace(CASES[name], **model), sync=None)
    trainer.step(0)
    gc.freeze()  # as in train_3d.py
    is_first, group = dist.get_rank() == 0, dist.new_group(backend="gloo")
    disk = checkpoint.Checkpoints(folder, 2, dist.new_group(backend="gloo"))
    mine, numbers = trainer.state_to_save()
    ours, sharded = {i: s.tensor for i, s in enumerate(mine)}, dcp_state(trainer)
    full = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in sharded.items()}
    states = {"torch.save": full, "save": ours, "pause": ours} | dict.fromkeys(THREADS, sharded)
    # DCP copies before async_save returns. "Pinned" and "non-blocking" need a GPU.
    stager, saving = DefaultStager(StagingOptions(False, False, False, False)), []

    def start(kind: str, path: Path) -> None:
        """Saves, or starts to save."""
        if kind == "torch.save" and is_first:
            path.mkdir()
            with open(path / "all.pt", "wb") as file:
                torch.save(full, file)
                file.flush()
                os.fsync(file.fileno())
        elif kind in ("save", "pause"):
            disk.save(int(path.name.removeprefix("step-")), mine, {"optimizer": numbers})
            if kind == "save":
                disk.wait()
        elif kind in THREADS:
            writer = dcp.FileSystemWriter(path, sync_files=True, thread_count=THREADS[kind])
            planner = dcp.DefaultSavePlanner(False, False, enable_plan_caching=True)
            how = {"storage_writer": writer, "planner": planner, "process_group": group}
            if kind == "async_save":
                saving.append(dcp.async_save(sharded, async_stager=stager, **how))
            else:
                dcp.save(sharded, **how)

    def load(kind: str, path: Path) -> dict:
        if kind == "torch.save":
            return torch.load(path / "all.pt")
        loaded = {key: torch.zeros_like(t) for key, t in states[kind].items()}
        if kind in THREADS:
            dcp.load(loaded, checkpoint_id=path, process_group=group)
        else:
            slices = [s._replace(tensor=loaded[i]) for i, s in enumerate(mine)]
            checkpoint.read(path, slices, group)
        return loaded

    def local(state: dict) -> list[Tensor]:
        return [t.to_local() if isinstance(t, DTensor) else t for t in state.values()]

    def timed(what: str, function: Callable, *args) -> None:
        start = time.perf_counter()
        function(*args)
        seconds.setdefault(what, []).append(time.perf_counter() - start)

    seconds, on_disk = {}, {}
    for i in range(1 + 2 * pairs):  # the first turn is dropped
        for j, kind in enumerate(KINDS if i % 2 else reversed(KINDS)):
            path, checked = Path(folder, f"step-{10 * i + j}"), check and i == 0 and kind in states
            before = [t.clone() for t in local(states[kind])] if checked else []
            dist.barrier()
            timed(kind, start, kind, path)
            if kind in ("pause", "async_save", "no save"):
                timed(f"{kind}, step", trainer.step, i + 1)
            while saving:
                saving.pop().result()
            disk.wait()
            assert disk.failed is None, disk.failed
            dist.barrier()
            if checked:
                if not all(map(torch.equal, local(load(kind, path)), before)):
                    raise RuntimeError(f"{kind}: it loads other values than it saved")
                on_disk[kind] = sum(file.stat().st_size for file in path.iterdir())
                dist.barrier()
            if is_first and kind in states:
                shutil.rmtree(path)
                os.sync()  # otherwise the next save may wait for the disk
    seconds = {what: times[1:] for what, times in seconds.items()}
    return {"bytes": sum(t.nbytes for t in full.values()), "on_disk": on_disk, "seconds": seconds}


def run(name: str, h: int, pairs: int, check: bool, folder: str | None, tries: int) -> dict:
    """One launch: seconds by kind and turn on the slowest rank, and the other results."""
    n = CASES[name].world_size

    def once() -> list[dict]:
        with tempfile.TemporaryDirectory(dir=folder) as new:
            args, before = (name, h, new, pairs, check), lambda rank: stats.bind(rank, n)
            return launch(n, measure, *args, timeout=300, before=before)

    ranks, foreign = stats.undisturbed(once, tries)
    slowest = {what: np.max([r["seconds"][what] for r in ranks], axis=0).tolist()
               for what in ranks[0]["seconds"]}  # fmt: skip
    return ranks[0] | {"seconds": slowest, "foreign": foreign}


def rows_of(name: str, h: int, launches: list[dict]) -> list[dict]:
    """One row per ratio. launches: what run() returned."""
    seconds = [found["seconds"] for found in launches]

    ms = {kind: 1e3 * float(np.median([s[kind] for s in seconds])) for kind in seconds[0]}
    rows = []
    for column, (over, under) in RATIOS.items():
        under = min("dcp.save", "dcp.save, 2 threads", key=ms.get) if under == "dcp.save" else under
        each = [stats.launch_ratio(s[over][i : i + 2], s[under][i : i + 2])
                for s in seconds for i in range(0, len(s[over]), 2)]  # fmt: skip
        rows.append({"layout": name, "h": h, "bytes": launches[0]["bytes"], "column": column,
                     "on_disk": [launches[0]["on_disk"].get(kind) for kind in (over, under)],
                     "of": over, "ms": ms[over], "over": under, "over_ms": ms[under],
                     "n": len(each), "ratio": float(np.median(each)),
                     "interval": stats.interval(each), "ratios": each})  # fmt: skip
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES, metavar="H")
    add("--folder", help="a folder on the disk to measure (default: a temporary folder)")
    add("--launches", type=int, default=5, metavar="N", help="launches per layout and size")
    add("--pairs", type=int, default=2, metavar="N", help="pairs of turns per launch")
    add("--tries", type=int, default=stats.TRIES, metavar="N", help="see tools.bench.compare")
    add("--out", metavar="FILE", help="write the rows as JSON")
    args = arguments.parse_args()
    print(f"{len(stats.cores())} cores, gloo, torch {torch.__version__}, float32, AdamW, fsync")
    runs, start = {(name, h): [] for h in args.sizes for name in CASES}, time.perf_counter()
    for i in range(args.launches):
        for (name, h), launches in runs.items():
            launches.append(run(name, h, args.pairs, i == 0, args.folder, args.tries))
            if i == 0:
                print(f"{name}, h {h}: loaded equal; bytes on disk {launches[0]['on_disk']}")
        print(f"launch {i + 1} of {args.launches}: {time.perf_counter() - start:.0f} s", flush=True)
    foreign = [found["foreign"] for launches in runs.values() for found in launches]
    print(f"other processes used up to {max(foreign):.2f} cores during a launch")
    titles, rows = ("layout", "h", "state", "save", "pause", "n", *RATIOS), []
    print("\n| " + " | ".join(titles) + " |\n|" + " --- |" * len(titles))
    for (name, h), launches in runs.items():
        rows += (mine := rows_of(name, h, launches))
        state, n = f"{mine[0]['bytes'] / 1e6:.0f} MB", f"{mine[0]['n']}"
        times = [f"{mine[i]['ms']:.0f} ms" for i in (0, 2)]  # save, pause
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(r["ratio"], *r["interval"]) for r in mine]
        print("| " + " | ".join([name, f"{h}", state, *times, n, *ratios]) + " |")
    if args.out:
        stats.write(args.out, stats.provenance("make bench-checkpoint") | {
            "launches": args.launches, "pairs": args.pairs, "foreign_cores": foreign, "rows": rows
        })  # fmt: skip


if __name__ == "__main__":
    main()
