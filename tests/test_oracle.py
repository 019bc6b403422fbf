"""The judge must refuse each kind of wrong layout."""

import functools
import math
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddp
import measure
from tests.commands import Forked
from tools.verify import oracle
from tools.verify.oracle import TOLERANCES, Case, judge


def after_the_last_step(spoil):
    """A step function for judge() that calls spoil(trainer) when the last step is done."""

    def step_of(trainer, step: int):
        stats = trainer.step(step)
        if step + 1 == trainer.args.steps:
            with torch.no_grad():
                spoil(trainer)
        return stats

    return {"step": step_of}


def exchange(tensor: torch.Tensor) -> None:
    """On both of two ranks: take the other rank's values."""
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    tensor.copy_(both[1 - dist.get_rank()])


def swap_parameter_shards(trainer) -> None:
    exchange(trainer.model.h["0"].mlp.c_fc.weight)


def swap_gradient_shards(trainer) -> None:
    """Both ranks have 3 of 6 rows, so sizes and offsets agree."""
    (piece,) = (piece for n, piece, *_ in trainer.sync.pieces() if n.endswith("0.mlp.c_fc.weight"))
    exchange(piece.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-6])
@pytest.mark.parametrize("kind", ["gradient", "parameter"])
def test_one_wrong_entry_on_one_rank_is_seen(kind, value):
    def add(trainer) -> None:
        if dist.get_rank() == 1:
            _, piece, p, _ = trainer.sync.pieces()[-1]
            (p if kind == "parameter" else piece.grad).view(-1)[-1] += value

    errors = judge(Case(d=2, m=1, n_layer=1), after_the_last_step(add))
    other = errors.gradient if kind == "parameter" else errors.parameter
    assert errors.worst > 1e-8 and other <= measure.TOLERANCE and errors.where.startswith(kind)


@pytest.mark.parametrize("swap", [swap_parameter_shards, swap_gradient_shards])
def test_shards_that_changed_places_are_seen(swap):
    errors = judge(Case(t=2, m=1, n_layer=1), after_the_last_step(swap))
    assert errors.worst > 1e-3 and "c_fc" in errors.where


def lose_a_layer(trainer) -> None:
    del trainer.model.ln_f


def lose_a_piece(trainer) -> None:
    pieces = trainer.sync.pieces()
    trainer.sync.pieces = lambda: pieces[dist.get_rank() :]


def lose_half_a_piece(trainer) -> None:
    *pieces, (name, piece, p, at) = trainer.sync.pieces()
    half = piece[: piece.numel() // 2]
    half.grad = piece.grad[: half.numel()]
    trainer.sync.pieces = lambda: [*pieces, (name, half, p, at)]


def two_of_one_name(trainer) -> None:
    trainer.model.other = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    trainer.model.other.tied_name = "wte.weight"


def one_too_many(trainer) -> None:
    trainer.model.extra = nn.Parameter(torch.zeros(0, dtype=torch.float64))


def reshape(trainer) -> None:
    p = trainer.model.ln_f.weight
    p.data = p.data.view(1, -1)


def one_entry_for_all(trainer) -> None:
    """Broadcasting would compare it with every entry."""
    trainer.model.h["0"].attn.c_attn.bias.data = torch.zeros(1, dtype=torch.float64)


def narrow(trainer) -> None:
    p = trainer.model.ln_f.weight
    p.data = p.data.float()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lose_a_layer, "pieces of parameters that this rank does not hold: .*ln_f"),
        (lose_a_piece, r"the ranks that shard the state hold \d+ of \d+ elements"),
        (lose_half_a_piece, "pieces that the optimizer does not update: .*ln_f"),
        (two_of_one_name, "two parameters have one name"),
        (one_too_many, "unexpected: .'extra'"),
        (reshape, r"ln_f.weight is \(1, 24\) .* expected \(24,\)"),
        (one_entry_for_all, r"c_attn.bias.* is \((1|72),\) .* expected \((1|72),\)"),
        (narrow, "ln_f.weight is .* in torch.float32: expected .* in torch.float64"),
    ],
)
def test_what_cannot_be_compared_is_refused(spoil, message):
    with pytest.raises(RuntimeError, match=message):
        judge(Case(d=2, m=1, n_layer=1), after_the_last_step(spoil))


def lose_a_layer_and_its_pieces(trainer) -> None:
    lost = {id(p) for p in trainer.model.ln_f.parameters()}
    pieces = [piece for piece in trainer.sync.pieces() if id(piece[2]) not in lost]
    trainer.sync.pieces = lambda: pieces
    trainer.model.ln_f = nn.Identity()


def test_a_gradient_that_no_rank_holds_is_refused():
    """The checks of every rank pass."""
    with pytest.raises(AssertionError, match="no rank compared 24 elements of ln_f.weight"):
        judge(Case(p=2, m=1, n_layer=2), after_the_last_step(lose_a_layer_and_its_pieces))


BF16 = dict(dtype="bf16", m=2, n_layer=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(d=2, **BF16), Case(d=2, zero=3, grad_dtype="bf16", optimizer="sgd", **BF16),
        Case(t=2, p=2, sequence=True, seq_len=8, **BF16),
    ],
    ids=str,
)  # fmt: skip
def test_rounding_of_bf16_is_within_its_tolerances(case):
    assert judge(case).within("bf16")


class NoSum:
    """An all-reduce that does not happen."""

    def __init__(self, flat, group):
        pass

    def wait(self):
        pass


def lose_the_masters(trainer, step: int):
    """Rounds the masters to bf16 after each step, so small updates are lost."""
    stats = trainer.step(step)
    for _, piece, _, _ in trainer.sync.pieces():
        piece.data.copy_(piece.bfloat16())
    return stats


def decay_nothing(trainer, step: int):
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    return trainer.step(step)


@pytest.mark.parametrize(
    "seams, optimizer, kind",
    [
        ({"sync": functools.partial(ddp.DDP, reduce=NoSum)}, "adamw", "gradient"),
        ({"step": lose_the_masters}, "adamw", "parameter"),
        ({"step": lose_the_masters}, "sgd", "parameter"),
        ({"step": decay_nothing}, "sgd", "parameter"),
        (after_the_last_step(lambda trainer: trainer.sync.pieces()[-1][1].grad.fill_(math.nan)),
         "sgd", "gradient"),
        (after_the_last_step(lambda trainer: trainer.sync.pieces()[-1][1].grad.zero_()), "sgd",
         "gradient"),
    ],
)  # fmt: skip
def test_bugs_are_beyond_the_tolerances_of_bf16(seams, optimizer, kind):
    errors = judge(Case(d=2, optimizer=optimizer, **BF16), seams)
    assert getattr(errors, kind) > TOLERANCES["bf16"][errors._fields.index(kind)], errors
    assert not errors.within("bf16")


def spoil_a_parameter(trainer) -> None:
    """One that rank 0 holds the master of; under ZeRO-3 it is gathered first, and stays."""
    trainer.sync.gather()
    if dist.get_rank() == trainer.args.zero // 3:
        next(trainer.model.parameters()).view(-1)[0] += 1
    trainer.sync.gather = lambda: None


@pytest.mark.parametrize(
    "zero, message",
    [(0, r"wte.weight\[0:\] does not equal its rounded master"),
     (3, "wte.weight differs between the ranks that share it")],
)  # fmt: skip
def test_bf16_parameters_that_are_not_their_masters_are_refused(zero, message):
    """Under ZeRO-3 the wrong entry is on rank 1, which does not hold its master."""
    with pytest.raises(RuntimeError, match=message):
        judge(Case(d=2, zero=zero, **BF16), after_the_last_step(spoil_a_parameter))


def fail_on_rank_1() -> None:
    assert dist.get_rank() == 0, "on purpose"
    dist.barrier()


def test_the_rank_that_failed_first_is_reported(monkeypatch):
    """Rank 0 loses its connection afterwards. The parent looks when both have failed."""
    wait = oracle.multiprocessing.connection.wait
    monkeypatch.setattr(oracle.multiprocessing.connection, "wait",
                        lambda ends, timeout: [wait([end])[0] for end in ends])  # fmt: skip
    with pytest.raises(RuntimeError, match="rank 1 failed:(.|\n)*on purpose"):
        oracle.launch(2, fail_on_rank_1)


def test_a_resume_with_another_batch_is_refused():
    """The resumed run would read other rows and be reported as a mismatch."""
    case = Case(d=2, m=2, b=2, resume={"at": 1, "d": 1, "m": 2})
    with pytest.raises(ValueError, match="begins with 8 rows per batch and is resumed with 4"):
        judge(case)


def a_rank_that_hangs() -> None:
    with measure.Report("hangs.py", timeout=3) as report:
        if report.group.rank() == 1:
            signal.pause()
        ddp.global_count(torch.zeros(1), report.group)


def test_a_hang_in_a_demo_ends_with_a_message():
    with Forked(2, a_rank_that_hangs) as job:
        job.processes[0].join(60)
        assert job.processes[0].exitcode == 1
        said = job.read("errors")
    assert said.startswith("hangs.py: rank 0: all_reduce over all ranks failed because a rank")
    assert said.count("\n") == 1
