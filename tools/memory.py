"""What ZeRO and recomputing save, as the operating system sees it: resident memory, and formulas.

Every row is a run of its own, in fresh processes: train a tiny model, so that the libraries are in
memory; then build the model, train two steps, and read RssAnon (resident, and no file's) after the
last backward and before the optimizer, less what it was before the model. A second table: of each
policy of activation_ckpt.py what a forward leaves for backward, and the peak of both together.
Needs Linux and glibc.

    python -m tools.memory --nproc 4
"""

import argparse
import ctypes
import dataclasses
import functools
import gc
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

import activation_ckpt
import ddp
import gpt
import zero
from tools import cost
from tools.oracle import launch

TOLERANCE = 0.01  # of what ZeRO-0 needs
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def give_back_at_once() -> None:
    """Let glibc's malloc map every large block by itself, so that to free it is to give it back;
    otherwise each thread of gloo keeps one. Raises OSError elsewhere."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)


def status(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(key))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """RssAnon, after free memory was given back: a process inherits its parent's, too."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("RssAnon")


def forget_peak() -> int:
    """From here VmHWM counts anew; what it begins with: resident now, files included."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmHWM")


def activations_on_rank(config: gpt.GPTConfig, rows: int, policy: str) -> tuple[int, int]:
    """(resident bytes that a forward leaves behind, peak of forward and backward)."""
    give_back_at_once()
    model = gpt.build(config, seed=0)
    activation_ckpt.checkpoint_blocks(model.h, policy)
    x = torch.randint(config.vocab_size, (rows, config.seq_len))
    gpt.cross_entropy(model(x[:1, :8]), x[:1, :8]).backward()  # gradients and libraries are there
    before, base = resident_bytes(), forget_peak()
    loss = gpt.cross_entropy(model(x), x)
    held = resident_bytes() - before
    loss.backward()
    return held, status("VmHWM") - base


class Fall:
    """Of a table whose first row is what the others are compared with."""

    def __init__(self, first: str):
        self.first, self.rows, self.fine = first, [], True

    def verdict(self, resident: int, predicted: int) -> str:
        """The end of a row; `fine` says whether all fell as predicted."""
        self.rows.append((resident, predicted))
        fell, should = (a - b for a, b in zip(self.rows[0], (resident, predicted), strict=True))
        ok = abs(fell - should) <= TOLERANCE * self.rows[0][1]
        self.fine &= ok
        return (f"   less than {self.first}: predicted {should / 1e6:7.1f} MB  "
                f"resident {fell / 1e6:7.1f} MB  {'ok' if ok else 'MISMATCH'}")  # fmt: skip


def activations_table(config: gpt.GPTConfig, rows: int, say: Callable) -> bool:
    """Prints a row for each policy; whether what a forward leaves fell as predicted."""
    fall = Fall("none")
    sizes = dict(b=rows, s=config.seq_len, h=config.n_embd, a=config.n_head, itemsize=4,
                 attention="explicit")  # fmt: skip
    for policy in ("none", "selective", "full"):
        held, peak = launch(1, activations_on_rank, config, rows, policy)[0]
        predicted = cost.predicted_blocks_bytes(config.n_layer, policy, **sizes)
        say(f"recompute {policy:9s}  blocks' activations predicted {predicted / 1e6:7.1f} MB   "
            f"resident of a forward {held / 1e6:7.1f} MB, peak with backward {peak / 1e6:7.1f} MB"
            + fall.verdict(held, predicted))  # fmt: skip
    return fall.fine


def on_rank(config: gpt.GPTConfig, stage: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """(resident bytes, predicted bytes) of this rank's state."""
    give_back_at_once()
    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world // k, k), mesh_dim_names=("replica", "shard"))
    small = dataclasses.replace(config, n_layer=1, n_embd=config.n_head)
    train(small, stage, mesh, dtype)  # so that the libraries' pages are there
    before = resident_bytes()
    kept, predicted = train(config, stage, mesh, dtype)
    return resident_bytes() - before, predicted


def train(config: gpt.GPTConfig, stage: int, mesh, dtype: torch.dtype) -> tuple[tuple, int]:
    """(what holds the state, its predicted bytes) between the last backward and the optimizer."""
    k, rank = mesh["shard"].size(), mesh["shard"].get_local_rank()
    options = {"replicas": mesh["replica"].get_group()} if mesh["replica"].size() > 1 else {}
    x = torch.randint(config.vocab_size, (1, config.seq_len))
    model = gpt.build(config, seed=0, dtype=dtype)
    if stage:
        sync = zero.STAGES[stage](model, mesh["shard"].get_group(), 1, **options)
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
        predicted = zero.predicted_bytes(units, k, rank, stage, dtype)
    else:
        predicted = ddp.predicted_bytes(sum(p.numel() for p in model.parameters()), dtype)
    return (model, sync, optimizer), sum(predicted.values())


def table(config: gpt.GPTConfig, nproc: int, dtype: torch.dtype, say: Callable) -> bool:
    """Prints a row for each way to share the state; whether all fell as predicted."""
    rows = [(f"ZeRO-{stage}", stage, nproc) for stage in (0, *zero.STAGES)]
    if nproc > 2 and nproc % 2 == 0:
        rows.insert(3, (f"ZeRO-3 within {nproc // 2}", 3, nproc // 2))
    fall = Fall("ZeRO-0")
    for what, stage, k in rows:
        resident, predicted = launch(nproc, on_rank, config, stage, k, dtype)[0]
        say(f"{what:16s} {str(dtype)[6:]:9s} predicted {predicted / 1e6:7.1f} MB  resident "
            f"{resident / 1e6:7.1f} MB" + fall.verdict(resident, predicted))  # fmt: skip
    return fall.fine


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--nproc", type=int, default=4, metavar="N", help="ranks")
    args = arguments.parse_args()
    config = gpt.GPTConfig(n_layer=4, n_head=12, n_embd=768, vocab_size=256, seq_len=32)
    if sys.platform != "linux":
        raise SystemExit("memory.py: error: resident memory is read from /proc/self/status: Linux")
    say = functools.partial(print, flush=True)
    fine = [table(config, args.nproc, dtype, say) for dtype in (torch.float32, torch.bfloat16)]
    # Wide in the sequence: 8 heads' s x s is as large as all else in a block.
    config = gpt.GPTConfig(4, 8, 256, 256, seq_len=512, attention="explicit")
    fine.append(activations_table(config, 4, say))
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
