"""--arch examples.llama: from the command line, and next to transformers' LlamaForCausalLM."""

import dataclasses
import functools
import json

import pytest
import torch
from torch.nn import functional as F

import gpt
import options
import train_3d
from examples import llama
from measure import TOLERANCE, largest, relative_errors
from tests.commands import TINY, forked, read_log
from tests.test_plan import differences
from tests.test_train_3d import text  # noqa: F401
from tools import convert, sample
from tools.plan import dry_run
from tools.verify.oracle import Case, draw, judge, launch

LLAMA = ["--arch", "examples.llama", *TINY, "--config", "n_hidden=27", "--eval-interval", "2"]

RENAMED = {
    "attn.out": "self_attn.o_proj", "mlp.down": "mlp.down_proj", "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
}  # fmt: skip

# --- transformers ---------------------------------------------------------------------------------


def theirs(config: llama.Config, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of examples/llama.py under the names of transformers."""
    renamed = {"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"}
    found = {f"{new}.weight": tensors[f"{old}.weight"] for old, new in renamed.items()}
    size = config.n_embd // config.n_head
    for i in range(config.n_layer):
        mine, other = f"h.{i}.", f"model.layers.{i}."
        rows = [size * n for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        qkv = tensors[f"{mine}attn.qkv.weight"].split(rows)
        gate_up = tensors[f"{mine}mlp.gate_up.weight"].chunk(2)
        found |= {f"{other}self_attn.{x}_proj.weight": w for x, w in zip("qkv", qkv, strict=True)}
        found |= {f"{other}mlp.{x}_proj.weight": w
                  for x, w in zip(("gate", "up"), gate_up, strict=True)}  # fmt: skip
        for old, new in RENAMED.items():
            found[f"{other}{new}.weight"] = tensors[f"{mine}{old}.weight"]
    return found


def in_float64(model, config: llama.Config) -> None:
    """transformers computes norms and angles in fp32."""

    def norm(x, module):
        return F.rms_norm(x, module.weight.shape, module.weight, config.eps)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, module=module: norm(x, module)
    size = config.n_embd // config.n_head
    rates = config.theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)

    def angles(x, position_ids):
        both = torch.outer(position_ids[0].double(), rates).repeat(1, 2)[None]
        return both.cos(), both.sin()

    model.model.rotary_emb.forward = angles


def test_equal_to_transformers():
    reason = "transformers is optional: pip install transformers"
    transformers = pytest.importorskip("transformers", reason=reason)
    config = llama.Config(3, 6, 48, 41, 16, n_kv_head=2, n_hidden=85)
    with torch.device("meta"):
        mine = llama.Model(config)
    gpt.init_weights(mine, 0, torch.float64, "cpu", draw)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.n_hidden,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head, max_position_embeddings=config.seq_len,
        rms_norm_eps=config.eps, tie_word_embeddings=False, attn_implementation="sdpa",
    )).double()  # fmt: skip
    other.load_state_dict(theirs(config, dict(mine.named_parameters())))
    x = torch.randint(config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    # As they are, which rounds norms and angles to fp32.
    torch.testing.assert_close(other(input_ids=x).logits, mine(x), rtol=1e-4, atol=1e-5)
    in_float64(other, config)
    losses, gradients = [], []
    for model, logits in ((mine, mine(x)), (other, other(input_ids=x).logits)):
        losses.append(gpt.cross_entropy(logits[:, :-1], x[:, 1:]))
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    expected = theirs(config, gradients[0]) | {"loss": losses[0].detach()}
    found = gradients[1] | {"loss": losses[1].detach()}
    assert largest(relative_errors(found, expected).values()) <= TOLERANCE


# --- the command line -----------------------------------------------------------------------------


def test_it_trains_resumes_in_another_layout_and_samples(text, tmp_path):  # noqa: F811
    flags = [*LLAMA, "--data", text, "--checkpoint-dir", tmp_path / "saves"]
    one = forked(0, train_3d.main, *LLAMA, "--data", text, "--metrics", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    layout = ["--tp", 2, "--pp", 2, "--sequence-parallel", "--zero", 1, "--stop-after", 2]
    first = forked(4, train_3d.main, *flags, *layout, "--metrics", tmp_path / "rest")
    assert first.returncode == 0, first.stderr
    # The model's fields come from the checkpoint.
    rest = ["--resume", "--checkpoint-dir", tmp_path / "saves", "--eval-interval", 2,
            "--micro-batch-size", 2, "--eval-iters", 2, "--device", "cpu"]  # fmt: skip
    second = forked(2, train_3d.main, *rest, "--zero", 3, "--recompute", "full", "--sample", 5,
                    "--metrics", tmp_path / "rest")  # fmt: skip
    assert second.returncode == 0, second.stderr
    assert "continued from" in second.stdout and "--- sample after" in second.stdout
    losses = [[row.get("loss", row.get("val_loss")) for row in read_log(tmp_path / name)
               if row.keys() & {"loss", "val_loss"}] for name in ("one", "rest")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-12) and len(losses[0]) == 6
    about = json.loads((tmp_path / "saves/step-4/checkpoint.json").read_text())
    assert about["arguments"]["arch"] == "examples.llama"
    fields = dataclasses.asdict(llama.Config(2, 2, 16, 256, 16, n_hidden=27))
    assert about["sizes"] == {k: v for k, v in fields.items() if k not in options.FIELDS}

    done = forked(0, sample.main, "--checkpoint-dir", tmp_path / "saves", "--n", 5)
    assert done.returncode == 0, done.stderr
    done = forked(0, convert.main, "--checkpoint-dir", tmp_path / "saves", "--out", tmp_path / "hf")
    assert done.returncode == 2
    assert done.stderr.endswith("is of --arch examples.llama: only a GPT-2 can be converted\n")
    for wrong, message in (
        (["--arch", "gpt"], "--arch is gpt, but the checkpoint has examples.llama: leave out"),
        (["--config", "n_hidden=28"], "--config n_hidden is 28, but the checkpoint has 27: leave"),
        (["--n-layer", 3], "--n-layer is 3, but the checkpoint has 2: leave out"),
    ):
        done = forked(0, train_3d.main, *rest, *wrong)
        assert done.returncode == 2 and f"--resume: {message}" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--arch examples.lama", "--arch examples.lama: No module named 'examples.lama': give a"),
        ("--arch data", "--arch data: it does not define Config, MODELS, Model, plan, draw, flops"),
        ("--arch examples.llama --config n_kv_heads=2", "no such field; did you mean n_kv_head?"),
        ("--config x=2", "--config x: --arch gpt has no such field; use one of n_embd, n_head, n_"),
        ("--arch examples.llama --config n_kv_head=x", "n_kv_head=x: expected a value of type int"),
        ("--arch examples.llama --config qk_norm=1", "qk_norm=1: expected a value of type bool"),
        ("--arch examples.llama --config n_kv_head", "n_kv_head=: expected a value of type int"),
        ("--arch examples.llama --config n_kv_head=3", "n_head 4 is not divisible by n_kv_head 3"),
        ("--arch examples.llama --n-embd 12", "n_embd 12 is not divisible by 2 x n_head 4: a head"),
        ("--arch examples.llama --dropout 0.1", "llama has no dropout: leave out --dropout"),
        ("--arch examples.llama --tp 4", "--tp 4: n_kv_head 2 cannot be split: lower --tp"),
        ("--arch examples.llama --model gpt2", "'gpt2' (choose from nano, llama-2-7b, llama-3-8b)"),
    ],
)  # fmt: skip
def test_what_is_refused(flags, message):
    args = options.parser().parse_args(flags.split())
    with pytest.raises(ValueError) as error:
        options.check(args, 4)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cp 2", "--arch examples.llama does not use gpt.Core: leave out --cp 2"),
        ("--recompute selective", "has a block without attn.core: give --recompute full"),
    ],
)
def test_options_that_need_a_core_are_refused_for_a_model_without_one(flags, message, monkeypatch):
    monkeypatch.setattr(llama, "Model", lambda config: torch.nn.Linear(1, 1))
    args = options.parser().parse_args(f"--arch examples.llama {flags}".split())
    with pytest.raises(ValueError) as error:
        options.check(args, 4)
    assert message in str(error.value) and "\n" not in str(error.value)


SIZES = dict(n_head=4, n_embd=32, n_layer=4, vocab_size=41, seq_len=8, arch="examples.llama",
             config=("n_hidden=85", "qk_norm=true"))  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        Case(t=2, d=4, zero=1, sequence=True, **SIZES | dict(n_embd=40)),
        Case(p=2, d=2, zero=3, **SIZES),
        Case(t=2, p=2, m=3, recompute="full", schedule="zb-h1", tied=False, **SIZES),
        Case(t=2, d=2, zero=3, sequence=True, recompute="full", dtype="bf16", **SIZES),
    ],
    ids=str,
)  # fmt: skip
def test_a_rank_holds_sends_and_computes_what_is_predicted(case):
    """85 hidden units: the tp ranks differ. With n_embd 40 and d = 4, two units of ZeRO have more
    padding than one."""
    assert launch(case.world_size, differences, case) == [{}] * case.world_size


CONTEXT = functools.partial(Case, **SIZES | dict(n_head=12, n_embd=48, n_layer=2, seq_len=12))


@pytest.mark.parametrize(
    "case",
    [  # 12 heads and 2 key/value heads
        CONTEXT(c=2, t=2, sequence=True, recompute="full"), CONTEXT(c=3, dtype="bf16"),
        CONTEXT(c=2, t=2, cp_attention="gathered"), CONTEXT(c=2, cp_attention="ulysses"),
        CONTEXT(c=3, cp_attention="ulysses", recompute="selective"),
        CONTEXT(c=2, t=2, cp_attention="ulysses", attention="explicit", recompute="full"),
    ],
    ids=str,
)  # fmt: skip
def test_context_parallelism_sends_the_key_value_heads_only(case):
    """Also with Ulysses, where c may not divide the number of key/value heads."""
    errors = judge(case)
    assert errors.within(case.dtype), errors
    assert launch(case.world_size, differences, case) == [{}] * case.world_size


def test_a_dry_run(monkeypatch, capsys):
    flags = "--arch examples.llama --model llama-3-8b --world-size 64 --rank 9 --tp 8 --pp 2"
    monkeypatch.setattr("sys.argv", ["dry_run", *flags.split(), "--zero", "1"])
    dry_run.main()
    out = capsys.readouterr().out
    assert "differs" not in out and "activations (compared for --arch gpt only)" in out, out


def test_the_counts_of_published_models():
    for name, numel in (("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)):
        config = llama.MODELS[name]
        with torch.device("meta"):
            model = llama.Model(config)
        assert sum(p.numel() for p in model.parameters()) == numel
        matmuls = sum(2 * p.numel() for p in model.h.parameters() if p.ndim == 2)
        attention = 4 * config.n_layer * config.seq_len * config.n_embd
        head = 2 * config.n_embd * config.vocab_size
        assert gpt.forward_flops_per_token(config) == matmuls + attention + head
