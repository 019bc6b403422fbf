"""Activation checkpointing: save fewer tensors in forward, recompute or reload them in backward.

Autograd saves the tensors that backward needs: "saved tensors", or activations. Their size grows
with batch size, sequence length and depth, and often exceeds the size of the model. The policies
below keep fewer of them on the device in each transformer block. If a block is deterministic,
losses and gradients are bitwise identical to those without checkpointing. (Offload reloads a
non-contiguous tensor as a contiguous one, which can change the rounding of a matmul.)

    x0 x1 x2 x3: inputs and outputs of three blocks. u w z: tensors inside a block.
    [ ]: saved on the device from forward to backward.

    none        [x0 u w z] [x1 u w z] [x2 u w z] x3    everything
    full        [x0      ] [x1      ] [x2      ] x3    inputs; backward reruns each block's forward
    selective   [x0 u   z] [x1 u   z] [x2 u   z] x3    all but the attention weights w, which are
                                                       large and cheap to recompute
    offload     [        ] [        ] [x2 u w z] x3    only the last block's; the rest on the host

b microbatch size, s sequence length, h hidden size, a attention heads. F = 24 b s h^2 + 4 b s^2 h
and B = 2 F are the FLOPs of a block's forward and backward.

    policy     elements saved per block  FLOPs per block        recomputed
    none       16 b s h + b a s^2        F + B                  nothing
    full       b s h                     F + B + F - 8 b s h^2  all but the last matmul
    selective  16 b s h                  F + B + 2 b s^2 h      q k^T and softmax
    offload    0 (last block: as none)   F + B                  nothing

The table is for a GPT-2 block without dropout, in which attention is matmul, softmax, matmul. Fused
attention does not store the attention weights, so there "selective" reduces memory use very little.
During a block's backward, its recomputed tensors are in memory too. With "offload", the device
holds the tensors of two blocks.

The recomputation, or second forward, must draw the same dropout masks. It runs when backward first
needs a saved tensor of the block, repeats the block's collectives in order, and stops at the last
saved tensor. Ranks that save different tensors can therefore hang. In a tensor-parallel block
without dropout, "full" repeats all collectives but the last. "selective" repeats none.

    torchrun --standalone --nproc-per-node 2 activation_ckpt.py

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
Korthikanti et al. 2022, Reducing Activation Recomputation (arXiv 2205.05198), sections 4 and 5.
"""

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# --- version 1: the whole idea (policy "full") ----------------------------------------------------


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
        torch.autograd.backward(y, grad)  # adds to the .grad of the function's parameters, too
        return None, x.grad


class EarlyStop(BaseException):
    """Ends the second forward when all saved tensors have been recomputed. A BaseException, so that
    `except Exception` in the function does not catch it."""


def checkpoint(function: Callable, *inputs: Tensor) -> Tensor:
    """Call function(*inputs) under saved-tensor hooks. Autograd stores an index in place of each
    saved tensor. When backward needs one, unpack() reruns the function to recompute all of them.

    Unlike torch.utils.checkpoint(use_reentrant=False), it does not restore RNG or autocast state,
    accept keyword arguments, detect in-place changes to inputs, check that both forwards agree, or
    free tensors that are never unpacked."""
    count = 0  # tensors saved by the first forward
    recomputed: dict[int, Tensor] = {}  # by index
    detached = [x.detach().requires_grad_(x.requires_grad) for x in inputs]

    def pack(t: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def store(t: Tensor) -> Tensor:  # the pack hook of the second forward
        t = t.detach()  # else a node that saves its own output would be in a reference cycle
        recomputed[len(recomputed)] = t
        if len(recomputed) == count:
            raise EarlyStop
        return t

    def unpack(index: int) -> Tensor:
        if index not in recomputed:
            recomputed.clear()  # store() numbers the tensors from 0
            hooks = saved_tensors_hooks(store, lambda t: t)
            with contextlib.suppress(EarlyStop), torch.enable_grad(), hooks:
                function(*detached)
        return recomputed.pop(index)

    with saved_tensors_hooks(pack, unpack):
        return function(*inputs)


# --- recompute(): checkpoint() with five additions ------------------------------------------------


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


def current_autocast(device: str) -> torch.autocast:
    """2. Autocast: the second forward must compute in the dtypes of the first, but backward usually
    runs outside of the autocast context."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, torch.is_autocast_cache_enabled())


class SaveInputs(torch.autograd.Function):
    """3. Inputs are saved by an autograd node. Autograd raises an error if one was modified in
    place, and outer saved-tensor hooks (an enclosing recompute, measure.py) apply to them.

    The output is not used in the graph, so this node's backward never runs and cannot free the
    inputs before the second forward. The unpack hooks refer to Recompute, which refers to the node,
    so the inputs are freed with the last saved tensor."""

    @staticmethod
    def forward(ctx, leaf: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return leaf.clone()  # leaf requires a gradient, so there is a node even if no input does


class Holder:
    """4. Freeing: autograd stores a Holder in place of each saved tensor, and the Holder refers to
    the recomputed tensor. Once a node's backward has run, autograd frees both, even if the node
    never unpacked the tensor. A node that unpacks it twice does not recompute it twice."""

    def __init__(self, t: Tensor):
        self.kind = (t.shape, t.dtype, t.device)
        self.tensor: Tensor | None = None


class Recompute:
    """One call of recompute(). Hooks: pack and unpack for the first forward, store for the second.

    5. Checks: both forwards must save tensors of the same shapes, dtypes and devices."""

    def __init__(self, function: Callable, inputs: list[Tensor], save_rng: Callable):
        self.function, self.restore_rng = function, save_rng()
        self.autocasts = current_autocast("cpu"), current_autocast("cuda")
        self.inputs = SaveInputs.apply(torch.empty(0, requires_grad=True), *inputs)
        self.holders: list[weakref.ref[Holder]] = []  # weak: only autograd keeps a Holder alive

    def pack(self, t: Tensor) -> Holder:
        holder = Holder(t)
        self.holders.append(weakref.ref(holder))
        return holder

    def unpack(self, holder: Holder) -> Tensor:
        if holder.tensor is None:
            saved = self.inputs.grad_fn.saved_tensors
            inputs = [x.detach().requires_grad_(x.requires_grad) for x in saved]
            self.stored = 0  # tensors saved so far by the second forward
            cpu, cuda = self.autocasts
            with cpu, cuda, self.restore_rng(), torch.enable_grad():
                with contextlib.suppress(EarlyStop), saved_tensors_hooks(self.store, lambda t: t):
                    self.function(*inputs)
            if self.stored < len(self.holders):
                self.refuse(f"the first saved {len(self.holders)} and the second {self.stored}")
        return holder.tensor

    def store(self, t: Tensor) -> Tensor:
        t = t.detach()  # see store() in version 1
        holder = self.holders[self.stored]()
        if holder is not None:  # None: autograd has already released this saved tensor
            if (kind := (t.shape, t.dtype, t.device)) != holder.kind:
                self.refuse(f"tensor {self.stored} was {holder.kind} and is now {kind}")
            holder.tensor = t
        self.stored += 1
        if self.stored == len(self.holders):
            raise EarlyStop
        return t

    def refuse(self, difference: str) -> NoReturn:
        raise ValueError(
            f"recompute: both forwards must save the same tensors, but {difference}. The function "
            "must not depend on state that changes between forward and backward"
        )


def recompute(function: Callable, *args, save_rng: Callable = save_torch_rng, **kwargs) -> Any:
    """Call function(*args, **kwargs). Only its tensor arguments are kept for backward. Everything
    else that autograd would save is recomputed. Tensors in tuples, lists and dicts are passed to
    both forwards as the same objects. They stay in memory and are not checked for in-place changes.
    With retain_graph=True, recomputed tensors stay in memory until the graph is freed.

    save_rng() is called before the first forward. It returns a function that returns a context
    manager for the second forward, in which the same random numbers are drawn. train_3d.py passes
    Draws.save from gpt.py, where a mask is a function of (seed, step, row, module name).

    Raises ValueError in backward if the second forward saves fewer tensors, or a tensor of another
    shape, dtype or device. Surplus tensors are not noticed. Gradients can be wrong without an error
    if the function reads state that has changed since the first forward, or modifies a saved tensor
    in place."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    arguments = dict(enumerate(args)) | kwargs  # keys: positions and keywords
    keys = [key for key, x in arguments.items() if isinstance(x, Tensor)]
    inputs = [arguments.pop(key) for key in keys]  # `arguments` keeps the others
    n = len(args)  # call() must not capture args, which would keep the inputs on the device

    def call(*tensors: Tensor) -> Any:
        values = arguments | dict(zip(keys, tensors, strict=True))
        return function(*[values.pop(i) for i in range(n)], **values)

    state = Recompute(call, inputs, save_rng)
    with saved_tensors_hooks(state.pack, state.unpack):
        return function(*args, **kwargs)


# --- offload(): saved tensors in host memory ------------------------------------------------------
# Nothing is recomputed. On a GPU, copying one block's tensors overlaps with the computation of the
# block after it. On a CPU the copies are synchronous and save no memory.


class HostMemory:
    """The copy stream and the pool of free host buffers, shared by all offloaded blocks of a model.
    The stream runs copies in order, so a buffer is not overwritten before it has been read. Pinned
    and pageable buffers are in one pool, so use one device: a GPU tensor that got a pageable buffer
    would block the host."""

    def __init__(self):
        self.stream = None  # created by the first copy
        self.free_buffers: dict[tuple, list[Tensor]] = collections.defaultdict(list)
        self.latest: Callable[[], Offload | None] = lambda: None  # later a weakref to the newest

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> Any:
        """Queue the copies after the work that is on the compute stream. Return an event that is
        recorded after the last copy."""
        device = torch.get_device_module("cuda" if torch.cuda.is_initialized() else "cpu")
        self.stream = self.stream or device.Stream()
        self.stream.wait_stream(device.current_stream())
        with device.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        event = device.Event()
        event.record(self.stream)
        return event


class Offload:
    """The saved tensors of one forward of a block. They are copied to the host during the forward
    of the next offloaded block, and back during that block's backward. So the device holds the
    tensors of at most two blocks. With several microbatches in flight it can hold more: the block
    that ran forward last is not freed before another forward, and if several stages are on one
    rank, a block can be reloaded too early. With retain_graph=True, reloaded tensors stay.

    Parameters are not copied. A tensor that two nodes save is copied twice. A block must not modify
    a saved tensor in place (not checked)."""

    def __init__(self, module: nn.Module, memory: HostMemory):
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.on_host: list[Tensor] = []
        self.on_device: list[Tensor] | None = []  # None while only the host has them
        self.devices: list[torch.device] = []  # a block on a GPU can also save CPU scalars
        self.copied = None  # event of the latest copies
        self.memory, self.previous = memory, memory.latest  # the Offload of the block before
        memory.latest = weakref.ref(self)

    def pack(self, t: Tensor) -> Tensor | int:
        if t.untyped_storage().data_ptr() in self.parameters:
            return t
        free = self.memory.free_buffers[t.shape, t.dtype]
        # Contiguous: a copy to another layout goes through pageable memory and blocks the host.
        host = free.pop() if free else torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        self.on_host.append(host)
        self.on_device.append(t.detach())
        self.devices.append(t.device)
        return len(self.on_host) - 1

    def copy_to_host(self) -> None:
        """Called after the block's forward. Frees the previous block's tensors on the device."""
        if self.on_host:
            self.copied = self.memory.copy(self.on_host, self.on_device)
        if previous := self.previous():
            previous.wait()  # else later kernels could overwrite the memory before it is copied
            previous.on_device = None

    def copy_to_device(self) -> None:
        if self.on_device is None:
            pairs = zip(self.on_host, self.devices, strict=True)
            self.on_device = [torch.empty_like(host, device=device) for host, device in pairs]
            self.copied = self.memory.copy(self.on_device, self.on_host)

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.copy_to_device()  # usually a no-op: the backward of the next block has called it
        if previous := self.previous():
            previous.copy_to_device()
        self.wait()
        return self.on_device[packed]

    def wait(self) -> None:
        """The compute stream, not the host, waits for the latest copies."""
        if self.copied is not None:
            self.copied.wait()

    def __del__(self):
        self.wait()  # as in copy_to_host(), before on_device is freed
        for host in self.on_host:
            self.memory.free_buffers[host.shape, host.dtype].append(host)


def offload(function: Callable, module: nn.Module, memory: HostMemory, *args, **kwargs) -> Any:
    """Call `function`, the forward of `module`, and keep its saved tensors in host memory."""
    run = Offload(module, memory)
    with saved_tensors_hooks(run.pack, run.unpack):
        output = function(*args, **kwargs)
    run.copy_to_host()
    return output


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
    """Apply the policy to every `every`-th of the first `layers` blocks (default: all), in place.
    Checkpointing fewer blocks costs less recomputation but more memory. save_rng: see recompute().

    Only forward methods are replaced: those of the blocks or, for "selective", of the submodule at
    path `core` in each block, which computes attention from q, k and v. The second forward does
    not run module hooks of these modules, but runs those of their submodules. Raises ValueError if
    the policy is unknown."""
    if policy not in POLICIES:
        raise ValueError(f"recompute policy {policy!r} is unknown: use {', '.join(POLICIES)}")
    if policy == "none":
        return
    chain = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
    memory = HostMemory()
    for block in chain[:layers:every]:
        module = block.get_submodule(core) if policy == "selective" else block
        if policy == "offload":
            module.forward = functools.partial(offload, module.forward, module, memory)
        else:
            module.forward = functools.partial(recompute, module.forward, save_rng=save_rng)


# --- cost -----------------------------------------------------------------------------------------
# Cost of one GPT-2 block with explicit attention, without dropout, in fp32 or fp64, in one process.
# tools/cost.py has the other cases.


def saved_bytes(policy: str, b: int, s: int, h: int, a: int, itemsize: int) -> int:
    """Bytes saved from forward to backward; itemsize is that of the activations. The 16 b s h
    elements are the inputs of ln_1, c_attn, ln_2 and c_fc (4), q, k and v (3), the input of
    attn.c_proj (1), and GELU's input (4) and output (4). The table in the module docstring omits
    4 b s elements (mean and 1/std of the layer norms) and s^2 bytes (the causal mask)."""
    return {
        "none": (16 * b * s * h + b * a * s * s + 4 * b * s) * itemsize + s * s,
        "selective": (16 * b * s * h + 4 * b * s) * itemsize,
        "full": b * s * h * itemsize,
        "offload": 0,  # the last block's tensors are not counted
    }[policy]


def flops(policy: str, b: int, s: int, h: int) -> int:
    """FLOPs of the matmuls in forward, backward and second forward, 2 per multiply-add."""
    forward = 24 * b * s * h * h + 4 * b * s * s * h
    full = forward - 8 * b * s * h * h  # early stop skips mlp.c_proj
    selective = 2 * b * s * s * h  # q k^T; early stop skips weights @ v
    return 3 * forward + {"none": 0, "offload": 0, "selective": selective, "full": full}[policy]


# --- demo -----------------------------------------------------------------------------------------
# Each rank trains a separate model on separate rows. Checkpointing itself does not communicate.

FIRST_VERSIONS = {"textbook": CheckpointFunction.apply, "checkpoint()": checkpoint}


def apply(name: str, blocks: nn.ModuleDict) -> None:
    if name in POLICIES:
        return checkpoint_blocks(blocks, name)
    for block in blocks.values():
        block.forward = functools.partial(FIRST_VERSIONS[name], block.forward)


def measured_cost(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes saved by all blocks, and FLOPs of their forward and backward. x [b, s, h]."""
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

    b, s, h, a, n_layer = 2, 32, 48, 3, 5
    config = gpt.GPTConfig(n_layer, a, h, vocab_size=256, seq_len=s, attention="explicit")

    def train(name: str, rows: range) -> tuple[list[Tensor], dict[str, Tensor], nn.Module]:
        """Three steps of SGD. Returns losses, gradients of the last step, and the model."""
        model = gpt.build(config, dtype=torch.float64)
        apply(name, model.h)
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
        for name in (*FIRST_VERSIONS, *POLICIES):
            losses, gradients, model = train(name, rows)
            report.losses(name, losses, expected_losses)
            report.close(f"{name} max |d gradient|", gradients, expected)
            x = torch.randn(b, s, h, dtype=torch.float64, requires_grad=True)
            nbytes, count = measured_cost(model, x)
            policy = "full" if name in FIRST_VERSIONS else name
            if name != "checkpoint()":  # its closure holds the inputs, unseen by measure.py
                predicted = n_layer * saved_bytes(policy, b, s, h, a, itemsize=8)
                report.equal(f"{name} bytes saved", predicted, nbytes)
            not_skipped = 8 * b * s * h * h if name == "textbook" else 0  # no early stop
            report.equal(f"{name} FLOPs", n_layer * (flops(policy, b, s, h) + not_skipped), count)


if __name__ == "__main__":
    main()
