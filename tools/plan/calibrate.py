"""Measures this machine and returns it as a `Hardware` for the cost model of tools/plan/cost.py.

    python -m tools.plan.plan --calibrate --gpus 2 ...     plans for this machine

calibrate() runs three measurements on n ranks at the same time, with one thread each: forward and
backward of chains of transformer blocks, gloo collectives between matmuls, and AdamW. Speeds and
latencies are fitted to them. No training step is measured, so that steps can be predicted:
tools/plan/plan_check.py compares predicted and measured steps.
"""

import statistics
import time
from collections.abc import Callable

import numpy
import torch
import torch.distributed as dist

import gpt
from tools.plan import cost
from tools.plan.cost import Hardware, Program
from tools.verify.oracle import launch
from zero import all_gather, reduce_scatter

PROGRAM = Program(itemsize=4, grad_itemsize=4, reduce_itemsize=4)  # a CPU has no fast bf16
SIZES = (gpt.GPTConfig(4, 8, 256, 256, 128), gpt.GPTConfig(4, 8, 384, 256, 192))
ROWS = (1, 2)  # microbatch sizes


def seconds_of(call: Callable[[], object], seconds: float = 0.15) -> float:
    """Median duration of call(), repeated for `seconds` and at least four times."""
    dist.barrier()  # all ranks measure at the same time, as in a training step
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def blocks() -> list[tuple[float, float, float, float]]:
    """(FLOPs, matmuls, saved bytes, seconds) of forwards and of backwards.

    Measured for each size in SIZES and ROWS. A chain of blocks is used because the tensors of a
    single block would stay in the cache.
    """
    found = []
    for config in SIZES:
        chain = torch.nn.Sequential(*gpt.build(config, 0).h.values())
        n, s, h = config.n_layer, config.seq_len, config.n_embd
        for b in ROWS:
            dist.barrier()
            forward = cost.predicted_flops(config, n, b, "none") / 3
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
    """Measures on all ranks at the same time. Returns a tuple of
    - the results of blocks();
    - bytes per second that the optimizer reads and writes;
    - (bytes that a rank sends, seconds) of each measured collective;
    - the fraction of an overlapped collective's time by which it delays the computation.
    """
    state = torch.nn.Parameter(torch.randn(1 << 22))
    state.grad = torch.randn_like(state)
    adamw = torch.optim.AdamW([state])
    bandwidth = 7 * state.nbytes / seconds_of(adamw.step)  # AdamW reads 4 tensors and writes 3
    if dist.get_world_size() == 1:
        return blocks(), bandwidth, [(0.0, 1.0)], 1.0

    a, b = torch.randn(128, 256), torch.randn(256, 768)
    matmul_seconds = seconds_of(lambda: a @ b)

    def after_matmuls(operation: Callable[[], object], matmuls: int = 2) -> float:
        """Seconds of a collective after some matmuls, as in a training step.

        This includes the time waiting for a rank that is late, and gloo's threads compete with the
        matmuls for the cores.
        """
        dist.barrier()
        times = []
        for _ in range(16):
            start = time.perf_counter()
            for _ in range(matmuls):
                a @ b
            operation()
            times.append(time.perf_counter() - start)
        return statistics.median(times) - matmuls * matmul_seconds

    collectives = []  # bytes sent by one of two ranks: all-reduce 2 (2-1)/2, the others (2-1)/2
    for n in (1 << 12, 1 << 16, 1 << 18, 1 << 20):
        x, half = torch.zeros(n), torch.zeros(n // 2)
        collectives += [
            (x.nbytes, after_matmuls(lambda x=x: dist.all_reduce(x))),
            (x.nbytes / 2, after_matmuls(lambda x=x, h=half: reduce_scatter(h, x))),
            (x.nbytes / 2, after_matmuls(lambda x=x, h=half: all_gather(x, h))),
        ]

    alone = after_matmuls(lambda: dist.all_reduce(x), 0)
    times = max(1, round(alone / matmul_seconds))  # matmuls that take as long as the all-reduce

    def both() -> None:
        work = dist.all_reduce(x, async_op=True)
        for _ in range(times):
            a @ b
        work.wait()

    shorter, longer = sorted((alone, times * matmul_seconds))
    exposed = (after_matmuls(both, 0) - longer) / shorter
    dist.barrier()
    return blocks(), bandwidth, collectives, exposed


def fitted(terms: list[numpy.ndarray], seconds: numpy.ndarray) -> list[float]:
    """Non-negative coefficients c with sum_i c[i] terms[i] close to `seconds`.

    Least squares of the relative errors. While a coefficient is negative, the most negative one is
    set to zero and the others are fitted again.
    """
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
    """Measures with n forked ranks of one thread each, over gloo.

    Raises ValueError if the measured times do not grow with FLOPs.
    """
    ranks = launch(n, machine)
    *terms, seconds = numpy.mean([rank[0] for rank in ranks], axis=0).T
    a_flop, a_call, a_byte = fitted(terms, seconds)
    if a_flop == 0:
        raise ValueError("--calibrate: measured times do not grow with FLOPs. Is the machine idle?")
    bandwidth = statistics.fmean(rank[1] for rank in ranks)
    size, seconds = numpy.mean([rank[2] for rank in ranks], axis=0).T
    latency, a_byte_sent = fitted([numpy.ones_like(size), size], seconds)
    exposed = statistics.fmean(rank[3] for rank in ranks)
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) * 1024 / n
    link = 1e-9 / max(a_byte_sent, 1e-15)
    return Hardware(
        f"this machine, {n} ranks", 1e-12 / a_flop, memory / 1e9, bandwidth / 1e9, link, link,
        matmul=1.0, ramp_gflop=1e-9 * a_call / a_flop, passes=a_byte * bandwidth, link=1.0,
        network=1.0, overlap=min(1.0, max(0.0, exposed)), link_us=latency * 1e6,
        network_us=latency * 1e6,
    )  # fmt: skip
