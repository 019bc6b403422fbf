"""Activation checkpointing: save fewer tensors in forward, recompute or reload them in backward.

Autograd saves the tensors that backward needs ("saved tensors"): parameters, which are in memory
anyway, and activations. The size of the activations grows with batch size, sequence length and
depth, and often exceeds that of the model. All policies below except "none" keep fewer of them on
the device. If a block gives the same results when it is rerun with the same random numbers, losses
and gradients are bitwise identical to those without checkpointing. The docstring of offload()
describes one exception.

    x0 x1 x2 x3: inputs and outputs of three blocks. u w z: tensors inside a block.
    [ ]: saved on the device from forward to backward.

    none        [x0 u w z] [x1 u w z] [x2 u w z] x3    everything
    full        [x0      ] [x1      ] [x2      ] x3    inputs; backward reruns each block's forward
    selective   [x0 u   z] [x1 u   z] [x2 u   z] x3    all but the attention weights w, which are
                                                       large and cheap to recompute
    offload     [        ] [        ] [        ] x3    nothing: all activations are on the host

b microbatch size, s sequence length, h hidden size, a attention heads. F = 24 b s h^2 + 4 b s^2 h
are the FLOPs of the matmuls in a block's forward, and B = 2 F those in its backward.

    policy     elements kept per block   FLOPs per block        recomputed
    none       16 b s h + b a s^2        F + B                  nothing
    full       b s h                     F + B + F - 8 b s h^2  all but the last matmul
    selective  16 b s h                  F + B + 2 b s^2 h      q k^T and softmax
    offload    0                         F + B                  nothing

The table is for a GPT-2 block without dropout, in which attention is matmul, softmax, matmul. Fused
attention does not store the attention weights, so with it "selective" saves very little memory.
During a block's backward, its recomputed tensors are in memory too.

The recomputation, or second forward, must draw the same dropout masks. It starts when backward
first needs a saved tensor of the block, and stops as soon as all tensors that the first forward
saved have been recomputed. It repeats the collectives of the block up to that point. If ranks save
different tensors, they stop at different points, and one can wait forever in a collective that
another never starts. A tensor-parallel block without dropout saves nothing after its last
collective, so "full" repeats all collectives but that one. "selective" repeats none.

    torchrun --standalone --nproc-per-node 2 activation_ckpt.py

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
Korthikanti et al. 2022, Reducing Activation Recomputation (arXiv 2205.05198), sections 4 and 5.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

# --- version 1: the whole idea (policy "full"), in the textbook form and with hooks ---------------


class CheckpointFunction(torch.autograd.Function):
    """The textbook version: CheckpointFunction.apply(function, x). If x requires no gradient, the
    parameters get none. torch.autograd.grad() cannot return their gradients, which are added to
    `.grad`. RNG and autocast state are not restored."""

    @staticmethod
    def forward(ctx, function: Callable, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)  # autograd is off inside a Function, so nothing else is saved

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, grad)  # sets x.grad, and adds to the .grad of the parameters
        return None, x.grad


class EarlyStop(BaseException):
    """Ends the second forward when all saved tensors have been recomputed. A BaseException, so that
    `except Exception` in the function does not catch it."""


def checkpoint(function: Callable, *inputs: Tensor, rerun: Callable | None = None) -> Any:
    """Call function(*inputs) under saved-tensor hooks. Autograd stores an index in place of each
    saved tensor. When backward first needs one, unpack() reruns the function, which recomputes all
    of them. A recomputed tensor is freed after its first use. If it is needed again, for example by
    a second backward after one with retain_graph=True, the function runs again. If `rerun` is
    given, the second forward calls rerun() instead of the function. recompute() uses this.

    This is torch.utils.checkpoint.checkpoint(use_reentrant=False) without its keyword arguments,
    its handling of RNG and autocast state, and its detection of inputs modified in place."""
    detached = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    rerun = rerun or functools.partial(function, *detached)
    shapes: list[tuple] = []  # of the tensors saved by the first forward
    recomputed: dict[int, Tensor] = {}  # by index

    def pack(t: Tensor) -> int:
        shapes.append(tuple(t.shape))
        return len(shapes) - 1

    def store(t: Tensor) -> Tensor:  # the pack hook of the second forward
        t = t.detach()  # else a node that saves its own output would be in a reference cycle
        recomputed[len(recomputed)] = t
        if len(recomputed) == len(shapes):
            raise EarlyStop  # usually t is an input of an operation, which is then skipped
        return t

    def unpack(index: int) -> Tensor:
        if index not in recomputed:
            recomputed.clear()  # store() numbers the tensors from len(recomputed)
            # Grad mode is disabled in backward. It must be enabled, or nothing would be saved. The
            # graph is discarded, so the unpack hook is only used by a nested checkpoint.
            hooks = saved_tensors_hooks(store, lambda t: t)
            with contextlib.suppress(EarlyStop), torch.enable_grad(), hooks:
                rerun()
            second = [tuple(t.shape) for t in recomputed.values()]
            if second != shapes:
                raise ValueError(
                    f"the first forward saved tensors of shapes {shapes} and the second {second}: "
                    "the function must not depend on state that changes in between"
                )
        return recomputed.pop(index)

    with saved_tensors_hooks(pack, unpack):
        return function(*inputs)


# --- recompute(): checkpoint() for any block ------------------------------------------------------
# checkpoint() accepts only tensors, by position. recompute() accepts any arguments and adds three
# things: (1) it restores the RNG state; (2) it saves the inputs through autograd, so that in-place
# changes are detected and outer saved-tensor hooks apply to them; (3) it restores autocast.


def save_torch_rng() -> Callable[[], contextlib.AbstractContextManager]:
    """1. RNG state: random numbers, such as dropout masks, must be the same in both forwards.

    Saves the states of torch's CPU generator and, if CUDA is in use, the current GPU's. Returns
    a function that returns a context manager in which the generators restart from the saved states.
    On exit they return to the states that they had on entry."""
    cuda = torch.cuda.is_initialized()
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if cuda else None

    @contextlib.contextmanager
    def restore_rng():
        with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
            torch.set_rng_state(cpu_state)
            if cuda:
                torch.cuda.set_rng_state(cuda_state)
            yield

    return restore_rng


class SaveInput(torch.autograd.Function):
    """2. Saves an input in a separate autograd node. Outer saved-tensor hooks, such as those of
    an enclosing recompute or of measure.py, apply to it. Without outer hooks, load() raises an
    error if the input has been modified in place.

    The output is an empty tensor that refers to the node. Nothing is computed from it, so autograd
    never runs the node and does not free its input. Instead, the input is freed when backward has
    released all saved tensors of the block: their hooks hold `rerun` (see recompute()), and `rerun`
    holds the outputs."""

    @staticmethod
    def forward(ctx, leaf: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return leaf.clone()  # leaf requires a gradient, so there is a node even if x does not

    @staticmethod
    def load(output: Tensor) -> Tensor:
        (x,) = output.grad_fn.saved_tensors
        return x.detach().requires_grad_(x.requires_grad)


def recompute(function: Callable, *args, save_rng: Callable = save_torch_rng, **kwargs) -> Any:
    """Call function(*args, **kwargs). All tensor arguments are kept, including those in tuples,
    lists or dicts. Other tensors that autograd would save are recomputed.

    save_rng() is called before the first forward. It returns a function that returns a context
    manager, in which the second forward draws the same random numbers. This context manager must
    restore the state even on an exception, because EarlyStop passes through it. train_3d.py passes
    Draws.save from gpt.py, because the dropout masks there do not come from torch's default
    generators.

    Raises ValueError in backward if the second forward saves fewer tensors, or tensors of other
    shapes. Surplus tensors are not noticed. Gradients can be wrong without an error if the function
    reads state that has changed since the first forward, or modifies in place a tensor that it has
    saved (changes to inputs are detected, see SaveInput)."""
    leaf = torch.empty(0, requires_grad=True)
    outputs = tree_map_only(Tensor, lambda x: SaveInput.apply(leaf, x), (args, kwargs))
    restore_rng = save_rng()
    # 3. Autocast: the second forward must compute in the dtypes of the first, but backward usually
    # runs outside of the autocast context.
    cpu_autocast, cuda_autocast = (
        torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in ("cpu", "cuda")
    )

    # rerun() must not refer to args or kwargs. They would keep the inputs in memory even if outer
    # hooks have offloaded or dropped them.
    def rerun() -> None:
        detached_args, detached_kwargs = tree_map_only(Tensor, SaveInput.load, outputs)
        with cpu_autocast, cuda_autocast, restore_rng():
            function(*detached_args, **detached_kwargs)

    return checkpoint(functools.partial(function, *args, **kwargs), rerun=rerun)


# --- offload(): saved tensors in host memory ------------------------------------------------------


def offload(function: Callable, module: nn.Module, *args, **kwargs) -> Any:
    """Call `function`, the forward of `module`, and keep its saved tensors in host memory. Nothing
    is recomputed. Parameters are not copied. A tensor that two nodes save is copied twice. Tensors
    are reloaded with the same strides. Exceptions are tensors with gaps between their elements,
    such as a slice of a larger tensor, and expanded tensors. They are reloaded densely, which can
    change the rounding of a matmul.

    On a GPU, the copies run on the stream of the computation, in order with it. So no events are
    needed: PyTorch's allocators reuse device memory in stream order, and pinned memory only when
    its copy has finished. The copies do not overlap with computation. Overlapping them would need a
    second stream, an event after each copy, and reloads that start one block ahead."""
    # Compared by storage, because a matmul saves a view of its weight.
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(t: Tensor) -> tuple[torch.device, Tensor]:
        if t.untyped_storage().data_ptr() in parameters:
            return t.device, t
        host = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)
        return t.device, host.copy_(t, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, t = packed
        return t.to(device, non_blocking=True)  # returns t if it is on this device

    with saved_tensors_hooks(pack, unpack):
        return function(*args, **kwargs)


# --- checkpoint_blocks(): all blocks of a model ---------------------------------------------------

POLICIES = ("none", "selective", "full", "offload")


def checkpoint_blocks(
    blocks: nn.ModuleDict | nn.ModuleList,
    policy: str,
    every: int = 1,
    layers: int | None = None,
    save_rng: Callable = save_torch_rng,
    core: str = "attn.core",
) -> None:
    """Apply the policy, in place, to one block in `every`, starting with block 0, among the first
    `layers` blocks (None: all). Checkpointing fewer blocks costs less recomputation but more
    memory. save_rng: see recompute().

    Only forward methods are replaced: those of the blocks or, for "selective", of the submodule at
    path `core` in each block, which computes attention from q, k and v. The second forward does
    not run module hooks of these modules, but runs those of their submodules. Raises ValueError if
    the policy is unknown."""
    if policy not in POLICIES:
        raise ValueError(f"recompute policy {policy!r} is unknown: use {', '.join(POLICIES)}")
    if policy == "none":
        return
    chain = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
    for block in chain[:layers:every]:
        module = block.get_submodule(core) if policy == "selective" else block
        if policy == "offload":
            module.forward = functools.partial(offload, module.forward, module)
        else:
            module.forward = functools.partial(recompute, module.forward, save_rng=save_rng)


# --- cost -----------------------------------------------------------------------------------------
# Cost of one GPT-2 block with explicit attention, without dropout, in fp32 or fp64, in one process.
# tools/plan/cost.py has the other cases.


def saved_bytes(policy: str, b: int, s: int, h: int, a: int, itemsize: int) -> int:
    """Bytes kept on the device from forward to backward; itemsize is that of the activations. The
    16 b s h elements are, in units of b s h: 4 for the inputs of ln_1, c_attn, ln_2 and c_fc; 3 for
    q, k and v; 1 for the input of attn.c_proj; 4 for GELU's input; 4 for its output. The table in
    the module docstring omits 4 b s elements (mean and 1/std of the layer norms) and s^2 bytes (the
    causal mask)."""
    return {
        "none": (16 * b * s * h + b * a * s * s + 4 * b * s) * itemsize + s * s,
        "selective": (16 * b * s * h + 4 * b * s) * itemsize,
        "full": b * s * h * itemsize,
        "offload": 0,
    }[policy]


def flops(policy: str, b: int, s: int, h: int) -> int:
    """FLOPs of the matmuls in forward, backward and second forward, 2 per multiply-add."""
    forward = 24 * b * s * h * h + 4 * b * s * s * h
    full = forward - 8 * b * s * h * h  # early stop skips mlp.c_proj
    selective = 2 * b * s * s * h  # q k^T; early stop skips weights @ v
    return 3 * forward + {"none": 0, "offload": 0, "selective": selective, "full": full}[policy]


# --- demo -----------------------------------------------------------------------------------------
# Each rank trains a separate model on separate rows. Its blocks contain no collectives.


def measured_cost(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """The largest number of bytes saved by all blocks at once, and the FLOPs of their forward,
    backward and recomputation. x [b, s, h]. SavedActivations counts with saved-tensor hooks. Only
    the innermost hooks apply to a tensor, so inside checkpoint() and offload() it counts nothing,
    except the inputs that SaveInput saves."""
    from torch.utils.flop_counter import FlopCounterMode

    import measure

    with FlopCounterMode(display=False) as counter:
        with measure.SavedActivations(model) as saved:
            y = functools.reduce(lambda y, block: block(y), model.h.values(), x)
        y.sum().backward()
    return saved.peak, counter.get_total_flops()


def main() -> None:
    import data
    import gpt
    import measure

    first_versions = {"textbook": CheckpointFunction.apply, "checkpoint()": checkpoint}
    b, s, h, a, n_layer = 2, 32, 48, 3, 5
    config = gpt.GPTConfig(n_layer, a, h, vocab_size=256, seq_len=s, attention="explicit")

    def train(name: str, rows: range) -> tuple[list[Tensor], dict[str, Tensor], nn.Module]:
        """Three steps of SGD. Returns losses, gradients of the last step, and the model."""
        model = gpt.build(config, dtype=torch.float64)
        if name in POLICIES:
            checkpoint_blocks(model.h, name)
        else:
            for block in model.h.values():
                block.forward = functools.partial(first_versions[name], block.forward)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for step in range(3):
            optimizer.zero_grad()
            x, y = data.batch(data.example(), step, rows, s, seed=0)
            loss = gpt.cross_entropy(model(x), y) / y.numel()
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        return losses, {key: p.grad.clone() for key, p in model.named_parameters()}, model

    with measure.Report("activation_ckpt.py") as report:
        rows = range(b * report.group.rank(), b * (report.group.rank() + 1))
        expected_losses, expected, _ = train("none", rows)
        for name in (*first_versions, *POLICIES):
            losses, gradients, model = train(name, rows)
            report.losses(name, losses, expected_losses)
            report.close(f"{name} max |d gradient|", gradients, expected)
            if name in POLICIES:
                x = torch.randn(b, s, h, dtype=torch.float64, requires_grad=True)
                nbytes, count = measured_cost(model, x)
                predicted = n_layer * saved_bytes(name, b, s, h, a, itemsize=8)
                report.equal(f"{name} bytes saved", predicted, nbytes)
                report.equal(f"{name} FLOPs", n_layer * flops(name, b, s, h), count)


if __name__ == "__main__":
    main()
