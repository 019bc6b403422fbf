"""This machine as tools/cost.py's `Hardware`, measured.

    python -m tools.plan --calibrate --gpus 2 ...         plans with it

calibrate() measures chains of blocks, collectives between matmuls, and AdamW, on ranks of a core
each, at the same time. No step of a layout is among them: those are predicted, and tools/plan_check
measures how well.
"""

import statistics
import time
from collections.abc import Callable

import numpy
import torch
import torch.distributed as dist

import gpt
from tools import cost
from tools.cost import Hardware, Program
from tools.oracle import launch
from zero import all_gather, reduce_scatter

PROGRAM = Program(itemsize=4, grad_itemsize=4, reduce_itemsize=4)  # a CPU has no fast bf16
SIZES = (gpt.GPTConfig(4, 8, 256, 256, 128), gpt.GPTConfig(4, 8, 384, 256, 192))
ROWS = (1, 2)  # of a microbatch


def seconds_of(call: Callable[[], object], seconds: float = 0.15) -> float:
    dist.barrier()  # all ranks at once, as in a step
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def blocks() -> list[tuple[float, float, float, float]]:
    """(FLOPs, matmuls, bytes kept, seconds) of a chain of blocks, forward and backward, by size:
    a chain, since one block alone would stay in the cache."""
    found = []
    for config in SIZES:
        chain = torch.nn.Sequential(*gpt.build(config, 0).h.values())
        n, s, h = config.n_layer, config.seq_len, config.n_embd
        for b in ROWS:
            dist.barrier()
            forward = cost.predicted_flops(n, b, s, h, "none") / 3
            kept = n * cost.predicted_block_bytes(b, s, h, config.n_head, "sdpa", 4)
            x = torch.randn(b, s, h, requires_grad=True)
            times = []
            for _ in range(7):
                start = time.perf_counter()
                y = chain(x)
                middle = time.perf_counter()
                y.backward(x.detach())
                times.append((middle - start, time.perf_counter() - middle))
            f, both = (statistics.median(t) for t in zip(*times[2:], strict=True))
            found += [(forward, 6 * n, kept, f), (2 * forward, 12 * n, kept, both)]
    return found


def machine() -> tuple:
    """On each of two ranks, at the same time: (what blocks take, bytes a second of the optimizer,
    (bytes that travel, seconds) of collectives, share of a hidden one that is paid)."""
    state = torch.nn.Parameter(torch.randn(1 << 22))
    state.grad = torch.randn_like(state)
    adamw = torch.optim.AdamW([state])
    bandwidth = 7 * state.nbytes / seconds_of(adamw.step)  # reads 4 tensors, writes 3
    if dist.get_world_size() == 1:
        return blocks(), bandwidth, [(0.0, 1.0)], 1.0

    a, b = torch.randn(128, 256), torch.randn(256, 768)
    of_matmul = seconds_of(lambda: a @ b)

    def behind(operation: Callable[[], object], matmuls: int = 2) -> float:
        """Seconds of a collective as a step has it: between matmuls, so that whoever is later is
        waited for, and gloo's threads have no core of their own."""
        dist.barrier()
        times = []
        for _ in range(16):
            start = time.perf_counter()
            for _ in range(matmuls):
                a @ b
            operation()
            times.append(time.perf_counter() - start)
        return statistics.median(times) - matmuls * of_matmul

    travel = []
    for n in (1 << 12, 1 << 16, 1 << 18, 1 << 20):
        x, half = torch.zeros(n), torch.zeros(n // 2)
        travel += [(x.nbytes, behind(lambda x=x: dist.all_reduce(x))),
                   (x.nbytes / 2, behind(lambda x=x, h=half: reduce_scatter(h, x))),
                   (x.nbytes / 2, behind(lambda x=x, h=half: all_gather(x, h)))]  # fmt: skip

    alone = behind(lambda: dist.all_reduce(x), 0)
    times = max(1, round(alone / of_matmul))  # about as long as the all-reduce

    def both() -> None:
        work = dist.all_reduce(x, async_op=True)
        for _ in range(times):
            a @ b
        work.wait()

    shorter, longer = sorted((alone, times * of_matmul))
    share = (behind(both, 0) - longer) / shorter
    dist.barrier()
    return blocks(), bandwidth, travel, share


def fitted(terms: list[numpy.ndarray], seconds: numpy.ndarray) -> list[float]:
    """What each unit of a term takes, none less than nothing: the least squares of relative
    errors of their sum."""
    found, used = [0.0] * len(terms), list(range(len(terms)))
    while used:
        columns = numpy.stack([terms[i] / seconds for i in used], 1)
        costs, *_ = numpy.linalg.lstsq(columns, numpy.ones(len(seconds)), rcond=None)
        if min(costs) >= 0:
            for i, x in zip(used, costs, strict=True):
                found[i] = float(x)
            break
        del used[int(numpy.argmin(costs))]
    return found


def calibrate(n: int = 2) -> Hardware:
    """n forked ranks of one thread, gloo. Raises ValueError."""
    ranks = launch(n, machine)
    *terms, seconds = numpy.mean([rank[0] for rank in ranks], axis=0).T
    a_flop, a_call, a_byte = fitted(terms, seconds)
    if a_flop == 0:
        raise ValueError("--calibrate: times do not follow FLOPs: is this machine idle?")
    bandwidth = statistics.fmean(rank[1] for rank in ranks)
    size, seconds = numpy.mean([rank[2] for rank in ranks], axis=0).T
    latency, a_byte_sent = fitted([numpy.ones_like(size), size], seconds)
    share = statistics.fmean(rank[3] for rank in ranks)
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024 / n
    link = 1e-9 / max(a_byte_sent, 1e-15)
    return Hardware(
        f"this machine, {n} ranks", 1e-12 / a_flop, memory / 1e9, bandwidth / 1e9, link, link,
        matmul=1.0, ramp_gflop=1e-9 * a_call / a_flop, passes=a_byte * bandwidth, link=1.0,
        network=1.0, overlap=min(1.0, max(0.0, share)), link_us=latency * 1e6,
        network_us=latency * 1e6,
    )  # fmt: skip
