import functools
import gc

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import data
import ddp
import gpt
import measure
import zero
import zero3
from tools.verify import counting
from tools.verify.oracle import Case, judge, launch


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)]
    return torch.nn.Sequential(*layers).double()


def rows(rank: int, microbatch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + microbatch)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


class Uneven(torch.nn.Module):
    """Layers of odd sizes. No rank uses `unused`, and only the last rank uses `spare`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.frozen = torch.nn.Linear(5, 7).double(), torch.nn.Linear(7, 7).double()
        self.last, self.spare = torch.nn.Linear(7, 3).double(), torch.nn.Linear(5, 3).double()
        self.unused = torch.nn.Linear(2, 1).double()
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        y = self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))
        return y + self.spare(x) if rank == ranks - 1 else y


def uneven_batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """3 rows for rank 0, 5 for rank 1, 7 for rank 2. Some targets are -1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(3 + 2 * rank, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(-1, 3, (len(x),), generator=generator)


def version_and_one_process(version):
    """Three steps of AdamW with three microbatches, of this rank's rows and of all rows."""
    group, m = dist.group.WORLD, 3
    d = group.size()
    net, reference = Uneven(), Uneven()
    sync = ddp.DDP(net, group, m, bucket_bytes=100) if version is ddp.DDP else None
    adamw = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, eps=1e-4)
    optimizer, reference_optimizer = adamw(net.parameters()), adamw(reference.parameters())
    found, expected = {}, {}

    def backward(model, step: int, rank: int, count: int) -> torch.Tensor:
        total, (x, y) = torch.zeros((), dtype=torch.float64), uneven_batch(step, rank)
        for xs, ys in zip(x.tensor_split(m), y.tensor_split(m), strict=True):
            loss = gpt.cross_entropy(model(xs, rank, d)[None], ys[None]) / count
            loss.backward()
            total += loss.detach()
        return total

    for step in range(3):
        optimizer.zero_grad()
        reference_optimizer.zero_grad()
        if sync:
            sync.start()
        count = sum((uneven_batch(step, r)[1] >= 0).sum().item() for r in range(d))
        assert ddp.global_count(uneven_batch(step, group.rank())[1], group) == count
        loss = found[f"loss {step}"] = backward(net, step, group.rank(), count)
        expected[f"loss {step}"] = sum(backward(reference, step, r, count) for r in range(d))
        reference_optimizer.step()
        if sync:
            sync.finish()
            sync.step(optimizer)
        else:
            with measure.Collectives() as seen:
                version(net.parameters(), group)
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
            assert seen.total().payload == ddp.predicted_payload(trained)
            optimizer.step()
        dist.all_reduce(loss)
        for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            found[f"{name} {step}"], expected[f"{name} {step}"] = p.detach().clone(), q.clone()
            if q.grad is not None:
                found[f"{name}.grad {step}"] = p.grad.clone()
                expected[f"{name}.grad {step}"] = q.grad.clone()
    return max((error, what) for what, error in measure.relative_errors(found, expected).items())


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("version", [ddp.all_reduce_gradients, ddp.all_reduce_flat, ddp.DDP])
def test_each_version_equals_one_process(version, d):
    """In float64, with uneven sizes, rows and microbatches, masked targets, a frozen parameter, one
    that no rank uses and one that only the last rank uses."""
    for error, what in launch(d, version_and_one_process, version):
        assert error <= measure.TOLERANCE, (error, what)


def gpt_step(version, dtype=torch.float64, grad_dtype=None):
    """The second step of a small GPT. Returns (calls, exposed payload, hidden payload): predicted
    and measured; and the bytes held after finish(): predicted and measured."""
    group, m, config = dist.group.WORLD, 2, gpt.GPTConfig(2, 2, 32, 256, 32)
    net, tokens = gpt.build(config, seed=0, dtype=dtype), data.example()
    psi = sum(p.numel() for p in net.parameters())
    sync = None
    if version is ddp.DDP:
        sync = ddp.DDP(net, group, m, bucket_bytes=2**16, grad_dtype=grad_dtype)
    tensors = [piece.tensor for piece in sync.pieces()] if sync else net.parameters()
    optimizer = torch.optim.AdamW(tensors)
    rows = range(4 * group.rank(), 4 * group.rank() + 4)
    for step in range(2):
        with counting.Collectives({"dp": group}) as seen:
            if sync:
                sync.start()
            x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
            for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                gpt.cross_entropy(net(xs), ys).backward()
            if sync:
                sync.finish()
                held = counting.bytes_by_kind(sync.held(), optimizer)
                sync.step(optimizer)
            else:
                version(net.parameters(), group)
                optimizer.step()
    calls, exposed = {ddp.all_reduce_gradients: len([*net.parameters()])}.get(version, 1), psi
    if sync:
        # Exposed: the buckets that wait for a parameter of which no matmul follows in backward.
        late = ("wte", "wpe", "h.0.ln_1", "h.0.attn.c_attn")
        first = min(sync.bucket_of[i] for i, (n, _) in enumerate(sync.parameters)
                    if n.startswith(late))  # fmt: skip
        calls, exposed = len(sync.buckets), sum(flat.numel() for flat in sync.buckets[first:])
    total, hidden = (seen.total("dp", "all_reduce", hidden=hidden) for hidden in (None, True))
    costs = ((calls, exposed, ddp.predicted_payload(psi) - exposed),
             (total.calls, total.payload - hidden.payload, hidden.payload))  # fmt: skip
    return costs, sync and (ddp.predicted_bytes(psi, dtype, grad_dtype), held)


@pytest.mark.parametrize("version", [ddp.all_reduce_gradients, ddp.all_reduce_flat, ddp.DDP])
def test_which_gradients_are_reduced_during_backward(version):
    for (predicted, measured), _ in launch(2, gpt_step, version):
        assert measured == predicted
        assert (measured[2] > measured[1]) == (version is ddp.DDP)


@pytest.mark.parametrize("dtype, grad_dtype", [(torch.float64, None), (torch.float32, None),
                         (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_bytes_held_are_predicted(dtype, grad_dtype):
    for _, (predicted, measured) in launch(2, gpt_step, ddp.DDP, dtype, grad_dtype):
        assert measured == predicted


def naive_and_bucketed():
    group, m = dist.group.WORLD, 3
    naive, bucketed = model(), model()
    sync = ddp.DDP(bucketed, group, m, bucket_bytes=100)
    seen, calls = measure.Collectives({"dp": group}), 0
    for step in range(3):  # again and again: counters must start afresh, and buckets may change
        naive.zero_grad()
        sync.start()
        for i in range(m):
            x = rows(group.rank(), 10 * step + i)
            naive(x).sum().backward()
            with seen:
                bucketed(x).sum().backward()
                if i < m - 1 or step == 0:
                    assert len(seen.calls) == calls, "met too early"
        on_time = len(sync.buckets) if step > 0 else 0  # in the first step the order is learned
        assert len(sync.launched) == on_time, "one waited for the end of backward"
        calls = len(seen.calls)
        sync.finish()
        ddp.all_reduce_gradients(naive.parameters(), group)
    for a, b in zip(naive.parameters(), bucketed.parameters(), strict=True):
        if group.size() == 2:  # two numbers have one sum
            assert torch.equal(a.grad, b.grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-13, atol=0)
    return seen.total("dp", "all_reduce", "backward"), calls


@pytest.mark.parametrize("d", [2, 3])
def test_bucketed_equals_naive_and_leaves_during_the_last_backward(d):
    for total, calls in launch(d, naive_and_bucketed):
        psi = sum(p.numel() for p in model().parameters())
        assert total == (calls, 2 * ddp.predicted_payload(psi)) and calls > 3


def hierarchical(hosts: int):
    """Buckets of any length, four under way at once."""
    group = dist.group.WORLD
    grid = torch.arange(group.size()).view(hosts, -1)
    inside, _ = dist.new_subgroups_by_enumeration(grid.tolist())
    across, _ = dist.new_subgroups_by_enumeration(grid.T.tolist())
    generator = torch.Generator().manual_seed(group.rank())
    lengths, n = (12, 1, 7, 25), inside.size()
    buckets = [torch.randn(k, dtype=torch.float64, generator=generator) for k in lengths]
    expected = [bucket.clone() for bucket in buckets]
    for bucket in expected:
        dist.all_reduce(bucket)
    reduce = ddp.Hierarchical(inside, across)
    with measure.Collectives({"inside": inside, "across": across}) as seen:
        handles = [reduce(bucket, group) for bucket in buckets]
        early = [call.operation for call in seen.calls]
        for handle in handles:
            handle.wait()
    scattered, crossed, gathered = "reduce_scatter", "all_reduce", "all_gather"
    third = [gathered, crossed, scattered]  # oldest first
    assert early == [scattered, crossed, scattered, *third, *third]
    predicted = ddp.predicted_hierarchical_payload(lengths, n)
    assert {key: seen.total(*key) for key in predicted} == {
        key: (len(lengths), payload) for key, payload in predicted.items()
    }
    for a, b in zip(buckets, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("ranks, hosts", [(4, 2), (6, 3), (6, 2), (2, 2), (2, 1)])
def test_hierarchical_is_an_all_reduce(ranks, hosts):
    launch(ranks, hierarchical, hosts)


def unused():
    group = dist.group.WORLD
    for rung in (None, ddp.all_reduce_gradients, ddp.all_reduce_flat):
        net = model()
        net.spare = torch.nn.Linear(2, 2).double()
        sync = None if rung else ddp.DDP(net, group, 1, bucket_bytes=1)
        y = net[0](rows(0, 0)).sum()  # no rank uses the last layer, and the spare one rank 1 alone
        if group.rank() == 1:
            y = y + net.spare(torch.ones(2, dtype=torch.float64)).sum()
        y.backward()
        sync.finish() if sync else rung(net.parameters(), group)
        assert torch.equal(net.spare.bias.grad, torch.ones(2, dtype=torch.float64))
        assert net[2].weight.grad is None


def test_a_parameter_unused_on_some_ranks():
    launch(2, unused)


def unused_under_zero(kind):
    group, net = dist.group.WORLD, model()
    sync = kind(net, group, 1)
    for _ in range(2):  # in the second step, too, it leaves 0 and not what was there
        sync.start()
        (net[0](rows(0, 0)).sum() + (0 if group.rank() else net[2].bias.sum())).backward()
        sync.finish()
    sync.before_step()
    for name, piece, p, _ in sync.pieces():
        if p is net[2].bias or p is net[2].weight:
            expected = torch.ones_like(piece) if name == "2.bias" else None
            assert piece.grad is expected or torch.equal(piece.grad, expected), name


@pytest.mark.parametrize("kind", [zero.Zero1, zero.Zero2])
def test_a_parameter_unused_under_zero(kind):
    launch(2, unused_under_zero, kind)


def too_many(kind):
    net = model()
    sync = kind(net, dist.group.WORLD, 1)
    sync.start()
    net(rows(0, 0)).sum().backward()
    net(rows(0, 0)).sum().backward()


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero3.Zero3])
def test_an_accumulation_too_many_is_an_error(kind):
    with pytest.raises(RuntimeError, match="received 2 gradients in one step"):
        launch(1, too_many, kind)


def count():
    rank = dist.get_rank()
    targets = torch.tensor([[3, -1, -1], [-1, -1, -1]]) if rank else torch.zeros(2, 3).long()
    return ddp.global_count(targets, dist.group.WORLD).item()


def test_the_count_is_of_tokens_and_not_a_mean_of_ranks():
    assert launch(2, count) == [7, 7]


def count_of_none():
    return ddp.global_count(torch.full((2, 3), -1), dist.group.WORLD).item()


def test_a_batch_without_a_valid_token_is_not_divided_by_0():
    """Found by fuzz: one such batch made every parameter NaN."""
    assert launch(2, count_of_none) == [1, 1]
    errors = judge(Case(t=2, m=1, b=1, seq_len=2))  # its step 0 has none
    assert errors.worst <= measure.TOLERANCE, errors


def ranks_fill_buckets_in_different_orders(kind):
    group = dist.group.WORLD
    a, b = model(), model()
    both = torch.nn.ModuleDict({"a": a, "b": b})
    sync = ddp.DDP(both, group, 1, bucket_bytes=1) if kind is ddp.DDP else kind(both, group, 1)
    sync.start()
    first, second = (a, b) if group.rank() == 0 else (b, a)
    x = rows(0, 0)
    y = first(x).sum() * (3.0 if first is b else 1.0)  # the second backward runs first
    (y + second(x).sum() * (3.0 if second is b else 1.0)).backward()
    sync.finish()
    sync.before_step()
    plain = model()
    plain(x).sum().backward()
    expected = dict(plain.named_parameters())
    for name, piece, _, start in sync.pieces():
        net, _, rest = name.partition(".")
        whole = expected[rest].grad.flatten() * group.size() * (3.0 if net == "b" else 1.0)
        part = whole[start : start + piece.numel()]
        torch.testing.assert_close(piece.grad.flatten(), part, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero.Zero2])
def test_ranks_may_fill_buckets_in_different_orders(kind):
    """Collectives are matched by order: a bucket that leaves when it is full would meet another."""
    launch(2, ranks_fill_buckets_in_different_orders, kind)


def learned_order():
    """A model whose layers run in another order than they are listed in."""
    group, m = dist.group.WORLD, 2
    nets = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4, bias=False).double() for n in "abcd"})
    sync = ddp.DDP(nets, group, m, bucket_bytes=1)
    orders = []
    for _ in range(3):
        sync.start()
        for i in range(m):
            x = rows(group.rank(), i)[:, :4]
            for n in "bca":  # no rank uses d
                x = nets[n](x)
            x.sum().backward()
        sync.finish()
        orders.append([n for b in range(4) for i, n in enumerate("abcd") if sync.bucket_of[i] == b])
    return orders


def test_buckets_follow_the_order_that_the_first_step_showed():
    for orders in launch(2, learned_order):
        assert orders == [list("acbd")] * 3


def test_flat_is_one_call():
    (total,) = launch(1, flat_total)
    assert total == (1, sum(p.numel() for p in model().parameters()))


def flat_total():
    net = model()
    net(rows(0, 0)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    with measure.Collectives({"dp": dist.group.WORLD}) as seen:
        ddp.all_reduce_flat(net.parameters(), dist.group.WORLD)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    return seen.total("dp", "all_reduce")


class Sent(TorchDispatchMode):
    """Every call of torch.distributed, also those that measure.Collectives does not count."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls.append(function.name())
        return function(*args, **(kwargs or {}))


def calls_of_one_rank(kind) -> list:
    net = model()
    with Sent() as seen:
        sync = kind(net, dist.group.WORLD, 2)
        optimizer = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.1)
        for _ in range(2):
            sync.start()
            for i in range(2):
                net(rows(0, i)).sum().backward()
            sync.finish()
            sync.step(optimizer, clip=0.1)
        ddp.global_count(torch.zeros(3), dist.group.WORLD)
    return seen.calls


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero.Zero2, zero3.Zero3])
def test_one_rank_sends_nothing(kind):
    assert launch(1, calls_of_one_rank, kind) == [[]]


def calls_during_backward(kind, overlap: bool) -> tuple[int, int]:
    """(collectives during the second step's backward, and in all of that step)."""
    net = model()
    sync = kind(net, dist.group.WORLD, 2, overlap=overlap)
    for _ in range(2):
        with measure.Collectives() as seen:
            sync.start()
            for i in range(2):
                net(rows(0, i)).sum().backward()
            during = len(seen.calls)
            sync.finish()
        sync.before_step()
        sync.after_step()
    return during, len(seen.calls)


@pytest.mark.parametrize("kind", [ddp.DDP, zero.Zero1, zero.Zero2])
def test_without_overlap_all_gradients_are_sent_by_finish(kind):
    for during, once in launch(2, calls_during_backward, kind, False):
        assert during == 0 < once
    for during, total in launch(2, calls_during_backward, kind, True):
        assert 0 < during <= total == once * (2 if kind is zero.Zero2 else 1)


def misuse(how: str, kind=ddp.DDP):
    group, net = dist.group.WORLD, model()
    parts = dict(net.named_children())
    if how == "another order" and group.rank() == 1:
        parts = dict(reversed(parts.items()))
    if how == "one more" and group.rank() == 1:
        parts["extra"] = torch.nn.Linear(1, 1, bias=False)
    sync = kind(torch.nn.ModuleDict(parts), group, 1)
    net(rows(0, 0)).sum().backward()
    sync.finish()
    if how == "frozen":
        net[2].bias.requires_grad_(False)
    sync.start()


@pytest.mark.parametrize(
    "how, message",
    [
        ("another order", r"parameter 0 is 0.weight \(7, 5\) .* rank 0 .* and 2.weight \(3, 7\)"),
        ("one more", "parameter 4 is missing on rank 0 of the group and extra"),
        ("frozen", "2.bias was frozen"),
    ],
)
def test_misuse_is_refused_and_named(how, message):
    with pytest.raises(RuntimeError, match=message):
        launch(2, misuse, how)


def new_ddp_after_freezing():
    group, net = dist.group.WORLD, model()
    ddp.DDP(net, group, 1)
    gc.collect()
    net[2].bias.requires_grad_(False)
    sync = ddp.DDP(net, group, 1)
    net(rows(group.rank(), 0)).sum().backward()
    sync.finish()
    plain = model()
    sum(plain(rows(r, 0)).sum() for r in range(group.size())).backward()
    assert [n for n, *_ in sync.pieces()] == ["0.weight", "0.bias", "2.weight"]
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert not p.requires_grad or torch.allclose(p.grad, q.grad, rtol=1e-13)


def test_a_new_ddp_of_what_is_left():
    launch(2, new_ddp_after_freezing)


def gradient_of_bf16() -> float:
    """1 + 2^-10 in two microbatches: bf16 has 8 bits of it, and fp32 all."""
    net = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    sync = ddp.DDP(net, dist.group.WORLD, 2)
    for x in (1.0, 2**-10):
        net(torch.full((1, 1), x, dtype=torch.bfloat16)).sum().backward()
    sync.finish()
    return net.weight.grad.item()


def test_bf16_is_on_the_wire_and_nowhere_without_one():
    assert launch(1, gradient_of_bf16) == [1 + 2**-10]
    assert launch(2, gradient_of_bf16) == [2.0] * 2
