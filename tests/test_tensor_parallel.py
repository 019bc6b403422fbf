import pytest
import torch
import torch.distributed as dist
from torch import nn

import gpt
import measure
import tensor_parallel as tp
from tools.oracle import draw, launch

D = torch.float64


def conjugates_leave_their_arguments_alone():
    group = dist.group.WORLD
    x = torch.ones(3, dtype=D, requires_grad=True)
    r = torch.ones(3, dtype=D, requires_grad=True)
    # Both get the same gradient tensor, and the copy, being the younger, works on it first.
    other = r * 1.0
    (tp.CopyToGroup.apply(x, group) + other).backward(torch.ones(3, dtype=D))
    assert torch.equal(r.grad, torch.ones(3, dtype=D)), "r's gradient was all-reduced in place"
    assert torch.equal(x.grad, torch.full((3,), float(group.size()), dtype=D))
    part = torch.ones(3, dtype=D, requires_grad=True)
    y = tp.SumOverGroup.apply(part, group)
    y.sum().backward()
    assert torch.equal(part, torch.ones(3, dtype=D)), "the partial sum was overwritten"
    assert torch.equal(y, torch.full((3,), float(group.size()), dtype=D))
    assert torch.equal(part.grad, torch.ones(3, dtype=D))


def test_conjugates_leave_their_arguments_alone():
    launch(2, conjugates_leave_their_arguments_alone)


@pytest.mark.parametrize("n, t", [(12, 4), (13, 4), (7, 3), (5, 5)])
def test_cuts_are_torch_chunks_and_cover_the_whole(n, t):
    whole = torch.randn(n, 3)
    cuts = [tp.Cut(whole.shape, 0, (n,), r, t) for r in range(t)]
    for cut, chunk in zip(cuts, whole.chunk(t), strict=True):
        assert torch.equal(cut(whole), chunk)


def test_fused_matrices_are_cut_one_by_one():
    whole = torch.arange(12).view(12, 1)  # q: 0..3, k: 4..7, v: 8..11
    cut = [tp.Cut(whole.shape, 0, (4, 4, 4), r, 2)(whole).flatten().tolist() for r in (0, 1)]
    assert cut == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    grouped = [tp.Cut(whole.shape, 0, (8, 2, 2), r, 2)(whole).flatten().tolist() for r in (0, 1)]
    assert grouped == [[0, 1, 2, 3, 8, 10], [4, 5, 6, 7, 9, 11]]


def loss_beside_plain(v: int, scale: float):
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(v)
    logits = (torch.randn(2, 6, v, generator=generator, dtype=D) * scale).requires_grad_()
    targets = torch.randint(v, (2, 6), generator=generator)
    targets[0, 0] = targets[1, 3] = -1
    plain = gpt.cross_entropy(logits, targets) * 0.3
    plain.backward()
    head = nn.Module()
    head.weight = tp.cut_parameter(nn.Parameter(torch.zeros(v, 1)), 0, 1, group)
    start, stop = head.weight.cut.range(v)
    mine = logits.detach()[..., start:stop].clone().requires_grad_()
    kept = mine.detach().clone()
    loss = tp.vocab_parallel_cross_entropy(mine, targets, head, group) * 0.3
    loss.backward()
    assert torch.equal(mine, kept), "the logits were overwritten"
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(mine.grad, logits.grad[..., start:stop], rtol=1e-12, atol=1e-15)
    assert torch.equal(mine.grad[0, 0], torch.zeros(stop - start, dtype=D))


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1000.0])  # exp(1000) overflows: the maximum must be shared
def test_vocabulary_parallel_loss(t, scale):
    launch(t, loss_beside_plain, 41, scale)


def counts(n_layer: int, b: int):
    group = dist.group.WORLD
    config = gpt.GPTConfig(n_layer, 12, 24, 41, 6)
    model = gpt.build(config, dtype=D)
    tp.parallelize(model, tp.GPT_PLAN, group)
    assert model.wte.weight is model.lm_head.weight, "tied no more"
    x = torch.zeros(b, 6, dtype=torch.int64)
    with measure.Collectives({"tp": group}) as seen:
        tp.vocab_parallel_cross_entropy(model(x), x, model.lm_head, group).backward()
    return {k: tuple(seen.total("tp", "all_reduce", k)) for k in ("forward", "backward")}


@pytest.mark.parametrize("t", [2, 3, 4])
def test_two_all_reduces_forward_and_two_backward_in_each_block(t):
    for n_layer, b in ((1, 2), (3, 1)):
        predicted = tp.predicted_all_reduces(n_layer, b, s=6, h=24)
        assert launch(t, counts, n_layer, b) == [predicted] * t
    one, two = (tp.predicted_all_reduces(n, 1, 6, 24) for n in (1, 2))
    assert all(two[phase][0] - one[phase][0] == 2 for phase in one)


def shards():
    config = gpt.GPTConfig(2, 4, 24, 41, 6, tied=False)
    with torch.device("meta"):
        model = gpt.GPT(config)
    tp.parallelize(model, tp.GPT_PLAN, dist.group.WORLD)
    gpt.init_weights(model, 0, D, "cpu", draw)
    return {n: (p.detach(), hasattr(p, "cut")) for n, p in gpt.named_parameters(model)}


def test_shards_differ_and_replicas_do_not():
    a, b = launch(2, shards)
    for name, (tensor, is_cut) in a.items():
        other = b[name][0]
        same = tensor.shape == other.shape and torch.equal(tensor, other)
        assert same is not is_cut, name
    whole = {n for n, (_, is_cut) in a.items() if not is_cut}
    assert whole == {n for n in a if "ln_" in n or "wpe" in n or n.endswith("c_proj.bias")}


def parallelize_with(plan: dict):
    tp.parallelize(gpt.build(gpt.GPTConfig(1, 2, 8, 5, 4)), plan, dist.group.WORLD)


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"h.*.mlp.c_fc": "columns"}, "style 'columns' is none of column, row, vocab"),
        ({"h.*.mlp.fc": "column"}, "the plan names a module that the model does not have"),
        ({"wte": "vocab"}, "wte: 5 rows or columns in chunks of 2 leave one of t = 4 ranks"),
    ],
)
def test_bad_plans(plan, message):
    with pytest.raises(RuntimeError, match=message):
        launch(4, parallelize_with, plan)
