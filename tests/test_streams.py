"""What the host waits for in a step, and what streams wait for each other. No GPU is needed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import checkpoint_dcp
import ddp
import options
import train_3d
from tests.commands import TINY, forked
from tests.streams import Device, Event, tensors_in
from tools.plan import dry_run
from tools.verify.oracle import Case, launch, trainer_of

# --- the host -------------------------------------------------------------------------------------

BLOCKING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "lift_fresh",
            "unique_dim", "bincount", "repeat_interleave"}  # fmt: skip


class NoWaits(TorchDispatchMode):
    """Fails where a GPU would make the host wait: values or a data-dependent shape are read, or a
    tensor is copied to the device from memory that is not in `pinned`."""

    def __init__(self):
        super().__init__()
        self.pinned: list[Tensor] = []

    def pin(self, t: Tensor) -> Tensor:
        self.pinned.append(t.clone())
        return self.pinned[-1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function._schema.name.split("::")[1]
        given = tensors_in(args)
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in given[1:])
        assert name not in BLOCKING and not by_mask, f"{name} makes the host wait"
        devices = {t.device.type for t in (*given, *tensors_in(result)) if t.dim()}
        if name in ("copy_", "_to_copy") and len(devices) > 1:
            source = given[-1]
            asynchronous = (kwargs or {}).get("non_blocking") or args[2:] == (True,)
            assert asynchronous and any(source is t for t in self.pinned), (
                f"a copy of {tuple(source.shape)} makes the host wait"
            )
        return result


def step_without_waits(case: Case) -> None:
    trainer = trainer_of(case)
    trainer.step(0)  # DDP learns the order of its buckets
    with NoWaits():
        trainer.step(1)


SIZES = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=19, seq_len=6, masked=False)


@pytest.mark.parametrize(
    "case",
    [
        Case(d=2, **SIZES),
        Case(d=2, zero=1, dtype="bf16", **SIZES),
        Case(d=2, zero=3, recompute="full", dropout=0.1, **SIZES),
        Case(d=4, nodes=2, recompute="offload", **SIZES),
        Case(t=2, p=2, sequence=True, schedule="zb-h1", attention="explicit", **SIZES),
    ],
    ids=str,
)
def test_the_host_does_not_wait_in_a_step(case):
    launch(case.world_size, step_without_waits, case)


def test_batches_are_pinned_and_masks_are_drawn_on_the_device(monkeypatch):
    """The meta device stands for the GPU."""
    case = Case(t=2, p=2, d=2, zero=3, sequence=True, dropout=0.1, optimizer="sgd", **SIZES)
    args = options.parser().parse_args(case.arguments())
    config = options.check(args, case.world_size)
    mode = NoWaits()
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: mode.pin(t))
    with dry_run.fake_ranks(case.world_size, 0):
        trainer = dry_run.trainer_of(args, config)
        trainer.read = lambda step, rows: torch.zeros(2, len(rows), 6, dtype=torch.long).unbind()
        trainer.step(0)
        with mode:
            trainer.step(1)
    assert len(mode.pinned) == 4


def logged_run() -> None:
    """Prints the steps of train_3d.py, and for which of them the host waited."""
    device, log, now = Device(), [], [None]
    plain, record, wait = train_3d.Trainer.step, Event.record, Event.synchronize

    def step(self, number: int) -> Tensor:
        if number == 0:
            device.__enter__()
        log.append(f"step {number}")
        now[0] = number
        stats = plain(self, number)
        if number == 3:
            device.__exit__(None, None, None)
        return stats

    def recorded(self, stream=None) -> None:
        record(self, stream)
        self.step = now[0]

    def waited(self) -> None:
        wait(self)
        log.append(f"wait for {self.step}")

    Event.step = None  # of an event that was never recorded
    train_3d.Trainer.step, Event.record, Event.synchronize = step, recorded, waited
    torch.get_device_module = lambda _: device
    train_3d.is_asynchronous = lambda _: True
    train_3d.main()
    print(log)


def test_the_host_waits_for_the_step_before_the_one_that_it_has_queued():
    done = forked(1, logged_run, *TINY)
    expected = ["step 0", "wait for None", "step 1", "wait for 0", "step 2", "wait for 1", "step 3"]
    assert done.stdout.endswith(f"{expected}\n"), done.stdout + done.stderr


# --- streams: gradients summed by host ------------------------------------------------------------


def summed_by_host() -> None:
    """On two hosts of two ranks. The length of one bucket is odd, so it is padded."""
    device, pairs = Device(), [[0, 1], [2, 3]]
    torch.get_device_module = lambda _: device
    dist.all_reduce = device.collective(dist.all_reduce, 0, 0)
    ddp.reduce_scatter = device.collective(ddp.reduce_scatter, 1, 0)
    ddp.all_gather = device.collective(ddp.all_gather, 1, 0)
    inside, _ = dist.new_subgroups_by_enumeration(pairs)
    across, _ = dist.new_subgroups_by_enumeration([*zip(*pairs, strict=True)])
    reduce, (compute, *_) = ddp.Hierarchical(inside, across), device.streams
    with device:
        for step in range(2):
            buckets = [torch.ones(n) for n in (4, 7, 6)]
            known = dict(compute.seen)
            handles = [reduce(bucket.mul_(1 + step), dist.group.WORLD) for bucket in buckets]
            assert {**compute.seen, compute: 0} == {**known, compute: 0}, "it waited before wait()"
            for bucket, handle in zip(buckets, handles, strict=True):
                handle.wait()
                bucket.div_(4 * (1 + step))
    assert all(torch.equal(bucket, torch.ones_like(bucket)) for bucket in buckets)


def test_the_compute_stream_waits_for_sums_by_host_once():
    launch(4, summed_by_host)


# --- the copy for a checkpoint --------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Of each copy_: is it asynchronous? And how many tensors are allocated."""

    def __init__(self):
        super().__init__()
        self.asynchronous, self.allocations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.asynchronous.append(args[2:] == (True,))
        self.allocations += "empty" in function._schema.name
        return function(*args, **(kwargs or {}))


def save_twice(folder: str) -> None:
    device, waits, trainer = Device(), [], trainer_of(Case(dtype="bf16", **SIZES))
    synchronize, write = device.synchronize, checkpoint.Checkpoints._write
    device.synchronize = lambda: (waits.append("device"), synchronize())
    torch.get_device_module = lambda _: device

    def watched(self, step: int, mine: list, *args) -> None:
        try:
            device.read_by_host([r.tensor for r in mine])
            ends = [(r.tensor.data_ptr(), r.tensor.data_ptr() + r.tensor.nbytes) for r in mine]
            waits.append(max(end for _, end in ends) - min(start for start, _ in ends))
        finally:
            write(self, step, mine, *args)

    checkpoint.Checkpoints._write = watched
    disk = checkpoint.Checkpoints(folder, 2, dist.group.WORLD)
    for step in range(2):
        trainer.step(step)
        mine, numbers = trainer.state_to_save()
        with device, Copies() as copies:
            disk.save(step, mine, {"optimizer": numbers})
        disk.wait()
        assert all(copies.asynchronous) and len(copies.asynchronous) == len(mine) > 1
        assert copies.allocations == (1 if step == 0 else 0)
        # One wait, before the thread reads the buffers, which lie next to each other.
        assert waits[0] == "device" and waits[1] <= sum(r.tensor.nbytes + 16 for r in mine), waits
        assert len(waits) == 2
        waits.clear()
    assert disk.failed is None, disk.failed
    plain = [r._replace(tensor=r.tensor.clone()) for r in mine]
    dcp.save({}, storage_writer=checkpoint_dcp.Writer(f"{folder}/plain", per_thread_copy_ahead=0),
             planner=checkpoint_dcp.SavePlanner(plain))  # fmt: skip
    for name in ("__0_0.distcp", ".metadata"):
        both = [Path(folder, kind, name).read_bytes() for kind in ("step-1", "plain")]
        assert both[0] == both[1], name


def test_a_save_waits_once_for_its_copies_and_reuses_one_buffer(tmp_path):
    launch(1, save_twice, str(tmp_path))
