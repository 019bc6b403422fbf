"""What the host waits for in a step, and what streams wait for each other. No GPU is needed."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import options
import train_3d
from tests.commands import TINY, forked
from tests.streams import Device, Event, tensors_in
from tools import dry_run
from tools.oracle import Case, launch, trainer_of

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

    train_3d.Trainer.step, Event.record, Event.synchronize = step, recorded, waited
    torch.get_device_module = lambda _: device
    train_3d.main()
    print(log)


def test_the_host_waits_for_the_step_before_the_one_that_it_has_queued():
    done = forked(1, logged_run, *TINY)
    expected = ["step 0", "wait for None", "step 1", "wait for 0", "step 2", "wait for 1", "step 3"]
    assert done.stdout.endswith(f"{expected}\n"), done.stdout + done.stderr
