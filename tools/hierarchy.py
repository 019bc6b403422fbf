"""Fast links inside a host, slow ones between: what crosses, and what it takes, by placement.

    python -m tools.hierarchy                    make hierarchy (as root; 3 min; an idle machine)

Hosts are network namespaces of this machine (tools/hosts.py) with 2 ranks each; what leaves a host
goes at --mbit megabits a second, what stays in it as fast as this machine copies. Then

(a) an all-reduce, flat, and by ddp.Hierarchical: summed inside first, then across;
(b) one model on two ranks, of which tp keeps both on a host or has one on each, and on all of them,
    with tp inside and pp or dp across, or the other way round (ranks are dealt out to hosts then);
(c) its replicas, with gradients summed flat or by host; and ZeRO-3, sharded over all or inside.

MB across: what a host sends to others a step, of the calls that were counted, if each goes around
in a ring of ranks; what the formulas of the strategy files say it is (these two must be equal); and
what went through the interface, with TCP's headers. Predicted times are tools/plan.py's, with this
machine as tools/calibrate.py measures it, the link as it was set up and measured, and cores shared.
"""

import argparse
import json
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
from tools import cost, dry_run, hosts, links
from tools.calibrate import PROGRAM, calibrate
from tools.cost import Hardware, Layout
from tools.oracle import launch
from tools.plan import Job
from tools.plan_check import step_seconds, trainer_of

CONFIG = gpt.GPTConfig(4, 8, 128, 256, 256)
ROWS = 16  # a step, of all replicas
B = 2  # of a microbatch
PER_HOST = 2
BUCKET = 4 << 20  # bytes


class Place(NamedTuple):
    """A layout, and the host of each rank."""

    what: str
    layout: Layout
    hosts: list[int]
    dp_nodes: int = 1

    def crossing(self, axis: str) -> int:
        """Ranks of the first host whose neighbour in a ring along this axis is on another."""
        t, p, d = self.layout.tp, self.layout.pp, self.layout.dp
        ranks = torch.arange(t * p * d).view(p, d, t)  # as in train_3d.py
        dim = ("pp", "dp", "tp").index(axis)
        following = ranks.roll(-1, dim).flatten().tolist()
        home = self.hosts[0]
        return sum(self.hosts[r] == home != self.hosts[following[r]] for r in range(len(following)))


def places(n_hosts: int) -> list[Place]:
    world = n_hosts * PER_HOST
    one = Layout(1, 1, 1, 0, B, ROWS // B, "none")

    def replicas(d: int, layout: Layout = one) -> Layout:
        return layout._replace(dp=d, microbatches=ROWS // B // d)

    neighbours = [rank // PER_HOST for rank in range(world)]
    dealt = [rank % n_hosts for rank in range(world)]  # neighbours are on different hosts
    t, wide = one._replace(tp=PER_HOST), one._replace(tp=n_hosts)
    return [
        Place("tp 2 on one host", one._replace(tp=2), [0, 0]),
        Place("pp 2 across", one._replace(pp=2), [0, 1]),
        Place("dp 2 across", replicas(2), [0, 1]),
        Place("tp 2 across", one._replace(tp=2), [0, 1]),
        Place("tp inside, pp across", t._replace(pp=n_hosts), neighbours),
        Place("tp inside, dp across", replicas(n_hosts, t), neighbours),
        Place("tp across, pp inside", wide._replace(pp=PER_HOST), dealt),
        Place("tp across, dp inside", replicas(PER_HOST, wide), dealt),
        Place("tp over all", one._replace(tp=world), neighbours),
        Place("DDP, flat", replicas(world), neighbours),
        Place("DDP, by host", replicas(world), neighbours, dp_nodes=n_hosts),
        Place("ZeRO-3 over all", replicas(world)._replace(zero=3), neighbours),
        Place("ZeRO-3 inside", replicas(world)._replace(zero=3, shard_size=PER_HOST), neighbours),
    ]


# --- on a rank ------------------------------------------------------------------------------------


def across(traffic: dict, members: dict[str, list[int]], host: list[int]) -> float:
    """Bytes from this rank to one on another host: to the next in the ring of each group."""
    rank, total = dist.get_rank(), 0.0
    for (group, operation), (_, nbytes) in traffic.items():
        ring = members[group]
        following = ring[(ring.index(rank) + 1) % len(ring)]
        if operation != "recv" and host[following] != host[rank]:
            wire = links.WIRE["p2p" if operation == "send" else operation]
            total += wire(len(ring)) * nbytes
    return total


def run_place(place: Place, steps: int) -> tuple[float, float, float, float]:
    """(seconds of a step; bytes in one, from this rank to other hosts: counted, predicted; from
    this host, through its interface)."""
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
    """(seconds, bytes from this host) of `size` bytes in buckets: flat, and by host."""
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
            before = before or hosts.sent_bytes()  # the first connects
        both.append((statistics.median(seconds[1:]), (hosts.sent_bytes() - before) / repeats))
    return both


def small_all_reduce() -> float:
    """Microseconds, over the world."""
    return 1e6 * links.measure("all_reduce", 64, dist.group.WORLD, torch.device("cpu"), 30)[0]


# --- beside what is expected ----------------------------------------------------------------------


def predicted(place: Place, fast: Hardware, mbit: float, slow_us: float) -> float | None:
    """Seconds of a step, of ranks that share the cores and rings that share the link. None: of a
    layout that the model does not know."""
    layout = place.layout
    if layout.shard_size or place.dp_nodes > 1:
        return None
    share = min(1.0, len(os.sched_getaffinity(0)) / layout.gpus)
    hardware = fast._replace(tflops=fast.tflops * share,
                             memory_gb_per_s=fast.memory_gb_per_s * share)
    # tp goes over what the model takes for a machine's own links, the others over its network.
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
    for _ in range(rounds):  # in turn: this machine's speed is not the same for long
        for place in found:
            ranks = launch(place.layout.gpus, run_place, place, steps,
                           before=lambda rank, place=place: net.enter(place.hosts[rank]))
            measured[place.what].append(ranks)
    print(f"\n(b) {'':22s}{'a step':>9s}{'predicted':>12s}   MB across, per host and step: "
          "counted, formula, through the interface")  # fmt: skip
    rows = []
    for place in found:
        runs = measured[place.what]
        seconds = statistics.median(max(rank[0] for rank in ranks) for ranks in runs)
        # Of the host that sends most.
        totals = [[0.0, 0.0, 0.0] for _ in net.names]
        for rank, (_, counted, expected, sent) in enumerate(runs[-1]):
            mine = totals[place.hosts[rank]]
            mine[0], mine[1], mine[2] = mine[0] + counted, mine[1] + expected, sent
        most = max(totals)
        expected = predicted(place, fast, mbit, slow_us)
        said = "" if expected is None else f"{1e3 * expected:.0f} ms"
        same = "" if most[0] == most[1] else "   <- differs"
        if place.what.startswith("DDP, flat"):
            print("(c)")
        print(f"    {place.what:22s}{1e3 * seconds:6.0f} ms{said:>12s}   "
              f"{', '.join(f'{x / 1e6:.2f}' for x in most)}{same}", flush=True)
        rows.append({"what": place.what, "layout": place.layout._asdict(), "step_s": seconds,
                     "predicted_s": expected, "bytes": most})  # fmt: skip
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("--hosts", type=int, choices=(2, 4), default=2)
    add("--mbit", type=options.at_least(1), default=1000, help="a second, from a host to others")
    add("--steps", type=options.at_least(1), default=5, help="timed, of each layout and round")
    add("--rounds", type=options.at_least(1), default=2)
    add("--out", metavar="FILE", help="the same as JSON")
    args = arguments.parse_args()
    if lack := hosts.missing():
        return print(f"tools.hierarchy: skipped: {lack}")
    cores = len(os.sched_getaffinity(0))
    fast = calibrate(2)
    with hosts.Hosts(args.hosts, args.mbit) as net:
        slow_us = max(launch(args.hosts, small_all_reduce, before=net.enter))
        print(f"{args.hosts} hosts of {PER_HOST} ranks x 1 thread, {cores} cores, gloo, float32; "
              f"inside {8 * fast.link_gb_per_s:.1f} Gbit/s and {fast.link_us:.0f} us a call, "
              f"between {args.mbit / 1000:g} Gbit/s and {slow_us:.0f} us")  # fmt: skip
        rows = {"all_reduce": compare_all_reduces(net, args.mbit, 4 * args.steps)}
        rows["steps"] = compare_places(net, fast, args.mbit, slow_us, args.steps, args.rounds)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(vars(args) | rows, file, indent=1)
    sys.exit(any(row["bytes"][0] != row["bytes"][1] for row in rows["steps"]))


if __name__ == "__main__":
    main()
