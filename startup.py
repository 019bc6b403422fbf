"""Start the ranks of a run: device, process group, and a check that all ranks agree.

    device, line = pick_device("auto")      cuda if every local rank has its own GPU, else cpu
    join_ranks(device)                      the default process group, from torchrun's environment
    check_same(vars(args))                  all ranks must have the same arguments and data
    with stop_signals(stop): ...            the first Ctrl-C calls stop(), the second ends the rank

Without torchrun, the process is the only rank. Local ranks are the ranks on one node.
"""

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

# TFLOP/s of dense bf16 matmuls by the start of the device name, from NVIDIA's data sheets.
PEAKS = {
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA A100": 312,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
}


def pick_device(name: str) -> tuple[torch.device, str]:
    """(device of this rank, a line that describes it). name: "auto", "cpu" or "cuda". Raises
    ValueError if "cuda" is given and there are fewer GPUs than local ranks, or if
    GLOO_SOCKET_IFNAME names an interface that this host does not have."""
    known = [interface for _, interface in socket.if_nameindex()]
    for interface in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if interface not in known:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME is {interface}, but this host has {', '.join(known)}: give "
                "the interface that connects it to the other hosts"
            )
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    enough = gpus >= ranks
    if name == "cuda" and not enough:
        raise ValueError(
            f"--device cuda: {ranks} local ranks and {gpus} GPUs, but every rank needs its own "
            "GPU: start fewer ranks per node, or give --device cpu"
        )
    if name == "cpu" or not enough:
        return torch.device("cpu"), f"device cpu ({gpus} GPUs for {ranks} local ranks)"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    tf32 = "without TF32" if torch.get_float32_matmul_precision() == "highest" else "with TF32"
    line = f"device cuda ({gpus} GPUs for {ranks} local ranks), {device_name(device)}"
    return device, f"{line}; float32 matmuls {tf32}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_tflops(device: torch.device, dtype: str) -> float | None:
    """The peak TFLOP/s of this device. None if it is unknown: for dtypes other than "bf16", a slice
    of a GPU (MIG), the NVL variants, and devices that are not in PEAKS."""
    name = device_name(device)
    if dtype != "bf16" or re.search("MIG|NVL", name):
        return None
    return next((peak for start, peak in PEAKS.items() if name.startswith(start)), None)


def check_writable(flag: str, path: str | None) -> None:
    """Create the file on rank 0, which writes it. Raises ValueError there if that fails."""
    try:
        if path and int(os.environ.get("RANK", 0)) == 0:
            open(path, "a").close()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


def join_ranks(device: torch.device, timeout: int = 600) -> None:
    """Initialise the default process group: torchrun's ranks, or this process alone. Raises
    SystemExit if a rank does not connect within `timeout` seconds, or if some ranks have a GPU and
    others do not."""
    on_gpu, limit = device.type == "cuda", datetime.timedelta(seconds=timeout)
    store, rank, world_size = dist.HashStore(), 0, 1
    try:
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # After a restart, torchrun's store still has the addresses of dead ranks
                # (pytorch#135712), so each start uses its own prefix. Not on several nodes, whose
                # restart counts can differ, see docs/running.md.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(restart, store)
        if rank == 0:
            store.set("device", device.type)
        elif (first := store.get("device").decode()) != device.type:
            sys.exit(
                f"train_3d.py: rank {rank} has device {device.type} and rank 0 has device {first}: "
                "give --device cpu, or use nodes with the same devices"
            )
        if on_gpu:
            torch.cuda.set_device(device)
            # NCCL 2.26: kernels of all communicators run in the order in which they were launched.
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
            timeout=limit, device_id=device if on_gpu else None,
        )  # fmt: skip
    except dist.DistError as error:
        where = ":".join(os.environ.get(f"MASTER_{name}", "?") for name in ("ADDR", "PORT"))
        sys.exit(
            f"train_3d.py: rank {os.environ.get('RANK', 0)}: not all ranks connected to {where} "
            f"within {timeout} s: {str(error).splitlines()[0]}"
        )


def check_same(values: dict) -> None:
    """Compare `values` by name over all ranks. If they differ, rank 0 prints one line and every
    rank exits with code 2. Call it before the first collective that needs equal values."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values | {"torch": torch.__version__})
    wrong = [
        f"rank {rank} has {name} {theirs[name]} and rank 0 has {everyone[0].get(name)}"
        for rank, theirs in enumerate(everyone)
        for name in theirs
        if theirs[name] != everyone[0].get(name)
    ]
    if not wrong:
        return
    if dist.get_rank() == 0:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        print(
            f"train_3d.py: error: {wrong[0]}{more}: start all ranks with the same command line, "
            "files and devices",
            file=sys.stderr,
            flush=True,
        )
    dist.barrier()  # torchrun stops all ranks when one exits, so rank 0 must print first
    sys.exit(2)


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `stop`, in another thread. The next one ends this process
    at once, with exit code 128 + its number.

    Python runs signal handlers in the main thread, and none while that thread is in a kernel, which
    can take minutes. But its C handler writes the number of each signal to a pipe, which a thread
    reads here. After Ctrl-C, torchrun sends SIGINT to ranks that have already received it from the
    terminal. So under torchrun, signals within a second of the first are ignored."""
    numbers, waiting = (signal.SIGINT, signal.SIGTERM), [stop]
    ignored = 1.0 if dist.is_torchelastic_launched() else 0.0  # seconds
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if waiting:
                since = time.monotonic()
                waiting.pop()()
            elif time.monotonic() - since >= ignored:
                os._exit(128 + number[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    signal.set_wakeup_fd(writer)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # without a handler, nothing is written
    try:
        yield
    finally:
        if waiting:  # otherwise the process is about to end, and the next signal still ends it
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.close(writer)
            thread.join()
            os.close(reader)
