"""Rows of which a process has some tokens, or has them in another order, train the same model."""

import copy
import threading

import pytest
import torch
from torch import nn

import generate
import gpt
from examples import llama
from measure import TOLERANCE, largest, relative_errors
from tools.verify.oracle import Case, draw, judge, launch, reader, trainer_of

ZIGZAG = [gpt.Subset((0, 3), 4), gpt.Subset((1, 2), 4)]  # of two context-parallel ranks
GATHERED = gpt.Subset((0, 3, 1, 2), 4)  # both, in the order of the ranks
CONFIGS = {
    "sdpa": gpt.GPTConfig(2, 2, 16, 41, 16),
    "explicit, dropout": gpt.GPTConfig(2, 2, 16, 41, 16, "explicit", dropout=0.2),
    "llama": llama.Config(2, 4, 32, 41, 16, qk_norm=True),
}


class Gathering(nn.Module):
    """The core of attention of one of two ranks, which are threads: gathers keys and values."""

    def __init__(self, core: gpt.Core, rank: int, both: threading.Barrier, shared: dict):
        super().__init__()
        self.core, self.rank, self.both, self.shared = core, rank, both, shared

    def forward(self, q, k, v):
        self.shared[self.rank] = k, v
        self.both.wait()
        k, v = (
            torch.cat(pair, dim=2) for pair in zip(*(self.shared[i] for i in (0, 1)), strict=True)
        )
        self.both.wait()
        return self.core(q, k, v, GATHERED)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_halves_of_each_row_give_the_loss_and_gradients_of_the_row(name):
    config = CONFIGS[name]
    case = Case(vocab_size=config.vocab_size, seq_len=config.seq_len)
    with torch.device("meta"):
        model = gpt.module_of(config).Model(config)
    gpt.init_weights(model, 0, torch.float64, "cpu", draw)
    x, y = reader(case)(0, range(3))
    both, shared, losses = threading.Barrier(2, timeout=60), {}, {}
    ranks = [copy.deepcopy(model) for _ in range(2)]

    def run(rank: int) -> None:
        part, tokens = ranks[rank], ZIGZAG[rank]
        for block in part.h.values():
            block.attn.core = Gathering(block.attn.core, rank, both, shared)
        for module in part.modules():
            if hasattr(module, "tokens"):
                module.tokens = tokens
        losses[rank] = gpt.cross_entropy(part(tokens.take(x, 1)), tokens.take(y, 1))

    for each in (model, *ranks):
        if hasattr(each, "draws"):
            each.draws.at(5, range(3))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loss = gpt.cross_entropy(model(x), y)
    loss.backward()
    (losses[0] + losses[1]).backward()
    expected = {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}
    sums = {n: sum(p.grad for p in pair) for n, *pair in named_pairs(*ranks)}
    found = sums | {"loss": (losses[0] + losses[1]).detach()}
    assert largest(relative_errors(found, expected).values()) <= TOLERANCE


def named_pairs(a: nn.Module, b: nn.Module):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        yield name, p, q


SIZES = dict(n_layer=3, n_head=4, n_embd=32, seq_len=16, m=3)


@pytest.mark.parametrize(
    "case",
    [
        Case(attention="explicit", dropout=0.1, **SIZES),
        Case(t=2, p=2, sequence=True, dropout=0.1, recompute="full", **SIZES),
        Case(t=4, p=2, schedule="zb-h1", dropout=0.1, recompute="selective", **SIZES),
        Case(t=2, d=2, zero=3, sequence=True, **SIZES),
        Case(t=2, p=2, sequence=True, arch="examples.llama", config=("qk_norm=true",), **SIZES),
    ],
    ids=str,
)
def test_rows_in_another_order_train_the_same_model(case):
    errors = judge(case, {"tokens": GATHERED})
    assert errors.worst <= TOLERANCE, errors


def sampled(case: Case, tokens: gpt.Subset) -> list[int]:
    trainer = trainer_of(case, tokens=tokens)
    return generate.sample(trainer, torch.arange(5), 14).tolist()  # past the sequence length


@pytest.mark.parametrize("changes", [{}, dict(t=2, sequence=True), dict(arch="examples.llama")])
def test_samples_from_rows_in_another_order(changes):
    case = Case(attention="explicit", **SIZES | changes)
    (expected,) = launch(1, sampled, Case(**vars(case) | dict(t=1, sequence=False)), gpt.ALL)
    assert launch(case.t, sampled, case, GATHERED) == [expected] * case.t
