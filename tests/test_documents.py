"""--document-mask: a token attends to the earlier tokens of its document only, in every layout."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import generate
import gpt
import options
from examples import llama
from measure import TOLERANCE
from tools.plan import dry_run
from tools.verify.oracle import Case, draw, judge, launch, trainer_of

END = 1
# The last document of a row may have no end. The second row begins with an end.
ROWS = torch.tensor([[5, 6, 1, 2, 3, 4, 5, 1, 1, 2, 6, 0], [1, 0, 0, 2, 3, 1, 4, 4, 5, 2, 6, 1]])
STARTS = [[0, 0, 0, 3, 3, 3, 3, 3, 8, 9, 9, 9], [0, 1, 1, 1, 1, 1, 6, 6, 6, 6, 6, 6]]
CONFIGS = {
    "sdpa": gpt.GPTConfig(2, 2, 16, 7, 12),
    "explicit": gpt.GPTConfig(2, 2, 16, 7, 12, "explicit"),
    "llama": llama.Config(2, 4, 32, 7, 12, qk_norm=True),
}
SIZES = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=7, seq_len=24, document_mask=END, steps=2)


def test_an_end_belongs_to_the_document_that_it_ends():
    assert gpt.document_starts(ROWS, END).tolist() == STARTS
    assert gpt.document_starts(ROWS, None) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_has_the_losses_and_gradients_of_a_row_of_its_own(name):
    with torch.device("meta"):
        model = gpt.module_of(CONFIGS[name]).Model(CONFIGS[name])
    gpt.init_weights(model, 0, torch.float64, "cpu", draw)
    draws, targets = gpt.draws_of(model), ROWS.roll(-1, 1)

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")

    draws.at(0, range(2), gpt.document_starts(ROWS, END))
    packed, alone = losses(ROWS, targets), []
    draws.at(0, range(1))
    for row, starts in enumerate(STARTS):
        for start in sorted({*starts}):
            held = range(start, start + starts.count(start))
            if name != "llama":  # its embeddings are those of the positions in the row
                model.wpe.tokens = gpt.Subset((*held,), ROWS.size(1))
            alone.append(losses(ROWS[row : row + 1, held], targets[row : row + 1, held]))
    torch.testing.assert_close(torch.cat(alone), packed, rtol=0, atol=1e-13)
    assert len(alone) == 7
    parameters = [*model.parameters()]
    expected = torch.autograd.grad(torch.cat(alone).sum(), parameters)
    found = torch.autograd.grad(packed.sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        Case(c=3, **SIZES),
        Case(c=2, dropout=0.1, **SIZES),
        Case(p=2, m=4, recompute="full", **SIZES),
        Case(c=2, p=2, m=4, recompute="selective", schedule="zb-v", **SIZES | dict(n_layer=4)),
        Case(c=2, t=2, sequence=True, cp_attention="ulysses", recompute="full", **SIZES),
        Case(c=2, d=2, zero=3, cp_attention="gathered", attention="explicit", **SIZES),
        Case(c=2, t=2, arch="examples.llama", **SIZES),
        Case(t=2, p=2, sequence=True, schedule="zb-h1", resume=dict(at=1, t=1, c=2), **SIZES),
    ],
    ids=str,
)
def test_layouts(case):
    errors = judge(case)
    assert errors.worst <= TOLERANCE, errors


def measured(case: Case) -> tuple[list[float], float]:
    """The logits of the token after a prompt, and the loss in validation."""
    trainer = trainer_of(case)
    trainer.model.eval()
    with torch.no_grad():
        logits = generate.next_logits(trainer, torch.tensor([5, 6, END, 2, 3, 4, 5, 0]))
        trainer.args.val_batches = 1
        return logits.tolist(), trainer.validate(trainer.read).item()


@pytest.mark.parametrize("arch", ["gpt", "examples.llama"])
def test_samples_and_validation(arch):
    case = Case(arch=arch, **SIZES)
    (expected,) = launch(1, measured, case)
    (unmasked,) = launch(1, measured, dataclasses.replace(case, document_mask=None))
    assert expected[0] != unmasked[0] and expected[1] != unmasked[1]
    for method in ("ring", "gathered", "ulysses"):
        for logits, loss in launch(
            2, measured, dataclasses.replace(case, c=2, m=2, cp_attention=method)
        ):
            assert logits == pytest.approx(expected[0], abs=1e-12)
            assert loss == pytest.approx(expected[1], abs=1e-12)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--document-mask 256", "256 is outside the vocabulary 0..255: give the id of the token"),
        ("--document-mask -1", "must be at least 0, got -1"),
        ("--document-mask 0 --arch examples.llama", "llama does not use gpt.Core: leave out --doc"),
    ],
)
def test_a_mask_without_effect_is_refused(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(llama, "Model", lambda config: nn.Linear(1, 1))
    with pytest.raises((ValueError, SystemExit)) as error:
        options.check(options.parser().parse_args(flags.split()), 1)
    assert message in str(error.value) + capsys.readouterr().err


def test_a_dry_run_refuses_it():
    args = dry_run.parser().parse_args(["--document-mask", "0"])
    with pytest.raises(ValueError, match="--document-mask: the formulas .*: leave it out"):
        dry_run.ranks_of(args)
