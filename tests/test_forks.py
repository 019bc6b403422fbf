"""Runs the examples, and compares what they define with one process in more layouts. If an example
needed a change in another file, an interface would be missing there."""

import dataclasses
import functools
import random
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddp
import measure
import tensor_parallel
from examples import compressed_gradients, llama, optimizer, own_schedule, shared_kv
from measure import TOLERANCE
from schedules import draw
from tests.commands import ROOT, forked
from tests.test_plan import differences
from tools.verify.fuzz import draw_case, verdict
from tools.verify.oracle import Case, judge, launch, trainer_of

EXAMPLES = [
    path for path in sorted((ROOT / "examples").glob("*.py")) if "def main" in path.read_text()
]


@pytest.mark.parametrize(
    "example, ranks",
    [(own_schedule, 3), (compressed_gradients, 2), (llama, 4), (shared_kv, 4), (optimizer, 3)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_an_example_runs_and_finds_no_mismatch(example, ranks):
    done = forked(ranks, example.main)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok\n") >= 4 and "MISMATCH" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    "example, ranks, owner, name, wrong",
    [
        (own_schedule, 2, own_schedule, "predicted_bubble", lambda p, m: 0.5),
        (llama, 4, tensor_parallel, "all_reduce_partial", lambda gradients: None),
        (compressed_gradients, 2, compressed_gradients, "Narrow", ddp.all_reduce_bucket),
        (optimizer, 2, torch.Tensor, "sign_", lambda t: t.div_(t.norm())),  # not element-wise
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_example_fails_on_a_mismatch(example, ranks, owner, name, wrong):
    done = forked(ranks, example.main, before=lambda: setattr(owner, name, wrong))
    assert done.returncode == 1 and "MISMATCH" in done.stdout, done.stdout + done.stderr


def test_an_example_says_what_it_needs():
    done = forked(0, llama.main)
    command = "torchrun --standalone --nproc-per-node 4 -m examples.llama"
    assert done.stderr == f"examples.llama: start it with  {command}\n"
    assert done.returncode == 1
    done = forked(2, llama.main, "--tp", 2, "--pp", 2)
    assert done.returncode == 2 and "start a multiple of 4 ranks" in done.stderr, done.stderr
    done = forked(2, llama.main, "--tp", 2)
    assert done.returncode == 0 and "given losses" in done.stdout, done.stdout + done.stderr


def test_examples_say_how_to_run_them_and_are_not_imported():
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        command = f"torchrun --standalone --nproc-per-node . -m examples.{path.stem}\n"
        assert re.search(f"^    {command}", path.read_text(), re.M), path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")):
        assert not re.search(r"^\s*(from|import) examples", path.read_text(), re.M), path


# --- a schedule -----------------------------------------------------------------------------------


def test_a_schedule_of_ones_own():
    for case in (Case(p=3, m=5), Case(t=2, p=2, d=2, m=4, zero=1, recompute="full")):
        assert judge(case, {"schedule": own_schedule.waves}).worst <= TOLERANCE
    assert draw(own_schedule.waves(2, 3)).splitlines() == [
        "rank 0 |F0 F1 .  .  .  B1--- B0--- F2 .  .  .  B2---",
        "rank 1 |.  F0 F1 B1--- B0--- .  .  .  F2 B2--- .  .",
    ]


# --- compressed gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bits", [(torch.float16, 11), (torch.bfloat16, 8)], ids=str)
def test_a_compressed_gradient(dtype, bits):
    reduce = functools.partial(compressed_gradients.Narrow, dtype=dtype)
    sync = functools.partial(ddp.DDP, reduce=reduce, bucket_bytes=2000)
    errors = judge(Case(d=2, p=2, optimizer="sgd", tied=False), {"sync": sync})
    assert 0.5 < errors.gradient * 2**bits < 4, errors  # it was rounded, and only that
    assert errors.parameter < 1e-5 * 2 ** (11 - bits), errors


def top_k(fraction: float, feedback: bool) -> tuple[float, int]:
    """(loss after 60 steps of a least-squares fit, elements gathered in a step)."""
    torch.manual_seed(0)
    truth, net = torch.randn(1, 40), nn.Linear(40, 1, bias=False)
    reduce = compressed_gradients.TopK(fraction, feedback)
    sync = ddp.DDP(net, dist.group.WORLD, 1, reduce=reduce)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    for _ in range(60):
        sync.start()
        x = torch.randn(32, 40)
        loss = (net(x) - x @ truth.T).square().mean() / dist.get_world_size()
        with measure.Collectives() as seen:
            loss.backward()
            sync.finish()
        sync.step(optimizer)
    return loss.item(), seen.total(None, "all_gather").payload


def test_the_largest_tenth_with_error_feedback():
    loss, gathered = launch(2, top_k, 0.1, True)[0]
    assert loss < 1e-4 and gathered == 2 * 2 * 4  # from each rank 4 of 40 values, and their places
    assert launch(2, top_k, 0.1, False)[0][0] > 1e-3, "without feedback it must be worse"


def test_all_of_the_entries_are_an_exact_sum():
    sync = functools.partial(ddp.DDP, reduce=compressed_gradients.TopK(1.0), bucket_bytes=2000)
    assert judge(Case(d=3, optimizer="sgd"), {"sync": sync}).worst <= TOLERANCE


# --- a model with its plan ------------------------------------------------------------------------

SIZES = dict(n_head=4, n_embd=32, n_layer=3, vocab_size=41, m=3)
SIZES |= dict(arch="examples.llama", config=("n_hidden=85", "qk_norm=true"))


@pytest.mark.parametrize(
    "case",
    [
        Case(**SIZES),
        Case(t=2, p=2, d=2, zero=1, **SIZES | dict(config=("n_kv_head=4",))),
        Case(t=2, p=3, optimizer="sgd", recompute="full", **SIZES),
        Case(t=2, p=2, d=2, zero=3, sequence=True, seq_len=8, **SIZES),
        Case(p=2, zero=2, schedule="zb-h1", attention="explicit", recompute="selective", **SIZES),
        Case(t=2, p=2, resume=dict(at=2, t=1, p=1, d=3, m=1, zero=3), **SIZES),
    ],
    ids=str,
)  # fmt: skip
def test_another_model_cut_by_its_own_plan(case):
    errors = judge(case)
    assert errors.worst <= TOLERANCE, errors


def test_a_plan_that_splits_a_kv_head_is_refused():
    with pytest.raises(RuntimeError, match="ValueError: --tp 4: n_kv_head 2 cannot be split"):
        judge(Case(t=4, **SIZES))


@pytest.mark.slow
def test_a_slice_of_fuzz_of_another_model():
    rng, compared = random.Random(2026), 0
    for case in (draw_case(rng, 8, resumes=0.0) for _ in range(24)):
        kv = rng.choice([k for k in range(case.t, case.n_head, case.t) if case.n_head % k == 0]
                        or [case.n_head])  # fmt: skip
        config = (f"n_kv_head={kv}", f"n_hidden={rng.randint(8, 40)}", f"qk_norm={kv % 2 == 0}")
        new = dict(arch="examples.llama", config=config, dropout=0.0)
        case = dataclasses.replace(case, n_embd=case.n_head * rng.choice((4, 6)), **new)
        ok, line = verdict(case)
        assert ok, (str(case), line)
        compared += "refused" not in line
    assert compared >= 8


# --- fewer kv heads than tp ranks: ranks share a kv head ------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(t=4, optimizer="sgd", **SIZES),
        Case(t=4, sequence=True, seq_len=8, **SIZES),
        Case(t=4, d=2, zero=3, sequence=True, seq_len=8, optimizer="sgd", **SIZES),
        Case(t=2, p=2, d=2, zero=1, schedule="zb-h1", **SIZES),
    ],
    ids=str,
)
def test_ranks_share_a_kv_head(case):
    errors = judge(dataclasses.replace(case, arch="examples.shared_kv"))
    assert errors.worst <= TOLERANCE, errors


def test_ranks_whose_heads_share_unevenly_are_refused():
    config = shared_kv.Config(n_head=12, n_embd=48, n_kv_head=3)
    assert shared_kv.plan(config, 3) and shared_kv.plan(config, 6)
    with pytest.raises(ValueError, match="--tp 2: it is neither a divisor nor a multiple of n_kv"):
        shared_kv.plan(config, 2)  # 6 heads per rank: 4 of one key/value head, and 2 of the next


def test_ranks_that_share_a_kv_head_send_it_each():
    case = Case(t=4, c=2, seq_len=8, **SIZES | dict(arch="examples.shared_kv"))
    errors = judge(case)
    assert errors.worst <= TOLERANCE, errors
    for found in launch(8, differences, case):  # others: the formulas are those of a fused qkv
        assert not [key for key in found if key[0] == "cp"], found


# --- an optimizer ---------------------------------------------------------------------------------


def train_with_lion(case: Case, one_process: dict | None = None) -> dict | float:
    """Train a Llama, in which no gradient is 0 in exact arithmetic. Returns the losses and norms,
    and this rank's parameters. With `one_process`, the result of one process, returns the largest
    relative error."""
    trainer = trainer_of(case)
    pieces = [piece.tensor for piece in trainer.sync.pieces()]
    trainer.optimizer = optimizer.Lion(pieces, weight_decay=0.1)
    found = {"stats": torch.stack([trainer.step(step)[:2] for step in range(case.steps)])}
    trainer.sync.gather()
    parameters = dict(trainer.model.named_parameters())
    found |= {name: p.detach().clone() for name, p in parameters.items()}
    if one_process is None:
        return found
    expected = {name: one_process[name] for name in found}
    for name, p in parameters.items():
        expected[name] = p.distribution.shard(expected[name])
    return measure.largest(measure.relative_errors(found, expected).values())


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_an_optimizer_in_the_trainer(zero):
    case = Case(**SIZES | {"m": 6})
    [expected] = launch(1, train_with_lion, case)
    case = dataclasses.replace(case, t=2, p=2, d=2, m=3, zero=zero)
    assert max(launch(8, train_with_lion, case, expected)) <= TOLERANCE
