"""What the links between ranks cost: each collective and point-to-point, by size and group.

First the identity that ZeRO rests on, all-reduce = reduce-scatter + all-gather, shown on numbers.
Then a table. `wire` is what a ring sends per rank: all-reduce 2 (n-1)/n of the payload, all-gather
and reduce-scatter (n-1)/n, point-to-point all of it; GB/s is wire over time. Each time is the
median of several calls, of the slowest rank. The last lines fit time = latency + wire / bandwidth:
latency from the smallest size, bandwidth from the difference of the largest and the smallest.

    torchrun --standalone --nproc-per-node 2 -m tools.links --out links.json
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

# elements of the full tensor that a ring sends per rank, as a factor of the payload
WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "p2p": lambda n: 1.0,
}


def identity(group: dist.ProcessGroup, device: torch.device) -> float:
    """max |all_reduce(x) - all_gather(reduce_scatter(x))| / max |x|, in float64."""
    n = group.size()
    generator = torch.Generator().manual_seed(group.rank())
    x = torch.randn(1000 * n, generator=generator, dtype=torch.float64).to(device)
    whole, shard, both = x.clone(), x.new_empty(1000), torch.empty_like(x)
    dist.all_reduce(whole, group=group)
    reduce_scatter(shard, x, group=group)
    all_gather(both, shard, group=group)
    return ((whole - both).abs().max() / whole.abs().max()).item()


def call(operation: str, flat: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """A function that runs `operation` once on the payload `flat`; buffers are made here."""
    n, rank = group.size(), group.rank()
    shard = flat.new_empty(flat.numel() // n)
    if operation == "all_reduce":
        return lambda: dist.all_reduce(flat, group=group)
    if operation == "reduce_scatter":
        return lambda: reduce_scatter(shard, flat, group=group)
    if operation == "all_gather":
        return lambda: all_gather(flat, shard, group=group)

    def p2p() -> None:
        """Rank 2i to rank 2i + 1; the odd one of an odd group looks on."""
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
    """(median, spread) seconds of one call on `payload` float32 elements, of the slowest rank. The
    spread is the distance between the quartiles."""
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
        if i >= 2:  # the first calls connect and allocate
            seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    quartiles = statistics.quantiles(slowest.tolist(), n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def group_sizes(world_size: int) -> list[int]:
    """2, 4, 8, ... and the world."""
    return sorted({2**k for k in range(1, 12) if 2**k < world_size} | {max(2, world_size)})


def table(sizes_kb: list[int], repeats: int, device: torch.device, say: Callable) -> list[dict]:
    """One row for each (group size, operation, bytes), on the first ranks of the world; the others
    wait."""
    rows = []
    for n in group_sizes(dist.get_world_size()):
        group = dist.new_group(list(range(n)))
        if dist.get_rank() < n:
            worst = identity(group, device)
            say(f"{n} ranks: all-reduce = reduce-scatter + all-gather within {worst:.1e}")
            assert worst <= 1e-12, "the identity does not hold"
            for operation, wire in WIRE.items():
                for kb in sizes_kb:
                    payload = max(1, kb * 1024 // 4 // n) * n  # float32, in whole shards
                    seconds, spread = measure(operation, payload, group, device, repeats)
                    wire_bytes = wire(n) * payload * 4
                    rows.append({
                        "ranks": n, "operation": operation, "bytes": payload * 4,
                        "wire_bytes": wire_bytes, "ms": 1e3 * seconds, "spread_ms": 1e3 * spread,
                        "wire_gb_per_s": wire_bytes / seconds / 1e9,
                    })  # fmt: skip
                    say(f"{n:3d} ranks  {operation:15s}{payload * 4:>11,d} B {1e3 * seconds:9.3f} "
                        f"ms +- {1e3 * spread:<7.3f} {wire_bytes / seconds / 1e9:7.2f} GB/s")
        dist.barrier()
    return rows


def fit(rows: list[dict]) -> list[dict]:
    """latency (us) and bandwidth (GB/s of wire) for each (group size, operation)."""
    fits = []
    for n, operation in dict.fromkeys((r["ranks"], r["operation"]) for r in rows):
        mine = [r for r in rows if (r["ranks"], r["operation"]) == (n, operation)]
        small, large = min(mine, key=lambda r: r["bytes"]), max(mine, key=lambda r: r["bytes"])
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
        help="payloads")  # fmt: skip
    add("--repeats", type=int, default=30, help="timed calls of each, at least 2")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", metavar="FILE", help="the table as JSON")
    args = arguments.parse_args()
    device, line = startup.pick_device(args.device)
    startup.join_ranks(device)

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    say(line)
    if dist.get_world_size() < 2:
        raise SystemExit("links.py: a link has two ends: start 2 ranks or more with torchrun")
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
