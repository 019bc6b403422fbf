"""What really happened, seen from outside: collectives, bytes held, activations saved.

Nothing here changes a number, and no strategy file knows that it is watched. Every strategy file
predicts its costs by formulas; these instruments are the other side of each `predicted | measured`.

    with Collectives({"tp": tp_group}) as seen:     every call of torch.distributed, in forward,
        step()                                       backward and hooks, and its payload
    seen.total("tp", "all_reduce")

    with SavedActivations(model) as saved: loss = model(x)         bytes kept for backward
    with trace.span("F0"): ...; trace.write(FILE, title)           a timeline of all ranks
    held = bytes_held(p for p in model.parameters())                bytes of distinct storages
"""

import collections
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
from torch._C._distributed_c10d import OpType  # what dist.Work says of itself
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# torch's internal name -> (ours, which argument is the full, unsharded tensor)
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}
# what a handle says of itself; on gloo a reduce-scatter does not know
_WORKS = {"ALLREDUCE": "all_reduce", "ALLGATHER": "all_gather", "_ALLGATHER_BASE": "all_gather",
          "_REDUCE_SCATTER_BASE": "reduce_scatter", "UNKNOWN": "reduce_scatter"}  # fmt: skip


class Call(NamedTuple):
    """One collective. `payload` counts the elements of its full, unsharded tensor."""

    operation: str
    group: str
    payload: int
    dtype: torch.dtype
    phase: str  # "forward" (or no autograd at all) | "backward" (backward itself and its hooks)
    ranks: int  # size of the group
    hidden: bool = False  # some matrix was multiplied between its start and the use of its result


_MATMULS = {"mm", "addmm", "bmm", "baddbmm"}


class Total(NamedTuple):
    calls: int
    payload: int  # elements


class Collectives(TorchDispatchMode):
    """Records every collective of this process. `groups` names the groups that matter; of several
    names of one group the first counts. A call on any other group is recorded under torch's own
    name for it. What runs in a recomputed forward
    counts as backward, since that is when it runs. An asynchronous call is hidden if a matrix
    multiplication starts before anything reads its result; the others are exposed."""

    def __init__(self, groups: dict[str, dist.ProcessGroup] | None = None):
        super().__init__()
        self.names: dict[str, str] = {}
        for name, group in (groups or {}).items():
            self.names.setdefault(group.group_name, name)
        self.calls: list[Call] = []
        self._matmuls = 0
        self._unread: dict[int, tuple[int, int]] = {}  # storage -> (call, matmuls before it)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation = func.name().split("::")[1].split(".")[0]
        if func.namespace == "c10d" and operation in _OPERATIONS:
            name, position = _OPERATIONS[operation]
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            payload = sum(t.numel() for t in tensors)
            if self._is_async(func, args):
                output = args[0][0] if isinstance(args[0], list) else args[0]
                self._unread[_storage(output)] = (len(self.calls), self._matmuls)
            group, ranks = self._group(args)
            dtype = tensors[0].dtype
            self.calls.append(Call(name, group, payload, dtype, self._phase(), ranks))
        else:
            self._look_for_reads(args)
            self._matmuls += operation in _MATMULS
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_async(func, args) -> bool:
        """torch 2.11 does not say: what is waited for at once is read at once, so it does not
        matter. Arguments that have their default are left out."""
        names = [argument.name for argument in func._schema.arguments]
        place = names.index("async_op") if "async_op" in names else len(args)
        return args[place] if place < len(args) else True

    def _look_for_reads(self, args) -> None:
        for arg in args if self._unread else ():
            for t in arg if isinstance(arg, (list, tuple)) else [arg]:
                if isinstance(t, Tensor) and _storage(t) in self._unread:
                    number, before = self._unread.pop(_storage(t))
                    self.calls[number] = self.calls[number]._replace(hidden=self._matmuls > before)

    def _group(self, args) -> tuple[str, int]:
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                group = dist.ProcessGroup.unbox(arg)
                return self.names.get(group.group_name, group.group_name), group.size()
        raise AssertionError("a collective without a group")

    @staticmethod
    def _phase() -> str:
        # Only a backward pass has a current autograd node.
        return "forward" if torch._C._current_autograd_node() is None else "backward"

    def select(self, group=None, operation=None, phase=None, hidden=None) -> list[Call]:
        wanted = {"group": group, "operation": operation, "phase": phase, "hidden": hidden}
        return [
            call
            for call in self.calls
            if all(v is None or getattr(call, k) == v for k, v in wanted.items())
        ]

    def total(self, group=None, operation=None, phase=None, hidden=None) -> Total:
        calls = self.select(group, operation, phase, hidden)
        return Total(len(calls), sum(call.payload for call in calls))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind these tensors: two views of one buffer count once."""
    storages = {_storage(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def bytes_by_kind(
    held: dict[str, list[Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, int]:
    """bytes_held of each kind of `held`; the optimizer's moments join the kind "optimizer"."""
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    more = {"optimizer": moments}
    return {kind: bytes_held([*tensors, *more.get(kind, [])]) for kind, tensors in held.items()}


class SavedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, each storage once, without the model's
    own parameters and without `ignore` (inputs that the caller holds anyway). Views of one tensor
    share its storage, and a storage counts whole. bytes() is what is alive now, and `peak` the most
    that was when something was saved; nothing is held longer because it is counted."""

    def __init__(self, model: nn.Module, ignore: Iterable[Tensor] = ()):
        self._not_ours = [*model.parameters(), *ignore]
        self._saved: dict[int, tuple[StorageWeakRef, int, tuple]] = {}  # by storage
        self.peak = 0
        super().__init__(self._pack, lambda t: t)

    def __enter__(self) -> "SavedActivations":
        super().__enter__()
        return self

    def _pack(self, t: Tensor) -> Tensor:
        # Asked each time: parameters that come and go (ZeRO-3) change their place.
        if all(_storage(t) != _storage(other) for other in self._not_ours):
            ref, shape = StorageWeakRef(t.untyped_storage()), (tuple(t.shape), t.dtype)
            self._saved.setdefault(ref.cdata, (ref, t.untyped_storage().nbytes(), shape))
            self.peak = max(self.peak, self.bytes())
        return t.detach()  # or a node that saves its own output would hold itself

    def _alive(self) -> dict[int, tuple]:
        self._saved = {n: saved for n, saved in self._saved.items() if not saved[0].expired()}
        return self._saved

    def bytes(self, others: Iterable[Tensor] = ()) -> int:
        """What is alive now, together with `others`, which may share storages with it."""
        held = {number: nbytes for number, (_, nbytes, _) in self._alive().items()}
        storages = (t.untyped_storage() for t in others)
        held.update((storage._cdata, storage.nbytes()) for storage in storages)
        return sum(held.values())

    def by_shape(self) -> dict[tuple, int]:
        """How many storages of which (shape, dtype): to find where a formula and a count differ."""
        return dict(collections.Counter(shape for *_, shape in self._alive().values()))


class Trace:
    """What this rank did and when, for Perfetto (ui.perfetto.dev) or chrome://tracing.

        with trace.span("B3", kind="B"): ...      on a GPU it waits for what was launched, which
        trace.write("trace.json", "stage 0")      makes the spans true and the run slower

    Times are seconds of this rank's clock; write() puts all ranks on the clock of rank 0."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, []  # (name, start, end, what else is known)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def span(self, name: str, **known):
        start = self.now()
        yield
        self.spans.append((name, start, self.now(), known))

    def offset(self) -> float:
        """This rank's clock less rank 0's, good to half of a message's way there and back: rank 0
        asks each rank for its time, and the quickest of several answers counts."""
        rank, best = dist.get_rank(), (float("inf"), 0.0)
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

    def write(self, path: str, title: str) -> list[list[tuple]]:
        """Called by all ranks; rank 0 writes the file. Returns the spans of every rank, by rank, on
        the clock of rank 0 (on the other ranks, nothing)."""
        offset, everyone = self.offset(), [None] * dist.get_world_size()
        mine = [(name, start - offset, end - offset, more) for name, start, end, more in self.spans]
        gathered = everyone if dist.get_rank() == 0 else None
        dist.gather_object((title, mine), gathered)
        if dist.get_rank() > 0:
            return []
        zero = min(start for _, spans in everyone for _, start, _, _ in spans)
        events = []
        for rank, (title, spans) in enumerate(everyone):
            about = {"name": f"rank {rank}: {title}"}
            events.append({"ph": "M", "name": "process_name", "pid": rank, "args": about})
            for name, start, end, known in spans:
                events.append({"ph": "X", "name": name, "pid": rank, "tid": 0, "args": known,
                               "ts": 1e6 * (start - zero), "dur": 1e6 * (end - start)})  # fmt: skip
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
        return [spans for _, spans in everyone]


def check_writable(flag: str, path: str | None) -> None:
    """Raises ValueError on rank 0, who would write, if it cannot. Leaves a file."""
    try:
        if path and int(os.environ.get("RANK", 0)) == 0:
            open(path, "a").close()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


class Logger:
    """Rank 0's progress lines and JSON rows. It reads numbers off the device every `print_every`
    steps, and is the only one who does: a step never waits for its own loss."""

    def __init__(self, path: str | None, steps: int, print_every: int, tokens_per_step: int,
                 tflop: float, peak: float | None = None, stop: int | None = None,
                 append: bool = False):  # fmt: skip
        """tflop: of the model, a rank's part of a step, without what is recomputed. peak: TFLOP/s
        of its GPU, if known: then their ratio is the MFU (Chowdhery et al. 2022, PaLM, appendix B).
        stop: the step at which this process ends, if not at the last. append: go on with the rows
        that are there; a step that a lost process had begun comes twice."""
        self.steps, self.print_every, self.tokens_per_step = steps, print_every, tokens_per_step
        self.tflop, self.peak = tflop, peak
        self.stop = steps if stop is None else stop
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        check_writable("--log", path)
        mode = "a" if append else "w"
        self.file = open(path, mode, buffering=1) if path and self.is_main else None
        self.pending: list[tuple[int, Tensor, float]] = []

    def start(self) -> None:
        self.since = time.perf_counter()

    def step(self, step: int, stats: Tensor, lr: float) -> None:
        """`stats`: [loss, gradient norm, ...], on whatever device they are."""
        self.pending.append((step, stats, lr))
        if len(self.pending) == self.print_every or step + 1 == self.stop:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        rows = torch.stack([stats for _, stats, _ in self.pending]).tolist()
        seconds = (time.perf_counter() - self.since) / len(rows)
        speed, tflops = self.tokens_per_step / seconds, self.tflop / seconds
        mfu = {"mfu": tflops / self.peak} if self.peak else {}
        for (step, _, lr), (loss, norm, *_) in zip(self.pending, rows, strict=True):
            skipped = {} if math.isfinite(norm) else {"skipped": True}  # see Trainer.step
            self._write(step, loss=loss, grad_norm=norm, lr=lr, tokens_per_s=speed,
                        tflops_per_rank=tflops, **mfu, **skipped)  # fmt: skip
            if skipped:
                self.say(f"step {step + 1:5d}/{self.steps}  update skipped: gradient norm {norm}")
        left = seconds * (self.stop - step - 1)
        self.say(f"step {step + 1:5d}/{self.steps}  loss {loss:.4f}  norm {norm:.3f}  lr {lr:.1e}  "
                 f"{speed:,.0f} tokens/s  {tflops:.3g} TFLOP/s a rank  "
                 + "".join(f"MFU {100 * x:.1f} %  " for x in mfu.values())
                 + f"{left:.0f} s left")  # fmt: skip
        self.pending = []
        self.start()

    def validation(self, step: int, loss: Tensor) -> None:
        self._write(step, val_loss=loss.item())
        self.say(f"step {step + 1:5d}/{self.steps}  val loss {loss.item():.4f}")
        self.start()  # validation is not training time

    def saved(self, save: NamedTuple) -> None:
        """What became of a save: checkpoint.Saved."""
        step, size, pause, seconds, failed = save
        self._write(step - 1, saved=failed is None, save_pause_s=pause, save_s=seconds)
        what = f"{size / 1e6:.1f} MB in {seconds:.2f} s"
        if failed:
            what = f"FAILED, what was saved before stays: {failed}"
        self.say(f"step {step:5d}/{self.steps}  saved  {what}; training stood still for "
                 f"{1e3 * pause:.0f} ms")  # fmt: skip

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def _write(self, step: int, **row) -> None:
        if self.file:
            seen = {"step": step, "tokens": (step + 1) * self.tokens_per_step}
            self.file.write(json.dumps(seen | row) + "\n")


def lost_collective(error: BaseException) -> str | None:
    """One line on an error that a collective ended with because a rank did not come: which
    operation, over which group, and where in our files. None if it is another error."""
    if not re.search("[Tt]imed? ?out|[Cc]onnection|pair closure", str(error)):
        return None
    here = os.path.dirname(os.path.abspath(__file__))
    frames = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)
              if os.path.dirname(os.path.abspath(frame.f_code.co_filename)) == here]  # fmt: skip
    if not frames:
        return None
    frame, number = frames[-1]
    line = linecache.getline(frame.f_code.co_filename, number).strip()

    def value(name: str, frame=frame):
        first, *rest = name.split(".")
        return functools.reduce(lambda x, n: getattr(x, n, None), rest, frame.f_locals.get(first))

    operation, group = line, dist.group.WORLD
    if called := re.search(r"(?:dist\.|^|= )(\w+)\(", line):
        operation = called[1]
        if given := re.search(r"group=([\w.]+)", line):
            group = value(given[1])
    elif waited := re.search(r"([\w.]+)\.wait\(\)", line):
        if isinstance(work := value(waited[1]), dist.Work):
            name = OpType(work._get_op_type()).name
            operation = _WORKS.get(name, name.lower())
        names = ("group", "self.group", "ctx.group")
        known = [value(name, f) for f, _ in reversed(frames) for name in names]
        group = next((g for g in known if isinstance(g, dist.ProcessGroup)), group)
    alike = group is dist.group.WORLD  # None, where there is none yet
    name = "all ranks" if alike else f"{group.group_desc} {dist.get_process_group_ranks(group)}"
    file = os.path.basename(frame.f_code.co_filename)
    return (f"{operation} over {name} failed, since a rank did not come: {file}:{number}, "
            f"{frame.f_code.co_name}: {line}")  # fmt: skip


TOLERANCE = 1e-12  # of float64; rounding of sums in another order stays below, bugs do not


def largest(numbers: Iterable[float]) -> float:
    """The maximum of at least one number; infinite if any is NaN or Inf. max() skips a NaN that is
    not the first number."""
    numbers = list(numbers)
    return max(numbers) if all(map(math.isfinite, numbers)) else math.inf


def check_alike(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError if a name is missing or unexpected, a shape differs, or a tensor of
    `actual` is not in `dtype` (default: the dtype of the expected tensor)."""
    if actual.keys() != expected.keys():
        raise ValueError(f"tensors missing: {sorted(expected.keys() - actual.keys())}; unexpected: "
                         f"{sorted(actual.keys() - expected.keys())}")  # fmt: skip
    for name, a in actual.items():
        want = (expected[name].shape, dtype or expected[name].dtype)
        if (a.shape, a.dtype) != want:
            raise ValueError(f"{name} is {tuple(a.shape)} in {a.dtype}: expected {tuple(want[0])} "
                             f"in {want[1]}")  # fmt: skip


def relative_errors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:  # fmt: skip
    """max|a - b| / max|b| by name. max|b| is taken to be at least `floor` of the largest entry of
    all tensors: some gradients are exactly 0 (a key's bias shifts all scores of a row by the same
    amount), and what is computed for them is rounding. The error is infinite where either tensor
    has a NaN or an Inf. Raises ValueError as check_alike does."""
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
    """The frame of a strategy file's demo: joins torchrun's ranks (gloo, one thread each), collects
    what was compared, prints it from rank 0, and leaves with exit code 1 if any rank saw a
    mismatch. A collective that waits longer than `timeout` seconds ends the rank with one line."""

    def __init__(self, title: str, timeout: float = 60):
        self.title, self.rows, self.failed = title, [], False
        self.timeout = datetime.timedelta(seconds=timeout)
        self.tables: dict[str, list[str]] = {}

    def __enter__(self) -> "Report":
        if not dist.is_torchelastic_launched():
            launch = f"torchrun --standalone --nproc-per-node 2 {self.title}"
            raise SystemExit(f"{self.title}: start me with  {launch}")
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=self.timeout)
        self.group = dist.group.WORLD
        return self

    def close(self, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        """Tensors that must be equal to TOLERANCE."""
        worst = largest(relative_errors(actual, expected).values())
        self._row(what, f"{worst:.1e} relative", f"<= {TOLERANCE:.0e}", worst <= TOLERANCE)

    def losses(self, what: str, actual: list[Tensor], expected: list[Tensor]) -> None:
        """The losses of a few steps, printed from both sides, and equal to TOLERANCE."""
        a, b = torch.stack(actual), torch.stack(expected)
        for step, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            name = f"{what} loss, step {step}"
            self.rows.append(f"  {name:34s} {x:>21.15f} | one process {y:.15f}")
        self.close(f"{what} losses", {"loss": a}, {"loss": b})

    def equal(self, what: str, predicted: object, measured: object) -> None:
        """A cost, which must be what the formula says, to the last byte or call."""
        self._row(what, f"predicted {predicted}", f"measured {measured}", predicted == measured)

    def costs(self, table: str, what: str, predicted, measured) -> None:
        """A line of a table: costs by kind (dicts or NamedTuples), which must be equal."""
        predicted, measured = (
            x if isinstance(x, dict) else x._asdict() for x in (predicted, measured)
        )
        header = f"  {table:28s}" + "".join(f"{kind:>20s}" for kind in predicted)
        pairs = (f"{n:,} | {measured[kind]:,}" for kind, n in predicted.items())
        ok = predicted == measured
        line = "".join(f"{pair:>20s}" for pair in pairs)
        lines = self.tables.setdefault(table, [header + "   predicted | measured"])
        lines.append(f"    {what:26s}{line}   {'ok' if ok else 'MISMATCH'}")
        self.failed |= not ok

    def _row(self, what: str, left: str, right: str, ok: bool) -> None:
        self.rows.append(f"  {what:34s} {left:>21s} | {right:25s} {'ok' if ok else 'MISMATCH'}")
        self.failed |= not ok

    def __exit__(self, kind, error, _) -> None:
        if kind is not None:
            if line := lost_collective(error):
                print(f"{self.title}: rank {dist.get_rank()}: {line}", file=sys.stderr, flush=True)
                os._exit(1)  # a collective that never completes would block a normal exit
            return  # Python prints the traceback; torchrun stops the other ranks
        failed = torch.tensor(float(self.failed))
        dist.all_reduce(failed)
        if dist.get_rank() == 0 or self.failed:
            ranks = dist.get_world_size()
            print(f"{self.title} on {ranks} ranks, float64; rank {dist.get_rank()} says:")
            print("\n".join(sum(self.tables.values(), self.rows)), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        if failed > 0:
            raise SystemExit(1)
