"""Measures the time of collectives and transfers between ranks, by size and number of ranks.

    make links
    torchrun --standalone --nproc-per-node 2 -m tools.bench.links --out links.json

For each group size it first checks that an all-reduce equals a reduce-scatter followed by an
all-gather, on which ZeRO relies. It then prints one row per operation and payload (bytes of the
full tensor): the median time on the slowest rank, its spread, and GB/s.

GB/s is the wire divided by the time. The wire is the number of bytes that a rank sends in a ring of
n ranks: 2 (n-1)/n of the payload for an all-reduce, (n-1)/n for an all-gather or reduce-scatter,
and the payload for a point-to-point transfer ("p2p").

The last rows are a fit of time = latency + wire / bandwidth. The latency is the time of the
smallest payload. The bandwidth comes from the difference between the largest and the smallest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import startup
from zero import all_gather, reduce_scatter

# Elements that a rank sends in a ring of n ranks / elements of the full tensor.
WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "p2p": lambda n: 1.0,
}


def identity(group: dist.ProcessGroup, device: torch.device) -> float:
    """max |all_reduce(x) - all_gather(reduce_scatter(x))| / max |all_reduce(x)|, in float64."""
    n = group.size()
    generator = torch.Generator().manual_seed(group.rank())
    x = torch.randn(1000 * n, generator=generator, dtype=torch.float64).to(device)
    summed, shard, gathered = x.clone(), x.new_empty(1000), torch.empty_like(x)
    dist.all_reduce(summed, group=group)
    reduce_scatter(shard, x, group=group)
    all_gather(gathered, shard, group=group)
    return ((summed - gathered).abs().max() / summed.abs().max()).item()


def call(operation: str, flat: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """A function that runs `operation` once with the payload `flat`. Allocates the buffers."""
    n, rank = group.size(), group.rank()
    shard = flat.new_empty(flat.numel() // n)
    if operation == "all_reduce":
        return lambda: dist.all_reduce(flat, group=group)
    if operation == "reduce_scatter":
        return lambda: reduce_scatter(shard, flat, group=group)
    if operation == "all_gather":
        return lambda: all_gather(flat, shard, group=group)

    def p2p() -> None:
        """Rank 2i sends to rank 2i + 1. In an odd group the last rank does nothing."""
        peer = rank ^ 1
        if peer < n:
            post = dist.isend if rank < peer else dist.irecv
            operation = dist.P2POp(post, flat, group=group, group_peer=peer)
            for handle in dist.batch_isend_irecv([operation]):
                handle.wait()

    return p2p


def measure(
    operation: str, payload: int, group: dist.ProcessGroup, device: torch.device, repeats: int
) -> tuple[float, float]:
    """(median, interquartile range) of the seconds of a call, on the slowest rank.

    payload: float32 elements of the full tensor.
    """
    run = call(operation, torch.zeros(payload, device=device), group)
    seconds = []
    for i in range(repeats + 2):
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # start together
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:  # the first calls open connections and allocate
            seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    quartiles = statistics.quantiles(slowest.tolist(), n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def group_sizes(world_size: int) -> list[int]:
    """2, 4, 8, ... and the world size."""
    return sorted({2**k for k in range(1, 12) if 2**k < world_size} | {max(2, world_size)})


def table(sizes_kb: list[int], repeats: int, device: torch.device, say: Callable) -> list[dict]:
    """One row per (group size, operation, bytes). A group of n consists of the ranks 0..n-1."""
    rows = []
    for n in group_sizes(dist.get_world_size()):
        group = dist.new_group(list(range(n)))
        if dist.get_rank() < n:
            worst = identity(group, device)
            say(f"{n} ranks: all-reduce = reduce-scatter + all-gather within {worst:.1e}")
            assert worst <= 1e-12, "the identity does not hold"
            for operation, wire in WIRE.items():
                for kb in sizes_kb:
                    payload = max(1, kb * 1024 // 4 // n) * n  # float32 elements, a multiple of n
                    seconds, spread = measure(operation, payload, group, device, repeats)
                    wire_bytes = wire(n) * payload * 4
                    rows.append({
                        "ranks": n, "operation": operation, "bytes": payload * 4,
                        "wire_bytes": wire_bytes, "ms": 1e3 * seconds, "spread_ms": 1e3 * spread,
                        "wire_gb_per_s": wire_bytes / seconds / 1e9,
                    })  # fmt: skip
                    say(
                        f"{n:3d} ranks  {operation:15s}{payload * 4:>11,d} B {1e3 * seconds:9.3f} "
                        f"ms +- {1e3 * spread:<7.3f} {wire_bytes / seconds / 1e9:7.2f} GB/s"
                    )
        dist.barrier()
    return rows


def fit(rows: list[dict]) -> list[dict]:
    """Latency (us) and bandwidth (GB/s of wire; None: too noisy) by group size and operation."""
    fits = []
    for n, operation in dict.fromkeys((r["ranks"], r["operation"]) for r in rows):
        chosen = [r for r in rows if (r["ranks"], r["operation"]) == (n, operation)]
        small, large = (extreme(chosen, key=lambda r: r["bytes"]) for extreme in (min, max))
        seconds = (large["ms"] - small["ms"]) / 1e3
        wire_bytes = large["wire_bytes"] - small["wire_bytes"]
        fits.append({
            "ranks": n, "operation": operation, "latency_us": 1e3 * small["ms"],
            "gb_per_s": wire_bytes / seconds / 1e9 if seconds > 0 else None,
        })  # fmt: skip
    return fits


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--sizes-kb", type=int, nargs="+", default=[4, 64, 1024, 25 * 1024], metavar="KB",
        help="payloads, in KiB of float32")  # fmt: skip
    add("--repeats", type=int, default=30, help="timed calls per row, at least 2")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", metavar="FILE", help="write the table as JSON")
    args = arguments.parse_args()
    device, line = startup.pick_device(args.device)
    startup.join_ranks(device)

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    say(line)
    if dist.get_world_size() < 2:
        raise SystemExit("links.py: 1 rank has no links: start 2 or more with torchrun")
    rows = table(args.sizes_kb, args.repeats, device, say)
    if dist.get_rank() == 0:
        fits = fit(rows)
        for f in fits:
            speed = "too noisy" if f["gb_per_s"] is None else f"{f['gb_per_s']:.2f} GB/s"
            say(f"{f['ranks']:3d} ranks  {f['operation']:15s} {f['latency_us']:8.0f} us + {speed}")
        if args.out:
            about = {"backend": dist.get_backend(), "torch": torch.__version__}
            with open(args.out, "w") as file:
                json.dump({"about": about, "rows": rows, "fit": fits}, file, indent=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
