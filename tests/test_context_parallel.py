"""Context parallelism next to one process: attention alone, its costs, and training runs."""

import dataclasses
import functools
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import context_parallel as cp
import generate
import gpt
import measure
import options
from measure import TOLERANCE
from tests.commands import forked
from tools.verify import counting
from tools.verify.oracle import Case, judge, launch, reader, trainer_of

D = torch.float64


def slow(*values) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# --- attention alone ------------------------------------------------------------------------------

fused = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)


def explicit(q, k, v, keep=None):
    """One process. keep [b, a, s, s]: the dropout mask divided by 1 - p."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = q @ k.mT / q.size(-1) ** 0.5
    weights = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf).softmax(
        -1
    )
    return (weights if keep is None else weights * keep) @ v


METHODS = {
    "version 1": lambda group: functools.partial(cp.gathered_attention, group=group),
    "ring": lambda group: lambda *qkv: cp.RingAttention.apply(*qkv, group, True, None),
    "ring, explicit": lambda group: lambda *qkv: cp.RingAttention.apply(*qkv, group, False, None),
    "ulysses": lambda group: functools.partial(cp.ulysses_attention, group=group, core=fused),
    "ulysses, explicit": lambda group: functools.partial(
        cp.ulysses_attention, group=group, core=explicit
    ),
}


def inputs(a: int, kv_heads: int, s: int, n: int = 6, b: int = 2) -> dict[str, torch.Tensor]:
    """q, k, v and the gradient of the output, for all tokens."""
    generator = torch.Generator().manual_seed(s)
    heads = {"q": a, "k": kv_heads, "v": kv_heads, "grad": a}
    return {x: torch.randn(b, h, s, n, dtype=D, generator=generator) for x, h in heads.items()}


def run(attention, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and the gradients of q, k and v."""
    qkv = {name: given[name].clone().requires_grad_() for name in "qkv"}
    out = attention(*qkv.values())
    out.backward(given["grad"])
    return {"out": out.detach()} | {name: x.grad for name, x in qkv.items()}


def shard(full: dict[str, torch.Tensor], group) -> dict[str, torch.Tensor]:
    s = next(iter(full.values())).size(2)
    mine = cp.positions(s, group.size(), [group.rank()])
    return {name: x[:, :, mine] for name, x in full.items()}


def alone(method: str) -> float:
    """The largest relative error: one token per chunk, and 5; as many key/value heads as heads, and
    fewer, which c divides or does not."""
    group, worst = dist.group.WORLD, 0.0
    for a, kv_heads, chunk in [(12, 12, 1), (12, 12, 5), (12, 4, 1), (12, 4, 5), (12, 2, 3)]:
        full = inputs(a, kv_heads, s=2 * group.size() * chunk)
        expected = shard(run(explicit, full), group)
        found = run(METHODS[method](group), shard(full, group))
        errors = measure.relative_errors(found, expected).values()
        worst = max(worst, measure.largest(errors))
    return worst


@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_and_its_gradients_equal_one_process(method, c):
    errors = launch(c, alone, method)
    assert max(errors) <= TOLERANCE, errors


def dropped(s: int) -> float:
    group = dist.group.WORLD
    c, full = group.size(), inputs(4, 2, s)
    keep = torch.rand(2, 4, s, s, generator=torch.Generator().manual_seed(1), dtype=D)
    keep = (keep > 0.3) / 0.7
    expected = shard(run(functools.partial(explicit, keep=keep), full), group)
    mine, order = cp.positions(s, c, [group.rank()]), cp.positions(s, c, range(c))
    keep = keep[:, :, mine][..., order]
    found = run(lambda *qkv: cp.RingAttention.apply(*qkv, group, False, keep), shard(full, group))
    return measure.largest(measure.relative_errors(found, expected).values())


@pytest.mark.parametrize("c", [1, 2, 3])
def test_the_dropout_mask_of_ring_attention(c):
    errors = launch(c, dropped, 6 * c)
    assert max(errors) <= TOLERANCE, errors


def of_a_model(attention: str, dropout: float) -> dict[str, float]:
    """ContextParallelCore, which a model calls, next to gpt.Core of all tokens: output and
    gradients of each method. Without dropout also next to version 1."""
    group = dist.group.WORLD
    c, full, errors = group.size(), inputs(6, 6, s=24), {}
    config = gpt.GPTConfig(1, 6, 36, 41, 24, attention, dropout=dropout)

    def core_of(tokens: gpt.Subset) -> gpt.Core:
        core = gpt.Core(config)
        core.tokens, core.drop.draws = tokens, gpt.Draws()
        core.drop.draws.at(3, range(2))
        return core

    expected = shard(run(core_of(gpt.ALL), full), group)
    for method in cp.METHODS:
        core = core_of(gpt.Subset(cp.zigzag(c, group.rank()), 2 * c))
        found = run(cp.ContextParallelCore(core, group, method), shard(full, group))
        errors[method] = measure.largest(measure.relative_errors(found, expected).values())
        if not dropout:
            first = run(METHODS["version 1"](group), shard(full, group))
            both = measure.relative_errors(found, first).values()
            errors[f"{method}, version 1"] = measure.largest(both)
    return errors


@pytest.mark.parametrize("attention, dropout", [("sdpa", 0.0), ("explicit", 0.0), ("sdpa", 0.3)])
def test_the_attention_of_a_model_equals_one_process_and_version_1(attention, dropout):
    for errors in launch(3, of_a_model, attention, dropout):
        assert max(errors.values()) <= TOLERANCE, errors


# --- rounding -------------------------------------------------------------------------------------


def rounded(method: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """(squared error, squared size) of this rank's shards. 96 tokens on any number of ranks."""
    group, full = dist.group.WORLD, inputs(8, 8, s=96, n=16)
    full = {name: x.to(dtype) for name, x in full.items()}
    expected = shard(run(explicit, {name: x.double() for name, x in full.items()}), group)
    found = run(METHODS[method](group), shard(full, group))
    assert {x.dtype for x in found.values()} == {dtype}
    return {name: ((found[name].double() - x).square().sum().item(), x.square().sum().item())
            for name, x in expected.items()}  # fmt: skip


def rounding(method: str, dtype: torch.dtype, c: int) -> dict[str, float]:
    """Relative errors of the output and the gradients, over all ranks."""
    ranks, errors = launch(c, rounded, method, dtype), {}
    for name in ranks[0]:
        error, size = map(sum, zip(*(rank[name] for rank in ranks), strict=True))
        errors[name] = (error / size) ** 0.5
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["version 1", "ring", "ring, explicit"])
def test_rounding_errors_do_not_grow_with_the_number_of_ranks(method, dtype):
    """1 rank computes with the same kernel, and merges nothing. Ulysses only moves tensors."""
    one = rounding(method, dtype, 1)
    for c in (2, 8):
        ratios = {name: error / one[name] for name, error in rounding(method, dtype, c).items()}
        assert max(ratios.values()) <= 1.4, (c, ratios)


# --- costs ----------------------------------------------------------------------------------------


def counted(method: str, a: int, kv_heads: int) -> tuple[dict, dict, int]:
    """(all calls, those with a matmul before the result is used, FLOPs) of an attention layer."""
    group, full = dist.group.WORLD, inputs(a, kv_heads, s=24)
    mine = shard(full, group)
    with FlopCounterMode(display=False) as flops, counting.Collectives({"cp": group}) as seen:
        run(METHODS[method](group), mine)
    kinds = {(call.phase, call.operation) for call in seen.calls}
    calls, hidden = ({kind: tuple(seen.total("cp", kind[1], kind[0], hidden=h)) for kind in kinds}
                     for h in (None, True))  # fmt: skip
    return (
        calls,
        {kind: calls for kind, (calls, _) in hidden.items() if calls},
        flops.get_total_flops(),
    )


@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["version 1", "ring", "ring, explicit", "ulysses"])
def test_the_payload_is_that_of_the_formula(name, c):
    method = {"version 1": "gathered"}.get(name, name.split(",")[0])
    for a, kv_heads in ((12, 12), (12, 4)):
        predicted = cp.predicted_payload(method, b=2, s=24, a=a, kv_heads=kv_heads, n=6, c=c)
        for calls, _, _ in launch(c, counted, name, a, kv_heads):
            received = {kind: calls.pop((kind[0], "recv")) for kind in list(calls)
                        if kind[1] == "send"}  # fmt: skip
            assert all(calls[kind] == received[kind] for kind in received)
            assert c == 1 or calls == predicted


@pytest.mark.parametrize("c", [2, 3, 4])
def test_transfers_of_the_ring_overlap_with_its_blocks(c):
    """Forward: c - 1 of keys and values. Backward: c - 1 of these, and c - 1 of c of gradients: the
    last one is launched after the last block."""
    for _, hidden, _ in launch(c, counted, "ring, explicit", 12, 4):
        assert hidden == {("forward", "recv"): c - 1, ("backward", "recv"): 2 * (c - 1)}


def events() -> tuple[str, str]:
    """Of ring attention, in forward and in backward. L: a transfer is launched, B: a block is
    computed, W: wait() for a transfer."""
    log, exchange = [], cp.exchange

    def logged(name, function):
        return lambda *args: (log.append(name), function(*args))[1]

    cp.exchange = lambda *args: (log.append("L"), logged("W", exchange(*args)))[1]
    cp.attend, cp.attend_backward = logged("B", cp.attend), logged("B", cp.attend_backward)
    mine = shard(inputs(4, 2, s=24), dist.group.WORLD)
    out = METHODS["ring"](dist.group.WORLD)(*(mine[x].requires_grad_() for x in "qkv"))
    forward = "".join(log)
    out.backward(mine["grad"])
    return forward, "".join(log)[len(forward) :]


@pytest.mark.parametrize("c", [2, 3, 4])
def test_transfers_are_launched_before_a_block_and_waited_for_after_it(c):
    """In backward, the gradient of one block is sent while the next block is computed."""
    forward = "LBW" * (c - 1) + "B"
    backward = "LBLW" + "LBWLW" * (c - 2) + "BWL" + "W"
    assert launch(c, events) == [(forward, backward)] * c


@pytest.mark.parametrize("c", [2, 3, 4])
def test_a_zigzag_balances_the_scores(c):
    assert cp.imbalance(24, c) == 1.0
    last, mean = sum(range(24 - 24 // c + 1, 25)), 24 * 25 / 2 / c
    assert cp.imbalance(24, c, is_zigzag=False) == pytest.approx(last / mean)
    flops = [each for _, _, each in launch(c, counted, "ring, explicit", 12, 4)]
    assert len({*flops}) == 1, flops


def saved_bytes(method: str | None, attention: str) -> int:
    """What a block stores for backward. method: None for one process with all tokens."""
    c = dist.get_world_size()
    config = gpt.GPTConfig(1, 4, 64, 41, 96, attention)
    model = gpt.build(config)
    x = torch.randn(2, 96 // c, 64, requires_grad=True)
    if method:
        model.h["0"].attn.core.tokens = gpt.Subset(cp.zigzag(c, dist.get_rank()), 2 * c)
        cp.parallelize_attention(model, dist.group.WORLD, method)
    with measure.SavedActivations(model) as saved:
        y = model.h["0"](x)
        return saved.bytes([y])


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("method, limit", [("ring", 1.0), ("ulysses", 1.1)])
def test_a_block_stores_1_of_c_of_the_activations(method, limit, attention):
    (one,) = launch(1, saved_bytes, None, attention)
    for c in (2, 4):
        for each in launch(c, saved_bytes, method, attention):
            assert each <= limit * one / c, (c, each, one)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(c=2, seq_len=6), "--cp with --seq-len 6 is not divisible by 4: make it a multiple"),
        (dict(c=2, t=4, sequence=True, seq_len=12), "--seq-len 12 is not divisible by 8: make it"),
        (dict(c=3, n_head=4, cp_attention="ulysses", seq_len=12),
         "--n-head 4 is not divisible by --tp 1 x --cp 3: make it a multiple of 3"),
        (dict(c=2, t=2, n_head=2, cp_attention="ulysses", seq_len=12),
         "--n-head 2 is not divisible by --tp 2 x --cp 2: make it a multiple of 4"),
        (dict(c=3, seq_len=12, d=2, zero=1, shard_size=4), "d x c 6 is not divisible by --zero"),
        (dict(c=3, seq_len=12, nodes=2), "d x c 3 is not divisible by --dp-nodes 2: give a"),
    ],
)  # fmt: skip
def test_refused_layouts(changes, message):
    case = Case(**changes)
    args = options.parser().parse_args(case.arguments())
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        options.check(args, case.world_size)
    assert "\n" not in str(error.value)


def test_a_world_size_without_room_for_cp_is_refused():
    args = options.parser().parse_args(["--cp", "3", "--tp", "2"])
    with pytest.raises(ValueError, match="--tp 2 x --pp 1 x --cp 3: start a multiple of 6 ranks"):
        options.check(args, 4)


def test_heads_that_c_does_not_divide_are_refused():
    message = "ValueError: 3 heads cannot be divided over 2 ranks: use the ring"
    with pytest.raises(RuntimeError, match=message):
        launch(2, lambda: cp.ulysses_attention(
            *torch.ones(3, 1, 3, 4, 2), dist.group.WORLD, fused))  # fmt: skip


def test_a_model_without_a_core_is_refused():
    def without_core():
        cp.parallelize_attention(torch.nn.Linear(2, 2), dist.group.WORLD, "ring")

    launch(1, without_core)
    with pytest.raises(RuntimeError, match="ValueError: .*no submodule named core"):
        launch(2, without_core)


# --- the demo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, *slow(2, 4), 5])
def test_the_demo_runs_on_any_number_of_ranks(c):
    done = forked(c, cp.main)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one process" in done.stdout and "MISMATCH" not in done.stdout
    for method in cp.METHODS:
        assert f"{method} max |d gradient|" in done.stdout
        assert (f"{method} backward" in done.stdout) == (c > 1)


# --- complete training runs -----------------------------------------------------------------------
# tests/test_layouts.py has the combinations of strategies. Here are the others.

SIZES = dict(seq_len=12, n_layer=3)


@pytest.mark.parametrize("method", ["ring", *slow("gathered", "ulysses")])
@pytest.mark.parametrize(
    "changes",
    [
        dict(c=2, d=2), dict(c=2, dtype="float32"), dict(c=2, dtype="bf16", n_layer=2),
        dict(c=3, d=2, zero=3, dtype="bf16", n_layer=2),
        dict(c=2, t=2, sequence=True, arch="examples.llama", tied=False,
             config=("n_kv_head=4", "n_hidden=17", "qk_norm=true"), n_embd=48),
        dict(c=3, p=2, schedule="zb-v", n_layer=4, arch="examples.llama",
             config=("n_kv_head=6", "n_hidden=17"), n_embd=48),
        dict(c=4, d=2, zero=2, shard_size=4, seq_len=8, dropout=0.2),
        dict(c=2, d=3, nodes=3), dict(c=4, nodes=2, seq_len=8), dict(c=2, recompute="offload"),
    ],
    ids=str,
)  # fmt: skip
def test_training_equals_one_process(changes, method):
    case = Case(cp_attention=method, **SIZES | changes)
    errors = judge(case)
    assert errors.within(case.dtype), errors


@pytest.mark.parametrize(
    "first, then",
    [
        (dict(c=2, d=2, zero=1), dict(c=3, t=2, d=1, m=4, cp_attention="gathered")),
        (dict(c=3, cp_attention="gathered", dropout=0.2), dict(c=2, p=2, cp_attention="ulysses")),
        (dict(c=1, d=2, zero=3), dict(c=2, zero=3, d=2)),
        (dict(c=2, t=2, sequence=True, cp_attention="ulysses"), dict(c=1, d=2, m=1)),
    ],
    ids=str,
)
def test_a_run_is_resumed_with_another_c_and_method(first, then):
    resume = dict(at=1, t=1, p=1, zero=0, sequence=False) | then
    errors = judge(Case(resume=resume, **SIZES | first))
    assert errors.worst <= TOLERANCE, errors


def validated(case: Case) -> torch.Tensor:
    trainer = trainer_of(case)
    trainer.args.val_batches = 2
    trainer.step(0)
    return trainer.validate(reader(case))


def sampled(case: Case) -> list[list[int]]:
    """After prompts of 1 and 5 tokens; also past the sequence length."""
    trainer = trainer_of(case)
    return [generate.sample(trainer, torch.arange(n), 12).tolist() for n in (1, 5)]


LAYOUTS = [
    dict(c=2, t=2, sequence=True), dict(c=3, cp_attention="gathered"),
    dict(c=2, d=2, cp_attention="ulysses"), dict(c=2), dict(c=2, t=2),
    dict(c=2, p=2, schedule="zb-v"), dict(c=2, d=2, zero=3, dropout=0.2),
    dict(c=2, arch="examples.llama", n_embd=48),
]  # fmt: skip


@pytest.mark.parametrize("changes", [*LAYOUTS[:2], *slow(*LAYOUTS[2:])], ids=str)
def test_validation_equals_one_process(changes):
    case = Case(**SIZES | {"n_layer": 4} | changes)
    one = dataclasses.replace(case, t=1, c=1, p=1, d=1, m=case.d * case.m, zero=0, sequence=False)
    (expected,) = launch(1, validated, one)
    for loss in launch(case.world_size, validated, case):
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("seq_len", [4, *slow(12)])
@pytest.mark.parametrize("changes", [*LAYOUTS[:3], *slow(*LAYOUTS[3:])], ids=str)
def test_samples_equal_those_of_one_process(changes, seq_len):
    seq_len = 6 if seq_len == 4 and changes["c"] == 3 else seq_len
    case = Case(n_layer=4, seq_len=seq_len, **changes)
    one = dataclasses.replace(case, t=1, c=1, p=1, d=1, m=case.d * case.m, zero=0, sequence=False)
    (expected,) = launch(1, sampled, one)
    assert launch(case.world_size, sampled, case) == [expected] * case.world_size
