"""Instruments: count collectives and saved activations, record timelines, compare tensors.

They change no result. The strategy files use them only in their demos, to compare predicted with
measured costs.

    with Collectives({"tp": tp_group}) as seen:         every call of torch.distributed
        step()
    seen.total("tp", "all_reduce")                      Total(calls, payload in elements)

    with SavedActivations(model) as saved:              what autograd stores for backward
        loss = model(x)
    saved.bytes(), saved.peak                           bytes now, and the maximum so far

    with trace.span("F0"):                              a timeline of all ranks
        ...
    trace.write("trace.json", "rank name")

    with Report("ddp.py") as report:                    the demo of a strategy file
        report.close("gradients", actual, expected)     equal to 1e-12
        report.equal("calls", predicted, measured)      exactly equal
"""

import contextlib
import datetime
import functools
import json
import linecache
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import OpType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# --- collectives ----------------------------------------------------------------------------------

# torch's dispatcher name -> (name in this file, position of the argument with the full tensor)
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}


class Call(NamedTuple):
    """One collective, or one send or receive."""

    operation: str  # a name of _OPERATIONS
    group: str
    payload: int  # elements of the full, unsharded tensor
    dtype: torch.dtype
    phase: str  # "backward": in a backward pass, hooks and recomputation included; else "forward"
    ranks: int  # size of the group
    hidden: bool = False  # set by tools/verify/counting.py


class Total(NamedTuple):
    calls: int
    payload: int  # elements


class Collectives(TorchDispatchMode):
    """Records the collectives that this process launches, as a list of Call.

    groups: names for process groups. If two names have the same group, the first is used. Other
    groups are recorded under torch's name."""

    def __init__(self, groups: dict[str, dist.ProcessGroup] | None = None):
        super().__init__()
        self.names: dict[str, str] = {}
        for name, group in (groups or {}).items():
            self.names.setdefault(group.group_name, name)
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch would wrap each call: a fifth of a dry run's time
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        operation = func.name().split("::")[1].split(".")[0]
        if operation in _OPERATIONS:
            name, position = _OPERATIONS[operation]
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            payload, dtype = sum(t.numel() for t in tensors), tensors[0].dtype
            group, ranks = self._group(args)
            # Only a backward pass has a current autograd node.
            forward = torch._C._current_autograd_node() is None
            phase = "forward" if forward else "backward"
            self.calls.append(Call(name, group, payload, dtype, phase, ranks))
        return func(*args, **(kwargs or {}))

    def _group(self, args) -> tuple[str, int]:
        """(name, size) of the process group among args."""
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                group = dist.ProcessGroup.unbox(arg)
                return self.names.get(group.group_name, group.group_name), group.size()
        raise AssertionError("a collective without a group")

    def total(self, group=None, operation=None, phase=None, hidden=None) -> Total:
        """Number and payload of the calls with these values. None matches all."""
        wanted = {"group": group, "operation": operation, "phase": phase, "hidden": hidden}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        found = [c for c in self.calls if all(getattr(c, k) == v for k, v in wanted.items())]
        return Total(len(found), sum(call.payload for call in found))


# --- memory ---------------------------------------------------------------------------------------


def storage_id(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd saves for backward, each storage once. The
    parameters of `model` do not count. `peak` is the largest number of bytes that were alive after
    a tensor was saved. Counting does not keep a tensor alive."""

    def __init__(self, model: nn.Module):
        self._parameters = [*model.parameters()]
        self._saved: dict[int, tuple[StorageWeakRef, int]] = {}  # storage -> (reference, bytes)
        self.peak = 0
        super().__init__(self._pack, lambda t: t)

    def __enter__(self) -> "SavedActivations":
        super().__enter__()
        return self

    def _pack(self, t: Tensor) -> Tensor:
        # Compared at each call, because ZeRO-3 changes the storage of a parameter.
        if all(storage_id(t) != storage_id(p) for p in self._parameters):
            ref = StorageWeakRef(t.untyped_storage())
            self._saved.setdefault(ref.cdata, (ref, t.untyped_storage().nbytes()))
            self.peak = max(self.peak, self.bytes())
        return t.detach()  # a node that saves its own output would be part of a reference cycle

    def bytes(self, others: Iterable[Tensor] = ()) -> int:
        """Bytes that are alive now, including the storages of `others`."""
        self._saved = {n: saved for n, saved in self._saved.items() if not saved[0].expired()}
        held = {number: nbytes for number, (_, nbytes) in self._saved.items()}
        held |= {storage_id(t): t.untyped_storage().nbytes() for t in others}
        return sum(held.values())


# --- time -----------------------------------------------------------------------------------------


class Trace:
    """A timeline of what this rank does, for ui.perfetto.dev or chrome://tracing.

    On a GPU, each span begins and ends with a synchronisation. The times are then those of the
    device, and the run is slower."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans = []  # (name, start, end, details), in seconds of this rank's clock

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def span(self, name: str, **details):
        start = self.now()
        yield
        self.spans.append((name, start, self.now(), details))

    def offset(self) -> float:
        """This rank's clock minus that of rank 0, in seconds. Rank 0 asks each rank 20 times for
        its time and uses the fastest answer, so the error is at most half of its round trip."""
        rank, best = dist.get_rank(), (float("inf"), 0.0)  # (round trip, offset)
        answer = torch.zeros(1, dtype=torch.float64, device=self.device)
        for other in range(1, dist.get_world_size()):
            for _ in range(20 if rank in (0, other) else 0):
                if rank == other:
                    dist.recv(answer, src=0)
                    dist.send(answer.fill_(self.now()), dst=0)
                else:
                    start = self.now()
                    dist.send(answer, dst=other)
                    dist.recv(answer, src=other)
                    end = self.now()
                    best = min(best, (end - start, answer.item() - (start + end) / 2))
            if rank == 0:
                dist.send(answer.fill_(best[1]), dst=other)
                best = (float("inf"), 0.0)
            elif rank == other:
                dist.recv(answer, src=0)
                best = (0.0, answer.item())
        return best[1] if rank else 0.0

    def write(self, path: str, title: str) -> None:
        """Write the spans of all ranks to `path`, in microseconds of rank 0's clock. All ranks must
        call it. title: the name of this rank's row."""
        offset, everyone = self.offset(), [None] * dist.get_world_size()
        mine = [(name, start - offset, end - offset, more) for name, start, end, more in self.spans]
        dist.gather_object((title, mine), everyone if dist.get_rank() == 0 else None)
        if dist.get_rank() > 0:
            return
        starts = (start for _, spans in everyone for _, start, _, _ in spans)
        zero = min(starts, default=0.0)
        events = []
        for rank, (title, spans) in enumerate(everyone):
            about = {"name": f"rank {rank}: {title}"}
            events.append({"ph": "M", "name": "process_name", "pid": rank, "args": about})
            for name, start, end, details in spans:
                ts, dur = 1e6 * (start - zero), 1e6 * (end - start)
                event = {"ph": "X", "name": name, "pid": rank, "tid": 0, "ts": ts, "dur": dur}
                events.append(event | {"args": details})
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


# --- errors of collectives ------------------------------------------------------------------------

# torch's name of a Work object's operation -> name in this file. gloo's reduce-scatter has UNKNOWN.
_WORKS = {
    "ALLREDUCE": "all_reduce",
    "ALLGATHER": "all_gather",
    "_ALLGATHER_BASE": "all_gather",
    "_REDUCE_SCATTER_BASE": "reduce_scatter",
    "UNKNOWN": "reduce_scatter",
}


def exit_if_lost(title: str, error: BaseException) -> None:
    """If `error` is that of a collective, print one line and end the process."""
    if line := lost_collective(error):
        print(f"{title}: rank {os.environ.get('RANK', 0)}: {line}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for collectives that never complete


def lost_collective(error: BaseException) -> str | None:
    """One line on a collective that failed because another rank exited or did not respond: the
    operation, the ranks of its group, and the line of this repository that waited for it. None for
    any other error.

    The operation and the group are read from the source line and the local variables of the frame
    in which the error was raised."""
    if not re.search("[Tt]imed? ?out|[Cc]onnection|pair closure", str(error)):
        return None
    here = os.path.dirname(os.path.abspath(__file__))
    frames = [
        (frame, number)
        for frame, number in traceback.walk_tb(error.__traceback__)
        if os.path.dirname(os.path.abspath(frame.f_code.co_filename)) == here
    ]
    if not frames:
        return None
    frame, number = frames[-1]
    line = linecache.getline(frame.f_code.co_filename, number).strip()

    def value(name: str, frame=frame):
        """The value of an expression like `self.group` in the frame."""
        first, *rest = name.split(".")
        return functools.reduce(lambda x, n: getattr(x, n, None), rest, frame.f_locals.get(first))

    operation, group = line, dist.group.WORLD
    if called := re.search(r"(?:dist\.|^|= )(\w+)\(", line):  # dist.all_reduce(x, group=group)
        operation = called[1]
        if given := re.search(r"group=([\w.]+)", line):
            group = value(given[1])
    elif waited := re.search(r"([\w.]+)\.wait\(\)", line):  # handle.wait()
        if isinstance(work := value(waited[1]), dist.Work):
            name = OpType(work._get_op_type()).name
            operation = _WORKS.get(name, name.lower())
        names = ("group", "self.group", "ctx.group")
        known = [value(name, f) for f, _ in reversed(frames) for name in names]
        group = next((g for g in known if isinstance(g, dist.ProcessGroup)), group)
    is_world = group is dist.group.WORLD  # None if there is no process group yet
    name = "all ranks" if is_world else f"{group.group_desc} {dist.get_process_group_ranks(group)}"
    file = os.path.basename(frame.f_code.co_filename)
    return (
        f"{operation} over {name} failed because a rank exited or did not respond: "
        f"{file}:{number}, {frame.f_code.co_name}: {line}"
    )


# --- comparison -----------------------------------------------------------------------------------

# Relative, in float64: sums in a different order differ by less, bugs by more.
TOLERANCE = 1e-12


def largest(numbers: Iterable[float]) -> float:
    """The maximum of at least one number, or inf if one is NaN or Inf. (max() can ignore a NaN.)"""
    numbers = list(numbers)
    return max(numbers) if all(map(math.isfinite, numbers)) else math.inf


def check_alike(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError if names or shapes differ, or if a tensor of `actual` does not have
    `dtype` (default: the dtype of the expected tensor)."""
    if actual.keys() != expected.keys():
        missing, unexpected = expected.keys() - actual.keys(), actual.keys() - expected.keys()
        raise ValueError(f"tensors missing: {sorted(missing)}; unexpected: {sorted(unexpected)}")
    for name, a in actual.items():
        want = (expected[name].shape, dtype or expected[name].dtype)
        if (a.shape, a.dtype) != want:
            raise ValueError(
                f"{name} is {tuple(a.shape)} in {a.dtype}: expected {tuple(want[0])} in {want[1]}"
            )


def relative_errors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:  # fmt: skip
    """max|a - b| / max|b| of each tensor, or inf if a or b has a NaN or Inf.

    max|b| is replaced by `floor` times the largest entry of all expected tensors, if that is
    larger. Some gradients are 0 in exact arithmetic, so their computed values are rounding errors.
    An example is the bias of attention keys, which shifts all scores of a row by the same amount.
    Raises ValueError as check_alike() does."""
    check_alike(actual, expected, dtype)
    floor *= max((t.abs().max().item() for t in expected.values() if t.numel()), default=1.0)
    errors = {}
    for name, a in actual.items():
        b = expected[name]
        if a.numel() == 0:
            continue
        errors[name] = math.inf
        if a.isfinite().all() and b.isfinite().all():
            scale = max(b.abs().max().item(), floor, 1e-300)
            errors[name] = (a - b).abs().max().item() / scale
    return errors


class Report:
    """The demo of a strategy file: compares, prints, and exits with code 1 after a mismatch.

    On entry, joins the ranks of torchrun (gloo, one thread per rank). On exit, rank 0 prints the
    rows, as does every rank with a mismatch. A collective that waits longer than `timeout` seconds
    ends the rank with one line. title: a file, or a module that is started with -m. ranks: how
    many a user should start. dtype: printed above the rows."""

    def __init__(
        self, title: str, timeout: float = 60, ranks: int = 2, dtype: str = "float64"
    ):  # fmt: skip
        self.title, self.ranks, self.dtype = title, ranks, dtype
        self.rows, self.failed = [], False
        self.timeout = datetime.timedelta(seconds=timeout)

    def __enter__(self) -> "Report":
        if not dist.is_torchelastic_launched():
            script = self.title if self.title.endswith(".py") else f"-m {self.title}"
            command = f"torchrun --standalone --nproc-per-node {self.ranks} {script}"
            raise SystemExit(f"{self.title}: start it with  {command}")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=self.timeout)
        self.group = dist.group.WORLD
        return self

    def close(self, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Tensors by name that must be equal up to TOLERANCE."""
        worst = largest(relative_errors(actual, expected).values())
        self._row(what, f"{worst:.1e} relative", f"<= {TOLERANCE:.0e}", worst <= TOLERANCE)

    def losses(self, what: str, actual: list[Tensor], expected: list[Tensor]) -> None:
        """The loss of each step, printed next to that of one process; equal up to TOLERANCE."""
        a, b = torch.stack(actual), torch.stack(expected)
        for step, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            name = f"{what} loss, step {step}"
            self.rows.append(f"  {name:34s} {x:>21.15f} | one process {y:.15f}")
        self.close(f"{what} losses", {"loss": a}, {"loss": b})

    def equal(self, what: str, predicted: object, measured: object) -> None:
        """A cost that must be exactly what its formula predicts."""
        self._row(what, f"predicted {predicted}", f"measured {measured}", predicted == measured)

    def _row(self, what: str, left: str, right: str, ok: bool) -> None:
        self.rows.append(f"  {what:34s} {left:>21s} | {right:25s} {'ok' if ok else 'MISMATCH'}")
        self.failed |= not ok

    def __exit__(self, kind, error, _) -> None:
        if kind is not None:
            exit_if_lost(self.title, error)
            return  # Python prints the traceback; torchrun stops the other ranks
        failed = torch.tensor(float(self.failed))
        dist.all_reduce(failed)
        if dist.get_rank() == 0 or self.failed:
            ranks = f"rank {dist.get_rank()} of {dist.get_world_size()}"
            try:
                print(f"{self.title}, {self.dtype}, {ranks}:", *self.rows, sep="\n", flush=True)
            except BrokenPipeError:  # `make tp | head -1`: drop the output
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        dist.barrier()
        dist.destroy_process_group()
        if failed > 0:
            raise SystemExit(1)
