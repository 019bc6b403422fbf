"""Single steps that go wrong, step numbers beyond any run's, and many steps in a row."""

import collections
import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
import data
import ddp
import gpt
import measure
import options
import train_3d
import zero
from logger import Logger
from tests.commands import TINY, forked, read_log
from tools.verify.oracle import Case, launch, trainer_of

SMALL = dict(n_head=2, n_embd=8, vocab_size=19, seq_len=6)


def state(trainer: train_3d.Trainer) -> dict[str, Tensor]:
    """Copies of what this rank holds: parameters, masters, the optimizer's tensors."""
    found = {}
    for name, piece, _, _ in trainer.sync.pieces():
        found[f"piece {name}"] = piece
        found |= {f"{key} {name}": x for key, x in trainer.optimizer.state.get(piece, {}).items()}
    trainer.sync.gather()
    found |= dict(trainer.model.named_parameters())
    copies = {name: x.detach().clone() for name, x in found.items() if x is not None}
    if trainer.args.zero == 3:
        trainer.sync.after_step()  # back to shards
    return copies


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a.keys() | b.keys() if not torch.equal(a[name], b[name])]


# --- a gradient that is not finite ----------------------------------------------------------------


def spoiled_step(trainer: train_3d.Trainer, step: int, value: float) -> float:
    """A step in which one entry of one gradient on the last rank is `value`. Returns the norm."""
    last = dist.get_rank() == dist.get_world_size() - 1
    weight = next(iter(trainer.model.h.values())).attn.c_attn.weight

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[-1, -1] = value
        return spoiled if last else gradient

    hook = weight.register_hook(spoil)
    norm = trainer.step(step)[1].item()
    hook.remove()
    return norm


def train_through_a_bad_step(case: Case, bad: int, value: float) -> float:
    """Three steps; on the last rank a gradient of step `bad` is spoiled. A second trainer skips
    that step. Returns the norm of the bad step."""
    spoiled, clean = trainer_of(case), trainer_of(case)
    for step in range(3):
        before = state(spoiled)
        if step == bad:
            norm = spoiled_step(spoiled, step, value)
            after = state(spoiled)
            for name in after.keys() - before.keys():  # a first step makes moments: zeros
                before[name] = torch.zeros_like(after[name])
            assert differences(before, after) == []
        else:
            assert torch.equal(spoiled.step(step), clean.step(step)), f"step {step}"
            after = state(spoiled)
            assert differences(after, state(clean)) == [], f"step {step}"
            assert any(not torch.equal(before[n], after[n]) for n in before), "no update"
    return norm


def train_through_bad_steps(case: Case) -> tuple[float, float]:
    return (
        train_through_a_bad_step(case, 1, math.inf),
        train_through_a_bad_step(case, 0, math.nan),
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(d=2), Case(d=2, optimizer="sgd", clip=0.0), Case(d=2, zero=1),
        Case(d=2, zero=3, recompute="full"), Case(d=4, zero=2, shard_size=2),
        Case(t=2, sequence=True), Case(p=2, schedule="zb-v"),
        Case(d=2, dtype="bf16", clip=0.0), Case(d=2, zero=3, dtype="bf16", optimizer="sgd"),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_with_an_infinite_gradient_changes_nothing(case):
    case = dataclasses.replace(case, **SMALL, n_layer=4 if case.p > 1 else 2)
    for infinite, nan in launch(case.world_size, train_through_bad_steps, case):
        assert math.isinf(infinite) and math.isnan(nan)


def save_after_a_bad_step(case: Case, folder: str):
    trainer, loaded = trainer_of(case), trainer_of(case)
    trainer.step(0)
    before = state(trainer)
    spoiled_step(trainer, 1, math.inf)
    disk = checkpoint.Checkpoints(folder, 1, dist.group.WORLD)
    held, numbers = trainer.state_to_save()
    disk.save(2, held, {"optimizer": numbers})
    disk.wait()
    assert disk.failed is None, disk.failed
    dist.barrier()  # rank 0 has renamed the folder
    (path, about), _ = checkpoint.newest_complete(checkpoint.find(folder)[0], dist.group.WORLD)
    checkpoint.read(path, loaded.state_to_load(about["optimizer"]), dist.group.WORLD)
    loaded.loaded()
    assert differences(before, state(loaded)) == []


def test_a_save_after_a_step_with_an_infinite_gradient_holds_the_state_before_it(tmp_path):
    launch(2, save_after_a_bad_step, Case(d=2, zero=1, n_layer=2, **SMALL), str(tmp_path))


def test_the_logger_says_that_an_update_was_skipped(tmp_path, capsys):
    flags = ["--metrics", str(tmp_path / "log"), "--steps", "3", "--log-interval", "3"]
    logger = Logger(options.parser().parse_args(flags), gpt.MODELS["nano"])
    logger.start()
    for step, norm in enumerate((1.0, math.inf, math.nan)):
        logger.step(step, torch.tensor([2.0, norm, 0.0]), lr=0.1)
    logger.file.close()
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [row.get("skipped") for row in rows] == [None, True, True]
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert skipped == ["step     2/3  update skipped: gradient norm inf",
                       "step     3/3  update skipped: gradient norm nan"]  # fmt: skip


# --- an exception in the middle of a step ---------------------------------------------------------


class Interrupted(Exception):
    pass


@contextlib.contextmanager
def interrupted(trainer: train_3d.Trainer, call: int, backward: bool) -> Iterator[None]:
    """The given call of the first block's MLP raises, or, if `backward`, the backward through it
    does."""
    mlp = next(iter(trainer.model.h.values())).mlp
    plain, calls = mlp.forward, 0

    def fail(_) -> None:
        raise Interrupted

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        y, calls = plain(x), calls + 1
        if calls == call:
            x.register_hook(fail) if backward else fail(x)
        return y

    mlp.forward = forward
    with pytest.raises(Interrupted):
        yield
    del mlp.forward


class Late:
    """The handle of a collective. Its result is written by wait(), or by deliver() if wait() was
    not called before: the slowest network that is possible."""

    in_flight: list["Late"] = []

    def __init__(self, work: dist.Work, output: Tensor, result: Tensor):
        self.work, self.output, self.result = work, output, result
        Late.in_flight.append(self)

    def wait(self) -> None:
        self.work.wait()
        if self in Late.in_flight:
            Late.in_flight.remove(self)
            self.output.copy_(self.result)

    @staticmethod
    def deliver(*_) -> None:
        while Late.in_flight:
            Late.in_flight[0].wait()


def make_collectives_late() -> None:
    """From now on, in this process: the asynchronous ones of ddp.py and zero.py."""
    all_reduce = dist.all_reduce

    def late_all_reduce(x: Tensor, *args, async_op: bool = False, **kwargs):
        if not async_op:
            return all_reduce(x, *args, **kwargs)
        result = x.clone()
        return Late(all_reduce(result, *args, async_op=True, **kwargs), x, result)

    def late(real: Callable) -> Callable:
        def call(output: Tensor, x: Tensor, **kwargs) -> Late:
            result = torch.empty_like(output)
            return Late(real(result, x.clone(), **kwargs), output, result)

        return call

    dist.all_reduce = late_all_reduce
    for module in (ddp, zero):
        module.all_gather, module.reduce_scatter = late(zero.all_gather), late(zero.reduce_scatter)


def train_through_interruptions(case: Case, ways: list[tuple[int, bool]]) -> int:
    """Three steps. The first two are interrupted in each of these ways (see interrupted) before
    they run. Returns the number of collectives in flight at the last interruption."""
    clean, trainer = trainer_of(case), trainer_of(case)
    expected = []
    for step in range(3):
        stats = clean.step(step)
        gradients = [piece.grad.clone() for _, piece, _, _ in clean.sync.pieces()]
        expected.append((stats, gradients, state(clean)))
    make_collectives_late()
    in_flight = 0
    for step in range(3):
        for call, backward in ways if step < 2 else ():
            with interrupted(trainer, call, backward):
                trainer.step(step)
            in_flight = len(Late.in_flight)
            trainer.sync.start()
            gathered = any(unit.gathered for unit in trainer.sync.units) if case.zero else False
            assert case.zero < 3 or not gathered, "gathered"
        block = next(iter(trainer.model.h.values()))
        hook = block.register_forward_pre_hook(Late.deliver)
        stats, gradients, held = expected[step]
        assert torch.equal(trainer.step(step), stats), f"step {step}"
        hook.remove()
        for (name, piece, _, _), gradient in zip(trainer.sync.pieces(), gradients, strict=True):
            assert torch.equal(piece.grad, gradient), f"step {step}: gradient of {name}"
        assert differences(state(trainer), held) == [], f"step {step}"
    return in_flight


SIZES = dict(m=2, n_head=2, n_embd=8, n_layer=3, vocab_size=19, seq_len=6, bucket_bytes=1000)


@pytest.mark.parametrize(
    "case",
    [
        Case(d=2, **SIZES), Case(d=4, nodes=2, **SIZES), Case(d=2, dtype="bf16", **SIZES),
        Case(d=2, zero=1, **SIZES), Case(d=2, zero=2, **SIZES), Case(d=2, zero=3, **SIZES),
        Case(d=2, zero=3, reshard=0, **SIZES), Case(d=4, zero=2, shard_size=2, **SIZES),
        Case(d=4, zero=3, shard_size=2, **SIZES),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_after_an_interrupted_step_equals_the_step_alone(case):
    """The second microbatch is interrupted: in its forward, then in its backward."""
    ways = [(2, False), (2, True)]
    in_flight = launch(case.world_size, train_through_interruptions, case, ways)
    assert min(in_flight) > 0, "no collective was in flight"


@pytest.mark.parametrize(
    "case",
    [
        Case(t=2, sequence=True, **SIZES), Case(schedule="zb-h1", **SIZES),
        Case(t=2, d=2, zero=2, sequence=True, schedule="zb-h1", **SIZES),
        Case(d=2, zero=3, recompute="selective", dropout=0.1, **SIZES),
    ],
    ids=str,
)  # fmt: skip
def test_other_strategies_after_an_interrupted_step(case):
    launch(case.world_size, train_through_interruptions, case, [(2, False), (2, True)])


@pytest.mark.parametrize("zero", [0, 3])
def test_recompute_after_an_interrupted_step(zero):
    """Calls of a block: forward, recompute, and the same of the second microbatch."""
    case = Case(d=2, zero=zero, recompute="full", dropout=0.1, **SIZES)
    launch(2, train_through_interruptions, case, [(3, False), (4, False), (3, True)])


def pipeline_after_an_interrupted_step(case: Case) -> str:
    trainer = trainer_of(case)
    trainer.step(0)
    with interrupted(trainer, 2 - trainer.pp_rank, False):  # rank 0 has sent a microbatch
        trainer.step(1)
    with pytest.raises(RuntimeError) as error:
        trainer.step(1)
    return str(error.value)


def test_a_pipeline_refuses_to_run_after_an_interrupted_step():
    for message in launch(2, pipeline_after_an_interrupted_step, Case(p=2, **SIZES)):
        assert "interrupted" in message and "resume from the newest checkpoint" in message


# --- large step numbers, small corpora ------------------------------------------------------------

LARGE = (10**9, 2**40)


@pytest.mark.parametrize("step", LARGE)
def test_batches_of_large_steps(step):
    tokens, rows = np.arange(10_000), range(8)

    def starts(step: int, rows: range) -> list[int]:
        x, y = data.batch(tokens, step, rows, seq_len=4, seed=0)
        assert torch.equal(y, x + 1)
        return x[:, 0].tolist()

    here = starts(step, rows)
    assert here == starts(step, range(3)) + starts(step, range(3, 8))
    for other in (0, step - 1, step + 1, step % 2**32 + 1, 2 * step):
        assert starts(other, rows) != here, other


@pytest.mark.parametrize("step", LARGE)
def test_dropout_masks_of_large_steps(step):
    drop, x = gpt.Dropout(0.5), torch.ones(8, 6, 5)
    drop.draws = gpt.Draws()

    def mask(step: int, rows: range) -> Tensor:
        drop.draws.at(step, rows)
        return drop(x[: len(rows)])

    here = mask(step, range(8))
    assert torch.equal(here, torch.cat([mask(step, range(3)), mask(step, range(3, 8))]))
    for other in (0, step - 1, step + 1, step % 2**32 + 1, 2 * step):
        assert not torch.equal(mask(other, range(8)), here), other


def stats_of_large_steps(case: Case) -> Tensor:
    """Loss and norm of four steps, from a trainer that reads with data.batch."""
    trainer, tokens = trainer_of(case), np.arange(1000) ** 2 % case.vocab_size
    trainer.read = lambda step, rows: data.batch(tokens, step, rows, case.seq_len, case.seed)
    return torch.stack([trainer.step(step)[:2] for start in LARGE for step in (start, start + 1)])


def test_large_steps_do_not_depend_on_the_layout():
    sizes = dict(n_layer=2, n_head=2, n_embd=8, vocab_size=19, seq_len=6, dropout=0.2)
    (alone,) = launch(1, stats_of_large_steps, Case(m=8, b=1, **sizes))
    assert len(set(alone[:, 0].tolist())) == 4
    for case in (
        Case(t=2, d=2, m=2, b=2, zero=3, sequence=True, recompute="full", **sizes),
        Case(p=2, d=2, m=4, b=1, **sizes),
    ):
        for stats in launch(4, stats_of_large_steps, case):
            torch.testing.assert_close(stats, alone, rtol=measure.TOLERANCE, atol=0)


def test_the_learning_rate_beyond_the_last_step_stays_the_lowest():
    for warmup in (None, 0, 7, 40):
        for step in (40, 41, 79, 80, *LARGE):
            rate = gpt.learning_rate(step, 40, warmup, peak=1.0)
            assert rate == pytest.approx(0.1 if warmup != 40 or step > 40 else 1.0), (warmup, step)


def test_a_corpus_shorter_than_the_run(tmp_path):
    """The shortest text that is accepted: one row to train on, one to validate."""
    path, length = tmp_path / "text", int(TINY[TINY.index("--seq-len") + 1])
    path.write_bytes(bytes(range(2 * (length + 1))))
    runs = []
    for ranks, flags in ((0, ""), (0, ""), (4, "--tp 2 --zero 1")):
        log = tmp_path / f"log{len(runs)}"
        line = [*TINY, "--steps", 12, "--eval-interval", 6, "--lr", 0.01, "--data", path]
        line += ["--metrics", log]
        done = forked(ranks, train_3d.main, *line, *flags.split())
        assert done.returncode == 0, done.stderr
        keys = ("loss", "grad_norm", "val_loss")
        runs.append([row[key] for row in read_log(log) for key in keys if key in row])
    alone, again, *others = runs
    assert len(alone) == 2 * 12 + 2 and again == alone
    assert alone[0] > 5 and alone[-3] < 0.8 * alone[0], "it learns its one row"
    for run in others:
        assert run == pytest.approx(alone, rel=measure.TOLERANCE)


# --- many steps -----------------------------------------------------------------------------------


def lengths(name: str, x: object, seen: dict[str, int]) -> dict[str, int]:
    """The length of every container that x holds, by its path."""
    if isinstance(x, (list, tuple, set, dict, collections.deque)):
        seen[name] = len(x)
        for i, item in enumerate(x.values() if isinstance(x, dict) else x):
            lengths(f"{name}[{i}]", item, seen)
    elif type(x).__module__ in ("ddp", "zero", "pipeline", "gpt") and not isinstance(
        x, (torch.nn.Module, torch.autograd.Function)
    ):
        for key, value in vars(x).items():
            lengths(f"{name}.{key}", value, seen)
    return seen


def held_by_this_process(trainer: train_3d.Trainer) -> dict[str, object]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory goes back to the kernel
    parts = {name: getattr(trainer, name) for name in ("sync", "pipe", "draws")}
    hooks = [getattr(module, name) for module in trainer.model.modules()
             for name in ("_forward_hooks", "_forward_pre_hooks")]  # fmt: skip
    hooks += [p._backward_hooks or () for p in trainer.model.parameters()]
    state = [len(x) for x in trainer.optimizer.state.values()]
    status = Path("/proc/self/status").read_text()
    return {
        "tensors": sum(isinstance(x, Tensor) for x in gc.get_objects()),
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "hooks": sum(map(len, hooks)),
        "containers": lengths("trainer", parts, {}) | {"optimizer.state": sum(state)},
        "bytes": 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]),
    }


def leak(trainer: train_3d.Trainer, kept: list, step: int) -> None:
    """Leaves one of each kind per step; of memory, as much as one activation of a block. Only one
    thread is started, because a thread has a stack."""
    kept.append(torch.empty(0))
    size = (trainer.args.micro_batch_size, trainer.config.seq_len, trainer.config.n_embd)
    kept.append(torch.ones(size, dtype=torch.float64).untyped_storage())
    kept.append(os.dup(0))
    vars(trainer.pipe).setdefault("leaked", []).append(0)
    next(trainer.model.parameters()).register_hook(lambda gradient: None)
    if step == WARMUP:
        threading.Thread(target=threading.Event().wait, daemon=True).start()


WARMUP, STEPS = 20, 180
LIMITS = {"tensors": 10, "bytes": 3 * 2**19}  # a leak per step is 180 tensors, 2.9 MB
WIDE = dict(b=2, n_layer=2, n_head=2, n_embd=32, vocab_size=19, seq_len=32)


def without_flight_recorder(rank: int) -> None:
    """torch.distributed records the last 2000 collectives: its buffer grows by 2 MB."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"


def what_grows(case: Case, leaking: bool = False) -> dict[str, tuple]:
    """By kind, after the warmup and at the end: what grew by more than its limit."""
    trainer, kept = trainer_of(case), []
    for step in range(WARMUP):
        trainer.step(step)
    before = held_by_this_process(trainer)
    for step in range(WARMUP, WARMUP + STEPS):
        trainer.step(step)
        if leaking:
            leak(trainer, kept, step)
    after = held_by_this_process(trainer)
    return {
        kind: (before[kind], x)
        for kind, x in after.items()
        if (x - before[kind] > LIMITS[kind] if kind in LIMITS else x != before[kind])
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(d=2, **WIDE), Case(d=2, zero=3, recompute="full", **WIDE),
        Case(t=2, p=2, schedule="zb-v", **WIDE | {"n_layer": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_grows_in_180_steps(case):
    for grown in launch(case.world_size, what_grows, case, before=without_flight_recorder):
        assert grown == {}


@pytest.mark.slow
def test_a_leak_in_every_step_is_seen():
    (grown,) = launch(1, what_grows, Case(**WIDE), True, before=without_flight_recorder)
    assert grown.keys() == {"tensors", "threads", "descriptors", "hooks", "containers", "bytes"}
