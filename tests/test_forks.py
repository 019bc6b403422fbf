"""What a fork would do, without a change in any file: if one of these needs an edit elsewhere, a
seam is wrong."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ddp
import measure
import tensor_parallel
import zero
from measure import TOLERANCE
from schedules import Action, draw
from tools.verify.oracle import Case, judge, launch

# --- a schedule of one's own: GPipe in waves of w microbatches, so that memory is bounded by w ----


def waves(p: int, m: int, w: int = 2) -> list[list[Action]]:
    def actions(stage: int) -> list[Action]:
        actions = []
        for first in range(0, m, w):
            wave = range(first, min(m, first + w))
            actions += [Action("F", i, stage) for i in wave]
            actions += [Action("B", i, stage) for i in reversed(wave)]
        return actions

    return [actions(stage) for stage in range(p)]


def test_a_schedule_of_ones_own():
    for case in (Case(p=3, m=5), Case(t=2, p=2, d=2, m=4, zero=1, recompute="full")):
        assert judge(case, {"schedule": waves}).worst <= TOLERANCE
    assert draw(waves(2, 3)).splitlines() == [
        "rank 0 |F0 F1 .  .  .  B1--- B0--- F2 .  .  .  B2---",
        "rank 1 |.  F0 F1 B1--- B0--- .  .  .  F2 B2--- .  .",
    ]


# --- compressed gradients: fp16 on the wire, and the largest tenth with error feedback ------------


class Fp16Sum:
    """Half the bytes; each rank's gradient is rounded to 11 bits before the sum."""

    def __init__(self, flat: torch.Tensor, group: dist.ProcessGroup):
        self.flat, self.half = flat, flat.half()
        self.work = dist.all_reduce(self.half, group=group, async_op=True)

    def wait(self) -> None:
        self.work.wait()
        self.flat.copy_(self.half)


def test_a_compressed_gradient():
    sync = functools.partial(ddp.DDP, reduce=Fp16Sum, bucket_bytes=2000)
    errors = judge(Case(d=2, p=2, optimizer="sgd", tied=False), {"sync": sync})
    assert 1e-6 < errors.gradient < 1e-2, errors  # 2^-11 = 5e-4, so it was rounded, and only that
    assert errors.parameter < 1e-5, errors


class TopK:
    """The largest share of a bucket's entries as (value, place); what was left behind is added to
    the next step's gradient (Lin et al. 2017, arXiv 1712.01887, without its momentum)."""

    def __init__(self, share: float):
        self.share, self.left = share, {}  # by bucket

    def __call__(self, flat: torch.Tensor, group: dist.ProcessGroup) -> "TopK":
        mine = flat + self.left.get(flat.data_ptr(), 0.0)
        k = max(1, int(self.share * len(mine)))
        places = mine.abs().topk(k).indices
        values = mine[places]
        self.left[flat.data_ptr()] = mine.index_fill(0, places, 0.0)
        all_values, all_places = (t.new_empty(k * group.size()) for t in (values, places))
        zero.all_gather(all_values, values, group=group)
        zero.all_gather(all_places, places, group=group)
        flat.zero_().index_add_(0, all_places, all_values)
        return self

    def wait(self) -> None:
        pass


def top_k(share: float, feedback: bool) -> tuple[float, int]:
    """(loss after 60 steps of a least-squares fit, elements gathered in a step)."""
    torch.manual_seed(0)
    truth, net = torch.randn(1, 40), nn.Linear(40, 1, bias=False)
    reduce = TopK(share)
    sync = ddp.DDP(net, dist.group.WORLD, 1, reduce=reduce)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    for _ in range(60):
        sync.start()
        x = torch.randn(32, 40)
        loss = (net(x) - x @ truth.T).square().mean() / dist.get_world_size()
        if not feedback:
            reduce.left.clear()
        with measure.Collectives() as seen:
            loss.backward()
            sync.finish()
        sync.step(optimizer)
    return loss.item(), seen.total(None, "all_gather").payload


def test_the_largest_tenth_with_error_feedback():
    loss, gathered = launch(2, top_k, 0.1, True)[0]
    assert loss < 1e-4 and gathered == 2 * 2 * 4  # from each rank 4 of 40 values, and their places
    assert launch(2, top_k, 0.1, False)[0][0] > 1e-3, "without feedback it must be worse"


# --- another model, cut by its own plan: RMSNorm, RoPE, SwiGLU, grouped-query attention -----------

HEADS, KV_HEADS, SIZE, HIDDEN = 4, 2, 6, 20
H = HEADS * SIZE


def rotate(x):  # [b, a, s, SIZE]
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of queries or keys."""
    rates = 10_000.0 ** -torch.arange(0, 1, 2 / SIZE, dtype=x.dtype)
    angles = torch.outer(torch.arange(x.size(2), dtype=x.dtype), rates)  # [s, SIZE/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(H), nn.RMSNorm(H)
        self.qkv = nn.Linear(H, (HEADS + 2 * KV_HEADS) * SIZE, bias=False)
        self.out = nn.Linear(H, H, bias=False)
        self.gate_up = nn.Linear(H, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, H, bias=False)

    def heads(self, x):
        """q [b, a/t, s, SIZE], k and v of this rank. x may be a shard of the sequence."""
        qkv = self.qkv(x)
        kv, rest = divmod(qkv.size(-1) * KV_HEADS, (HEADS + 2 * KV_HEADS) * SIZE)
        if rest:
            raise ValueError(f"{KV_HEADS} kv heads cannot be split over this many tp ranks: lower "
                             "--tp, or use SharedKVBlock")  # fmt: skip
        heads = qkv.unflatten(-1, (-1, SIZE)).transpose(1, 2)
        return heads.split([heads.size(1) - 2 * kv, kv, kv], dim=1)

    def forward(self, x):
        q, k, v = self.heads(self.norm_1(x))
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, n_layer: int, vocab_size: int, block: type[Block] = Block):
        super().__init__()
        self.wte, self.ln_f = nn.Embedding(vocab_size, H), nn.RMSNorm(H)
        self.h = nn.ModuleDict({str(i): block() for i in range(n_layer)})
        self.lm_head = nn.Linear(H, vocab_size, bias=False)

    def forward(self, x):
        x = self.wte(x)
        for block in self.h.values():
            x = block(x)
        return self.lm_head(self.ln_f(x))


PLAN = {
    "wte": "vocab",
    "h.*.norm_?": "replicated",
    "h.*.qkv": ("column", (HEADS, KV_HEADS, KV_HEADS)),
    "h.*.out": "row",
    "h.*.gate_up": ("column", (1, 1)),
    "h.*.down": "row",
    "ln_f": "replicated",
    "lm_head": "column",
}
SIZES = dict(n_head=HEADS, n_embd=H, n_layer=3, vocab_size=41, m=3)
SEAMS = {"model": functools.partial(Llama, 3, 41), "plan": PLAN}


@pytest.mark.parametrize(
    "case",
    [
        Case(**SIZES),
        Case(t=2, p=2, d=2, zero=1, **SIZES),
        Case(t=2, p=3, optimizer="sgd", recompute="full", **SIZES),
        Case(t=2, p=2, d=2, zero=3, sequence=True, seq_len=8, **SIZES),
    ],
    ids=str,
)
def test_another_model_cut_by_its_own_plan(case):
    errors = judge(case, SEAMS)
    assert errors.worst <= TOLERANCE, errors


def test_a_plan_that_splits_a_kv_head_is_refused():
    with pytest.raises(RuntimeError, match="ValueError: 2 kv heads cannot be split .*: lower --tp"):
        judge(Case(t=4, **SIZES), SEAMS)


# --- fewer kv heads than tp ranks: ranks share a kv head ------------------------------------------


class SharedKVBlock(Block):
    """k and v come from a separate matrix, which SharedKV replicates."""

    def __init__(self):
        super().__init__()
        del self.qkv
        self.q = nn.Linear(H, H, bias=False)
        self.kv = nn.Linear(H, 2 * KV_HEADS * SIZE, bias=False)

    def heads(self, x):
        q, kv = (layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.q, self.kv))
        return q, *kv.chunk(2, dim=1)


class SharedKV(nn.Module):
    """A style: every rank holds the full weight and uses the kv heads that its queries read. So
    its gradient is a partial sum, and `partial` adds it over tp."""

    def __init__(self, linear: nn.Linear, fused: tuple, group: dist.ProcessGroup, sequence: bool):
        super().__init__()
        self.group, self.sequence, self.weight = group, sequence, linear.weight
        self.weight.partial = group.size() > 1
        queries, rank = HEADS // group.size(), group.rank()
        first, last = (q * KV_HEADS // HEADS for q in (rank * queries, (rank + 1) * queries - 1))
        self.mine = slice(first, last + 1)

    def forward(self, x):
        kv = self.weight.view(2, KV_HEADS, SIZE, H)[:, self.mine].flatten(0, 2)
        return tensor_parallel.ColumnLinear.apply(x, kv, None, self.group, self.sequence)


SHARED_PLAN = {name: style for name, style in PLAN.items() if name != "h.*.qkv"}
SHARED_PLAN |= {"h.*.q": "column", "h.*.kv": "shared kv"}


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
def test_ranks_share_a_kv_head(case, monkeypatch):
    monkeypatch.setitem(tensor_parallel.STYLES, "shared kv", SharedKV)
    model = functools.partial(Llama, 3, 41, SharedKVBlock)
    errors = judge(case, {"model": model, "plan": SHARED_PLAN})
    assert errors.worst <= TOLERANCE, errors
