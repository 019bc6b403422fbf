import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ddp
import gpt
import measure
import zero
import zero3
from tools.plan import cost
from tools.verify import counting
from tools.verify.oracle import launch

SIZES = [((3, 5), (8,)), ((7,),), ((1,), (6, 3))]  # by layer: 23, 7, 19; no d divides a prime
M = 2
VARIANTS = [(1, {}), (2, {}), (3, {}), (3, {"reshard_after_forward": False})]


class Layer(nn.Module):
    """x + the sum of its parameters' entries, each times another integer, `coefficients`. The
    gradient of an entry is x's times this integer, so every sum is exact, and a gradient that is in
    the place of another differs from it."""

    def __init__(self, shapes, generator):
        super().__init__()
        draw = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        self.params = nn.ParameterList(draw)
        for p in self.params:
            integers = 1.0 + torch.randperm(1000, generator=generator)[: p.numel()]
            p.coefficients = integers.double().view_as(p)

    def forward(self, x):
        return x + sum((p * p.coefficients).sum() for p in self.params)


def model() -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleDict({str(i): Layer(shapes, generator) for i, shapes in enumerate(SIZES)})
    made["1"].params[0].tied_name = "tied"
    return made


def attach(net, stage, options, hybrid: bool, accumulations: int):
    """ZeRO over the world, or within neighbours of two and across."""
    group, world = dist.group.WORLD, dist.get_world_size()
    if hybrid:
        mesh = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replica", "shard"))
        options = options | {"replicas": mesh["replica"].get_group()}
        group = mesh["shard"].get_group()
    return zero3.STAGES[stage](net, group, accumulations, **options), group


def pieces_and_step(stage: int, options: dict, hybrid: bool):
    net = model()
    named = dict(gpt.named_parameters(net))
    before = {n: p.detach().clone() for n, p in named.items()}
    sync, group = attach(net, stage, options, hybrid, M)
    names = {"dp": group} | ({"replica": sync.replicas} if hybrid else {})
    tied = [unit for unit in sync.units if any(hasattr(p, "tied_name") for p in unit.place)]
    assert [len(unit.place) for unit in tied] == [1], "a tied matrix is in a unit alone"
    rank, held = dist.get_rank(), {}
    with measure.Collectives(names) as seen:
        for _ in range(2):
            sync.start()
            for i in range(M):
                y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
                for layer in net.values():
                    y = layer(y)
                ((rank + i + 1) * y).backward()
            gathered = any(unit.gathered for unit in sync.units)
            assert stage < 3 or gathered == (sync.group.size() == 1), "kept too long"
            sync.finish()
            assert counting.bytes_held(p.grad for p in named.values()) == 8 * len(named)
            whole = [*named.values(), *(u.parameter_shard for u in sync.units)]
            held["parameters"] = counting.bytes_held(whole)
            held["gradients"] = counting.bytes_held(u.gradient_shard for u in sync.units)
            sync.before_step()
            for _, piece, _, _ in sync.pieces():
                piece.data -= 0.1 * piece.grad
            sync.after_step()
    sync.gather()
    world = dist.get_world_size()
    gradient = sum(r + i + 1 for r in range(world) for i in range(M))
    for n, p in named.items():
        update = 0.1 * (gradient * p.coefficients)
        assert torch.equal(p, before[n] - update - update), n
    return {
        "pieces": [(n, start, t.numel()) for n, t, _, start in sync.pieces()],
        "units": [[p.numel() for p in unit.place] for unit in sync.units],
        "held": held,
        "seen": {(g, op): tuple(seen.total(g, op)) for g in names
                 for op in ("reduce_scatter", "all_gather", "all_reduce")},
    }  # fmt: skip


@pytest.mark.parametrize("stage, options", VARIANTS)
@pytest.mark.parametrize("world, hybrid", [(1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (4, 1)])
def test_pieces_own_every_element_once_and_padding_never(world, hybrid, stage, options):
    results = launch(world, pieces_and_step, stage, options, bool(hybrid))
    d = 2 if hybrid else world
    for name, p in gpt.named_parameters(model()):
        owned = [0] * p.numel()
        for result in results:
            for n, start, length in result["pieces"]:
                assert length, "an empty piece"
                if n == name:
                    assert start + length <= p.numel(), "padding in a piece"
                    for i in range(start, start + length):
                        owned[i] += 1
        assert owned == [world // d] * p.numel(), name
    for rank, result in enumerate(results):
        units, uses = result["units"], [cost.Use(i, matmul=False) for i in range(len(SIZES))]
        sizes = [zero.padded(numels, d) for numels in units]
        predicted = cost.predicted_zero_payload(sizes, d, uses, stage, M, world // d, not options)
        totals = zero.predicted_payload(sizes, d, stage, M, world // d)
        if stage == 3:
            totals = zero3.predicted_payload(sizes, d, M, world // d, not options)
        assert totals == {op: payload.exposed for op, payload in predicted.items()}
        for op, payload in predicted.items():
            assert payload.hidden == 0  # nothing is multiplied here
            total = (2 * payload.calls, 2 * payload.exposed)
            name = "replica" if hybrid and op == "all_reduce" else "dp"
            assert result["seen"][name, op] == total, op
        held = cost.predicted_zero_bytes(units, d, rank % d, stage, torch.float64)
        assert held["optimizer"] == 2 * 8 * sum(length for _, _, length in result["pieces"])
        assert {k: held[k] for k in result["held"]} == result["held"]


def addresses(stage: int, dtype: torch.dtype) -> list[int]:
    """Of parameters, their gradients and all shards, modulo 16 bytes."""
    net = model().to(dtype)
    sync, _ = attach(net, stage, {}, hybrid=False, accumulations=1)
    sync.gather()
    tensors = [*net.parameters()]
    for unit in sync.units:
        tensors += [*unit.gradient_of.values(), unit.parameter_shard, unit.gradient_shard]
        shard = unit.parameters.numel() // dist.get_world_size() * unit.parameters.itemsize
        assert shard % 16 == 0
    return [t.data_ptr() % 16 for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_and_shards_begin_at_multiples_of_16_bytes(stage, dtype):
    """The sizes are odd."""
    for rank in launch(3, addresses, stage, dtype):
        assert set(rank) == {0}


def minimal_zero1(optimizer, options: dict):
    """MinimalZero1 next to one process that has all rows."""
    rank, d = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    net[2].bias.requires_grad_(False)
    plain, frozen = copy.deepcopy(net), net[2].bias.detach().clone()
    sync = zero.MinimalZero1(net.parameters(), dist.group.WORLD)
    trained = [p for p in plain.parameters() if p.requires_grad]
    assert sync.shard.numel() == -(-sum(p.numel() for p in trained) // d)
    mine, plain_optimizer = optimizer([sync.shard], **options), optimizer(trained, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(d, M, 4, 5, dtype=torch.float64, generator=generator)
        plain_optimizer.zero_grad()
        sync.start()
        for rows in x.flatten(0, 1):
            (plain(rows).square().sum() / len(x)).backward()
        for rows in x[rank]:
            (net(rows).square().sum() / len(x)).backward()
        plain_optimizer.step()
        sync.step(mine)
        assert (sync.parameters[63:] == 0).all(), "padding"
    assert torch.equal(net[2].bias, frozen) and net[2].bias.grad is None
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("d", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "optimizer, options",
    [(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_version_1_equals_one_process(optimizer, options, d):
    """63 trainable elements: no d but 1 divides them."""
    launch(d, minimal_zero1, optimizer, options)


def sharded_layers(optimizer, options: dict):
    """ShardedLayer next to one process that has all rows."""
    rank, d = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    net[2].bias.requires_grad_(False)
    plain = copy.deepcopy(net)
    for i in (0, 2):
        net[i] = zero3.ShardedLayer(net[i], dist.group.WORLD)
    assert [p.numel() for p in net.parameters()] == [-(-42 // d), -(-21 // d)]
    trained = [p for p in plain.parameters() if p.requires_grad]
    mine = optimizer(net.parameters(), **options)
    plain_optimizer = optimizer(trained, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(d, M, 4, 5, dtype=torch.float64, generator=generator)
        plain_optimizer.zero_grad()
        mine.zero_grad()
        for rows in x.flatten(0, 1):
            (plain(rows).square().sum() / len(x)).backward()
        for rows in x[rank]:
            (net(rows).square().sum() / len(x)).backward()
        for i, full in ((0, trained[:2]), (2, trained[2:])):
            gradient = zero3.shard_of([p.grad for p in full], dist.group.WORLD)
            torch.testing.assert_close(net[i].shard.grad, gradient, rtol=1e-12, atol=1e-14)
        plain_optimizer.step()
        mine.step()
        for i, full in ((0, trained[:2]), (2, trained[2:])):
            shard = zero3.shard_of(full, dist.group.WORLD)
            torch.testing.assert_close(net[i].shard.detach(), shard, rtol=1e-12, atol=1e-14)
    assert torch.equal(net[2].layer[0].bias, plain[2].bias) and net[2].layer[0].bias.grad is None


@pytest.mark.parametrize("d", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "optimizer, options",
    [(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_version_1_of_zero3_equals_one_process(optimizer, options, d):
    launch(d, sharded_layers, optimizer, options)


BF16 = torch.bfloat16


def bf16_steps(stage: int, options: dict, grad_dtype, replicate: bool):
    """Three steps in bf16 on two ranks that shard or replicate the state, compared with one process
    that adds in the same order."""
    config, rank = gpt.GPTConfig(2, 2, 16, 31, 8), dist.get_rank()
    kind = zero3.STAGES[stage] if stage else ddp.DDP
    model, whole = (gpt.build(config, seed=0, dtype=BF16) for _ in range(2))
    group = dist.group.WORLD
    if replicate:
        options = options | {"replicas": group}
        group = [dist.new_group([r]) for r in range(2)][rank]
    sync = kind(model, group, M, grad_dtype=grad_dtype, **options)
    optimizer = torch.optim.AdamW([t for _, t, _, _ in sync.pieces()], lr=1e-3)
    masters = {p: p.detach().float().requires_grad_() for p in whole.parameters()}
    whole_optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)
    add_dtype = grad_dtype or torch.float32
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(config.vocab_size, (2, M, 3, config.seq_len + 1), generator=generator)
        parts = []  # by rank, by microbatch
        for r in range(2):
            parts.append([])
            for i in range(M):
                for p in masters:  # in it a tied matrix adds up its two uses
                    p.grad, p.grad_dtype = None, add_dtype if stage < 2 else BF16
                loss = gpt.cross_entropy(whole(x[r, i, :, :-1]), x[r, i, :, 1:]) / 48
                assert loss.dtype == torch.float32
                loss.backward()
                parts[-1].append([p.grad for p in masters])
        for n, (p, master) in enumerate(masters.items()):
            total = torch.zeros_like(p, dtype=add_dtype)
            if stage < 2 or replicate:  # over microbatches here, then over ranks in bf16
                mine = [sum(parts[r][i][n].to(add_dtype) for i in range(M)) for r in range(2)]
                total = mine[0].to(BF16) + mine[1].to(BF16)
            else:  # over ranks in bf16, then over microbatches
                for i in range(M):
                    total = total + (parts[0][i][n] + parts[1][i][n]).to(add_dtype)
            master.grad = total.float()
        whole_optimizer.step()
        for p, master in masters.items():
            p.data.copy_(master.detach())
        sync.start()
        for i in range(M):
            mine = x[rank, i]
            (gpt.cross_entropy(model(mine[:, :-1]), mine[:, 1:]) / 48).backward()
        sync.finish()
        assert all(t.grad is None for _, t, _, _ in sync.pieces()), "fp32 copies from last step"
        held = counting.bytes_by_kind(sync.held(), optimizer)
        sync.before_step()
        optimizer.step()
        sync.after_step()
    sync.gather()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q), (name, (p - q).abs().max())
    if stage:
        units = [[p.numel() for p in unit.place] for unit in sync.units]
        predicted = cost.predicted_zero_bytes
        return held, predicted(units, group.size(), group.rank(), stage, BF16, grad_dtype)
    psi = sum(p.numel() for p in model.parameters())
    return held, ddp.predicted_bytes(psi, BF16, grad_dtype)


@pytest.mark.parametrize("grad_dtype", [None, BF16])
@pytest.mark.parametrize(
    "stage, options, replicate",
    [(0, {}, False), *((*v, False) for v in VARIANTS), (2, {}, True), (3, {}, True)],
)
def test_bf16_is_bitwise_one_process_that_adds_in_the_same_order(
    stage, options, replicate, grad_dtype
):
    for held, predicted in launch(2, bf16_steps, stage, options, grad_dtype, replicate):
        assert held == predicted


DTYPES = [(torch.float64, None), (BF16, None), (BF16, BF16)]


def gpt_steps(stage: int, options: dict, hybrid: bool, dtype, grad_dtype):
    """(predicted, measured) payload of the second of two steps of a GPT with a tied table, and
    (predicted, measured) bytes that are stored after its last backward."""
    config = gpt.GPTConfig(3, 2, 32, 251, 32)  # an odd vocabulary: uneven shards
    net = gpt.build(config, seed=0, dtype=dtype)
    options = options | {"grad_dtype": grad_dtype}
    sync, group = attach(net, stage, options, hybrid, M)
    optimizer = torch.optim.AdamW([piece.tensor for piece in sync.pieces()], lr=1e-2)
    names = {"shard": group} | ({"replica": sync.replicas} if hybrid else {})
    tokens = torch.arange(4 * 32).view(4, 32) % 251

    def to_the_optimizer():
        sync.start()
        for x in tokens.chunk(M):
            gpt.cross_entropy(net(x), x).backward()
        sync.finish()
        held = counting.bytes_by_kind(sync.held(), optimizer)
        sync.before_step()
        optimizer.step()
        return held

    to_the_optimizer()
    # From after_step(), since layers wait for its gathers.
    with counting.Collectives(names) as seen:
        sync.after_step()
        held = to_the_optimizer()
    uses = [
        cost.Use(sync.units.index(unit), "Linear" in str(layer), type(layer) is nn.Embedding)
        for (unit,), layer in zip(sync.needs, zero.layers(net), strict=True)
    ]
    d, reshard = group.size(), options.get("reshard_after_forward", True)
    units = [[p.numel() for p in unit.place] for unit in sync.units]
    sizes = [zero.padded(numels, d) for numels in units]
    replicas = dist.get_world_size() // d
    payload = cost.predicted_zero_payload(sizes, d, uses, stage, M, replicas, reshard)
    measured = {}
    for operation in payload:
        total, hidden = (seen.total(None, operation, hidden=h) for h in (None, True))
        split = total.payload - hidden.payload, hidden.payload
        measured[operation] = cost.Payload(total.calls, *split)
    rank = group.rank()
    predicted_held = cost.predicted_zero_bytes(units, d, rank, stage, dtype, grad_dtype)
    return (payload, measured), (predicted_held, held)


@pytest.mark.parametrize("world, hybrid", [(1, 0), (2, 0), (3, 0), (4, 1)])
@pytest.mark.parametrize("stage, options", VARIANTS)
def test_what_is_exposed_hidden_and_stored_in_a_step_of_a_gpt(world, hybrid, stage, options):
    dtypes = DTYPES if world in (2, 4) else DTYPES[:1]
    for dtype, grad_dtype in dtypes:
        results = launch(world, gpt_steps, stage, options, bool(hybrid), dtype, grad_dtype)
        for (predicted, measured), (predicted_held, held) in results:
            assert predicted == measured
            assert predicted_held == held
            assert world == 1 or predicted["reduce_scatter"].hidden > 0


def small_updates(kind):
    """Gradients of 1, and a rate of which a bf16 weight of 1 would not notice a single step."""
    net = nn.Linear(8, 8, bias=False, dtype=BF16)
    nn.init.ones_(net.weight)
    sync = kind(net, dist.group.WORLD, 1)
    optimizer = torch.optim.SGD([t for _, t, _, _ in sync.pieces()], lr=2**-11)
    for _ in range(64):
        sync.start()
        net(torch.ones(1, 8, dtype=BF16)).sum().backward()
        sync.finish()
        sync.before_step()
        optimizer.step()
        sync.after_step()
    sync.gather()
    return net.weight.detach().float().unique().tolist()


@pytest.mark.parametrize("kind", [ddp.DDP, *zero3.STAGES.values()])
def test_small_updates_of_bf16_weights_add_up(kind):
    assert launch(2, small_updates, kind) == [[1.0 - 2 * 64 * 2**-11]] * 2


def units_of_a_tied_matrix_with_a_bias():
    net = nn.Linear(5, 3)
    net.weight.tied_name = "wte.weight"
    sync = zero.Zero1(net, dist.group.WORLD, 1)
    return [[p is net.weight for p in unit.place] for unit in sync.needs[0]]


def test_a_tied_matrix_is_sharded_alone():
    """The other stage that holds it has no bias to group it with, and must have the same shards."""
    assert launch(1, units_of_a_tied_matrix_with_a_bias) == [[[True], [False]]]


def kept_by_a_forward_without_backward(options: dict):
    net = model()
    sync = zero3.Zero3(net, dist.group.WORLD, 1, **options)
    with torch.no_grad():
        for layer in net.values():
            layer(torch.ones(1, dtype=torch.float64))
    return [unit.gathered for unit in sync.units]


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}])
def test_validation_keeps_no_parameters(options):
    """No backward comes that would give them back."""
    assert launch(2, kept_by_a_forward_without_backward, options) == [[False] * len(SIZES)] * 2


def optimizer_bytes(stage: int, options: dict) -> int:
    sync, _ = attach(model(), stage, options, hybrid=False, accumulations=1)
    pieces = [piece for _, piece, _, _ in sync.pieces()]
    optimizer = torch.optim.AdamW(pieces)
    sync.finish()
    sync.before_step()
    for piece in pieces:
        piece.grad = torch.zeros_like(piece)
    optimizer.step()
    return counting.bytes_by_kind(sync.held(), optimizer)["optimizer"]


@pytest.mark.parametrize("stage, options", VARIANTS[:3])
def test_the_state_that_is_sharded_shrinks_by_d(stage, options):
    """Two moments of 8 bytes: all ranks' are one rank's, and no rank has more than its d-th of each
    unit, rounded up to 8 elements."""
    (one,) = launch(1, optimizer_bytes, stage, options)
    assert one == 2 * 8 * (23 + 7 + 19)
    for d in (2, 4):
        ranks = launch(d, optimizer_bytes, stage, options)
        most = 2 * 8 * sum(-(-n // d // 8) * 8 for n in (23, 7, 19))
        assert sum(ranks) == one and one / d <= max(ranks) <= most


def given_back_on_the_way():
    sync = zero3.Zero3(model(), dist.group.WORLD, 1)
    unit, waited = sync.units[0], []
    unit.reshard()
    unit.unshard()
    wait = unit.gathering.wait
    unit.gathering = SimpleNamespace(wait=lambda: waited.append(wait()))
    unit.reshard()
    return len(waited), unit.gathering


def test_memory_is_not_given_back_under_a_gather():
    assert launch(2, given_back_on_the_way) == [(1, None)] * 2


def gathered_twice_without_a_forward():
    sync = zero.Zero1(model(), dist.group.WORLD, 1)
    sync.after_step()
    waited = []
    for unit in sync.units:
        wait = unit.gathering.wait
        unit.gathering = SimpleNamespace(wait=lambda wait=wait: waited.append(wait()))
    sync.after_step()
    return len(waited)


def test_two_gathers_of_a_unit_are_never_in_flight():
    """A layer that no forward uses does not wait for its unit."""
    assert launch(2, gathered_twice_without_a_forward) == [len(SIZES)] * 2


def optimizer_over_one_parameter(kind):
    net = nn.Sequential(nn.Linear(5, 1, bias=False), nn.Linear(1, 1))
    sync = kind(net)
    optimizer = torch.optim.SGD([net[1].bias], lr=0.1)
    sync.finish()
    sync.before_step()
    with pytest.raises(ValueError, match="the optimizer holds 1.bias"):
        optimizer.step()


@pytest.mark.parametrize("kind", [zero.Zero1, zero3.Zero3])
def test_every_rank_refuses_an_optimizer_over_parameters(kind):
    """Also the ranks whose shards have nothing of the parameter."""
    launch(3, optimizer_over_one_parameter, kind)
