"""A stand-in for torch.cuda on the CPU that finds missing waits between streams.

    device = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    with device: ...                  AssertionError where a GPU could read too early

Operations run at once and in the order of the program. Checked is whether a GPU would keep that
order: a stream may use a tensor only after it has waited, directly or not, for the other streams
that wrote it, or, to write it, for those that read it too. The host may read a number only after it
has waited for an event or for the device. Memory may be freed only after the stream that allocated
it has waited for all others that used it: torch gives it to the next operation of that stream.
"""

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

READ_BY_HOST = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}
Seen = dict["Stream", int]  # by stream: how many of its operations are known to be complete


class Stream:
    def __init__(self, device: "Device"):
        self.device, self.seen, self.operations = device, {}, 0

    def wait_stream(self, other: "Stream") -> None:
        self.join(other.seen)

    def join(self, seen: Seen) -> None:
        self.device.check_freed()
        for stream, operations in seen.items():
            self.seen[stream] = max(operations, self.seen.get(stream, 0))


class Event:
    def __init__(self, device: "Device"):
        self.device, self.seen = device, {}

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or self.device.current).seen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.device.current).join(self.seen)

    def synchronize(self) -> None:
        self.device.host.join(self.seen)


class Storage:
    """How a storage was used. owner: the stream that allocated it. writes, reads: by stream, the
    number of the last operation."""

    def __init__(self, t: Tensor, owner: Stream):
        self.alive, self.owner, self.shape = StorageWeakRef(t.untyped_storage()), owner, t.shape
        self.writes: Seen = {}
        self.reads: Seen = {}

    def check(self, stream: Stream, uses: Seen, what: str) -> None:
        for other, operations in uses.items():
            if other is not stream and stream.seen.get(other, 0) < operations:
                raise AssertionError(
                    f"a tensor of {tuple(self.shape)} {what} by another stream, without a wait"
                )


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.storages: dict[int, Storage] = {}
        self.shared: set[int] = set()  # used by other streams than their owner
        self.host = Stream(self)
        self.current = Stream(self)
        self.streams = [self.current]

    def Stream(self) -> Stream:  # noqa: N802
        self.streams.append(Stream(self))
        return self.streams[-1]

    def Event(self) -> Event:  # noqa: N802
        return Event(self)

    def current_stream(self) -> Stream:
        return self.current

    @staticmethod
    def is_available() -> bool:
        """Of torch.accelerator, which asks the same module: there is no GPU."""
        return False

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def synchronize(self) -> None:
        for stream in self.streams:
            self.host.join(stream.seen)

    def storage_of(self, t: Tensor) -> Storage:
        key = t.untyped_storage()._cdata
        if key not in self.storages:
            self.storages[key] = Storage(t, self.current)
        return self.storages[key]

    def use(self, stream: Stream, reads: list[Tensor], writes: list[Tensor]) -> None:
        """The next operation of `stream`. It is launched after all that the host has waited for."""
        stream.join(self.host.seen)
        stream.operations += 1
        stream.seen[stream] = stream.operations
        for storage in map(self.storage_of, reads):
            storage.check(stream, storage.writes, "was written")
            storage.reads[stream] = stream.operations
        for storage in map(self.storage_of, writes):
            storage.check(stream, storage.writes, "was written")
            storage.check(stream, storage.reads, "was read")
            storage.writes[stream] = stream.operations
        for t in (*reads, *writes):
            if self.storage_of(t).owner is not stream:
                self.shared.add(t.untyped_storage()._cdata)

    def read_by_host(self, tensors: list[Tensor]) -> None:
        for storage in map(self.storage_of, tensors):
            storage.check(self.host, storage.writes, "was written")

    def check_freed(self) -> None:
        for key in [key for key in self.shared if self.storages[key].alive.expired()]:
            self.shared.remove(key)
            storage = self.storages.pop(key)
            for uses in (storage.writes, storage.reads):
                storage.check(storage.owner, uses, "was freed and used")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function._schema.name.split("::")[1]
        self.check_freed()
        arguments, reads, writes = function._schema.arguments, [], tensors_in(result)
        if function.namespace == "c10d" or any(
            a.alias_info and not a.alias_info.is_write
            for a in arguments  # a view
        ):
            return result
        given = dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
        for a in arguments:
            (writes if a.alias_info else reads).extend(tensors_in(given.get(a.name)))
        if "empty" in name or name.startswith("new_"):
            reads = []
        if name in READ_BY_HOST:
            self.read_by_host(reads)
        else:
            self.use(self.current, reads, writes)
        return result

    def collective(self, real: Callable, reads: int, writes: int) -> Callable:
        """As NCCL runs `real`: on a separate stream, which waits for the current one. reads,
        writes: places of its tensors among the arguments."""
        own = self.Stream()

        def call(*args, async_op: bool = False, **kwargs) -> Handle:
            own.wait_stream(self.current)
            with self.stream(own):
                real(*args, **kwargs)
            self.use(own, [args[reads]], [args[writes]])
            handle = Handle(self, own, args)
            return handle if async_op else handle.wait()

        return call


class Handle:
    """Keeps the tensors alive until wait(), as a Work of NCCL does."""

    def __init__(self, device: Device, stream: Stream, tensors: tuple):
        self.device, self.tensors, self.event = device, tensors, Event(device)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.wait()
        self.tensors = None


def tensors_in(x: object) -> list[Tensor]:
    if isinstance(x, list | tuple):
        return [t for each in x for t in tensors_in(each)]
    return [x] if isinstance(x, Tensor) else []
