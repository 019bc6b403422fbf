import collections
import dataclasses
import functools
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gpt
import measure
import pipeline
import tensor_parallel as tp
from tools.verify import counting
from tools.verify.oracle import Case, draw, launch, trainer_of

D = torch.float64
WAYS = [False, True, "keep"]  # without sequence parallelism; with it; with keep_gathered as well


def version_1(frozen: str) -> tuple[float, float]:
    """3 microbatches, 7 hidden units. Largest relative error of an output or a gradient, next to
    one process: of version 1, and of the parallel layers."""
    group, t, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 2, 5, 6), "w1": (7, 6), "w2": (6, 7)}
    full = {n: torch.randn(shape, dtype=D, generator=generator) for n, shape in shapes.items()}
    net = nn.Sequential(nn.Linear(6, 7, bias=False), nn.GELU(), nn.Linear(7, 6, bias=False))
    net[0].weight, net[2].weight = nn.Parameter(full["w1"]), nn.Parameter(full["w2"])
    tp.parallelize(net, {"0": "column", "2": "row"}, group)

    def run(mlp, x, w1, w2) -> dict[str, torch.Tensor]:
        leaves = {"x": x.clone().requires_grad_(), "w1": w1, "w2": w2}
        outputs = [mlp(microbatch, w1, w2) for microbatch in leaves["x"]]
        for y in outputs:
            y.square().sum().backward()
        gradients = {n: p.grad for n, p in leaves.items() if n != frozen}
        return gradients | {"y": torch.stack(outputs).detach()}

    def leaf(name: str, shard=lambda w: w) -> torch.Tensor:
        return shard(full[name]).clone().requires_grad_(name != frozen)

    expected = run(lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2), full["x"],
                   leaf("w1"), leaf("w2"))  # fmt: skip
    shards = {"w1": lambda w: w.tensor_split(t)[rank], "w2": lambda w: w.tensor_split(t, 1)[rank]}
    first = run(functools.partial(tp.mlp, group=group), full["x"],
                *(leaf(n, shard) for n, shard in shards.items()))  # fmt: skip
    errors = [measure.relative_errors(first, {
        n: shards.get(n, lambda w: w)(tensor) for n, tensor in expected.items()})]  # fmt: skip
    weights = {"w1": net[0].weight, "w2": net[2].weight}
    for name, weight in weights.items():
        weight.requires_grad_(name != frozen)
    second = run(lambda x, w1, w2: net(x), full["x"], *weights.values())
    shards = {n: w.distribution.shard for n, w in weights.items()}
    errors.append(measure.relative_errors(second, {
        n: shards.get(n, lambda w: w)(tensor) for n, tensor in expected.items()}))  # fmt: skip
    return tuple(measure.largest(e.values()) for e in errors)


@pytest.mark.parametrize("frozen", ["", "w1", "w2"])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_version_1_and_the_parallel_layers_equal_one_process(t, frozen):
    for errors in launch(t, version_1, frozen):
        assert max(errors) <= measure.TOLERANCE, errors


def conjugates(sequence: bool):
    """f and g by themselves: a weight of 1, tokens of one number."""
    group, t, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    one = torch.ones(1, 1, dtype=D, requires_grad=True)
    shard = 3 if sequence else 3 * t  # of t ranks' 3 t tokens
    x = torch.arange(shard, dtype=D).view(1, -1, 1).requires_grad_()
    kept, seed = x.detach().clone(), torch.full((1, 3 * t, 1), rank + 1.0, dtype=D)
    given = seed.clone()
    y = tp.ColumnLinear.apply(x, one, None, group, bool(sequence), sequence == "keep")
    y.backward(given)
    whole = torch.cat([kept] * t, 1) if sequence else kept
    assert torch.equal(y, whole) and torch.equal(x, kept)
    assert torch.equal(given, seed), "the incoming gradient was summed in place"
    total = t * (t + 1) / 2
    assert torch.equal(x.grad, torch.full((1, shard, 1), total, dtype=D))
    assert torch.equal(one.grad, (rank + 1) * whole.sum().view(1, 1))

    part = torch.full((1, 3 * t, 1), rank + 1.0, dtype=D, requires_grad=True)
    z = tp.reduce_output(part * 1, group, sequence)
    given = torch.arange(shard, dtype=D).view(1, -1, 1)
    z.backward(given)
    assert torch.equal(z, torch.full((1, shard, 1), total, dtype=D))
    assert torch.equal(part.grad, torch.cat([given] * t, 1) if sequence else given)

    kept = part.exp()  # which its backward needs
    z = tp.reduce_output(kept, group, sequence)
    if sequence:
        assert torch.equal(kept, part.exp())
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()


@pytest.mark.parametrize("sequence", WAYS)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_conjugates(t, sequence):
    """Inputs are not changed, except g's partial sum, and autograd is told of that change."""
    launch(t, conjugates, sequence)


def shards_of_batches_keep_their_order():
    """[b, s, h] with b, s, h > 1: token i of row j stays that."""
    group, t, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    whole = torch.arange(2 * 2 * t * 5, dtype=D).view(2, 2 * t, 5)
    mine = whole[:, 2 * rank : 2 * rank + 2]
    assert torch.equal(tp.start_all_gather(mine, group)(), whole)
    assert torch.equal(tp.start_reduce_scatter(whole, group)(), t * mine)


def test_shards_of_batches_keep_their_order():
    launch(3, shards_of_batches_keep_their_order)


@pytest.mark.parametrize("n, t", [(12, 4), (13, 4), (14, 4), (7, 3), (5, 5)])
def test_shards_are_those_of_tensor_split_and_cover_the_full_tensor(n, t):
    whole = torch.randn(n, 3)
    cuts = [tp.Distribution(whole.shape, (tp.Split(0, (n,), group_of(t, r)),)) for r in range(t)]
    for cut, split in zip(cuts, whole.tensor_split(t), strict=True):
        assert torch.equal(cut.shard(whole), split)


def test_fused_matrices_are_cut_one_by_one():
    whole = torch.arange(12).view(12, 1)  # q: 0..3, k: 4..7, v: 8..11

    def shards(sizes):
        splits = [tp.Split(0, sizes, group_of(2, r)) for r in (0, 1)]
        return [tp.Distribution(whole.shape, (split,)).shard(whole).flatten().tolist()
                for split in splits]  # fmt: skip

    assert shards((4, 4, 4)) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    grouped = shards((8, 2, 2))
    assert grouped == [[0, 1, 2, 3, 8, 10], [4, 5, 6, 7, 9, 11]]


def loss_beside_plain(v: int, scale: float, target: int = -100):
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(v)
    logits = (torch.randn(2, 6, v, generator=generator, dtype=D) * scale).requires_grad_()
    targets = torch.randint(v, (2, 6), generator=generator)
    targets[0, 0], targets[1, 3], targets[1, 4] = -1, -2, -100
    plain = gpt.cross_entropy(logits, targets) * 0.3
    plain.backward()
    targets[1, 4] = target
    head = nn.Module()
    head.weight = tp.shard_parameter(nn.Parameter(torch.zeros(v, 1)), 0, (1,), group)
    start, stop = tp.bounds(v, group.rank(), group.size())
    mine = logits.detach()[..., start:stop].clone().requires_grad_()
    kept = mine.detach().clone()
    loss = tp.vocab_parallel_cross_entropy(mine, targets, head, group) * 0.3
    loss.backward()
    assert torch.equal(mine, kept), "the logits were overwritten"
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(mine.grad, logits.grad[..., start:stop], rtol=1e-12, atol=1e-15)
    assert not mine.grad[0, 0].any() and not mine.grad[1, 4].any()


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1000.0])  # exp(1000) overflows: the maximum must be shared
def test_vocabulary_parallel_loss(t, scale):
    launch(t, loss_beside_plain, 41, scale)


def counts(n_layer: int, b: int, sequence: bool):
    group, s = dist.group.WORLD, 12
    config = gpt.GPTConfig(n_layer, 12, 24, 41, s)
    model = gpt.build(config, dtype=D)
    tp.parallelize(model, gpt.PLAN, group, bool(sequence), sequence == "keep")
    assert model.wte.weight is model.lm_head.weight, "tied no more"
    x = torch.zeros(b, s, dtype=torch.int64)
    with counting.Collectives({"tp": group}) as seen:
        tp.vocab_parallel_cross_entropy(model(x), x, model.lm_head, group).backward()
    hidden = {op: seen.total("tp", op, "backward", hidden=True).calls for op in tp_operations}
    counted = {(k, op): tuple(seen.total("tp", op, k))
               for k in ("forward", "backward") for op in tp_operations}  # fmt: skip
    return {k: v for k, v in counted.items() if v[0]}, hidden


tp_operations = ("all_reduce", "all_gather", "reduce_scatter")


@pytest.mark.parametrize("t", [2, 3, 4])
@pytest.mark.parametrize("sequence", WAYS)
def test_collectives_of_a_block_and_what_hides_them(t, sequence):
    """A block has two f and two g. The all-reduce of each f is overlapped with the gradient of its
    weight. With keep_gathered, backward has the all-gathers of g only, and nothing hides them."""
    for n_layer, b in ((1, 2), (3, 1)):
        how = dict(sequence=bool(sequence), keep_gathered=sequence == "keep")
        predicted = tp.predicted_collectives(n_layer, b, s=12, h=24, **how)
        for counted, hidden in launch(t, counts, n_layer, b, sequence):
            assert counted == predicted
            f = 2 * n_layer + 1
            behind = {"reduce_scatter": f} if sequence else {"all_reduce": f}
            behind |= {"all_gather": f} if sequence is True else {}
            assert hidden == dict.fromkeys(tp_operations, 0) | behind


def calls_by_async_op(n_layer: int, sequence: bool, defer: bool) -> collections.Counter:
    """(phase, operation, async_op) -> calls, of one forward and backward."""
    called, queue = collections.Counter(), []

    def counted(operation: str, real):
        def call(*args, async_op=False, **kwargs):
            phase = "forward" if torch._C._current_autograd_node() is None else "backward"
            called[phase, operation, async_op] += 1
            return real(*args, async_op=async_op, **kwargs)

        return call

    dist.all_reduce = counted("all_reduce", dist.all_reduce)
    for name in ("all_gather", "reduce_scatter"):
        setattr(tp, name, counted(name, getattr(tp, name)))
    group, x = dist.group.WORLD, torch.zeros(1, 12, dtype=torch.int64)
    model = gpt.build(gpt.GPTConfig(n_layer, 12, 24, 41, 12), dtype=D)
    tp.parallelize(model, gpt.PLAN, group, bool(sequence), sequence == "keep")
    if defer:
        pipeline.defer_weight_gradients(model, queue)
    tp.vocab_parallel_cross_entropy(model(x), x, model.lm_head, group).backward()
    while queue:
        queue.pop(0)()
    return called


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("sequence", WAYS)
def test_a_collective_is_asynchronous_only_where_a_matmul_overlaps_it(sequence, defer):
    """With 4 blocks 9 of 20 calls, or 18 of 47 with sequence parallelism. If weight gradients are
    deferred, nothing overlaps, and the gathers for them are outside of backward. Keeping the
    gathered inputs saves one gather per layer."""
    for n_layer in (1, 4):
        n = 2 * n_layer + 1  # f: two of a block, and the head; g: two, and the embedding
        if sequence:
            expected = {
                ("forward", "all_gather", False): 2 * n if defer and sequence is True else n,
                ("forward", "reduce_scatter", False): n,
                ("forward", "all_reduce", False): 2,  # of the loss
                ("backward", "all_gather", False): n,
                ("backward", "reduce_scatter", not defer): n,
            } | ({} if defer or sequence == "keep" else {("backward", "all_gather", True): n})
        else:
            expected = {
                ("forward", "all_reduce", False): n + 2,
                ("backward", "all_reduce", not defer): n,
            }
        assert launch(2, calls_by_async_op, n_layer, sequence, defer) == [expected] * 2


def shards():
    config = gpt.GPTConfig(2, 4, 24, 41, 6, tied=False)
    with torch.device("meta"):
        model = gpt.GPT(config)
    tp.parallelize(model, gpt.PLAN, dist.group.WORLD)
    gpt.init_weights(model, 0, D, "cpu", draw)
    return {n: (p.detach(), len(p.distribution.splits) > 0) for n, p in gpt.named_parameters(model)}


def test_shards_differ_and_replicas_do_not():
    a, b = launch(2, shards)
    for name, (tensor, is_cut) in a.items():
        other = b[name][0]
        same = tensor.shape == other.shape and torch.equal(tensor, other)
        assert same is not is_cut, name
    whole = {n for n, (_, is_cut) in a.items() if not is_cut}
    assert whole == {n for n in a if "ln_" in n or "wpe" in n or n.endswith("c_proj.bias")}


def parallelize_with(plan: dict, v: int):
    config = gpt.GPTConfig(1, 2, 8, v, 4, tied=False)
    plan = gpt.PLAN | plan
    tp.parallelize(gpt.build(config), {n: s for n, s in plan.items() if s}, dist.group.WORLD)


@pytest.mark.parametrize(
    "plan, v, message",
    [
        ({"h.*.mlp.c_fc": "columns"}, 4, "unknown style 'columns'; use one of column, row, vocab"),
        ({"h.*.mlp.c_fc": None}, 4, "h.0.mlp.c_fc has parameters, but the plan does not name it"),
        ({"h.*.dropout": "tokens"}, 4, "plan names 'h.*.dropout', but the model has no such"),
        ({}, 3, "wte, style 'vocab': 3 rows .* so that each of t = 4 ranks .* smaller t"),
    ],
)
def test_bad_plans(plan, v, message):
    with pytest.raises(RuntimeError, match=message):
        launch(4, parallelize_with, plan, v)


# --- models that are not gpt.GPT ------------------------------------------------------------------

H, SIZE, V, S = 24, 6, 41, 8  # hidden size, head size, vocabulary, sequence length


class Attention(nn.Module):
    """QK-norm per head, as in Qwen3: between a column- and a row-parallel layer."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(H, H) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """change(net): called before parameters are drawn."""

    def __init__(self, change=lambda net: None):
        super().__init__()
        self.wte, self.norm, self.attn = nn.Embedding(V, H), nn.RMSNorm(H), Attention()
        self.lm_head = nn.Linear(H, V, bias=False)
        change(self)
        self.double()
        for name, p in self.named_parameters():
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))

    def forward(self, x):
        x = self.wte(x)
        return self.lm_head(x + self.attn(self.norm(x)))


PLAN = {
    "wte": "vocab",
    "norm": "replicated",
    "attn.[qkv]": "column",
    "attn.out": "row",
    "lm_head": "column",
}
QK_PLAN = PLAN | {"attn.?_norm": "partial"}


def train(model: nn.Module, group=None, defer: bool = False, steps: int = 3):
    """Gradients and parameters after a few steps of SGD. group: None for one process. defer: the
    gradients of weights are computed after the backward."""
    queue = []
    if defer:
        pipeline.defer_weight_gradients(model, queue)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randint(V, (2, S), generator=torch.Generator().manual_seed(step))
        if group:
            loss = tp.vocab_parallel_cross_entropy(model(x), x.roll(1), model.lm_head, group)
        else:
            loss = gpt.cross_entropy(model(x), x.roll(1))
        (loss / x.numel()).backward()
        while queue:
            queue.pop(0)()
        if group:
            tp.all_reduce_partial((p, p.grad) for p in model.parameters())
        optimizer.step()
    named = dict(model.named_parameters())
    gradients = {f"gradient {n}": p.grad for n, p in named.items() if p.grad is not None}
    return gradients | {n: p.detach() for n, p in named.items()}


def beside_one_process(plan: dict, sequence: bool, change=lambda net: None, defer: bool = False):
    """(largest relative error, the replicated tensors)."""
    expected = train(Net(change))
    how = bool(sequence), sequence == "keep"
    model = tp.parallelize(Net(change), plan, dist.group.WORLD, *how)
    cuts = {n: p.distribution for n, p in model.named_parameters() if p.distribution.splits}
    actual = train(model, dist.group.WORLD, defer)
    for name, cut in cuts.items():
        for key in {name, f"gradient {name}"} & expected.keys():
            expected[key] = cut.shard(expected[key])
    errors = measure.relative_errors(actual, expected)
    replicas = {n: a for n, a in actual.items() if n.removeprefix("gradient ") not in cuts}
    return measure.largest(errors.values()), replicas


def check_beside_one_process(t: int, *args) -> None:
    (worst, first), *others = launch(t, beside_one_process, *args)
    for error, replicas in [(worst, first), *others]:
        assert error <= measure.TOLERANCE
        assert all(torch.equal(a, first[n]) for n, a in replicas.items())


@pytest.mark.parametrize("sequence", [False, True])
def test_per_head_qk_norm_named_partial(sequence):
    check_beside_one_process(2, QK_PLAN, sequence)


def parallelize_net(plan: dict, change=lambda net: None, t: int = 2) -> nn.Module:
    return tp.parallelize(on_meta(change), plan, group_of(t))


def on_meta(change=lambda net: None) -> Net:
    with torch.device("meta"):
        return Net(change)


def group_of(t: int, rank: int = 0):
    """Enough of a process group for parallelize, which makes no collective for a model on meta."""
    return types.SimpleNamespace(rank=lambda: rank, size=lambda: t)


def give_scale(net: nn.Module) -> None:
    """A parameter directly on the attention module."""
    net.attn.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    "plan, change, name",
    [
        (PLAN, lambda net: None, "attn.q_norm"),
        (QK_PLAN, give_scale, "attn"),
        ({n: style for n, style in QK_PLAN.items() if n != "norm"}, lambda net: None, "norm"),
    ],
)
def test_the_plan_must_name_every_module_with_parameters(plan, change, name):
    with pytest.raises(ValueError, match=rf"^{name} has parameters, but .* 'partial' if it is"):
        parallelize_net(plan, change)


def test_who_is_partial():
    """The style "partial" applies to the parameters of the module itself, not of its children."""
    plan = QK_PLAN | {"attn": "partial"}
    replicated = {"norm.weight", "attn.out.bias"}
    partial = {"attn.scale", "attn.q_norm.weight", "attn.k_norm.weight"}
    cases = (2, False, partial), (2, True, partial | replicated), (1, True, set())
    for t, sequence, expected in cases:
        net = tp.parallelize(on_meta(give_scale), plan, group_of(t), sequence)
        assert {n for n, p in net.named_parameters() if p.distribution.partial} == expected


def test_one_rank_keeps_the_plain_layers():
    net = parallelize_net(PLAN, t=1)
    kinds = {type(layer) for layer in net.modules()}
    assert kinds == {type(layer) for layer in on_meta().modules()}


# --- dropout, tied weights, ids out of range ------------------------------------------------------


def give_dropout(net: nn.Module, p: float = 0.1) -> None:
    net.drop = nn.Dropout(p)


@pytest.mark.parametrize("style", [{"drop": "heads"}, {"drop": "tokens"}, {}], ids=str)
def test_torchs_dropout_must_not_draw(style):
    with pytest.raises(ValueError, match=r"^drop: Dropout\(p=0.1.* draws .* set p to 0, or use"):
        parallelize_net(QK_PLAN | style, give_dropout)
    parallelize_net(QK_PLAN, functools.partial(give_dropout, p=0.0))
    parallelize_net(QK_PLAN | {"drop": "replicated"}, give_dropout)


def test_a_module_that_knows_no_shards_is_refused():
    plan = QK_PLAN | {"wte": "tokens"}
    tp.parallelize(on_meta(), plan, group_of(2), False)
    with pytest.raises(ValueError, match="^wte, style 'tokens': this style sets `tokens`, which"):
        tp.parallelize(on_meta(), plan, group_of(2), True)


def tie(net: nn.Module) -> None:
    net.lm_head.weight = net.wte.weight


@pytest.mark.parametrize("style", ["row", ("column", (20, 21)), "replicated", "partial"], ids=str)
def test_tied_weights_with_other_shards_are_refused(style):
    with pytest.raises(ValueError, match=r"^lm_head.weight is tied to a parameter that the plan"):
        parallelize_net(QK_PLAN | {"lm_head": style}, tie)
    net = parallelize_net(QK_PLAN, tie)
    assert net.wte.weight is net.lm_head.weight


def test_a_module_in_two_places_is_sharded_in_both():
    def share(net: nn.Module) -> None:
        net.attn.k = net.attn.q

    net = parallelize_net(QK_PLAN, share)
    assert net.attn.k.weight is net.attn.q.weight and net.attn.k.weight.shape == (H // 2, H)


def embed(token: int):
    group = dist.group.WORLD
    layer = tp.VocabParallelEmbedding(nn.Embedding(V, 2), (1,), group, False)
    return layer(torch.tensor([[0, token]]))


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("token", [V, V + 1000, -1])
def test_a_token_outside_the_vocabulary_is_an_error(t, token):
    with pytest.raises(RuntimeError, match="IndexError: index out of range"):
        launch(t, embed, token)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_target_outside_the_vocabulary_is_an_error(t):
    with pytest.raises(RuntimeError, match="(Target|index) [0-9]+ is out of bounds"):
        launch(t, loss_beside_plain, V, 1.0, V)


# --- frozen weights, autocast ---------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def give_lora(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.attn.q, net.attn.out = LoRA(net.attn.q), LoRA(net.attn.out)


LORA_PLAN = {
    "wte": "vocab",
    "norm": "replicated",
    "attn.?_norm": "partial",
    "attn.q.a": "replicated",
    "attn.q.b": "column",
    "attn.out.a": "row",
    "attn.out.b": "replicated",
    "attn.q.base": "column",
    "attn.[kv]": "column",
    "attn.out.base": "row",
    "lm_head": "column",
}


def freeze(net: nn.Module, *names: str) -> None:
    for name, p in net.named_parameters():
        p.requires_grad_(name not in names)


SOME = ("wte.weight", "attn.q.weight", "attn.k.bias", "attn.out.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "sequence, defer",
    [(False, False), (True, False), (True, True), ("keep", False), ("keep", True)],
)
@pytest.mark.parametrize(
    "plan, change",
    [(LORA_PLAN, give_lora), (QK_PLAN, lambda net: freeze(net, *SOME)),
     (QK_PLAN, lambda net: freeze(net, "attn.out.bias"))],
    ids=["lora", "some", "row bias"],
)  # fmt: skip
def test_frozen_weights(plan, change, sequence, defer):
    check_beside_one_process(2, plan, sequence, change, defer)


def cost_of_a_backward(frozen: bool, sequence: bool, defer: bool):
    """(FLOPs in units of one matmul, collectives, what is saved of the input: None, x or so many
    tokens, what waits for a W)."""
    group, queue, b = dist.group.WORLD, [], 2
    layer = nn.Sequential(nn.Linear(8, 6))
    how = bool(sequence), sequence == "keep"
    (layer,) = tp.parallelize(layer, {"0": "column"}, group, *how)
    layer.weight.requires_grad_(not frozen)
    if defer:
        pipeline.defer_weight_gradients(layer, queue)
    x = torch.zeros(b, 4, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    with FlopCounterMode(display=False) as flops, measure.Collectives({"tp": group}) as seen:
        y.sum().backward()
    operations = [op for op in tp_operations if seen.total("tp", op).calls]
    assert layer.weight.grad is None or not frozen
    inputs = ("x" if t.data_ptr() == x.data_ptr() else t.size(1) for t in saved if t.dim() == 3)
    kept = next(inputs, None)
    return flops.get_total_flops() / (2 * y.numel() * 8), operations, kept, len(queue)


@pytest.mark.parametrize(
    "frozen, sequence, defer, expected",
    [
        (False, False, False, (2, ["all_reduce"], "x", 0)),
        (True, False, False, (1, ["all_reduce"], None, 0)),
        (True, True, False, (1, ["reduce_scatter"], None, 0)),
        (False, True, False, (2, ["all_gather", "reduce_scatter"], "x", 0)),
        (True, True, True, (1, ["reduce_scatter"], None, 0)),
        (False, True, True, (1, ["reduce_scatter"], "x", 1)),
        (True, "keep", False, (1, ["reduce_scatter"], None, 0)),
        (False, "keep", False, (2, ["reduce_scatter"], 8, 0)),
        (False, "keep", True, (1, ["reduce_scatter"], 8, 1)),
    ],
)
def test_backward_does_nothing_for_a_frozen_weight(frozen, sequence, defer, expected):
    assert launch(2, cost_of_a_backward, frozen, sequence, defer) == [expected] * 2


def without_qk_norm(net: nn.Module) -> None:
    net.attn.q_norm = net.attn.k_norm = nn.Identity()


def under_autocast(sequence: bool, defer: bool):
    """Of one process and of a rank: the loss and, by parameter, the gradient."""
    runs, group = [], dist.group.WORLD
    for parallel in (False, True):
        net, queue = Net(without_qk_norm).float(), []
        if parallel:
            tp.parallelize(net, PLAN, group, bool(sequence), sequence == "keep")
        if parallel and defer:
            pipeline.defer_weight_gradients(net, queue)
        x = torch.arange(2 * S).view(2, S)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
            assert logits.dtype == torch.bfloat16
            if parallel:
                loss = tp.vocab_parallel_cross_entropy(logits, x, net.lm_head, group)
            else:
                loss = gpt.cross_entropy(logits, x)
        loss.backward()
        for work in queue:
            work()
        if parallel:
            tp.all_reduce_partial((p, p.grad) for p in net.parameters())
        runs.append((loss.detach(), dict(net.named_parameters())))
    (expected, full), (loss, shards) = runs
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    gradients = {n: p.distribution.shard(full[n].grad) for n, p in shards.items()}
    errors = measure.relative_errors({n: p.grad for n, p in shards.items()}, gradients, floor=0.01)
    assert measure.largest(errors.values()) < 0.1, errors


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("sequence", WAYS)
def test_autocast(sequence, defer):
    launch(2, under_autocast, sequence, defer)


def keep_next_to_gather_again(case: Case) -> None:
    ways = [trainer_of(dataclasses.replace(case, keep_gathered=keep)) for keep in (False, True)]
    for step in range(2):
        assert torch.equal(*(trainer.step(step) for trainer in ways)), step
    for trainer in ways:
        trainer.sync.gather()
    for (name, a), (_, b) in zip(*(t.model.named_parameters() for t in ways), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "case",
    [
        Case(recompute="full", dropout=0.2, b=1), Case(p=2, schedule="zb-v", n_layer=4, b=1),
        Case(dtype="bf16", d=2, zero=3), Case(p=2, schedule="zb-h1", dtype="bf16", b=1),
    ],
    ids=str,
)  # fmt: skip
def test_an_input_that_is_kept_is_the_one_that_is_gathered_again(case):
    """Bitwise. With b = 1, a gathered tensor is a view of what the collective wrote."""
    case = dataclasses.replace(case, t=2, sequence=True, seq_len=8)
    launch(case.world_size, keep_next_to_gather_again, case)


# --- sizes that t does not divide, modules that a style cannot replace ----------------------------


def one_forward(n_head: int, head_size: int, s: int, sequence: bool):
    config = gpt.GPTConfig(1, n_head, n_head * head_size, 41, s)
    model = tp.parallelize(gpt.build(config), gpt.PLAN, dist.group.WORLD, sequence)
    model(torch.zeros(1, s, dtype=torch.int64))


@pytest.mark.parametrize(
    "t, n_head, head_size, s, sequence, message",
    [
        (2, 3, 8, 8, False, "n_head 3 .* 36 of 72 columns .* needs 3 x 8"),
        (3, 5, 2, 8, False, "n_head 5 .* (12|9) of 30 columns .* needs 3 x 2"),
        (2, 4, 2, 7, True, r"unflatten: Provided sizes \[2, -1\] don't .* size of dim 1 \(7\)"),
        (3, 3, 2, 8, True, r"unflatten: Provided sizes \[3, -1\] don't .* size of dim 1 \(8\)"),
    ],
)
def test_sizes_that_t_does_not_divide(t, n_head, head_size, s, sequence, message):
    with pytest.raises(RuntimeError, match=message):
        launch(t, one_forward, n_head, head_size, s, sequence)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def change_layer(name: str, make, net: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(parent), attribute, make())


@pytest.mark.parametrize(
    "name, make",
    [
        ("attn.q", lambda: Doubled(H, H)),
        ("attn.q", lambda: LoRA(nn.Linear(H, H))),
        ("attn.out", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(H, H))),
        ("wte", lambda: nn.Embedding(V, H, padding_idx=0)),
        ("wte", lambda: nn.Embedding(V, H, max_norm=1.0)),
        ("wte", lambda: gpt.PositionEmbedding(V, H)),
    ],
)
def test_a_module_that_computes_something_else_is_not_replaced(name, make):
    with pytest.raises(ValueError, match=f"^{name}, style .* replaces a plain nn.(Linear|Embedd)"):
        parallelize_net(QK_PLAN, functools.partial(change_layer, name, make))


@pytest.mark.parametrize("fused", [(1,) * 5, (12, 11), (23, 1)])
def test_proportions_that_do_not_fit_are_refused(fused):
    message = r"^attn.q, .* 24 rows .* proportions \([0-9, ]+\) so that each"
    with pytest.raises(ValueError, match=message):
        parallelize_net({"attn.q": ("column", fused)} | QK_PLAN)


def test_proportions_are_multiplied():
    weight = nn.Parameter(torch.empty(24, 2))
    for fused in ((4, 1, 1), (16, 4, 4)):
        shard = tp.shard_parameter(weight, 0, fused, group_of(2))
        assert shard.distribution.splits[0].sizes == (16, 4, 4)
