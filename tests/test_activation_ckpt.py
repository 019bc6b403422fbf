import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import activation_ckpt as ckpt
import gpt
import measure

B, S, H, A, L = 3, 10, 12, 2, 5


def model(attention: str = "sdpa", dropout: float = 0.0) -> gpt.GPT:
    config = gpt.GPTConfig(L, A, H, 17, S, attention=attention, dropout=dropout)
    return gpt.build(config, dtype=torch.float64)


def gradients(net: gpt.GPT) -> dict:
    net.draws.at(0, range(B))
    x = torch.randint(17, (B, S), generator=torch.Generator().manual_seed(0))
    y = gpt.cross_entropy(net(x), x)
    net.draws.at(1, range(B))  # another microbatch may have come before this backward
    y.backward()
    assert net.draws.step == 1, "the second forward left its place behind"
    return {n: p.grad for n, p in net.named_parameters()}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_same_gradients_and_masks_bitwise(every):
    plain = gradients(model("explicit", dropout=0.2))
    net = model("explicit", dropout=0.2)
    ckpt.checkpoint_blocks(net.h, "full", every, net.draws.remember)
    for name, gradient in gradients(net).items():
        assert torch.equal(gradient, plain[name]), name


def test_torchs_own_dropout_draws_the_same_mask_again():
    drop = torch.nn.Dropout(0.5)
    torch.manual_seed(1)
    x = torch.ones(100, requires_grad=True)
    y = ckpt.recompute(lambda x: drop(x * x), x)
    after = torch.get_rng_state()
    torch.rand(3)
    between = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * y)
    assert not torch.equal(after, between)
    assert torch.equal(torch.get_rng_state(), between), "the second forward moved the generator"


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("policy, every", [("none", 1), ("full", 1), ("full", 2), ("full", 5)])
def test_bytes_kept_and_flops_are_as_predicted(attention, policy, every):
    net = model(attention)
    ckpt.checkpoint_blocks(net.h, policy, every)
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as flops, measure.SavedActivations(net) as saved:
        y = x
        for block in net.h.values():
            y = block(y)
        y.sum().backward()
    predicted = ckpt.predicted_bytes(L, B, S, H, A, attention, 8, policy, every)
    # backward ran inside the hooks too: what a recomputed block saved for itself comes on top
    if policy == "none":
        assert saved.bytes == predicted
    with measure.SavedActivations(net) as saved:
        y = x
        for block in net.h.values():
            y = block(y)
    assert saved.bytes == predicted, saved.by_shape()
    if attention == "explicit":  # torch's counter counts 0 for sdpa on the CPU
        assert flops.get_total_flops() == ckpt.predicted_flops(L, B, S, H, policy, every)


def test_names_parameters_and_hooks_stay():
    net = model()
    names = [n for n, _ in net.named_parameters()]
    fired = []
    for n, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=n: fired.append(n))
    ckpt.checkpoint_blocks(net.h, "full")
    gradients(net)
    assert [n for n, _ in net.named_parameters()] == names
    assert sorted(fired) == sorted(names)


def test_an_input_without_gradient_is_refused():
    with pytest.raises(ValueError, match="the input requires no gradient"):
        ckpt.recompute(torch.nn.Linear(2, 2), torch.ones(2))
    with torch.no_grad():  # in validation nobody asks for one
        ckpt.recompute(torch.nn.Linear(2, 2), torch.ones(2))


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="'half' is none of none, full"):
        ckpt.checkpoint_blocks(model().h, "half")
