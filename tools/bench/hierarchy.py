"""Measures how the placement of ranks on hosts affects traffic between hosts and step time.

    make hierarchy    python -m tools.bench.hierarchy     as root, 3 minutes, on an idle machine

Hosts are network namespaces of this machine (tools/bench/hosts.py) with 2 ranks each. Communication
inside a host is as fast as the machine copies memory; a host sends --mbit Mbit/s to other hosts.
tp, pp and dp are tensor, pipeline and data parallelism. "across" means that the ranks of a group
are on different hosts, "inside" that they are on the same host. Three tables are printed:

(a) an all-reduce over all ranks, flat or by host (ddp.Hierarchical: sum inside each host, then
    across hosts);
(b) one model on two ranks, on one host or on two; and on all ranks, with tp inside and pp or dp
    across, or the reverse;
(c) replicas on all ranks: gradients all-reduced flat or by host; ZeRO-3 with parameters sharded
    over all ranks or inside each host.

"MB across" are bytes that a host sends to other hosts per step, determined in three ways: from the
counted collectives, assuming rings; from the formulas of the strategy files; and from the counters
of the network interface, which include headers. The exit code is 1 if the first two are not equal.
"predicted" is the time given by tools/plan/cost.py with this machine's speed
(tools/plan/calibrate.py), the configured bandwidth, and cores that are shared by the ranks.
"""

import argparse
import os
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

import ddp
import gpt
import options
from tools.bench import hosts, links, stats
from tools.plan import cost, dry_run
from tools.plan.calibrate import PROGRAM, calibrate
from tools.plan.cost import Hardware, Layout
from tools.plan.plan import Job
from tools.plan.plan_check import step_seconds, trainer_of
from tools.verify.oracle import launch

CONFIG = gpt.GPTConfig(4, 8, 128, 256, 256)
ROWS = 16  # global batch size
B = 2  # microbatch size
PER_HOST = 2
BUCKET = 4 << 20  # bytes


class Place(NamedTuple):
    """A layout and the host of each rank."""

    what: str
    layout: Layout
    hosts: list[int]
    dp_nodes: int = 1

    def crossing(self, axis: str) -> int:
        """Number of ranks on the first host whose next rank along `axis` is on another host."""
        t, p, d = self.layout.tp, self.layout.pp, self.layout.dp
        ranks = torch.arange(t * p * d).view(p, d, t)  # as in train_3d.py
        dim = ("pp", "dp", "tp").index(axis)
        next_rank = ranks.roll(-1, dim).flatten().tolist()
        first = self.hosts[0]
        return sum(self.hosts[r] == first != self.hosts[n] for r, n in enumerate(next_rank))


def places(n_hosts: int) -> list[Place]:
    world = n_hosts * PER_HOST
    one = Layout(1, 1, 1, 0, B, ROWS // B, "none")

    def replicas(d: int, layout: Layout = one) -> Layout:
        return layout._replace(dp=d, microbatches=ROWS // B // d)

    neighbours = [rank // PER_HOST for rank in range(world)]
    round_robin = [rank % n_hosts for rank in range(world)]  # neighbours are on different hosts
    t, wide = one._replace(tp=PER_HOST), one._replace(tp=n_hosts)
    return [
        Place("tp 2 on one host", one._replace(tp=2), [0, 0]),
        Place("pp 2 across", one._replace(pp=2), [0, 1]),
        Place("dp 2 across", replicas(2), [0, 1]),
        Place("tp 2 across", one._replace(tp=2), [0, 1]),
        Place("tp inside, pp across", t._replace(pp=n_hosts), neighbours),
        Place("tp inside, dp across", replicas(n_hosts, t), neighbours),
        Place("tp across, pp inside", wide._replace(pp=PER_HOST), round_robin),
        Place("tp across, dp inside", replicas(PER_HOST, wide), round_robin),
        Place("tp over all", one._replace(tp=world), neighbours),
        Place("DDP, flat", replicas(world), neighbours),
        Place("DDP, by host", replicas(world), neighbours, dp_nodes=n_hosts),
        Place("ZeRO-3 over all", replicas(world)._replace(zero=3), neighbours),
        Place("ZeRO-3 inside", replicas(world)._replace(zero=3, shard_size=PER_HOST), neighbours),
    ]


# --- on a rank ------------------------------------------------------------------------------------


def across(traffic: dict, members: dict[str, list[int]], host: list[int]) -> float:
    """Bytes that this rank sends to another host, if each collective is a ring of its group.

    traffic: (group, operation) -> (calls, bytes). members: group -> its ranks. host: host by rank.
    """
    rank, total = dist.get_rank(), 0.0
    for (group, operation), (_, nbytes) in traffic.items():
        ring = members[group]
        next_rank = ring[(ring.index(rank) + 1) % len(ring)]
        if operation != "recv" and host[next_rank] != host[rank]:
            wire = links.WIRE["p2p" if operation == "send" else operation]
            total += wire(len(ring)) * nbytes
    return total


def run_place(place: Place, steps: int) -> tuple[float, float, float, float]:
    """Trains in this place. Returns, per step: seconds; bytes that this rank sends to other hosts,
    counted and predicted; bytes that the interface of this host sent.
    """
    job = Job(CONFIG, place.layout.gpus, PER_HOST, ROWS, cost.HARDWARE["a100-80"], PROGRAM)
    k, more = place.layout.shard_size, f"--dp-nodes {place.dp_nodes}"
    trainer = trainer_of(job, place.layout, more + f" --zero-shard-size {k}" * (k > 0))
    trainer.step(0)
    seen = dry_run.observe(trainer, dist.get_rank(), activations=False, step=1)
    counted, expected = (
        across(traffic, seen.members, place.hosts)
        for traffic in seen.traffic
    )
    dist.barrier()
    before = hosts.sent_bytes()
    seconds = step_seconds(trainer, range(2, 2 + steps))
    return seconds, counted, expected, (hosts.sent_bytes() - before) / steps


def all_reduces(n_hosts: int, size: int, repeats: int) -> list[tuple[float, float]]:
    """(seconds, bytes that this host sent) of an all-reduce of `size` bytes: flat, by host."""
    ranks = torch.arange(dist.get_world_size()).view(n_hosts, PER_HOST)
    inside, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
    between, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
    buckets, both = torch.zeros(size // 4).split(BUCKET // 4), []
    for reduce in (ddp.all_reduce_bucket, ddp.Hierarchical(inside, between)):
        seconds, before = [], 0
        for _ in range(1 + repeats):
            start = time.perf_counter()
            for handle in [reduce(bucket, dist.group.WORLD) for bucket in buckets]:
                handle.wait()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            before = before or hosts.sent_bytes()  # the first call connects and is not counted
        both.append((statistics.median(seconds[1:]), (hosts.sent_bytes() - before) / repeats))
    return both


def small_all_reduce() -> float:
    """Microseconds of an all-reduce of 64 elements over all ranks."""
    return 1e6 * links.measure("all_reduce", 64, dist.group.WORLD, torch.device("cpu"), 30)[0]


# --- measured and predicted -----------------------------------------------------------------------


def predicted(place: Place, fast: Hardware, mbit: float, slow_us: float) -> float | None:
    """Seconds per step by the cost model, or None for a layout that it does not support.

    Ranks share the cores, and rings that cross between hosts share the link.
    """
    layout = place.layout
    if layout.shard_size or place.dp_nodes > 1:
        return None
    share = min(1.0, len(os.sched_getaffinity(0)) / layout.gpus)
    hardware = fast._replace(tflops=fast.tflops * share,
                             memory_gb_per_s=fast.memory_gb_per_s * share)
    # The cost model has two kinds of links: tp uses `link`, pp and dp use `network`.
    for axes, name in ((["tp"], "link"), (["pp", "dp"], "network")):
        crossing = max(place.crossing(axis) for axis in axes)
        both = {"gb_per_s": fast.link_gb_per_s, "us": fast.link_us}
        if crossing:
            both = {"gb_per_s": mbit / 8000 / crossing, "us": slow_us}
        hardware = hardware._replace(**{f"{name}_{unit}": x for unit, x in both.items()})
    return cost.predicted_step(CONFIG, layout, hardware, layout.tp, PROGRAM).total


def compare_all_reduces(net: hosts.Hosts, mbit: float, repeats: int) -> list[dict]:
    n, rows = len(net.names), []
    print(f"\n(a) {'all-reduce':18s}{'flat':>10s}{'by host':>12s}{'ratio':>8s}   MB across, per "
          "host: formula, through the interface")  # fmt: skip
    for size in (1 << 18, BUCKET, 6 * BUCKET):
        flat, by_host = launch(n * PER_HOST, all_reduces, n, size, repeats,
                               before=lambda rank: net.enter(rank // PER_HOST))[0]  # fmt: skip
        numel = size // 4
        crosses = [ddp.predicted_wire_bytes(numel, k, 4) for k in (n * PER_HOST, n)]
        rows.append({"bytes": size, "flat_s": flat[0], "by_host_s": by_host[0],
                     "flat_bytes": (crosses[0], flat[1]),
                     "by_host_bytes": (crosses[1], by_host[1])})  # fmt: skip
        print(f"    {size / 1e6:6.2f} MB         {1e3 * flat[0]:8.1f} ms {1e3 * by_host[0]:8.1f} ms"
              f"{by_host[0] / flat[0]:8.2f}   {crosses[0] / 1e6:.2f}, {flat[1] / 1e6:.2f}; by host "
              f"{crosses[1] / 1e6:.2f}, {by_host[1] / 1e6:.2f}", flush=True)  # fmt: skip
    return rows


def compare_places(
    net: hosts.Hosts, fast: Hardware, mbit: float, slow_us: float, steps: int, rounds: int
) -> list[dict]:
    found = places(len(net.names))
    measured: dict[str, list] = {place.what: [] for place in found}
    for _ in range(rounds):  # places alternate, because the machine's speed drifts
        for place in found:
            ranks = launch(place.layout.gpus, run_place, place, steps,
                           before=lambda rank, place=place: net.enter(place.hosts[rank]))
            measured[place.what].append(ranks)
    print(f"\n(b) {'':22s}{'step':>9s}{'predicted':>12s}   MB across, per host and step: "
          "counted, formula, through the interface")  # fmt: skip
    rows = []
    for place in found:
        runs = measured[place.what]
        seconds = statistics.median(max(rank[0] for rank in ranks) for ranks in runs)
        # Per host: bytes counted, predicted, sent by the interface. The largest is printed.
        totals = [[0.0, 0.0, 0.0] for _ in net.names]
        for rank, (_, counted, expected, sent) in enumerate(runs[-1]):
            host = totals[place.hosts[rank]]
            host[0], host[1], host[2] = host[0] + counted, host[1] + expected, sent
        most = max(totals)
        expected = predicted(place, fast, mbit, slow_us)
        expected_ms = "" if expected is None else f"{1e3 * expected:.0f} ms"
        same = "" if most[0] == most[1] else "   <- differs"
        if place.what.startswith("DDP, flat"):
            print("(c)")
        print(f"    {place.what:22s}{1e3 * seconds:6.0f} ms{expected_ms:>12s}   "
              f"{', '.join(f'{x / 1e6:.2f}' for x in most)}{same}", flush=True)
        rows.append({"what": place.what, "layout": place.layout._asdict(), "step_s": seconds,
                     "predicted_s": expected, "bytes": most})  # fmt: skip
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--hosts", type=int, choices=(2, 4), default=2, help="number of hosts, of 2 ranks each")
    add("--mbit", type=options.at_least(1), default=1000, help="Mbit/s from a host to the others")
    add("--steps", type=options.at_least(1), default=5, help="timed steps per launch")
    add("--rounds", type=options.at_least(1), default=2, help="launches of each layout")
    add("--out", metavar="FILE", help="write the tables as JSON")
    args = arguments.parse_args()
    if lack := hosts.missing():
        return print(f"tools.bench.hierarchy: skipped: {lack}")
    cores = len(os.sched_getaffinity(0))
    fast = calibrate(2)
    with hosts.Hosts(args.hosts, args.mbit) as net:
        slow_us = max(launch(args.hosts, small_all_reduce, before=net.enter))
        print(f"{args.hosts} hosts of {PER_HOST} ranks x 1 thread, {cores} cores, gloo, float32; "
              f"inside {8 * fast.link_gb_per_s:.1f} Gbit/s and {fast.link_us:.0f} us per call, "
              f"between {args.mbit / 1000:g} Gbit/s and {slow_us:.0f} us")  # fmt: skip
        rows = {"all_reduce": compare_all_reduces(net, args.mbit, 4 * args.steps)}
        rows["steps"] = compare_places(net, fast, args.mbit, slow_us, args.steps, args.rounds)
    if args.out:
        command = "make hierarchy" + (f' ARGS="--mbit {args.mbit}"' if args.mbit != 1000 else "")
        given = {"hosts": args.hosts, "ranks": args.hosts * PER_HOST, "mbit": args.mbit,
                 "steps_per_launch": args.steps, "launches": args.rounds}  # fmt: skip
        stats.write(args.out, stats.provenance(command) | given | rows)
    sys.exit(any(row["bytes"][0] != row["bytes"][1] for row in rows["steps"]))


if __name__ == "__main__":
    main()
