"""The interface of checkpoint.py to torch.distributed.checkpoint: planners, a writer and a reader.

    files = save(path, slices, group)           each rank of `group` writes its slices
    load(path, slices, group)                   each rank fills its slices
    Reader(path).read_metadata()                which slices are stored, and in which files

A slice is a checkpoint.TensorSlice (name, shape, offsets, tensor). checkpoint.py imports this file
only where it reads or writes, because importing torch.distributed.checkpoint takes a second.
"""

import enum
import math
import pickle
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


def save(path: Path, slices: list, group: dist.ProcessGroup) -> dict[str, list[int]]:
    """Write the slices of all ranks of `group` to a folder. Returns {name: [size, crc32]} of the
    files that this rank has written. Raises OSError."""
    writer = Writer(path, per_thread_copy_ahead=0)  # the slices are in host memory already
    planner = SavePlanner(slices)
    try:
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        raise OSError(first_of(error)) from None
    return writer.files


def load(path: Path, slices: list, group: dist.ProcessGroup) -> None:
    """Fill the slices of all ranks of `group`. Raises ValueError."""
    reader, planner = Reader(path), LoadPlanner(slices)
    try:
        dcp.load({}, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise ValueError(first_of(error)) from None


def first_of(error: CheckpointException) -> str:
    """The message of the first failed rank. CheckpointException is not an Exception, and has one
    error per failed rank."""
    first = next((wrapped[0] for wrapped in error.failures.values()), error)
    return f"{first}" or type(first).__name__


def size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def index(s) -> MetadataIndex:
    return MetadataIndex(s.name, s.offsets)


def chunk(s) -> dcp.ChunkStorageMetadata:
    return dcp.ChunkStorageMetadata(torch.Size(s.offsets), s.tensor.size())


class SavePlanner(dcp.DefaultSavePlanner):
    """Writes the slices of this rank. torch combines the plans of all ranks and raises an error if
    slices overlap or if a part of a tensor is missing."""

    def __init__(self, slices: list):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slices = {index(s): s for s in slices}

    def create_local_plan(self) -> dcp.SavePlan:
        items = []
        for s in self.slices.values():
            properties = TensorProperties.create_from_tensor(s.tensor)
            data = TensorWriteData(chunk(s), properties, torch.Size(s.shape))
            items.append(dcp.WriteItem(index(s), WriteItemType.SHARD, tensor_data=data))
        self.plan = dcp.SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.slices[index].tensor


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Fills the slices of this rank from the stored slices that overlap them."""

    def __init__(self, slices: list):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.slices = {index(s): s for s in slices}

    def create_local_plan(self) -> dcp.LoadPlan:
        items, by_name = [], {}
        for s in self.slices.values():
            by_name.setdefault(s.name, []).append(s)
        for name, mine in by_name.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{name} is missing")
            if tuple(stored.size) != mine[0].shape:
                raise ValueError(f"{name} is {list(stored.size)}: expected {list(mine[0].shape)}")
            new = create_read_items_for_chunk_list(name, stored, [chunk(s) for s in mine])
            found = sum(math.prod(item.lengths) for item in new)
            if found != (wanted := sum(s.tensor.numel() for s in mine)):
                raise ValueError(f"{name} has {found} of the {wanted} elements of this rank")
            items += new
        return dcp.LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.slices[index].tensor


class MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata, which is a pickle. A pickle can call any function by name, so only the names
    that torch writes there are allowed."""

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
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 pickles an enum's member
            return self._member
        if name not in self.allowed.get(module, ()):
            raise pickle.UnpicklingError(f"it uses {module}.{name}, which no checkpoint contains")
        return super().find_class(module, name)

    @staticmethod
    def _member(owner: object, name: str) -> enum.Enum:
        if isinstance(owner, enum.EnumMeta):
            return owner[name]
        raise pickle.UnpicklingError(f"it uses {name} of {owner}, which no checkpoint contains")


class Writer(dcp.FileSystemWriter):
    """After a save, `files` is {name: [size, crc32]} of the files that this rank has written."""

    def storage_meta(self) -> None:
        """Returns None, so that .metadata contains no path of this machine and no path class."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner):
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:  # torch.save raises one that hides the OSError of a full disk
            raise error.__context__ or error from None
        mine = Path(self.path).glob(f"{plan.storage_data.prefix}*")
        self.files = {path.name: size_and_crc(path) for path in mine}
        return written


class Reader(dcp.FileSystemReader):
    """Reads .metadata with MetadataUnpickler. torch reads the tensors with weights_only=True."""

    def read_metadata(self) -> dcp.Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return MetadataUnpickler(file).load()
