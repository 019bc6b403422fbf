"""Activation checkpointing: keep a block's input only, and compute the rest again in backward.

    keep all    x0 [a b c] x1 [a b c] x2 [a b c] x3      all of a b c stay until backward needs them
    full        x0 .  .  . x1 .  .  . x2 .  .  . x3      backward of block 3: x2 -> forward again ->
                           ^-- kept --^                  a b c of this one block, used, dropped

    per block (GPT-2, full)   kept between the passes      compute per step
    none                      everything autograd saves    F + B            (B = 2 F)
    full                      b s h                        F + B + F        one third more
    and while a block is in backward, its own activations once.
    every = k: of every k blocks the first is checkpointed: the bytes go down and the forwards go up
    by 1/k of the above.

Dropout must draw the same masks again: what they are drawn from is remembered with the input.
Inside tensor parallelism the second forward repeats the forward's collectives, in backward.

    torchrun --standalone --nproc-per-node 2 activation_ckpt.py

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174); Korthikanti et
al. 2022 (arXiv 2205.05198), section 5, for what to keep instead.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# None: what is kept is this rank's own business. What `function` communicates, it does again.

# --- strategy -------------------------------------------------------------------------------------


def torch_rng() -> Callable[[], contextlib.AbstractContextManager]:
    """The default `remember`: torch's generators, the CPU's and the current GPU's, as they are now.
    What it returns opens a context that begins with them, and leaves no trace."""
    on_gpu = torch.cuda.is_initialized()
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None

    @contextlib.contextmanager
    def again():
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):
            torch.set_rng_state(cpu)
            if on_gpu:
                torch.cuda.set_rng_state(gpu)
            yield

    return again


class Recompute(torch.autograd.Function):
    """function(x) with x kept instead of what function would save. The gradients of parameters are
    accumulated by the backward inside backward, so their hooks fire there."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor], remember: Callable) -> Tensor:
        ctx.function, ctx.again = function, remember()
        ctx.save_for_backward(x)
        return function(x)  # autograd records nothing in here

    @staticmethod
    def backward(ctx, grad: Tensor):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), ctx.again():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)
        return x.grad, None, None


def recompute(
    function: Callable[[Tensor], Tensor], x: Tensor, remember: Callable = torch_rng
) -> Tensor:
    """function(x), one tensor to one tensor, recomputed in backward. remember() -> what opens the
    context of the second forward, in which chance must fall as in the first. Raises ValueError
    where autograd would drop the parameters' gradients without a word: it follows inputs only."""
    if torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError(
            "recompute: the input requires no gradient, so none would reach the parameters; "
            "call x.requires_grad_() first"
        )
    return Recompute.apply(x, function, remember)


POLICIES = ("none", "full")


def checkpoint_blocks(
    blocks: nn.ModuleDict, policy: str, every: int = 1, remember: Callable = torch_rng
) -> None:
    """Checkpoint the first of every `every` blocks, in place. A block keeps its name, parameters
    and hooks; only its forward is replaced. Raises ValueError for an unknown policy."""
    if policy not in POLICIES:
        raise ValueError(f"recompute policy {policy!r} is none of {', '.join(POLICIES)}")
    if policy == "none":
        return
    for i, block in enumerate(blocks.values()):
        if i % every == 0:
            # The class's forward on this block, not block.forward: that is what is replaced here.
            plain = type(block).forward.__get__(block)
            block.forward = lambda x, plain=plain: recompute(plain, x, remember)


# --- cost -----------------------------------------------------------------------------------------


def predicted_block_bytes(b: int, s: int, h: int, a: int, attention: str, itemsize: int) -> int:
    """Bytes that autograd keeps of one GPT-2 block of gpt.py, in training without dropout on the
    CPU, if nothing is checkpointed. In units of b s h: the inputs of ln_1, c_attn, ln_2 and c_fc
    1 each; q k v 3; the input of attn.c_proj 1; gelu's input 4 and output 4. Norms: mean and 1/std,
    2 b s each. Then sdpa: a log-sum-exp of b a s; explicit: the softmax, b a s s, and the mask, s s
    of one byte. Korthikanti et al., section 4.1, count 34 s b h + 5 a s s b bytes: 2-byte numbers,
    with the masks of three dropouts and the dropped-out softmax besides the softmax."""
    core = b * a * s if attention == "sdpa" else b * a * s * s
    mask = 0 if attention == "sdpa" else s * s
    return (16 * b * s * h + 4 * b * s + core) * itemsize + mask


def predicted_bytes(
    n_layer: int, b: int, s: int, h: int, a: int, attention: str, itemsize: int,
    policy: str, every: int = 1,
) -> int:  # fmt: skip
    """Bytes kept between forward and backward of a chain of `n_layer` blocks: a checkpointed block
    keeps its input, b s h. So does the first norm of the next block, if that one is not
    checkpointed: the same storage, counted there."""
    kept = predicted_extra_forwards(n_layer, policy, every)
    block = predicted_block_bytes(b, s, h, a, attention, itemsize)
    return kept * b * s * h * itemsize + (n_layer - kept) * block


def predicted_flops(
    n_layer: int, b: int, s: int, h: int, policy: str, every: int = 1
) -> int:
    """FLOPs of the matmuls of n_layer blocks, forward and backward: 2 per multiply-add;
    forward 24 b s h^2 + 4 b s^2 h a block (the mask saves none), backward twice that."""
    forward = 24 * b * s * h * h + 4 * b * s * s * h
    return (3 * n_layer + predicted_extra_forwards(n_layer, policy, every)) * forward


def predicted_extra_forwards(n_layer: int, policy: str, every: int = 1) -> int:
    """Block forwards computed again per microbatch."""
    return 0 if policy == "none" else -(-n_layer // every)


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import data
    import gpt
    import measure

    steps, b, n_layer = 3, 2, 5
    config = gpt.GPTConfig(n_layer, 3, 48, 256, 32, attention="explicit")
    s, h, a = config.seq_len, config.n_embd, config.n_head
    with measure.Proof("activation_ckpt.py") as proof:
        # Each rank has rows of its own, and checkpointing talks to nobody; losses are summed to be
        # shown. A mask drawn anew in the second forward would show in every gradient.
        tokens, _ = data.load(__file__, s)
        rows = range(b * proof.group.rank(), b * (proof.group.rank() + 1))

        def train(policy: str, every: int, dropout: float):
            config.dropout = dropout
            model = gpt.build(config, seed=0, dtype=torch.float64)
            checkpoint_blocks(model.h, policy, every, model.draws.remember)
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
            for step in range(steps):
                optimizer.zero_grad()
                model.draws.at(step, rows)
                x, y = data.batch(tokens, step, rows, s, seed=0)
                loss = gpt.cross_entropy(model(x), y) / y.numel()
                loss.backward()
                losses.append(loss.detach())
                optimizer.step()
            return losses, model

        def costs(model) -> tuple[int, int]:
            """Bytes kept and FLOPs done by the chain of blocks alone."""
            x = torch.randn(b, s, h, dtype=torch.float64, requires_grad=True)
            with FlopCounterMode(display=False) as flops:
                with measure.SavedActivations(model) as saved:
                    y = x
                    for block in model.h.values():
                        y = block(y)
                y.sum().backward()
            return saved.bytes, flops.get_total_flops()

        losses, whole = train("none", 1, dropout=0.1)
        expected = dict(whole.named_parameters())
        for policy, every in (("none", 1), ("full", 1), ("full", 2)):
            what = f"{policy}, every {every}"
            mine, model = train(policy, every, dropout=0.1)
            for loss, one in zip(mine, losses, strict=True):
                assert torch.equal(loss, one), "forward is the same computation: bitwise"
            held = dict(model.named_parameters())
            gradients = {n: p.grad for n, p in expected.items()}
            proof.losses(what, mine, losses)
            proof.close(f"{what} max |d gradient|", {n: p.grad for n, p in held.items()}, gradients)
            _, model = train(policy, every, dropout=0.0)
            saved, flops = costs(model)
            sizes = (n_layer, b, s, h)
            bytes_ = predicted_bytes(*sizes, a, config.attention, 8, policy, every)
            proof.equal(f"{what} bytes kept by the blocks", bytes_, saved)
            proof.equal(f"{what} FLOPs", predicted_flops(*sizes, policy, every), flops)


if __name__ == "__main__":
    main()
