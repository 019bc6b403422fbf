"""Measures the memory of ZeRO stages, recompute policies and long rows, compared with the formulas.

    make memory NPROC=4    python -m tools.bench.memory --nproc 4     Linux with glibc

The first table has one row per ZeRO stage, in float32 and bf16: predicted bytes of parameters,
gradients and optimizer state, and the increase of resident memory caused by the model, read between
the backward of the second step and its optimizer. The second table has one row per recompute policy
of activation_ckpt.py: predicted bytes of the saved activations, resident memory added by a forward,
and the peak of forward and backward.

The third table is about context parallelism. It has one row per method: the bytes that a block
saves for backward on one of 4 ranks, and 4 times these bytes over those of one process. Its last
two rows are a step with 32,768 tokens in one process and on 4 ranks. Each process may allocate
160 MB, which is too little for the one process and enough for the ranks.

Resident memory is RssAnon of /proc/self/status, which excludes files. Each row runs in new
processes. They first train a tiny model, so that the libraries are loaded before the first reading.
A row of the first two tables is "ok" if the savings relative to the first row (ZeRO-0, or no
recomputation) agree with the formula. The exit code is 1 if a row is not.
"""

import argparse
import ctypes
import dataclasses
import gc
import resource
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import activation_ckpt
import context_parallel
import ddp
import gpt
import measure
import zero3
from tools.bench import stats
from tools.plan import cost
from tools.verify.oracle import launch

TOLERANCE = 0.01  # relative to the first row of a table
ALLOWED = 160 * 10**6  # bytes that a process may allocate for a step with LONG
LONG = gpt.GPTConfig(n_layer=1, n_head=4, n_embd=64, vocab_size=256, seq_len=32768)
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def return_freed_memory() -> None:
    """Makes malloc return each large block to the system when it is freed.

    Otherwise every thread of gloo keeps one block. Raises OSError without glibc.
    """
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status, for example "RssAnon"."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """RssAnon, after free memory (also that inherited from the parent) was returned."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("RssAnon")


def reset_peak() -> int:
    """Resets the peak VmHWM and returns its new value, the resident bytes including files."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmHWM")


def activations_on_rank(config: gpt.GPTConfig, rows: int, policy: str) -> tuple[int, int]:
    """(resident bytes added by a forward, peak added by forward and backward)."""
    return_freed_memory()
    model = gpt.build(config, seed=0)
    activation_ckpt.checkpoint_blocks(model.h, policy)
    x = torch.randint(config.vocab_size, (rows, config.seq_len))
    # A small step first, so that gradients are allocated and libraries are loaded.
    gpt.cross_entropy(model(x[:1, :8]), x[:1, :8]).backward()
    before, base = resident_bytes(), reset_peak()
    loss = gpt.cross_entropy(model(x), x)
    held = resident_bytes() - before
    loss.backward()
    return held, status("VmHWM") - base


class Savings:
    """Compares each row of a table with its first row."""

    def __init__(self, first: str):
        self.first, self.rows, self.fine = first, [], True

    def verdict(self, resident: int, predicted: int) -> str:
        """The end of a row. `fine` becomes False if resident memory differs from the formula."""
        self.rows.append((resident, predicted))
        first_resident, first_predicted = self.rows[0]
        saved, expected = first_resident - resident, first_predicted - predicted
        ok = abs(saved - expected) <= TOLERANCE * first_predicted
        self.fine &= ok
        return (f"   less than {self.first}: predicted {expected / 1e6:7.1f} MB  "
                f"resident {saved / 1e6:7.1f} MB  {'ok' if ok else 'MISMATCH'}")  # fmt: skip


def activations_table(config: gpt.GPTConfig, rows: int, say: Callable) -> bool:
    """Prints a row per recompute policy. Returns whether all savings agree with the formula."""
    savings = Savings("none")
    sizes = dict(b=rows, s=config.seq_len, h=config.n_embd, a=config.n_head, itemsize=4,
                 attention="explicit")  # fmt: skip
    for policy in ("none", "selective", "full"):
        held, peak = launch(1, activations_on_rank, config, rows, policy)[0]
        predicted = cost.predicted_blocks_bytes(config.n_layer, policy, **sizes)
        say(f"recompute {policy:9s}  block activations: predicted {predicted / 1e6:7.1f} MB   "
            f"resident {held / 1e6:7.1f} MB, peak with backward {peak / 1e6:7.1f} MB"
            + savings.verdict(held, predicted))  # fmt: skip
    return savings.fine


def context_parallel_model(config: gpt.GPTConfig, method: str) -> tuple[gpt.GPT, gpt.Subset]:
    """(the model, the tokens of this rank)."""
    group, model, tokens = dist.group.WORLD, gpt.build(config, seed=0), gpt.ALL
    if (c := group.size()) > 1:
        tokens = gpt.Subset(context_parallel.zigzag(c, group.rank()), 2 * c)
    for module in model.modules():
        if hasattr(module, "tokens"):
            module.tokens = tokens
    context_parallel.parallelize_attention(model, group, method)
    return model, tokens


def saved_by_a_block(config: gpt.GPTConfig, method: str) -> int:
    """Bytes that a block saves for backward on this rank, with one row."""
    model, tokens = context_parallel_model(config, method)
    x = tokens.take(torch.randn(1, config.seq_len, config.n_embd, requires_grad=True), 1)
    with measure.SavedActivations(model) as saved:
        y = model.h["0"](x)  # alive, and with it what was saved
    return saved.bytes() if y.requires_grad else 0


def step_within(config: gpt.GPTConfig, method: str, allowed: int) -> int | None:
    """Runs forward and backward of one row. Returns the peak of the bytes added by it, or None if
    it failed because this process may not allocate more than `allowed` bytes."""
    return_freed_memory()
    model, tokens = context_parallel_model(config, method)
    full = torch.randint(config.vocab_size, (1, config.seq_len))

    def step(full: torch.Tensor) -> None:
        x = tokens.take(full, 1)
        gpt.cross_entropy(model(x), x).backward()

    step(full[:, :64])  # gradients are allocated and libraries are loaded
    limit = status("VmData") + allowed, resource.getrlimit(resource.RLIMIT_DATA)[1]
    base = reset_peak()
    resource.setrlimit(resource.RLIMIT_DATA, limit)
    try:
        step(full)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None
    return status("VmHWM") - base


def context_table(config: gpt.GPTConfig, c: int, allowed: int, say: Callable) -> bool:
    """Prints the rows of context parallelism over c ranks. Returns whether all are as expected."""
    fine, short = [], dataclasses.replace(config, seq_len=2048)
    (one,) = launch(1, saved_by_a_block, short, "ring")
    for method in context_parallel.METHODS:
        saved = max(launch(c, saved_by_a_block, short, method))
        row = f"cp {c} {method:9s} saved by a block: {saved / 1e6:5.2f} MB, one process "
        row += f"{one / 1e6:.2f} MB; {c} x ratio {c * saved / one:.2f}"
        if method != "gathered":  # which stores keys, values and a mask of the full row
            fine.append(c * saved <= 1.1 * one)
            row += " <= 1.10  " + ("ok" if fine[-1] else "MISMATCH")
        say(row)
    for n in (1, c):
        peaks = launch(n, step_within, config, "ring", allowed, timeout=600)
        failed = None in peaks
        fine.append(failed == (n == 1))
        what = "out of memory" if failed else f"peak {max(peaks) / 1e6:.0f} MB"
        row = f"cp {n} step of {config.seq_len} tokens with at most {allowed / 1e6:.0f} MB: {what}"
        say(f"{row}  {'ok' if fine[-1] else 'MISMATCH'}")
    return all(fine)


def on_rank(config: gpt.GPTConfig, stage: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """(resident, predicted) bytes of this rank's model, gradients and optimizer state.

    stage: 0 for DDP. k: number of shards of ZeRO.
    """
    return_freed_memory()
    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world // k, k), mesh_dim_names=("replica", "shard"))
    small = dataclasses.replace(config, n_layer=1, n_embd=config.n_head)
    train(small, stage, mesh, dtype)  # loads the libraries into memory
    before = resident_bytes()
    alive, predicted = train(config, stage, mesh, dtype)
    return resident_bytes() - before, predicted


def train(config: gpt.GPTConfig, stage: int, mesh, dtype: torch.dtype) -> tuple[tuple, int]:
    """Trains until the second step's optimizer. Returns (the objects, the predicted bytes)."""
    k, rank = mesh["shard"].size(), mesh["shard"].get_local_rank()
    options = {"replicas": mesh["replica"].get_group()} if mesh["replica"].size() > 1 else {}
    x = torch.randint(config.vocab_size, (1, config.seq_len))
    model = gpt.build(config, seed=0, dtype=dtype)
    if stage:
        sync = zero3.STAGES[stage](model, mesh["shard"].get_group(), 1, **options)
    else:
        sync = ddp.DDP(model, dist.group.WORLD, 1)
    optimizer = torch.optim.AdamW([piece.tensor for piece in sync.pieces()], foreach=True)
    for step in range(2):
        sync.start()
        gpt.cross_entropy(model(x), x).backward()
        sync.finish()
        if step == 1:
            break
        sync.before_step()
        optimizer.step()
        sync.after_step()
    if stage:
        units = [[p.numel() for p in unit.place] for unit in sync.units]
        predicted = cost.predicted_zero_bytes(units, k, rank, stage, dtype)
    else:
        predicted = ddp.predicted_bytes(sum(p.numel() for p in model.parameters()), dtype)
    return (model, sync, optimizer), sum(predicted.values())


def table(config: gpt.GPTConfig, nproc: int, dtype: torch.dtype, say: Callable) -> bool:
    """Prints a row per ZeRO stage. Returns whether all savings agree with the formula."""
    rows = [(f"ZeRO-{stage}", stage, nproc) for stage in (0, *zero3.STAGES)]
    if nproc > 2 and nproc % 2 == 0:
        rows.insert(3, (f"ZeRO-3 within {nproc // 2}", 3, nproc // 2))
    savings = Savings("ZeRO-0")
    for what, stage, k in rows:
        resident, predicted = launch(nproc, on_rank, config, stage, k, dtype)[0]
        say(f"{what:16s} {str(dtype)[6:]:9s} predicted {predicted / 1e6:7.1f} MB  resident "
            f"{resident / 1e6:7.1f} MB" + savings.verdict(resident, predicted))  # fmt: skip
    return savings.fine


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--nproc", type=int, default=4, metavar="N", help="ranks")
    arguments.add_argument("--out", metavar="FILE", help="write the lines as JSON")
    args = arguments.parse_args()
    config = gpt.GPTConfig(n_layer=4, n_head=12, n_embd=768, vocab_size=256, seq_len=32)
    if sys.platform != "linux":
        raise SystemExit(
            f"memory.py: error: this is {sys.platform}: /proc/self/status exists on Linux only"
        )
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    fine = [table(config, args.nproc, dtype, say) for dtype in (torch.float32, torch.bfloat16)]
    # A long sequence: the s x s scores of 8 heads are as large as all other tensors of a block.
    config = gpt.GPTConfig(4, 8, 256, 256, seq_len=512, attention="explicit")
    fine.append(activations_table(config, 4, say))
    fine.append(context_table(LONG, 4, ALLOWED, say))
    if args.out:
        stats.write(args.out, stats.provenance("make memory") | {"ranks": 4, "lines": lines})
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
