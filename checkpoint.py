"""Checkpoints that fit any layout: on disk, every tensor is a set of rectangles of one named whole.

       rank 0   [ q | k | v ]  its rows of each of   --->   parameter/h.0.attn.c_attn.weight [3h, h]
       rank 1   [ q | k | v ]  three fused matrices           rows 0..h/2, h..3h/2, ...   of rank 0
                                                              rows h/2..h, 3h/2..2h, ...  of rank 1
    ZeRO's piece of a matrix, a range of it flattened: the end of a row, whole rows, the
    beginning of one, so at most three rectangles; or five, if three matrices are fused

A rank knows which part of what it holds (`cut`, and the offset of an optimizer's piece), and that
is all that is written down: no mesh, no rank, no schedule. So a run may go on in any other layout,
which asks for rectangles of its own; torch.distributed.checkpoint, which does the disk, reads what
meets them. No tensor is ever gathered.

    DIR/step-20/              there when it is complete, and not before: see Checkpoints
        __0_0.distcp ...      a file of each rank                               (torch's format)
        .metadata             which rectangle lies where                        (torch's format)
        checkpoint.json       step, optimizer's numbers, what the run was; size and crc32 of files

A save costs a pause, in which the state is copied (bytes held / memory bandwidth), and as much host
memory as this rank writes (up to twice that if pinned for a GPU); it is written while training goes
on. Ranks that hold the same share the writing out among them.

A run can resume in another --dtype. Weights and moments are converted as they are read. bf16 is
updated in fp32 and saved in fp32, so nothing is rounded between float32 and bf16.

GPT-2's weights in Hugging Face's format are read into any layout and written from any, see the end.

Lian et al. 2024, Universal Checkpointing (arXiv 2406.18820); Wan et al. 2024, ByteCheckpoint
(arXiv 2407.20143), on rectangles of flattened shards.
"""

import enum
import json
import math
import os
import pickle
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
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata as Stored
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

FORMAT = 1  # of checkpoint.json and of the names

# --- what a rank holds, as rectangles -------------------------------------------------------------


class Rectangle(NamedTuple):
    name: str  # on disk, of the whole
    shape: tuple[int, ...]  # of the whole
    offsets: tuple[int, ...]  # where in it `tensor` begins
    tensor: Tensor

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, self.offsets)

    @property
    def chunk(self) -> dcp.ChunkStorageMetadata:
        return dcp.ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.size())


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple, tuple]]:
    """Elements start..stop of a flattened tensor, in order, as boxes (offsets, sizes) of it."""
    row = math.prod(shape[1:])
    while start < stop:
        i, at = divmod(start, row)
        rows = (stop - start) // row
        if at == 0 and rows > 0:
            yield (i, *(0 for _ in shape[1:])), (rows, *shape[1:])
            start += rows * row
        else:
            end = min(row, at + stop - start)
            for offsets, sizes in boxes(shape[1:], at, end):
                yield (i, *offsets), (1, *sizes)
            start += end - at


def rectangles(name: str, tensor: Tensor, parameter: Tensor, offset: int) -> Iterator[Rectangle]:
    """`tensor`, which is a range of the flattened `parameter` from `offset` on (ddp.py and zero.py
    call it a piece), by where it lies in the whole that `parameter` may have been cut from. The
    rectangles are views of `tensor`. A parameter has at least one dim."""
    sharding = getattr(parameter, "sharding", None)
    shape, dim = (sharding.shape, sharding.dim) if sharding else (parameter.shape, 0)
    places = list(sharding.slices()) if sharding else [(0, 0, shape[0])]
    flat, at = tensor.detach().flatten(), 0
    assert flat.data_ptr() == tensor.data_ptr(), f"{name} is not contiguous"
    for offsets, sizes in boxes(tuple(parameter.shape), offset, offset + flat.numel()):
        box = flat[at : (at := at + math.prod(sizes))].view(sizes)
        first, last = offsets[dim], offsets[dim] + sizes[dim]
        for here, there, length in places:
            start, stop = max(first, here), min(last, here + length)
            if start < stop:
                whole = (*offsets[:dim], there + start - here, *offsets[dim + 1 :])
                yield Rectangle(name, tuple(shape), whole, box.narrow(dim, start - first,
                                                                      stop - start))  # fmt: skip


Pieces = Iterable[tuple[str, Tensor, nn.Parameter, int]]


def state_of(pieces: Pieces, optimizer: torch.optim.Optimizer) -> tuple[list[Rectangle], dict]:
    """(parameters and moments, the optimizer's numbers): what continues a run. The numbers (AdamW's
    step) must be the same for all pieces."""
    found: list[Rectangle] = []
    numbers: dict = {"moments": [], "scalars": {}}
    scalars: dict[str, list[Tensor]] = {}
    for name, piece, parameter, offset in pieces:
        found += rectangles(f"parameter/{name}", piece, parameter, offset)
        for key, value in optimizer.state.get(piece, {}).items():
            if value.dim():
                found += rectangles(f"{key}/{name}", value, parameter, offset)
                numbers["moments"] = sorted({*numbers["moments"], key})
            else:
                scalars.setdefault(key, []).append(value)
    for key, values in scalars.items():
        each = torch.stack(values).tolist()  # on a GPU, if AdamW is fused: one wait
        numbers["scalars"][key] = each[0]
        assert len(set(each)) == 1, f"{key} is {set(each)}"
    return found, numbers


def begin_state(pieces: Pieces, optimizer: torch.optim.Optimizer, numbers: dict) -> None:
    """An optimizer state like that which `numbers` is from, with zeros for moments."""
    fused = optimizer.defaults.get("fused")  # then its kernel reads the step
    for _, piece, _, _ in pieces:
        moments = {key: torch.zeros_like(piece) for key in numbers["moments"]}
        scalars = {
            key: torch.tensor(value, device=piece.device if fused else "cpu")
            for key, value in numbers["scalars"].items()
        }
        optimizer.state[piece] = {**scalars, **moments}


def share(held: list[Rectangle], rank: int, size: int) -> list[Rectangle]:
    """What the rank-th of `size` ranks writes, which all hold `held`: about the same bytes each, if
    no rectangle is larger than that."""
    loads, mine = [0] * size, []
    for r in sorted(held, key=lambda r: -r.tensor.nbytes):
        least = loads.index(min(loads))
        loads[least] += r.tensor.nbytes
        if least == rank:
            mine.append(r)
    return mine


# --- torch's side ---------------------------------------------------------------------------------


class Writes(dcp.DefaultSavePlanner):
    """The plan to write these rectangles, which no other rank writes: torch adds all ranks' up, and
    fails where they overlap or leave some of a tensor out."""

    def __init__(self, mine: list[Rectangle]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.mine = {r.index: r for r in mine}

    def create_local_plan(self) -> dcp.SavePlan:
        items = []
        for r in self.mine.values():
            properties = TensorProperties.create_from_tensor(r.tensor)
            data = TensorWriteData(r.chunk, properties, torch.Size(r.shape))
            items.append(dcp.WriteItem(r.index, WriteItemType.SHARD, tensor_data=data))
        self.plan = dcp.SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.mine[index].tensor


class Reads(dcp.DefaultLoadPlanner):
    """The plan to fill these rectangles with what was written, however that was cut."""

    def __init__(self, wanted: list[Rectangle]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.wanted = {r.index: r for r in wanted}

    def create_local_plan(self) -> dcp.LoadPlan:
        items, by_name = [], {}
        for r in self.wanted.values():
            by_name.setdefault(r.name, []).append(r)
        for name, mine in by_name.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, Stored):
                raise ValueError(f"{name} is missing")
            if tuple(stored.size) != mine[0].shape:
                raise ValueError(f"{name} is {list(stored.size)}: expected {list(mine[0].shape)}")
            new = create_read_items_for_chunk_list(name, stored, [r.chunk for r in mine])
            there = sum(math.prod(item.lengths) for item in new)
            if there != sum(r.tensor.numel() for r in mine):
                raise ValueError(f"{name} is there in part only")
            items += new
        return dcp.LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.wanted[index].tensor


class Unpickler(pickle.Unpickler):
    """torch's .metadata is a pickle, and a pickle may name any function to be called. This one
    knows the few names that are in ours, and no other."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", "float32", "float64", "bfloat16"},
        "torch.serialization": {"_get_layout"},
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.2 names a member of an enum
            return self._member
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)

    @staticmethod
    def _member(of: object, name: str) -> enum.Enum:
        if isinstance(of, enum.EnumMeta):
            return of[name]
        raise pickle.UnpicklingError(f"it takes {name} of {of}, which no checkpoint does")


class Writer(dcp.FileSystemWriter):
    """`files`: size and crc32 of what this rank has written."""

    def storage_meta(self) -> None:
        """No path of this machine, and no object for one, in .metadata."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner):
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save's own, which hides a full disk
            raise error.__context__ or error from None
        mine = Path(self.path).glob(f"{plan.storage_data.prefix}*")
        self.files = {path.name: _size_and_crc(path) for path in mine}
        return written


class Reader(dcp.FileSystemReader):
    """The tensors themselves torch reads with weights_only."""

    def read_metadata(self) -> dcp.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return Unpickler(file).load()


# --- a directory of them --------------------------------------------------------------------------
# To resume: find(), on each rank; newest_complete(), all together; then read() fills what a rank
# holds.


class Damaged(ValueError):
    """Names the file, and what is wrong with it."""


class Found(NamedTuple):
    """A checkpoint, as far as checkpoint.json tells."""

    path: Path
    about: dict


def find(directory: str) -> tuple[list[Found], list[str]]:
    """(checkpoints, newest first; a line on each that cannot be one). Looks at checkpoint.json
    alone. Raises FileNotFoundError where there is none, ValueError where none can be read."""
    found, wrong = [], []
    for path in reversed(_steps(directory)):
        try:
            found.append(Found(path, _read_about(path)))
        except Damaged as error:
            wrong.append(str(error))
    if wrong and not found:
        raise ValueError(f"no checkpoint in {directory} is whole: {wrong[0]}")
    if not found:
        inside = sorted(p.name for p in Path(directory).glob("*"))
        what = f"holds {', '.join(inside[:3])}, and no step-N" if inside else "is empty"
        what = what if Path(directory).exists() else "does not exist"
        raise FileNotFoundError(f"{directory} {what}: there is nothing to resume")
    return found, wrong


def _steps(directory: str | Path) -> list[Path]:
    named = [p for p in Path(directory).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(named, key=lambda p: int(p.name[5:]))


def _read_about(path: Path) -> dict:
    name = path / "checkpoint.json"
    try:
        about = json.loads(name.read_bytes())
        written, newer = about.pop("crc"), about["format"] > FORMAT
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{name} cannot be read: {type(error).__name__} {error}") from None
    if newer:
        raise Damaged(f"{name} has format {about['format']}, of a newer version than this one, "
                      f"which reads up to {FORMAT}")  # fmt: skip
    if written != _crc_of(about):
        raise Damaged(f"{name} was changed: its crc32 is {_crc_of(about)}, not {written}")
    return about


def _crc_of(about: dict) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while part := file.read(2**22):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]


def verify(found: Found, rank: int, ranks: int) -> None:
    """Reads the rank-th file and every ranks-th after it, and .metadata. Raises Damaged."""
    files = found.about["files"]
    for name, written in sorted(files.items())[rank::ranks]:
        path = found.path / Path(name).name  # and nowhere else
        if not path.exists():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != written[0]:
            raise Damaged(f"{path} has {path.stat().st_size} bytes of {written[0]}")
        if _size_and_crc(path) != written:
            raise Damaged(f"{path} was changed: its crc32 is another")
    try:
        stored = Reader(found.path).read_metadata().storage_data.values()
    except Exception as error:  # who knows what a pickle does that nobody wrote
        raise Damaged(f"{found.path / '.metadata'} cannot be read: {error}") from None
    if other := {info.relative_path for info in stored} - files.keys():
        raise Damaged(f"{found.path / '.metadata'} names {min(other)}, a file of unknown crc32")


def check_writable(directory: str | None) -> None:
    """Makes the directory. Raises ValueError, on rank 0, if nothing can be written to it."""
    if directory is None or int(os.environ.get("RANK", 0)) > 0:
        return
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        problem = f"--checkpoint-dir {directory} cannot be written: {error.strerror}"
        raise ValueError(problem) from None


class Saved(NamedTuple):
    """What became of a save. bytes: on rank 0, of all ranks. pause, seconds: that training stood
    still, and that writing took. failed: why it is not there, or None."""

    step: int
    bytes: int
    pause: float
    seconds: float
    failed: str | None


class Checkpoints:
    """Saves, by all ranks of `group` together. `group` is a CPU one, and nobody else's: a save
    talks there while training goes on.

    A save is written to DIR/tmp-step-N, and renamed at the very end: a kill or a full disk on the
    way leaves what was there before. Of a save and those before it, `keep` stay."""

    def __init__(self, directory: str, keep: int, group: dist.ProcessGroup):
        self.directory, self.keep, self.group = Path(directory), keep, group
        self.buffers: list[Tensor] = []
        self.thread: threading.Thread | None = None
        self.failed: str | None = None  # why the last save is not there
        self.ended: list[Saved] = []

    def save(self, step: int, mine: list[Rectangle], about: dict) -> None:
        """Copy, and begin to write what this rank writes of the state after `step` steps. A save
        that is still under way is waited for first. The buffers for the copies are kept."""
        start = time.perf_counter()
        self.wait()
        tensors = [r.tensor for r in mine]
        if [(b.shape, b.dtype) for b in self.buffers] != [(t.shape, t.dtype) for t in tensors]:
            self.buffers = host_buffers(tensors)
        copies = [r._replace(tensor=buffer.copy_(r.tensor, non_blocking=True))
                  for r, buffer in zip(mine, self.buffers, strict=True)]  # fmt: skip
        for device in {t.device for t in tensors}:
            torch.get_device_module(device).synchronize()  # once, for all copies
        pause = time.perf_counter() - start
        # It works on nothing that training changes: the copies are its own until it has ended.
        arguments = step, copies, about, pause
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the save that is under way has ended."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def news(self) -> list[Saved]:
        """The saves that have ended since this was asked last."""
        return [self.ended.pop(0) for _ in range(len(self.ended))]

    def _write(self, step: int, mine: list[Rectangle], about: dict, pause: float) -> None:
        start, size, self.failed = time.perf_counter(), 0, None
        first, path = self.group.rank() == 0, self.directory / f"tmp-step-{step}"
        try:
            if first:
                for old in self.directory.glob("tmp-step-*"):  # of a save that was cut short
                    shutil.rmtree(old, ignore_errors=True)
            dist.barrier(self.group)
            writer = Writer(path, per_thread_copy_ahead=0)  # all is on the CPU already
            dcp.save({}, storage_writer=writer, planner=Writes(mine), process_group=self.group)
            everyone = [None] * self.group.size() if first else None
            dist.gather_object(writer.files, everyone, group=self.group, group_dst=0)
            if first:
                everyone.append({".metadata": _size_and_crc(path / ".metadata")})
                files = {name: value for each in everyone for name, value in each.items()}
                size = sum(n for n, _ in files.values())
                self._finish(path, step, {**about, "format": FORMAT, "step": step, "files": files})
        except (Exception, dcp.CheckpointException) as error:  # training goes on, whatever it is
            self.failed = _first_line(error)
            if first:
                shutil.rmtree(path, ignore_errors=True)
        seconds = time.perf_counter() - start
        self.ended.append(Saved(step, size, pause, seconds, self.failed))

    def _finish(self, path: Path, step: int, about: dict) -> None:
        if elsewhere := [name for name in about["files"] if not (path / name).exists()]:
            raise OSError(f"{path / elsewhere[0]} was written, and is not here: ranks must see "
                          "the directory under one path")  # fmt: skip
        with open(path / "checkpoint.json", "w") as file:
            json.dump({**about, "crc": _crc_of(about)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
        final = self.directory / f"step-{step}"
        if final.exists():  # it was passed over, and the run went on from one before
            aside = self.directory / f"passed-over-step-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(final, aside)
        os.rename(path, final)
        _sync_folder(self.directory)
        steps = _steps(self.directory)
        for old in steps[: max(0, steps.index(final) + 1 - self.keep)]:
            shutil.rmtree(old, ignore_errors=True)


def host_buffers(tensors: list[Tensor]) -> list[Tensor]:
    """Buffers like `tensors`, views of one allocation of host memory. For a GPU it is pinned, and
    torch rounds its size up to a power of two (at most double)."""
    sizes = [-(-t.nbytes // 16) * 16 for t in tensors]  # any dtype may start there
    pinned = any(t.is_cuda for t in tensors)
    flat = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
    return [part[: t.nbytes].view(t.dtype).view(t.shape)
            for part, t in zip(flat.split(sizes), tensors, strict=True)]  # fmt: skip


def newest_complete(
    candidates: list[Found], group: dist.ProcessGroup
) -> tuple[Found | None, list[str]]:
    """The newest of `candidates` (see find) whose files are as they were written, and a line on
    each that was passed over; None without candidates. The ranks of `group` share the reading, and
    agree. Raises ValueError if none is whole, or the ranks have different candidates."""
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, [found.path.name for found in candidates], group=group)
    if other := [names for names in everyone if names != everyone[0]]:
        raise ValueError(f"the ranks see different checkpoints, {everyone[0]} and {other[0]}")
    wrong: list[str] = []
    for found in candidates:
        problem = None
        try:
            verify(found, group.rank(), group.size())
        except Exception as error:  # whatever it is, the others must hear of it
            problem = f"{error}"
        dist.all_gather_object(everyone, problem, group=group)
        if not any(everyone):
            return found, wrong
        wrong.append(next(filter(None, everyone)))
    if wrong:
        raise ValueError(f"no checkpoint is whole: {'; '.join(wrong)}")
    return None, []


def read(path: Path, wanted: list[Rectangle], group: dist.ProcessGroup) -> None:
    """Fill `wanted`, by all ranks of `group` together. Raises ValueError."""
    try:
        dcp.load({}, storage_reader=Reader(path), planner=Reads(wanted), process_group=group)
    except dcp.CheckpointException as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    """Of torch's exception, which is of many lines and ranks, what the first rank to fail said."""
    for wrapped in getattr(error, "failures", {}).values():
        error = wrapped[0]
        break
    return f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# --- GPT-2's weights, as Hugging Face keeps them --------------------------------------------------


class GPT2Folder:
    """A folder with `config.json` and `model.safetensors`: any GPT-2, as `transformers` saves it or
    as OpenAI published it. Raises ValueError for what is not one. `sizes`: GPTConfig's."""

    def __init__(self, directory: str):
        self.path = Path(directory)
        try:
            config = json.loads((self.path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            problem = f"--init-from {directory}: config.json cannot be read: {error}"
            raise ValueError(problem) from None
        for key, known in GPT2_FIXED.items():
            if (value := config.get(key, known[0])) not in known:
                raise ValueError(f"--init-from {directory}: config.json has {key} {value}: "
                                 f"expected {known[0]}")  # fmt: skip
        try:
            names = ("n_layer", "n_head", "n_embd", "vocab_size")
            self.sizes = {name: config[name] for name in names} | {
                "seq_len": config["n_positions"], "tied": config.get("tie_word_embeddings", True)
            }  # fmt: skip
        except KeyError as error:
            raise ValueError(f"--init-from {directory}: config.json lacks {error}") from None
        wide = 4 * self.sizes["n_embd"]
        if config.get("n_inner") not in (None, wide):
            raise ValueError(f"--init-from {directory}: config.json has n_inner {config['n_inner']}"
                             f": expected 4 n_embd, {wide}")  # fmt: skip
        package = safetensors("--init-from")
        try:
            self.file = package.safe_open(self._tensors(), framework="pt")
        except package.SafetensorError as error:
            problem = f"--init-from {directory}: model.safetensors cannot be read: {error}"
            raise ValueError(problem) from None
        self.keys = set(self.file.keys())

    def _tensors(self) -> Path:
        path = self.path / "model.safetensors"
        if not path.exists():
            inside = ", ".join(sorted(p.name for p in self.path.iterdir())[:4])
            raise ValueError(f"--init-from {self.path} holds {inside}, and no model.safetensors")
        return path

    def _key(self, name: str) -> str:
        """lm_head.weight is not there where it is the embedding's."""
        for key in (f"transformer.{name}", name):
            if key in self.keys:
                return key
        if name == "lm_head.weight":
            return self._key("wte.weight")
        raise ValueError(f"--init-from {self.path}: {name} is missing in model.safetensors")

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if some parameter of the whole model is not there in its shape. Of the
        positions there may be more."""
        for name, p in model.named_parameters():
            there = list(self.file.get_slice(self._key(name)).get_shape())
            there = there[::-1] if name.endswith(GPT2_TRANSPOSED) else there
            wanted = list(p.shape)
            if there != wanted and not (name == "wpe.weight" and there[0] > wanted[0]):
                raise ValueError(f"--init-from {self.path}: {name} is {there}: expected {wanted}")

    def draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """For gpt.init_weights: the whole tensor, read and not drawn."""
        whole = self.file.get_tensor(self._key(name))
        whole = whole.T if name.endswith(GPT2_TRANSPOSED) else whole
        return whole[: shape[0]]


GPT2_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # theirs are [in, out]
GPT2_FIXED = {  # what there is one of here, and its other names
    "model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
}  # fmt: skip


def export_gpt2(found: Found, directory: str, group: dist.ProcessGroup) -> None:
    """Writes a checkpoint's parameters, whatever layout they are from, as a folder that
    `transformers.GPT2LMHeadModel.from_pretrained` reads. By one process."""
    save_file, sizes = safetensors("--export").torch.save_file, found.about["sizes"]
    stored = Reader(found.path).read_metadata().state_dict_metadata
    whole = [
        Rectangle(name, tuple(s.size), (0,) * len(s.size), torch.empty(s.size))
        for name, s in stored.items()
        if name.startswith("parameter/")
    ]
    read(found.path, whole, group)
    tensors = {}
    for r in whole:
        name = r.name.removeprefix("parameter/")
        tensor = r.tensor.T.contiguous() if name.endswith(GPT2_TRANSPOSED) else r.tensor
        tensors[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor
    config = {key: known[0] for key, known in GPT2_FIXED.items()} | {
        "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
        "tie_word_embeddings": not found.about["arguments"]["untied"],
        "n_positions": sizes["seq_len"], "bos_token_id": None, "eos_token_id": None,
        **{key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
    }  # fmt: skip
    os.makedirs(directory, exist_ok=True)
    save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    (Path(directory) / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def safetensors(flag: str):
    """The package. Raises ValueError where it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{flag} needs a package: pip install safetensors") from None
    return safetensors
