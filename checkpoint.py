"""Checkpoints that can be loaded in any layout.

Each rank writes its shards and records the position of each in its full tensor. The layout (groups,
ranks, schedule) is not recorded. In any other layout, a rank reads the stored shards that overlap
its own. No rank gathers a full tensor.

Example: the fused qkv weight, [3 h, h] with hidden size h, on tp rank 0 of 2:

    on the rank, [3 h/2, h]             in the full tensor, parameter/h.0.attn.c_attn.weight
        +-----+
        |  q  |  h/2 rows      <-->     rows 0   .. h/2
        |  k  |  h/2 rows      <-->     rows h   .. h + h/2
        |  v  |  h/2 rows      <-->     rows 2 h .. 2 h + h/2
        +-----+

With ZeRO, a rank holds a contiguous range of this shard, flattened. As slices of a matrix, that is
the end of a row, some complete rows, and the beginning of a row.

torch.distributed.checkpoint reads and writes the files. checkpoint_dcp.py is the interface to it,
and is imported only where a tensor is read or written, because the import takes a second.

    DIR/step-20/            exists only if it is complete
        __0_0.distcp ...    tensors: one file per rank                          (torch's format)
        .metadata           which slice of which tensor is in which file        (torch's format)
        checkpoint.json     step, options of the run, size and crc32 of each file

Saving blocks training only while the state is copied to host memory, which takes (bytes of the
state) / (memory bandwidth). A thread writes the copy while training continues. Replicas hold the
same state. Each copies and writes a similar amount of it. For a GPU, the copy is in pinned memory,
whose size torch rounds up to a power of two.

A run can resume in another --dtype: weights and moments are converted when they are read. bf16 runs
save their fp32 master weights, so switching between float32 and bf16 does not round the state.

Lian et al. 2024, Universal Checkpointing (arXiv 2406.18820); Wan et al. 2024, ByteCheckpoint
(arXiv 2407.20143), on slices of flattened shards.
"""

import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

FORMAT = 1  # version of checkpoint.json and of the tensor names

# --- the state of a rank, as slices of full tensors -----------------------------------------------


class TensorSlice(NamedTuple):
    """A rectangular slice of a full tensor."""

    name: str  # of the full tensor, in the checkpoint
    shape: tuple[int, ...]  # of the full tensor
    offsets: tuple[int, ...]  # index of the slice's first element in the full tensor
    tensor: Tensor  # the values


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, tuple]]:
    """Split elements start..stop of a flattened tensor into boxes (offsets, sizes), in order. For a
    matrix these are at most three: the end of a row, complete rows, and the beginning of a row."""
    row = math.prod(shape[1:])
    while start < stop:
        i, column = divmod(start, row)
        rows = (stop - start) // row
        if column == 0 and rows > 0:
            yield (i, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * row
        else:
            end = min(row, column + stop - start)
            for offsets, sizes in boxes_of_range(shape[1:], column, end):
                yield (i, *offsets), (1, *sizes)
            start += end - column


def slices_of(name: str, tensor: Tensor, parameter: Tensor, offset: int) -> Iterator[TensorSlice]:
    """The slices of the full tensor that `tensor` holds, as views of `tensor`.

    parameter: this rank's parameter of at least one dim. Its `distribution`, if any, says which
        shard of the full tensor it is.
    tensor: a contiguous range of the flattened parameter that begins at `offset`, or its moments.
    """
    how = getattr(parameter, "distribution", None)
    shape = how.shape if how else parameter.shape
    # By dimension, for each fused matrix: (start in the shard, start in the full tensor, length).
    places = [[(0, 0, n)] for n in parameter.shape]
    for split in how.splits if how else ():
        places[split.dim] = list(split.slices())
    flat, position = tensor.detach().flatten(), 0
    assert flat.data_ptr() == tensor.data_ptr(), f"{name} is not contiguous"
    for offsets, sizes in boxes_of_range(tuple(parameter.shape), offset, offset + flat.numel()):
        n = math.prod(sizes)
        box = flat[position : position + n].view(sizes)
        position += n
        for chosen in itertools.product(*places):
            part, full_offsets = box, []
            for dim, (in_shard, in_full, length) in enumerate(chosen):
                start = max(offsets[dim], in_shard)
                stop = min(offsets[dim] + sizes[dim], in_shard + length)
                if start >= stop:
                    break
                part = part.narrow(dim, start - offsets[dim], stop - start)
                full_offsets.append(in_full + start - in_shard)
            else:
                yield TensorSlice(name, tuple(shape), tuple(full_offsets), part)


Pieces = Iterable[tuple[str, Tensor, nn.Parameter, int]]  # ddp.Piece


def state_slices(
    pieces: Pieces, optimizer: torch.optim.Optimizer
) -> tuple[list[TensorSlice], dict]:
    """(slices of parameters and moments, numbers). numbers: the names of the moments, and the
    scalars of the optimizer's state (AdamW's step), which must be equal for all pieces."""
    slices: list[TensorSlice] = []
    numbers: dict = {"moments": [], "scalars": {}}
    scalars: dict[str, list[Tensor]] = {}
    for name, piece, parameter, offset in pieces:
        slices += slices_of(f"parameter/{name}", piece, parameter, offset)
        for key, value in optimizer.state.get(piece, {}).items():
            if value.dim():
                slices += slices_of(f"{key}/{name}", value, parameter, offset)
                numbers["moments"] = sorted({*numbers["moments"], key})
            else:
                scalars.setdefault(key, []).append(value)
    for key, values in scalars.items():
        each = torch.stack(values).tolist()  # fused AdamW keeps them on the GPU: synchronise once
        numbers["scalars"][key] = each[0]
        assert len(set(each)) == 1, f"{key} is {set(each)}"
    return slices, numbers


def init_state(pieces: Pieces, optimizer: torch.optim.Optimizer, numbers: dict) -> None:
    """Create the optimizer state that `numbers` describes, with moments of zero to load into."""
    fused = optimizer.defaults.get("fused")  # its kernel reads the step on the device
    for _, piece, _, _ in pieces:
        moments = {key: torch.zeros_like(piece) for key in numbers["moments"]}
        scalars = {
            key: torch.tensor(value, device=piece.device if fused else "cpu")
            for key, value in numbers["scalars"].items()
        }
        optimizer.state[piece] = {**scalars, **moments}


def split_between_replicas(slices: list[TensorSlice], rank: int, size: int) -> list[TensorSlice]:
    """The slices that replica `rank` of `size` writes. All replicas hold the same `slices`. Each
    slice is written once, and all replicas write about the same number of bytes."""
    loads, mine = [0] * size, []
    for s in sorted(slices, key=lambda s: -s.tensor.nbytes):
        least = loads.index(min(loads))
        loads[least] += s.tensor.nbytes
        if least == rank:
            mine.append(s)
    return mine


# --- reading a directory of checkpoints -----------------------------------------------------------
# To resume, every rank calls find(), then newest_complete() and read(), which are collectives.


class CorruptCheckpoint(ValueError):
    """The message names the file and the problem."""


class Found(NamedTuple):
    """A checkpoint with a valid checkpoint.json. Its other files are not checked yet."""

    path: Path
    about: dict  # the content of checkpoint.json


def find(directory: str) -> tuple[list[Found], list[str]]:
    """(checkpoints, newest first; a message for each that has no valid checkpoint.json). Raises
    FileNotFoundError if there is no checkpoint, and ValueError if none is valid."""
    found, wrong = [], []
    for path in reversed(_steps(directory)):
        try:
            found.append(Found(path, _read_about(path)))
        except CorruptCheckpoint as error:
            wrong.append(str(error))
    if wrong and not found:
        raise ValueError(f"every checkpoint in {directory} is damaged: {wrong[0]}")
    if not found:
        names = sorted(p.name for p in Path(directory).glob("*"))
        what = f"contains {', '.join(names[:3])} but no step-N" if names else "is empty"
        what = what if Path(directory).exists() else "does not exist"
        raise FileNotFoundError(f"{directory} {what}: there is no checkpoint to resume")
    return found, wrong


def _steps(directory: str | Path) -> list[Path]:
    """The folders step-N of a directory, sorted by N."""
    named = [p for p in Path(directory).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")))


def _read_about(path: Path) -> dict:
    """The content of checkpoint.json. Raises CorruptCheckpoint."""
    name = path / "checkpoint.json"
    try:
        about = json.loads(name.read_bytes())
        expected, version = about.pop("crc"), about["format"]
        is_newer = version > FORMAT
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{name} cannot be read: {type(error).__name__} {error}"
        raise CorruptCheckpoint(problem) from None
    if is_newer:
        raise CorruptCheckpoint(
            f"{name} has format {version}, but this version reads formats up to {FORMAT}"
        )
    if (actual := _crc_of(about)) != expected:
        raise CorruptCheckpoint(f"{name} has changed: its crc32 is {actual}, expected {expected}")
    return about


def _crc_of(about: dict) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def verify(found: Found, rank: int, ranks: int) -> None:
    """Check .metadata, and every ranks-th file from number `rank` on. Raises CorruptCheckpoint."""
    import checkpoint_dcp

    files = found.about["files"]
    for name, expected in sorted(files.items())[rank::ranks]:
        path = found.path / Path(name).name  # a name cannot lead out of the folder
        if not path.exists():
            raise CorruptCheckpoint(f"{path} is missing")
        if (size := path.stat().st_size) != expected[0]:
            raise CorruptCheckpoint(f"{path} has {size} bytes, expected {expected[0]}")
        if (actual := checkpoint_dcp.size_and_crc(path)) != expected:
            raise CorruptCheckpoint(
                f"{path} has changed: crc32 {actual[1]}, expected {expected[1]}"
            )
    try:
        stored = checkpoint_dcp.Reader(found.path).read_metadata().storage_data.values()
    except Exception as error:  # a damaged pickle can raise any exception
        problem = f"{found.path / '.metadata'} cannot be read: {error}"
        raise CorruptCheckpoint(problem) from None
    if unknown := {info.relative_path for info in stored} - files.keys():
        problem = f"{found.path / '.metadata'} refers to {min(unknown)}, which has no known crc32"
        raise CorruptCheckpoint(problem)


def newest_complete(
    candidates: list[Found], group: dist.ProcessGroup
) -> tuple[Found | None, list[str]]:
    """(the newest undamaged checkpoint of `candidates`, a message for each newer, damaged one), or
    (None, []) without candidates. Each rank of `group` checks some of the files, and all get the
    same result. Raises ValueError if every checkpoint is damaged, or if the ranks have different
    candidates."""
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, [found.path.name for found in candidates], group=group)
    if different := [names for names in everyone if names != everyone[0]]:
        raise ValueError(
            f"the ranks see different checkpoints, {everyone[0]} and {different[0]}: give all "
            "ranks the same directory, on a shared file system"
        )
    wrong: list[str] = []
    for found in candidates:
        problem = None
        try:
            verify(found, group.rank(), group.size())
        except Exception as error:  # any exception: the other ranks wait for this rank's result
            problem = f"{error}"
        dist.all_gather_object(everyone, problem, group=group)
        if not any(everyone):
            return found, wrong
        wrong.append(next(filter(None, everyone)))
    if wrong:
        raise ValueError(f"every checkpoint is damaged: {'; '.join(wrong)}")
    return None, []


def read(path: Path, slices: list[TensorSlice], group: dist.ProcessGroup) -> None:
    """Fill `slices` from a checkpoint. All ranks of `group` must call it. Raises ValueError."""
    import checkpoint_dcp

    try:
        checkpoint_dcp.load(path, slices, group)
    except ValueError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None


# --- writing checkpoints --------------------------------------------------------------------------


def check_writable(directory: str | None) -> None:
    """Create the directory on rank 0. Raises ValueError there if it cannot be written."""
    if directory is None or int(os.environ.get("RANK", 0)) > 0:
        return
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        problem = f"--checkpoint-dir {directory} cannot be written: {error.strerror}"
        raise ValueError(problem) from None


class SaveResult(NamedTuple):
    step: int
    bytes: int  # written by all ranks; 0 except on rank 0
    pause: float  # seconds in which training was blocked
    seconds: float  # duration of the writing
    failed: str | None  # the error, or None


class Checkpoints:
    """Saves checkpoints to a directory. All ranks of `group` must make the same calls.

    group: a CPU group that nothing else uses, because a thread communicates over it during
        training.
    keep: number of checkpoints to keep, the new one included. Older ones are deleted.

    A checkpoint is written to tmp-step-N and renamed to step-N when it is complete. If the run is
    killed or the disk is full, earlier checkpoints stay unchanged."""

    def __init__(self, directory: str, keep: int, group: dist.ProcessGroup):
        self.directory, self.keep, self.group = Path(directory), keep, group
        self.buffers: list[Tensor] = []
        self.thread: threading.Thread | None = None
        self.failed: str | None = None  # the error of the last save
        self.results: list[SaveResult] = []

    def save(self, step: int, slices: list[TensorSlice], about: dict) -> None:
        """Copy `slices`, the state after `step` steps, and start to write the copies. First waits
        for the previous save, whose buffers are reused. about: more entries of checkpoint.json."""
        start = time.perf_counter()
        self.wait()
        tensors = [s.tensor for s in slices]
        if [(b.shape, b.dtype) for b in self.buffers] != [(t.shape, t.dtype) for t in tensors]:
            self.buffers = host_buffers(tensors)
        copies = [
            s._replace(tensor=buffer.copy_(s.tensor, non_blocking=True))
            for s, buffer in zip(slices, self.buffers, strict=True)
        ]
        for device in {t.device for t in tensors}:
            torch.get_device_module(device).synchronize()  # once, for all copies
        pause = time.perf_counter() - start
        # The thread uses only the copies, which do not change until it has finished.
        arguments = step, copies, about, pause
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the save in progress has finished."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def completed(self) -> list[SaveResult]:
        """The saves that have finished, successfully or not, since the last call."""
        return [self.results.pop(0) for _ in range(len(self.results))]

    def _write(self, step: int, slices: list[TensorSlice], about: dict, pause: float) -> None:
        import checkpoint_dcp

        start, size, self.failed = time.perf_counter(), 0, None
        is_first, path = self.group.rank() == 0, self.directory / f"tmp-step-{step}"
        try:
            if is_first:
                for old in self.directory.glob("tmp-step-*"):  # of interrupted saves
                    shutil.rmtree(old, ignore_errors=True)
            dist.barrier(self.group)
            written = checkpoint_dcp.save(path, slices, self.group)
            everyone = [None] * self.group.size() if is_first else None
            dist.gather_object(written, everyone, group=self.group, group_dst=0)
            if is_first:
                everyone.append({".metadata": checkpoint_dcp.size_and_crc(path / ".metadata")})
                files = {name: value for each in everyone for name, value in each.items()}
                size = sum(n for n, _ in files.values())
                self._finish(path, step, {**about, "format": FORMAT, "step": step, "files": files})
        except Exception as error:  # any error: training continues
            self.failed = _first_line(error)
            if is_first:
                shutil.rmtree(path, ignore_errors=True)
        seconds = time.perf_counter() - start
        self.results.append(SaveResult(step, size, pause, seconds, self.failed))

    def _finish(self, path: Path, step: int, about: dict) -> None:
        """On rank 0: write checkpoint.json, rename the folder, delete old checkpoints."""
        if missing := [name for name in about["files"] if not (path / name).exists()]:
            raise OSError(
                f"another rank wrote {path / missing[0]}, which rank 0 cannot see: give all ranks "
                "the same directory, on a shared file system"
            )
        with open(path / "checkpoint.json", "w") as file:
            json.dump({**about, "crc": _crc_of(about)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
        final = self.directory / f"step-{step}"
        if final.exists():  # it is damaged: the run was resumed from an earlier checkpoint
            replaced = self.directory / f"replaced-step-{step}"
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(path, final)
        _sync_folder(self.directory)
        steps = _steps(self.directory)
        for old in steps[: max(0, steps.index(final) + 1 - self.keep)]:
            shutil.rmtree(old, ignore_errors=True)


def host_buffers(tensors: list[Tensor]) -> list[Tensor]:
    """Buffers in host memory with the shapes and dtypes of `tensors`, in one allocation, so torch's
    rounding of pinned memory to a power of two applies once. Each has a separate storage: DCP
    copies a tensor that is a view of a larger storage before it writes it."""
    sizes = [-(-t.nbytes // 16) * 16 for t in tensors]  # aligned for every dtype
    pinned = any(t.is_cuda for t in tensors)
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned).numpy()
    return [
        torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
        for t, offset in zip(tensors, itertools.accumulate(sizes, initial=0), strict=False)
    ]


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
