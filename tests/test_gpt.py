import math

import pytest
import torch
from torch import nn

import gpt


def small(**changes) -> gpt.GPTConfig:
    sizes = dict(n_layer=3, n_head=2, n_embd=16, vocab_size=23, seq_len=8)
    return gpt.GPTConfig(**(sizes | changes))


def test_parameter_names_are_gpt2s():
    names = [name for name, _ in gpt.named_parameters(gpt.build(small()))]
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    expected = ["wte.weight", "wpe.weight"]
    for i in range(3):
        expected += [f"h.{i}.{layer}.{kind}" for layer in block for kind in ("weight", "bias")]
    assert names == expected + ["ln_f.weight", "ln_f.bias"]
    untied = [name for name, _ in gpt.named_parameters(gpt.build(small(tied=False)))]
    assert untied == names + ["lm_head.weight"]


def test_named_sizes_have_the_published_numbers_of_parameters():
    published = {"gpt2": 124.44e6, "gpt2-medium": 354.82e6, "gpt2-large": 774.03e6,
                 "gpt2-xl": 1557.61e6}  # fmt: skip
    for name, numel in published.items():
        with torch.device("meta"):
            model = gpt.GPT(gpt.MODELS[name])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(numel, rel=1e-4)


def test_explicit_attention_equals_sdpa():
    x = torch.randint(23, (2, 8), generator=torch.Generator().manual_seed(0))
    grads = {}
    for kind in ("explicit", "sdpa"):
        model = gpt.build(small(attention=kind), dtype=torch.float64)
        gpt.cross_entropy(model(x), x).backward()
        grads[kind] = [p.grad for p in model.parameters()]
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_mask_is_a_function_of_seed_step_row_and_site():
    model = gpt.build(small(dropout=0.25))
    a, b = model.h["1"].drop_1, model.h["1"].drop_2
    ones = torch.ones(2, 40, 50)

    def mask(drop, step, rows, seed=0):
        model.draws.seed = seed
        model.draws.at(step, rows)
        return drop(ones)

    first = mask(a, 3, [7, 9])
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert first.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(mask(a, 3, [9, 7]), first.flip(0)), "a row's mask goes with the row"
    others = mask(a, 4, [7, 9]), mask(a, 3, [8, 6]), mask(b, 3, [7, 9]), mask(a, 3, [7, 9], 1)
    for other in others:
        assert not torch.equal(other[0], first[0])
    a.tokens = gpt.Subset().chunk(1, 4)  # of a row that is four times as long
    quarter = mask(a, 3, [7, 9])
    del a.tokens
    ones = torch.ones(2, 160, 50)
    assert torch.equal(quarter, mask(a, 3, [7, 9])[:, 40:80])
    model.eval()
    assert torch.equal(a(ones), ones)


def test_subsets():
    zigzag = gpt.Subset((1, 6), 8)
    assert zigzag.total(10) == 40
    assert zigzag.positions(10).tolist() == [*range(5, 10), *range(30, 35)]
    halves = [zigzag.chunk(i, 2).positions(5).tolist() for i in range(2)]
    assert halves == [[*range(5, 10)], [*range(30, 35)]]
    four = torch.cat([zigzag.chunk(i, 4).positions(5) for i in range(4)])
    assert torch.equal(four, zigzag.positions(20)), "each quarter has half a chunk"
    full = torch.rand(3, 8, 2)
    assert torch.equal(zigzag.take(full, 1), full[:, [1, 6]])
    assert gpt.Subset().take(full, 1) is full
    with pytest.raises(RuntimeError, match="9"):
        zigzag.take(torch.rand(9), 0)


class WithBuffers(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.size, self.weight = size, nn.Parameter(torch.empty(size))
        self.init_buffers()

    def init_buffers(self) -> None:
        self.register_buffer("kept", torch.arange(self.size))
        self.register_buffer("recomputed", torch.arange(self.size) / 2, persistent=False)


def test_buffers_survive_building_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(WithBuffers(3), nn.Sequential(WithBuffers(2)))
    gpt.init_weights(
        model, 0, torch.float64, "cpu", lambda name, *_: torch.ones(int("1" in name) + 2)
    )
    expected = WithBuffers(3)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(model[0].kept, expected.kept)
    assert torch.equal(model[0].recomputed, expected.recomputed)
    assert [*model.state_dict()] == ["0.weight", "0.kept", "1.0.weight", "1.0.kept"]


def test_buffers_that_cannot_be_recomputed_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    with pytest.raises(ValueError, match="0: BatchNorm1d has buffers.*method init_buffers"):
        gpt.init_weights(model, 0, torch.float64, "cpu", None)


def test_dropout_needs_a_number_for_each_row():
    model = gpt.build(small(dropout=0.25))
    model.draws.at(0, range(3))
    with pytest.raises(ValueError, match="the input has 2 rows, but draws.at.. was called with 3"):
        model(torch.zeros(2, 8, dtype=torch.int64))


def test_no_token_sees_the_future():
    model = gpt.build(small(), dtype=torch.float64)
    x = torch.randint(23, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 23
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_initialisation_is_a_function_of_seed_and_name():
    whole = dict(gpt.named_parameters(gpt.build(small(), seed=3)))
    deeper = dict(gpt.named_parameters(gpt.build(small(n_layer=5), seed=3)))
    assert torch.equal(whole["h.1.attn.c_attn.weight"], deeper["h.1.attn.c_attn.weight"])
    other = dict(gpt.named_parameters(gpt.build(small(), seed=4)))
    for name, p in whole.items():
        if p.ndim == 2:  # biases are 0 and norms 1 under any seed
            assert not torch.equal(p, other[name]), name
    blocks = [whole[f"h.{i}.mlp.c_fc.weight"] for i in range(3)]
    assert not torch.equal(blocks[0], blocks[1]) and not torch.equal(blocks[1], blocks[2])


def test_initialisation_has_gpt2s_scales():
    model = gpt.build(small(n_layer=2, n_embd=128))
    scale = {"c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(4), "wte": 0.02, "wpe": 0.02}
    for name, p in model.named_parameters():
        if p.ndim == 2:
            expected = next(v for k, v in scale.items() if k in name)
            assert p.std().item() == pytest.approx(expected, rel=0.1), name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name


def test_the_loss_is_a_sum_over_valid_tokens():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1, -1, 4], [-1, -1, 0]])
    expected = -sum(logits[i, j].log_softmax(0)[targets[i, j]] for i, j in ((0, 0), (0, 2), (1, 2)))
    torch.testing.assert_close(gpt.cross_entropy(logits, targets), expected, rtol=0, atol=1e-14)
    assert gpt.cross_entropy(logits, torch.full((2, 3), -1)) == 0.0


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="15 is not divisible by n_head 2"):
        gpt.GPT(small(n_embd=15))
