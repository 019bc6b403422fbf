import contextlib
import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import activation_ckpt as ckpt
import gpt
import measure
import tensor_parallel
from tools.plan import cost
from tools.verify.oracle import launch

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
    assert net.draws.step == 1, "the second forward must restore the position"
    return {n: p.grad for n, p in net.named_parameters()}


POLICIES = [
    ("none", 1, None), ("selective", 1, None), ("selective", 2, 3), ("full", 1, None),
    ("full", 2, None), ("full", 3, None), ("full", 1, 2), ("full", 5, None), ("offload", 1, None),
    ("offload", 2, None),
]  # fmt: skip


VERSIONS = {
    "textbook": ckpt.CheckpointFunction.apply,
    "version 1": ckpt.checkpoint,
    "recompute": ckpt.recompute,
    "torch": functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
}


def gradients_of_microbatches(version: str | None, frozen: tuple[str, ...]) -> dict:
    """Three microbatches of different sizes. All forwards run before the first backward."""
    net = model("explicit")
    for block in net.h.values() if version else ():
        block.forward = functools.partial(VERSIONS[version], block.forward)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    generator, losses = torch.Generator().manual_seed(0), []
    for shape in ((3, 10), (1, 7), (2, 5)):
        x = torch.randint(17, shape, generator=generator)
        losses.append(gpt.cross_entropy(net(x), x))
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("frozen", [("h.1.mlp.c_fc.weight",), ("wte.weight", "wpe.weight")])
@pytest.mark.parametrize("version", VERSIONS)
def test_all_versions_compute_the_same_gradients(version, frozen):
    plain, actual = (gradients_of_microbatches(v, frozen) for v in (None, version))
    for name, gradient in plain.items():
        if version == "textbook" and "wte.weight" in frozen and name.startswith("h."):
            # The input of block 0 requires no gradient, so no Function has a backward.
            assert gradient is not None and actual[name] is None
        elif name in frozen:
            assert gradient is None and actual[name] is None
        else:
            assert actual[name] is not None and torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("version, ends", [("textbook", 2), ("version 1", 1), ("recompute", 1)])
def test_the_second_forward_stops_after_the_last_saved_tensor(version, ends):
    reached = []

    def function(x):
        y = x.exp().sin()
        reached.append(y)
        return y + 1

    VERSIONS[version](function, torch.ones(4, requires_grad=True)).sum().backward()
    assert len(reached) == ends


@pytest.mark.parametrize("trained_input", [True, False])
@pytest.mark.parametrize("version", ["version 1", "recompute", "torch"])
def test_the_second_forward_saves_what_the_first_has_saved(version, trained_input):
    """A linear layer saves its weight only if its input requires a gradient."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    x = torch.randn(4, 4, requires_grad=trained_input)
    inputs = [*mlp.parameters(), *[x] * trained_input]
    plain, actual = (torch.autograd.grad(y.square().sum(), inputs)
                     for y in (mlp(x), VERSIONS[version](mlp, x)))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain, actual, strict=True))


@pytest.mark.parametrize("policy, every, layers", POLICIES)
def test_the_same_gradients_and_masks_bitwise(policy, every, layers):
    plain = gradients(model("explicit", dropout=0.2))
    net = model("explicit", dropout=0.2)
    ckpt.checkpoint_blocks(net.h, policy, every, layers, net.draws.save)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("policy", ckpt.POLICIES)
def test_the_closed_forms_are_the_detailed_ones(policy, dtype):
    detailed = cost.predicted_block_bytes(B, S, H, A, "explicit", dtype.itemsize, policy)
    assert ckpt.saved_bytes(policy, B, S, H, A, dtype.itemsize) == detailed
    config = gpt.GPTConfig(1, A, H, 17, S)
    assert ckpt.flops(policy, B, S, H) == cost.predicted_flops(config, 1, B, policy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention, dropout", [("sdpa", 0), ("explicit", 0), ("explicit", 0.3)])
@pytest.mark.parametrize("policy, every, layers", POLICIES)
def test_bytes_kept_and_flops_are_as_predicted(attention, dropout, policy, every, layers, dtype):
    net = gpt.build(gpt.GPTConfig(L, A, H, 17, S, attention, dropout=dropout), dtype=dtype)
    net.draws.at(0, range(B))
    ckpt.checkpoint_blocks(net.h, policy, every, layers, net.draws.save)
    x = torch.randn(B, S, H, dtype=dtype, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        with measure.SavedActivations(net) as saved:
            y = x
            for block in net.h.values():
                y = block(y)
        y.sum().backward()
    sizes = dict(b=B, s=S, h=H, a=A, attention=attention, dropout=dropout > 0)
    predicted = cost.predicted_blocks_bytes(
        L, policy, every, layers, itemsize=dtype.itemsize, **sizes
    )
    assert saved.peak == predicted
    if attention == "explicit":  # torch's counter counts 0 for sdpa on the CPU
        expected = cost.predicted_flops(net.config, L, B, policy, every, layers)
        assert flops.get_total_flops() == expected


def bytes_kept_of_a_block(
    b: int, s: int, h: int, a: int, policy: str, sequence: bool, keep: bool = False
) -> int:
    """In bf16 with dropout, on this rank."""
    group = dist.group.WORLD
    net = gpt.build(gpt.GPTConfig(1, a, h, 17, s, "explicit", dropout=0.1), dtype=torch.bfloat16)
    tensor_parallel.parallelize(net, gpt.PLAN, group, sequence, keep)
    ckpt.checkpoint_blocks(net.h, policy, save_rng=net.draws.save)
    net.draws.at(0, range(b))
    shard = s // group.size() if sequence else s
    x = torch.randn(b, shard, h, dtype=torch.bfloat16, requires_grad=True)
    with measure.SavedActivations(net) as saved:
        y = net.h["0"](x)
    assert y.shape == x.shape
    return saved.peak


def test_korthikantis_34_and_what_is_more():
    """2205.05198, section 4.1: a block saves 34 s b h + 5 a s^2 b bytes. This one also saves the
    softmax in fp32, mean and 1/std of layer norms, and a causal mask."""
    b, s, h, a = 2, 16, 32, 4
    counted = launch(1, bytes_kept_of_a_block, b, s, h, a, "none", False)
    assert counted == [34 * s * b * h + 7 * a * s * s * b + 8 * b * s + s * s]
    # Their table 2: s b h (10 + 24/t), and with sequence parallelism 34/t. With keep_gathered, the
    # two inputs of column-parallel layers are full.
    for t in (2, 4):
        tp, sp, keep = (launch(t, bytes_kept_of_a_block, b, s, h, a, "selective", *how)
                        for how in ((False, False), (True, False), (True, True)))  # fmt: skip
        assert tp == [s * b * h * (10 + 24 // t) + 8 * b * s] * t
        assert sp == [s * b * h * 34 // t + 8 * b * s // t] * t
        assert keep == [s * b * h * 4 + s * b * h * 30 // t + 8 * b * s // t] * t


@pytest.mark.parametrize("policy", ckpt.POLICIES)
def test_names_parameters_and_hooks_stay(policy):
    net = model()
    names = [n for n, _ in net.named_parameters()]
    fired = []
    for n, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=n: fired.append(n))
    ckpt.checkpoint_blocks(net.h, policy, save_rng=net.draws.save)
    gradients(net)
    assert [n for n, _ in net.named_parameters()] == names
    assert sorted(fired) == sorted(names)


def test_frozen_layers_below_and_no_gradient_at_all():
    """Inputs that require no gradient, and forwards under torch.no_grad."""
    for policy in ("full", "selective"):
        grads = []
        for p in ("none", policy):
            net = model()
            net.wte.weight.requires_grad_(False)
            net.wpe.weight.requires_grad_(False)
            ckpt.checkpoint_blocks(net.h, p, save_rng=net.draws.save)
            grads.append(gradients(net))
            with torch.no_grad():
                net(torch.zeros(B, S, dtype=torch.int64))
        for name, gradient in grads[0].items():
            assert gradient is None or torch.equal(gradient, grads[1][name]), name


def watch_second_forward(monkeypatch, watched: Callable) -> None:
    """Calls watched(store, t) in place of store(t), the pack hook of the second forward."""
    plain = ckpt.saved_tensors_hooks

    def hooks(pack, unpack):
        second = pack.__name__ == "store"
        return plain(functools.partial(watched, pack) if second else pack, unpack)

    monkeypatch.setattr(ckpt, "saved_tensors_hooks", hooks)


def test_nothing_of_the_second_forward_outlives_backward(monkeypatch):
    kept = []

    def watched(store, t):
        kept.append(weakref.ref(t))
        return store(t)

    watch_second_forward(monkeypatch, watched)
    for policy in ("selective", "full"):
        net = model("explicit", dropout=0.2)
        ckpt.checkpoint_blocks(net.h, policy, save_rng=net.draws.save)
        gc.disable()  # nothing may wait for it
        try:
            gradients(net)
            parameters = {id(p) for p in net.parameters()}
            alive = [ref() for ref in kept if ref() is not None and id(ref()) not in parameters]
            assert kept and not alive, [tuple(t.shape) for t in alive]
        finally:
            gc.enable()


@pytest.mark.parametrize("policy", ckpt.POLICIES)
def test_a_graph_that_is_kept_is_run_backward_twice(policy):
    net = model("explicit", dropout=0.2)
    ckpt.checkpoint_blocks(net.h, policy, save_rng=net.draws.save)
    net.draws.at(0, range(B))
    x = torch.randint(17, (B, S), generator=torch.Generator().manual_seed(0))
    loss = gpt.cross_entropy(net(x), x)
    one, two = (torch.autograd.grad(loss, net.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def hooks_of_offload(monkeypatch, net: torch.nn.Module, x: torch.Tensor) -> tuple:
    hooks = []
    monkeypatch.setattr(
        ckpt, "saved_tensors_hooks", lambda *pair: hooks.append(pair) or contextlib.nullcontext()
    )
    ckpt.offload(net.forward, net, x)
    return hooks[0]


def test_offload_copies_activations_and_no_parameters(monkeypatch):
    net, x = torch.nn.Linear(3, 4), torch.randn(4, 3).T
    pack, unpack = hooks_of_offload(monkeypatch, net, torch.ones(3))
    for t, copied in ((net.weight.T, False), (net.bias, False), (x, True)):
        device, host = pack(t)
        back = unpack((device, host))
        assert device == t.device and torch.equal(back, t) and back.stride() == t.stride()
        assert (host.data_ptr() != t.data_ptr()) == copied


class Copies(TorchDispatchMode):
    """The arguments of each allocation and copy."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in ("empty_like", "copy_", "_to_copy"):
            self.seen.append((name, args[2:], kwargs))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_offload_of_a_gpu_tensor_is_asynchronous_and_pinned(monkeypatch):
    """With fake tensors, which have a device and no data."""
    pack, unpack = hooks_of_offload(monkeypatch, torch.nn.Linear(3, 4), torch.ones(3))
    with FakeTensorMode():
        x = torch.empty(4, 3, device="cuda").T
        with Copies() as copies:
            device, host = pack(x)
            back = unpack((device, host))
    assert (host.device.type, back.device) == ("cpu", x.device)
    assert host.stride() == back.stride() == x.stride()
    allocation, to_host, to_device = copies.seen
    assert allocation[2]["pin_memory"] is True
    assert to_host[:2] == ("copy_", (True,))  # non_blocking
    assert to_device[0] == "_to_copy" and to_device[2]["non_blocking"] is True


def test_a_forward_without_gradients_copies_nothing(monkeypatch):
    copies, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: copies.append(t) or empty_like(t, **k))
    net, x = model(), torch.zeros(B, S, dtype=torch.int64)
    ckpt.checkpoint_blocks(net.h, "offload")
    with torch.no_grad():
        net(x)
    assert not copies
    net(x)
    assert len(copies) > len(net.h)


def test_an_unknown_policy():
    with pytest.raises(ValueError, match="'half' is unknown: use none, selective, full, offload"):
        ckpt.checkpoint_blocks(model().h, "half")


# --- functions of other models --------------------------------------------------------------------


def test_a_second_forward_that_saves_another_shape_is_refused():
    """The number of tensors is the same, and the shapes broadcast."""
    x, runs = torch.ones(4, requires_grad=True), []

    def function(x):
        runs.append(x)
        return (x[:1] if len(runs) > 1 else x).exp().sum()

    with pytest.raises(ValueError, match=r"saved tensors of shapes \[\(4,\)\] .* \[\(1,\)\]"):
        ckpt.recompute(function, x).backward()


def test_a_second_forward_that_saves_fewer_tensors_is_refused():
    x, runs = torch.ones(4, requires_grad=True), []

    def function(x):
        runs.append(x)
        return x.exp() if len(runs) > 1 else x.exp().exp()

    with pytest.raises(ValueError, match=r"\[\(4,\), \(4,\)\] and the second \[\(4,\)\]"):
        ckpt.recompute(function, x).sum().backward()


class SquareReadTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad + ctx.saved_tensors[0] * grad


def test_saved_tensors_that_are_read_twice_are_recomputed_twice():
    x, runs = torch.full((4,), 3.0, requires_grad=True), []

    def function(x):
        runs.append(x)
        return SquareReadTwice.apply(x.exp())

    ckpt.recompute(function, x).sum().backward()
    assert len(runs) == 3 and torch.allclose(x.grad, 2 * (2 * x).exp())


def test_each_node_of_a_block_frees_its_recomputed_tensors(monkeypatch):
    """A chain of 4 exp, each of which saves its output. When the gradient of output i is computed,
    the outputs after i have been freed."""
    kept, alive = [], []

    def watched(store, t):
        kept.append(weakref.ref(store(t)))
        return kept[-1]()

    def function(x):
        for _ in range(4):
            x = x.exp()
            x.register_hook(lambda _: alive.append(sum(ref() is not None for ref in kept)))
        return x

    watch_second_forward(monkeypatch, watched)
    x = torch.zeros(3, requires_grad=True)
    ckpt.recompute(function, x).sum().backward()
    assert alive == [0, 3, 2, 1]  # nothing was recomputed before the first


class Rotary(torch.nn.Module):
    """A block as in other models: it takes angles, a mask or None and a flag, and returns a
    tuple."""

    def __init__(self):
        super().__init__()
        self.linear, self.core = torch.nn.Linear(4, 4), RotaryCore()

    def forward(self, x, angles, mask=None, *, scale=True, pair=None):
        y = self.core(self.linear(x), angles, mask=mask, scale=scale)
        return x + y * pair[0] * pair[1], y.sum()


class RotaryCore(torch.nn.Module):
    def forward(self, x, angles, mask, scale):
        x = x * angles.cos() + x.flip(-1) * angles.sin()
        return (x if mask is None else x.masked_fill(mask, 0.0)).tanh() * (2.0 if scale else 1.0)


@pytest.mark.parametrize("trained_input", [True, False])
@pytest.mark.parametrize("policy", ckpt.POLICIES)
def test_other_arguments_than_one_tensor(policy, trained_input):
    """Floats that need no gradient, keywords, None, a flag, a tuple of tensors. The output is a
    tuple, and the blocks are in an nn.ModuleList."""
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Rotary() for _ in range(3))
    start = torch.randn(2, 4, requires_grad=trained_input)
    angles, mask = torch.randn(2, 4), torch.tensor([True, False, False, False])
    pair = torch.randn(4), torch.randn(4, requires_grad=True)

    def gradients():
        x, loss = start, 0.0
        for i, block in enumerate(blocks):
            x, more = block(x, angles, mask=None if i else mask, scale=i == 1, pair=pair)
            loss = loss + more
        inputs = [*blocks.parameters(), pair[1], *[start] * trained_input]
        return torch.autograd.grad(x.sum() + loss, inputs)

    plain = gradients()
    ckpt.checkpoint_blocks(blocks, policy, core="core")
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_a_recomputed_block_in_a_recomputed_block():
    """With an input that needs no gradient."""
    torch.manual_seed(0)
    block, runs = RotaryCore(), []

    def inner(x, angles):
        runs.append(0)
        return block(x, angles, None, True)

    def outer(function, x, angles):
        return function(x.exp(), angles).sin()

    x, angles = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    (plain,) = torch.autograd.grad(outer(inner, x, angles).sum(), x)
    runs.clear()
    nested = functools.partial(outer, functools.partial(ckpt.recompute, inner))
    ckpt.recompute(nested, x, angles).sum().backward()
    assert torch.equal(x.grad, plain)
    assert len(runs) == 3  # first forward, in the outer's second forward, and the inner's own


def test_inputs_of_an_inner_recompute_are_recomputed_too():
    inputs = []

    def outer(x):
        y = 2 * x
        inputs.append(weakref.ref(y))
        return ckpt.recompute(lambda a, b: (a[0] * b).sin(), (y,), b=3 * y)

    x = torch.ones(4, requires_grad=True)
    z = ckpt.recompute(outer, x)
    assert inputs[0]() is None, "the graph keeps the inner input"
    z.sum().backward()
    assert torch.allclose(x.grad, 24 * x * (12 * x * x).cos())


def test_an_input_that_the_block_overwrites_is_refused():
    """The second forward would start from the overwritten x."""
    w = torch.ones(4, requires_grad=True)
    y = ckpt.recompute(lambda x: (x.add_(1) * w).exp(), torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_block_that_catches_exceptions():
    def function(x):
        try:
            return x.exp()
        except Exception:
            return x.sin().exp()

    x = torch.ones(4, requires_grad=True)
    ckpt.recompute(function, x).sum().backward()
    assert torch.equal(x.grad, x.exp())


def test_an_output_that_does_not_depend_on_the_input():
    """Its backward may run last, after the backward of all other outputs."""
    w, x = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    late, early = ckpt.recompute(lambda x: (w.exp(), x * 2), x)
    early.sum().backward()
    late.sum().backward()
    assert torch.equal(w.grad, w.exp())


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_the_second_forward_runs_under_the_autocast_of_the_first(first, second):
    """Backward may be called within autocast or outside of it."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    function = lambda x: layer(layer(x).tanh())  # noqa: E731
    grads = []
    for call in (function, functools.partial(ckpt.recompute, function)):
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            y = call(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=second):
            grads.append(torch.autograd.grad(y.float().sum(), [x, *layer.parameters()]))
    assert y.dtype == (torch.bfloat16 if first else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
