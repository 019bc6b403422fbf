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

Dropout must draw the same masks again, so the generators' states are kept with the input. Inside
tensor parallelism the second forward repeats the forward's all-reduces, in backward.

    torchrun --standalone --nproc-per-node 2 activation_ckpt.py

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174); Korthikanti et
al. 2022 (arXiv 2205.05198), section 5, for what to keep instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# None: what is kept is this rank's own business. What `function` communicates, it does again.

# --- strategy -------------------------------------------------------------------------------------


class Recompute(torch.autograd.Function):
    """function(x) with x kept instead of what function would save. The gradients of parameters are
    accumulated by the backward inside backward, so their hooks fire there."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function, ctx.rng = function, _rng_state(x.device)
        ctx.save_for_backward(x)
        return function(x)  # autograd records nothing in here

    @staticmethod
    def backward(ctx, grad: Tensor):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        now = _rng_state(x.device)
        _set_rng_state(x.device, ctx.rng)
        with torch.enable_grad():
            y = ctx.function(x)
        _set_rng_state(x.device, now)  # as if nothing had been drawn
        torch.autograd.backward(y, grad)
        return x.grad, None


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), one tensor to one tensor, recomputed in backward. Raises ValueError where
    autograd would drop the parameters' gradients without a word: it follows inputs only."""
    if torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError(
            "recompute: the input requires no gradient, so none would reach the parameters; "
            "call x.requires_grad_() first"
        )
    return Recompute.apply(x, function)


POLICIES = ("none", "full")


def checkpoint_blocks(blocks: nn.ModuleDict, policy: str, every: int = 1) -> None:
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
            block.forward = lambda x, plain=plain: recompute(plain, x)


# --- cost -----------------------------------------------------------------------------------------


def predicted_block_bytes(b: int, s: int, h: int, a: int, attention: str, itemsize: int) -> int:
    """Bytes that autograd keeps of one GPT-2 block without checkpointing, on the CPU, in units of
    b s h: ln_1 in 1, q k v 3, attention out 1, ln_2 in 1, c_fc in 1, gelu in 4, gelu out 4,
    c_attn in 1; two norms keep 2 b s each. Explicit attention adds the softmax a b s s, and sdpa
    the log-sum-exp a b s. (Korthikanti et al., table 2, count 34 s b h + 5 a s s b bytes in fp16,
    dropout included.)"""
    raise RuntimeError("to be filled")


def predicted_extra_forwards(n_layer: int, policy: str, every: int = 1) -> int:
    """Block forwards computed again per microbatch."""
    return 0 if policy == "none" else -(-n_layer // every)
