"""Models that are not this repository's, in the four calls that a reader copies."""

import copy
import dataclasses
import functools
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import ddp
import measure
import tensor_parallel
import zero
import zero3
from tools.verify.oracle import launch

KINDS = [ddp.DDP, zero.Zero1, zero.Zero2, zero3.Zero3]
V, S, H, CLIP, M, STEPS, ROWS = 13, 6, 8, 0.2, 2, 3, 12
BF16 = torch.bfloat16


# --- a model with nanoGPT's layout, and LoRA ------------------------------------------------------


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of two narrow matrices."""

    def __init__(self, linear: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.a = nn.Linear(linear.in_features, rank, bias=False)
        self.b = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.c_attn, self.c_proj = LoRA(nn.Linear(H, 3 * H)), nn.Linear(H, H)
        self.c_fc, self.c_out = LoRA(nn.Linear(H, 4 * H)), LoRA(nn.Linear(4 * H, H))

    def forward(self, x, scale=1.0):
        q, k, v = self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)) * scale
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """Containers in a container, a tied head, and a parameter that the model itself holds."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(V, H), "drop": nn.Dropout(0.0),
            "h": nn.ModuleList(Block() for _ in range(3)), "ln_f": nn.LayerNorm(H),
        })  # fmt: skip
        self.wpe = nn.Parameter(0.1 * torch.randn(S, H))
        self.lm_head = nn.Linear(H, V, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens, targets):
        x = self.transformer.drop(self.transformer.wte(tokens) + self.wpe)
        for block in self.transformer.h:
            x = block(x=x, scale=0.5)
        logits = self.lm_head(self.transformer.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def build() -> nn.Module:
    torch.manual_seed(0)
    return NanoGPT().double()


def microbatches(step: int, rank: int = 0, d: int = 1):
    """This rank's rows of the step's batch, in M microbatches."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(V, (ROWS, S + 1), generator=generator)[rank::d]
    return [(x[:, :-1], x[:, 1:]) for x in rows.chunk(M)]


def decayed(optimizer, tensors):
    return optimizer(tensors, lr=0.05, weight_decay=0.1)


def one_process(model, optimizer, norms):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = decayed(optimizer, trained)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in microbatches(step):
            loss = model(x, y) / (ROWS * S)
            loss.backward()
        norms.append(nn.utils.clip_grad_norm_(trained, CLIP))
        optimizer.step()


def many_ranks(model, optimizer, norms, kind, rank, d):
    sync = kind(model, accumulations=M)
    optimizer = decayed(optimizer, [piece.tensor for piece in sync.pieces()])
    for step in range(STEPS):
        sync.start()
        for x, y in microbatches(step, rank, d):
            loss = model(x, y) / (ROWS * S)
            loss.backward()
        sync.finish()
        norms.append(sync.step(optimizer, clip=CLIP))
    return sync


def lora_run(kind, optimizer):
    expected, model, true_norms, norms = build(), build(), [], []
    one_process(expected, optimizer, true_norms)
    sync = many_ranks(model, optimizer, norms, kind, dist.get_rank(), dist.get_world_size())
    expected = dict(expected.named_parameters())
    torch.testing.assert_close(norms, true_norms, rtol=1e-12, atol=0)
    assert min(norms) > CLIP, "clipping is active"
    if kind is not ddp.DDP:
        assert all(p.requires_grad for p in sync.unit_of) == (kind is not zero3.Zero3)
    seen = 0
    for piece in sync.pieces():
        true = expected[piece.name].grad.flatten()
        true = true[piece.start : piece.start + piece.tensor.numel()]
        torch.testing.assert_close(piece.tensor.grad.flatten(), true, rtol=1e-12, atol=1e-15)
        seen += piece.tensor.numel()
    sync.gather()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    return seen, sum(p.numel() for p in expected.values() if p.requires_grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [2, 3])
def test_nanogpt_with_lora_equals_one_process(d, kind, optimizer):
    results = launch(d, lora_run, kind, optimizer)
    for _, trained in results:
        assert sum(seen for seen, _ in results) == trained * (d if kind is ddp.DDP else 1)


def test_a_loop_over_many_ranks_has_one_line_more():
    """DDP(model) or Zero3(model) is added, and four other lines change. (One function also lists
    the trainable parameters, the other one returns.)"""
    lines = [len(inspect.getsource(f).splitlines()) for f in (one_process, many_ranks)]
    assert lines[1] - lines[0] == 1


# --- how zero.py splits a model into layers -------------------------------------------------------


class Holder(nn.Module):
    """Holds its arguments under their names, and runs nothing."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self):
        raise NotImplementedError


def test_layers_of_a_model_with_nested_containers():
    model = build()
    names = {module: name for name, module in model.named_modules()}
    found = {names[layer]: len(parameters) for layer, parameters in zero.layers(model).items()}
    of_block = len([*model.transformer.h[0].parameters()])
    blocks = {f"transformer.h.{i}": of_block for i in range(3)}
    assert found == {"": 1, "transformer.wte": 1, **blocks, "transformer.ln_f": 2, "lm_head": 1}
    assert list(found)[:2] == ["", "transformer.wte"], "in the order of the forward"


def test_blocks_can_be_passed():
    first, second = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    model = Holder(first=first, second=second, norm=nn.LayerNorm(2))
    found = zero.layers(model, blocks=[first, second])
    assert [*found] == [first, second, model.norm] and len(found[first]) == 4
    with pytest.raises(ValueError, match="the model does not contain Linear"):
        zero.layers(model, blocks=[nn.Linear(1, 1)])


def test_parameters_without_a_forward_are_refused():
    model = Holder(scales=nn.ParameterList([torch.zeros(2)]), norm=nn.LayerNorm(2))
    with pytest.raises(ValueError, match="Holder.scales has parameters but no forward.*blocks="):
        zero.layers(model)
    assert [*zero.layers(model, blocks=[model])] == [model]


def whole_during_backward():
    """Units whose memory is not freed, after the forward and between the blocks' backwards."""
    model = build()
    sync = zero3.Zero3(model, accumulations=2)
    names = {id(p): name for name, p in model.named_parameters()}
    held, (x, y) = [], microbatches(0)[0]

    def look(_):
        held.append([names[id([*unit.place][0])] for unit in sync.units if unit.gathered])

    hook = model.transformer.h[1].register_forward_hook(lambda *args: look(args) or args[2])
    loss = model(x, y)
    hook.remove()
    look(None)
    loss.backward()
    look(None)
    model(x, y).backward()
    look(None)
    return held


def test_a_parameter_of_the_model_itself_does_not_make_it_one_unit():
    (inside, after_forward, first, second), _ = launch(2, whole_during_backward)
    assert "wpe" in inside and "transformer.h.2.ln_1.weight" in inside  # gathered ahead
    assert not any("h.0" in name for name in inside)
    assert "wpe" in after_forward and not any("h.1" in name for name in after_forward)
    assert "wpe" in first and not any("h." in name for name in first), "of the first microbatch"
    assert second == []


# --- parameters that are frozen, unused, of several dtypes ----------------------------------------


def frozen_on_the_plain_rungs(rung):
    model = build()
    x, y = microbatches(0, dist.get_rank(), 2)[0]
    model(x, y).backward()
    with measure.Collectives() as seen:
        rung(model.parameters(), dist.group.WORLD)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {p.grad is None for p in model.parameters() if not p.requires_grad}
    return frozen, seen.total().payload - trained


@pytest.mark.parametrize("rung", [ddp.all_reduce_gradients, ddp.all_reduce_flat])
def test_a_frozen_parameter_gets_no_gradient_and_is_not_sent(rung):
    assert launch(2, frozen_on_the_plain_rungs, rung) == [({True}, 0)] * 2


class Branches(nn.Module):
    """`never` is used by no rank, `zero` by the last rank alone and with a gradient of 0, `some`
    by rank 0 alone and by it in the second microbatch only."""

    def __init__(self):
        super().__init__()
        names = ("always", "never", "zero", "some")
        self.parts = nn.ModuleDict({n: nn.Linear(3, 5, bias=False) for n in names})

    def forward(self, x, first: bool, last: bool, microbatch: int):
        y = self.parts["always"](x).sum()
        y = y + 0.0 * self.parts["zero"](x).sum() if last else y
        return y + self.parts["some"](x).sum() if first and microbatch == 1 else y


def branches(kind):
    """Two steps of AdamW, whose weight decay moves a parameter with a gradient of 0."""
    rank, d = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Branches().double()
    plain = copy.deepcopy(model)
    optimizer = decayed(torch.optim.AdamW, plain.parameters())
    rung = kind if kind in (ddp.all_reduce_gradients, ddp.all_reduce_flat) else None
    sync = None if rung else kind(model, accumulations=M)
    tensors = [piece.tensor for piece in sync.pieces()] if sync else model.parameters()
    mine = decayed(torch.optim.AdamW, tensors)
    for _ in range(2):
        x = torch.randn(d, M, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        mine.zero_grad()
        sync and sync.start()
        for r in range(d):
            for i in range(M):
                plain(x[r, i], r == 0, r == d - 1, i).backward()
                if r == rank:
                    model(x[r, i], r == 0, r == d - 1, i).backward()
        optimizer.step()
        if sync:
            sync.finish()
            sync.step(mine)
        else:
            rung(model.parameters(), dist.group.WORLD)
            mine.step()
    if sync:
        sync.gather()
        given = {piece.name: piece.tensor.grad is not None for piece in sync.pieces()}
    else:
        given = {name: p.grad is not None for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-12, atol=0, msg=name)
        assert given.get(name, p.grad is not None) == (p.grad is not None), name
    return plain.parts["never"].weight.grad is None


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kind", [ddp.all_reduce_gradients, ddp.all_reduce_flat, *KINDS[:3]])
def test_a_parameter_is_decayed_if_and_only_if_a_rank_used_it(kind, d):
    assert all(launch(d, branches, kind))


class Mixed(nn.Module):
    """Linear layers in bf16 next to a norm in fp32."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False, dtype=BF16) for _ in range(2))
        self.norm = nn.LayerNorm(4, bias=False)

    def forward(self, x):
        return self.second(self.norm(self.first(x).float()).to(BF16))


def mixed(kind):
    """A gradient of 1 + 2^-12 in fp32 is kept; bf16 has 8 bits of it."""
    torch.manual_seed(0)
    model = nn.ModuleList([Mixed()])
    sync = kind(model, accumulations=1)
    optimizer = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.0)
    model[0].norm.weight.register_hook(lambda g: torch.full_like(g, 1 + 2**-12))
    with measure.Collectives() as seen:
        sync.start()
        model[0](torch.ones(2, 4, dtype=BF16)).float().sum().backward()
        sync.finish()
    sync.step(optimizer)
    found = [t for name, t, _, _ in sync.pieces() if name.endswith("norm.weight")]
    sums = [c.dtype for c in seen.calls if c.operation in ("all_reduce", "reduce_scatter")]
    return {p.dtype for _, p, _, _ in sync.pieces()}, {*sums}, [t.grad.tolist() for t in found]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_each_dtype_is_summed_in_its_own(kind):
    for masters, sums, gradients in launch(2, mixed, kind):
        assert masters == {torch.float32} and sums == {BF16, torch.float32}
        for gradient in gradients:
            assert gradient == [2 + 2**-11] * len(gradient)


def gradient_of_bf16(kind, reduce_dtype):
    """1 + 2^-10 in two microbatches. The sum over ranks is in reduce_dtype."""
    model = nn.ModuleList([nn.Linear(1, 1, bias=False, dtype=BF16)])
    nn.init.ones_(model[0].weight)
    model[0].weight.grad = torch.ones_like(model[0].weight)  # a leftover, which counts for nothing
    sync = kind(model, accumulations=2, reduce_dtype=reduce_dtype)
    for x in (1.0, 2**-10):
        model[0](torch.full((1, 1), x, dtype=BF16)).sum().backward()
    sync.finish()
    sync.before_step()
    return sum(piece.tensor.grad.sum().item() for piece in sync.pieces())


@pytest.mark.parametrize("kind", KINDS[:2])
def test_bf16_gradients_are_rounded_if_they_are_sent_in_bf16(kind):
    """With one rank nothing is sent."""
    exact = 1 + 2**-10
    assert launch(1, gradient_of_bf16, kind, None) == [exact]
    everywhere = 2 if kind is ddp.DDP else 1  # ZeRO: the second rank has padding
    assert sum(launch(2, gradient_of_bf16, kind, None)) == 2 * everywhere
    assert sum(launch(2, gradient_of_bf16, kind, torch.float32)) == 2 * exact * everywhere


# --- saving, loading and reading ------------------------------------------------------------------


def state(kind, dtype):
    """Reads a state dict during training, loads another one, and takes a step from there."""
    model, donor = build().to(dtype), build().to(dtype)
    with torch.no_grad():
        for p in donor.parameters():
            p.mul_(2.0)
    sync = kind(model, accumulations=M)
    optimizer = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.0)

    def step():
        sync.start()
        for x, y in microbatches(0, dist.get_rank(), 2):
            model(x, y).backward()
        sync.finish()
        sync.step(optimizer)

    def check(expected):
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name
            assert value.untyped_storage().nbytes() >= value.nbytes, name

    step()
    first = model.state_dict()
    check(build().to(dtype).state_dict())
    model.load_state_dict(donor.state_dict())
    check(donor.state_dict())
    step()
    check(donor.state_dict())
    for name, value in build().to(dtype).state_dict().items():  # no view of what is freed since
        assert kind is not zero3.Zero3 or torch.equal(first[name], value), name
    try:
        model.load_state_dict(donor.state_dict(), assign=True)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_state_dicts_are_complete_and_loading_lasts(kind, dtype):
    for error in launch(2, state, kind, dtype):
        assert "oad with" in error and "assign" in error


def reads(kind):
    """What a read between two steps gives."""
    model = build()
    sync = kind(model, accumulations=M)
    optimizer = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.1)
    for x, y in microbatches(0, dist.get_rank(), 2):
        model(x, y).backward()
    sync.finish()
    sync.step(optimizer)
    p = model.transformer.h[1].c_proj.weight
    assert p.shape == (H, H) and p.numel() == H * H and p.requires_grad and p.device.type == "cpu"
    assert isinstance(p, nn.Parameter) and sum(q.numel() for q in model.parameters()) > 0
    tries = (
        lambda: p.sum(), lambda: p[0], lambda: p.data, lambda: p.detach(), lambda: p.T,
        lambda: print(p), lambda: p.tolist(), lambda: torch.stack([p, p]), lambda: p.add_(1),
        lambda: copy.deepcopy(model), lambda: model.float(), lambda: p.clone(),
        lambda: model.transformer.h.state_dict(),
    )  # fmt: skip
    for attempt in tries:
        with pytest.raises(ValueError, match=r"sync\.gather\(\)"):
            attempt()
    sync.gather()
    return p.sum().item(), type(p) is nn.Parameter


@pytest.mark.parametrize("kind", KINDS[1:])
def test_reading_a_parameter_between_steps_is_refused_until_gather(kind):
    first, second = launch(2, reads, kind)
    assert first == second and first[1]


def deleted(kind):
    model = build()
    kind(model)
    with pytest.raises(ValueError, match="ZeRO object .* was deleted.* keep it in a variable"):
        model(*microbatches(0)[0])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_deleted_zero_object_is_named(kind):
    launch(1, deleted, kind)


# --- layers in other forms ------------------------------------------------------------------------


class Pair(nn.Module):
    """Two inputs with gradients, by keyword; a dictionary with two outputs, one of them used by
    nothing but the other model's loss."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, *, x, memory):
        y = self.a(x) + torch.tanh(self.b(memory["first"]))
        return {"y": y, "extra": (self.c(y * y), "no tensor")}


class Chain(nn.Module):
    """The first pair gets a parameter as an input: its gradient is complete before the pair's."""

    def __init__(self):
        super().__init__()
        self.embed, self.prompt = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))
        self.pairs = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x):
        x, memory, loss = self.embed(x), self.prompt, 0.0
        for pair in self.pairs:
            found = pair(x=x, memory={"first": memory})
            x, memory, loss = found["y"], memory * x, loss + found["extra"][0].square().sum()
        return loss


def chain(kind, options, build=Chain):
    """Two steps next to one process."""
    torch.manual_seed(0)
    model = build().double()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    sync = kind(model, accumulations=M, **options)
    mine = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.01)
    x = torch.randn(2, M, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        sync.start()
        for rows in x.flatten(0, 1):
            plain(rows).backward()
        for rows in x[dist.get_rank()]:
            model(rows).backward()
        optimizer.step()
        sync.finish()
        sync.step(mine)
    sync.gather()
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()),
                               rtol=1e-12, atol=1e-14)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_a_layer_may_be_called_by_keyword_and_return_several_tensors(options):
    launch(2, chain, zero3.Zero3, options)
    launch(2, chain, zero.Zero2, {})


class Scaled(nn.Module):
    """A scalar parameter, and a matrix in another memory order."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.matrix = nn.Parameter(torch.randn(4, 4).T)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * torch.tanh(self.linear(x) @ self.matrix)


class Loop(nn.Module):
    """Runs its blocks twice, under torch's recomputation. (Its reentrant form runs a backward for
    each run of a block, so that there a block is run once: `accumulations` says once per step.)"""

    def __init__(self, checkpoint, times):
        super().__init__()
        self.checkpoint, self.times = checkpoint, times
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x):
        x = x.clone().requires_grad_()  # without a gradient torch's reentrant way trains nothing
        for block in [*self.blocks] * self.times:
            x = x + self.checkpoint(block, x)
        return x.square().sum()


def no_checkpoint(block, x):
    return block(x)


def to_the_end(block, x):
    """Does not stop at the last tensor that backward needs: the block's forward hooks run again."""
    with set_checkpoint_early_stop(False):
        return checkpoint(block, x, use_reentrant=False)


CHECKPOINTS = {
    "none": no_checkpoint, "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "early stop": functools.partial(checkpoint, use_reentrant=False), "to the end": to_the_end,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_layer_may_run_twice_and_under_torchs_recomputation(how, options):
    times = 1 if how is CHECKPOINTS["reentrant"] else 2
    launch(2, chain, zero3.Zero3, options, functools.partial(Loop, how, times))


def whole_after(build):
    """Units whose memory is not freed after the forward, and after the backward."""
    torch.manual_seed(0)
    model = build().double()
    sync, held = zero3.Zero3(model, accumulations=2), []
    loss = model(torch.ones(5, 4, dtype=torch.float64))
    held.append([unit.gathered for unit in sync.units])
    loss.backward()
    return [*held, [unit.gathered for unit in sync.units]]


def test_such_layers_are_resharded_in_time():
    for how in ("none", "early stop", "to the end"):
        build = functools.partial(Loop, CHECKPOINTS[how], 1)
        after_forward, after_backward = launch(2, whole_after, build)[0]
        assert after_forward == [False, False, True] and not any(after_backward)
    after_forward, after_backward = launch(2, whole_after, Chain)[0]
    assert after_forward == [True, False, False, False, True], "the prompt and the last pair"
    # The prompt, and the first layer, whose input has no gradient, wait for the last microbatch.
    assert after_backward == [True, True, False, False, False]
    after_forward, after_backward = launch(2, whole_after, Decoder)[0]
    assert after_forward == [False, False, False, True] and after_backward == [True] + 3 * [False]


class InARow(nn.Module):
    """The output of a block is the input of its next run."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList([Scaled()])

    def forward(self, x):
        x = self.embed(x)
        for _ in range(3):
            x = self.blocks[0](x)
        return x.square().sum()


class Positions(nn.Module):
    """Returns a view of its parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, n):
        return self.table[:n]


class WithPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.linear = Positions(), nn.Linear(4, 4)

    def forward(self, x):
        positions = self.positions(len(x))
        return (torch.tanh(self.linear(x)) * positions).square().sum()


class Square(nn.Module):
    def forward(self, weight):
        return weight**2


def parametrized():
    """A layer with one parameter and no tensor as an input: its backward reads the parameter."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for linear in (model[0], model[2]):
        parametrize.register_parametrization(linear, "weight", Square())
    return SumOf(model)


class SumOf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().sum()


class Target(nn.Module):
    """A forward without gradients between forward and backward, and a parameter of the model."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 3))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def run(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x @ self.out

    def forward(self, x, outer=True):
        if not outer:
            return self.run(x)
        y = self.run(x)
        with torch.no_grad():
            target = self(x + 1, outer=False)
        return (y - target).square().sum()


@dataclasses.dataclass
class Hidden:
    x: torch.Tensor


class OfHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden):
        return Hidden(torch.tanh(self.linear(hidden.x)))


class WithDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(OfHidden() for _ in range(3))

    def forward(self, x):
        hidden = Hidden(x)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.x.square().sum()


class InPlace(nn.Module):
    """Writes to its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x += self.b(torch.relu(self.a(torch.relu(x))))
        return x


def in_place():
    return SumOf(nn.Sequential(nn.Linear(4, 4), *(InPlace() for _ in range(3))))


class Scale(nn.Module):
    """Modifies its input in place and returns it, so its last node reads a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x.mul_(self.weight)


def scale():
    return SumOf(nn.Sequential(nn.Linear(4, 4), *(Scale() for _ in range(3))))


def frozen_positions():
    model = WithPositions()
    model.positions.requires_grad_(False)
    return model


class Penalty(SumOf):
    """A loss with a gradient in it: the second backward runs through the first."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        return super().forward(x) + slope.square().sum()


def penalty():
    return Penalty(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()))


class Normed(nn.Module):
    """The path of g and v is not the path of x, whose gradient is complete first."""

    def __init__(self):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 1))

    def forward(self, x):
        return x @ (self.g * torch.tanh(self.v / self.v.norm()))


def of_leaf():
    return OfLeaf(nn.Sequential(Normed(), nn.Tanh(), Normed()))


class OfLeaf(SumOf):
    def forward(self, x):
        return super().forward(x.clone().requires_grad_().detach().requires_grad_())


class ReLUInPlace(SumOf):
    """An in-place operation on an output that is a view (of a linear layer, with a 3-D input)."""

    def __init__(self):
        layers = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.ReLU(inplace=True))]
        super().__init__(nn.Sequential(*layers))

    def forward(self, x):
        return super().forward(x[None])


class Shared(nn.Embedding):
    """A table that is the head too."""

    def forward(self, x):
        return super().forward(x) if x.dtype == torch.int64 else torch.tanh(x @ self.weight.T)


class TableAndHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = Shared(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.table(torch.tanh(self.linear(self.table(x.abs().long())))).square().sum()


class Mixer(nn.Module):
    """Returns one of its inputs, and reads a memory that all blocks read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, memory):
        return torch.tanh(self.a(x) + self.b(memory)), memory


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.blocks = nn.Linear(4, 4), nn.ModuleList(Mixer() for _ in range(3))

    def forward(self, x):
        memory = self.encoder(x)
        x = memory * 2
        for block in self.blocks:
            x, memory = block(x, memory)
        return (x * memory).sum()


class Interleaved(WithDataclass):
    """Two forwards, and then two backwards."""

    def forward(self, x):
        first, second = super().forward(x), super().forward(2 * x)
        return first + 3 * second


class Queries(nn.Module):
    """A parameter of the model is the only input of a layer, at each step."""

    def __init__(self):
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(5, 4)), Normed()

    def forward(self, x):
        return (self.layer(self.queries) * x).square().sum()


SHAPES = [
    ReLUInPlace, TableAndHead, Decoder, Interleaved, Queries, InARow, WithPositions, parametrized,
    Target, WithDataclass, in_place, penalty, of_leaf, scale, frozen_positions,
]  # fmt: skip


def hooks_left():
    model = Queries().double()
    sync, counts = zero3.Zero3(model), []
    for _ in range(3):
        sync.start()
        model(torch.ones(5, 4, dtype=torch.float64)).backward()
        counts.append(len(model.queries._backward_hooks or ()))
    return counts


def test_no_hook_stays_on_an_input_that_lives_on():
    assert launch(1, hooks_left) == [[0, 0, 0]]


@pytest.mark.parametrize("build", SHAPES)
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_models_whose_backward_reads_parameters_at_unusual_times(options, build):
    """Each read freed memory under an earlier ZeRO-3."""
    launch(2, chain, zero3.Zero3, options, build)


class Keeping(nn.Module):
    """Stores a tensor that the loss uses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.kept = self.linear(x)
        return x + self.kept


class Escape(nn.Module):
    """What the second block returns is not used, and what it stores is."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList(Keeping() for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = block(x).detach() if i == 1 else block(x)
        return (x + sum(block.kept for block in self.blocks)).square().sum()


def test_an_output_that_leaves_by_an_attribute_is_refused():
    with pytest.raises(RuntimeError, match="is wrong, because its layer was not gathered"):
        launch(2, chain, zero3.Zero3, {}, Escape)


def compiled(kind):
    """A block compiled before ZeRO is attached: its hooks are traced too."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
    plain = copy.deepcopy(model)
    model[0].compile(backend="eager")
    sync = kind(model)
    x = torch.ones(3, 4)
    model[1](model[0](x)).sum().backward()
    plain[1](plain[0](x)).sum().backward()
    sync.finish()
    sync.before_step()
    for piece in sync.pieces():
        true = 2 * plain.get_parameter(piece.name).grad.flatten()
        true = true[piece.start : piece.start + piece.tensor.numel()]
        torch.testing.assert_close(piece.tensor.grad.flatten(), true)


@pytest.mark.parametrize("kind", [zero.Zero1, zero3.Zero3])
def test_a_block_may_be_compiled(kind):
    launch(2, compiled, kind)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.table(x.abs().long())).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_with_sparse_gradients(kind):
    launch(2, chain, kind, {}, Sparse)


def ids_and_weights():
    """The first layer takes token ids, and its backward reads its weights."""

    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(V, H), nn.Linear(H, H)

        def forward(self, tokens):
            return self.linear(self.table(tokens))

    torch.manual_seed(0)
    model = nn.ModuleList([Front(), nn.Linear(H, 1)])
    plain = copy.deepcopy(model)
    sync = zero3.Zero3(model)
    tokens = torch.arange(5)
    model[1](model[0](tokens)).sum().backward()
    plain[1](plain[0](tokens)).sum().backward()
    sync.finish()
    sync.before_step()
    for piece in sync.pieces():
        true = 2 * plain.get_parameter(piece.name).grad.flatten()
        true = true[piece.start : piece.start + piece.tensor.numel()]
        torch.testing.assert_close(piece.tensor.grad, true)


def test_a_layer_of_token_ids_may_be_more_than_a_table():
    launch(2, ids_and_weights)


def smaller_than_the_group(kind):
    model = nn.ModuleList([nn.Linear(1, 1, bias=False)]).double()
    nn.init.ones_(model[0].weight)
    sync = kind(model)
    optimizer = torch.optim.AdamW([piece.tensor for piece in sync.pieces()], lr=0.1)
    model[0](torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    sync.finish()
    norm = sync.step(optimizer, clip=1.0)
    sync.gather()
    return norm.item(), model[0].weight.item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_smaller_than_the_group(kind):
    (norm, weight), *others = launch(3, smaller_than_the_group, kind)
    assert norm == 3.0 and weight < 1.0 and others == [(norm, weight)] * 2


# --- mistakes -------------------------------------------------------------------------------------


def other_values(kind, hybrid: bool):
    torch.manual_seed(dist.get_rank() // 2 if hybrid else dist.get_rank())
    options = {}
    if hybrid:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        options = {"group": mesh["shard"].get_group(), "replicas": mesh["replica"].get_group()}
    kind(nn.Linear(3, 3), **options)


@pytest.mark.parametrize("kind, hybrid", [*((k, False) for k in KINDS), (zero.Zero1, True)])
def test_ranks_must_start_from_the_same_values(kind, hybrid):
    message = "parameter 0 is weight .*the same model"
    with pytest.raises(RuntimeError, match=message):
        launch(4 if hybrid else 2, other_values, kind, hybrid)


def mistake(how: str, kind, dtype):
    """One step, with a mistake in it."""
    model = build().to(dtype)
    sync = kind(model, accumulations=1 if how == "accumulations" else M)
    pieces = [piece.tensor for piece in sync.pieces()]
    optimizer = torch.optim.SGD(model.parameters() if how == "optimizer" else pieces, lr=0.1)
    if how == "converted":
        sync.gather()
        for p in model.parameters():  # as model.to() does
            p.data = p.data.clone()
    for _ in range(2):
        if how == "zero_grad":
            model.zero_grad(set_to_none=True)
        if how != "start":
            sync.start()
        for x, y in microbatches(0, dist.get_rank(), dist.get_world_size()):
            model(x, y).backward()
        if how == "finish twice":
            sync.finish()
        if how not in ("finish", "finish, parts"):
            sync.finish()
        if how == "finish, parts":
            optimizer.step()
        if how == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if how == "after_step":
            sync.before_step()
            optimizer.step()
        else:
            sync.step(optimizer)
    if how == "unfrozen":
        next(p for p in model.parameters() if not p.requires_grad).requires_grad_(True)
        sync.start()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how, message",
    [
        ("optimizer", r"the optimizer holds .*over \[piece.tensor for piece in sync.pieces\(\)\]"),
        ("accumulations", "received 2 gradients in one step, but .* is 1: .*accumulations=m"),
        ("start", r"call (sync\.)?start\(\)"),
        ("finish", "without finish()"),
        ("finish, parts", "call finish()"),
        ("finish twice", r"finish\(\) without start\(\)"),
        ("after_step", r"start\(\) before after_step\(\)"),
        ("unfrozen", "base.weight was unfrozen"),
    ],
)
def test_a_call_that_is_missing_or_wrong_is_refused(how, message, kind):
    """In bf16, where the optimizer must not update the model's own parameters under DDP either."""
    with pytest.raises(RuntimeError, match=message):
        launch(1, mistake, how, kind, BF16)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    "how, message",
    [("clip", "To clip, use sync.step"), ("converted", "its data was replaced.*call model.to")],
)
def test_what_zero_would_not_see_is_refused(how, message, kind):
    with pytest.raises(RuntimeError, match=message):
        launch(1, mistake, how, kind, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulations", [0, {}])
def test_accumulations_that_are_no_counts_are_refused(accumulations, kind):
    with pytest.raises(RuntimeError, match="accumulations must be an int >= 1.* for weight it is"):
        launch(1, kind, nn.Linear(2, 2), None, accumulations)


def copied(kind):
    """A copy of the model, for an average of the weights, has hooks of the original."""
    model = build().to(BF16)
    sync = kind(model, accumulations=M)
    sync.gather()
    average = copy.deepcopy(model)
    average.load_state_dict(model.state_dict())
    with torch.no_grad():
        average(*microbatches(0)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_model_does_not_disturb(kind):
    launch(2, copied, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_grad_before_start_does_no_harm(kind):
    launch(2, mistake, "zero_grad", kind, torch.float32)


def clipping_what_others_hold(plan: dict, sequence: bool, kind):
    model = nn.ModuleList([nn.Linear(2, 2)])
    torch.nn.init.ones_(model[0].weight)
    torch.nn.init.ones_(model[0].bias)
    tensor_parallel.parallelize(model, plan, dist.group.WORLD, sequence)
    sync = kind(model, dist.new_subgroups(1)[0])
    sync.finish()
    with pytest.raises(ValueError, match="over several ranks"):
        sync.step(torch.optim.SGD([piece.tensor for piece in sync.pieces()]), clip=1.0)


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1])
@pytest.mark.parametrize("plan, sequence", [({"0": "column"}, False), ({"0": "replicated"}, True)])
def test_step_does_not_clip_by_a_part_of_the_norm(plan, sequence, kind):
    launch(2, clipping_what_others_hold, plan, sequence, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_process_group_it_says_so(kind):
    with pytest.raises(ValueError, match="init_process_group"):
        kind(nn.Linear(1, 1))


def only_frozen(kind):
    model = nn.ModuleList([nn.Linear(3, 3).requires_grad_(False)])
    sync = kind(model)
    sync.start()
    y = model[0](torch.ones(1, 3))
    sync.finish()
    sync.before_step()
    sync.after_step()
    return len(sync.pieces()), y.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_may_be_frozen(kind):
    assert launch(2, only_frozen, kind) == [(0, False)] * 2


# --- ZeRO over unevenly sharded matrices ----------------------------------------------------------


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 3), nn.LayerNorm(8), nn.Linear(3, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def uneven(kind):
    """3 hidden units on 2 tensor-parallel ranks, with sequence parallelism, on 2 data-parallel."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, dp = mesh["tp"].get_group(), mesh["dp"].get_group()
    torch.manual_seed(0)
    model = nn.ModuleList([MLP()]).double()
    plain = copy.deepcopy(model)
    plan = {"*.up": "column", "*.norm": "replicated", "*.down": "row"}
    tensor_parallel.parallelize(model, plan, tp, sequence=True)
    sync = kind(model, dp)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rows in x:
        plain[0](rows).square().sum().backward()
    model[0](x[dp.rank()].chunk(2, dim=1)[tp.rank()]).square().sum().backward()
    sync.finish()
    sync.before_step()
    pieces = sync.pieces()
    partial = [piece for piece in pieces if piece.parameter.distribution.partial is tp]
    tensor_parallel.all_reduce_partial((piece.parameter, piece.tensor.grad) for piece in pieces)
    for piece in sync.pieces():
        true, p = plain.get_parameter(piece.name).grad, piece.parameter
        true = p.distribution.shard(true).flatten()
        true = true[piece.start : piece.start + piece.tensor.numel()]
        torch.testing.assert_close(piece.tensor.grad.flatten(), true, rtol=1e-12, atol=1e-14)
    return len(partial), dp.rank()


@pytest.mark.parametrize("kind", KINDS)
def test_partial_gradients_next_to_unevenly_sharded_matrices(kind):
    """The tensor-parallel ranks must hold the same shards of what is summed over them."""
    assert all(partial for partial, _ in launch(4, uneven, kind))


class Doubled(torch.autograd.Function):
    """2 x; the gradient of w is None."""

    @staticmethod
    def forward(ctx, x, w):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, None


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return Doubled.apply(self.linear(x), self.other.weight) + self.other.bias


def gradients_where_backward_returns_none(kind) -> list[str]:
    torch.manual_seed(0)
    model = NoGradient()
    sync = kind(model, accumulations=2, **({} if kind is ddp.DDP else {"blocks": [model]}))
    sync.start()
    for _ in range(2):
        model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    sync.finish()
    sync.before_step()
    given = [piece.name for piece in sync.pieces() if piece.tensor.grad is not None]
    sync.after_step()
    return given


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero.Zero2, zero3.Zero3])
def test_a_backward_that_returns_none_gives_no_gradient(kind):
    """Autograd calls the parameter's hook nevertheless, with `.grad` None."""
    names = {name for given in launch(2, gradients_where_backward_returns_none, kind)
             for name in given}  # fmt: skip
    assert names == {"linear.weight", "linear.bias", "other.bias"}


def graphs_on_gradients(kind) -> list[bool]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    sync = kind(model, accumulations=2)
    sync.start()
    for _ in range(2):
        model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward(create_graph=True)
    sync.finish()
    sync.before_step()
    pieces = [piece.tensor.grad.requires_grad for piece in sync.pieces()]
    sync.after_step()
    return pieces


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero.Zero2, zero3.Zero3])
def test_summed_gradients_keep_no_graph(kind):
    """With create_graph=True the gradients of a backward have one."""
    assert all(found and not any(found) for found in launch(2, graphs_on_gradients, kind))
