"""Activations are the memory that grows: keep less of a block for backward, and pay otherwise.

    none        x0 [a b c] x1 [a b c] x2 [a b c] x3      all of a b c stay until backward needs them
    full        x0 .  .  . x1 .  .  . x2 .  .  . x3      backward of block 3: x2 -> forward again ->
                           ^-- kept --^                  a b c of this one block, used, dropped
    selective   x0 [a . c] x1 [a . c] x2 [a . c] x3      b, attention's s x s, is large and cheap
    offload     .  .  .  . .  .  .  . .  .  .  . x3      x0 a b c wait in host memory

    per block (GPT-2)    kept for backward, numbers                       compute per step
    none                 16 b s h + b a s s (explicit attention)          F + B           (B = 2 F)
    selective            16 b s h                                         F + B + 2 b s s h
    full                 b s h                                            F + B + F less one matmul
    offload              on the device nothing, x0 x1 .. neither          F + B, and 2 copies of it
    plus, during a block's backward, what it had dropped (offload: the tensors of two blocks).
    every = k: the first of every k blocks; layers = n: among the first n (of a rank's).

With fused attention (sdpa) the s x s is never stored, and selective gains its log-sum-exp alone,
b a s. Offload on a CPU is a copy that gains nothing; it is here for its proof.

Dropout must draw the same masks again: what they are drawn from is remembered with the input. The
second forward pays for that drawing, and in tensor parallelism for the collectives, once more.
It ends where backward has all it needs: without dropout, a block's last matmul and the sum over tp
behind it are spared (of a matmul that puts its weight's gradient off, only the sum).

    torchrun --standalone --nproc-per-node 2 activation_ckpt.py

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174); Korthikanti et
al. 2022 (arXiv 2205.05198), sections 4 and 5.
"""

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# None: what is kept is this rank's own business. What `function` communicates, it does again.

# --- strategy -------------------------------------------------------------------------------------


def save_torch_rng() -> Callable[[], contextlib.AbstractContextManager]:
    """The default `save_rng`: torch's generators, the CPU's and the current GPU's, as they are now.
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


class Inputs(torch.autograd.Function):
    """A node that saves xs. It is outside of the block's graph, whose backward would free it. leaf
    requires a gradient, so that there is a node even if no x does."""

    @staticmethod
    def forward(ctx, leaf: Tensor, *xs: Tensor) -> Tensor:
        ctx.save_for_backward(*xs)
        return leaf.clone()


class Saved:
    """Autograd keeps this in place of a saved tensor. It holds the recomputed tensor too. Both are
    freed when the backward of the node is done, however often the node reads it."""

    def __init__(self, t: Tensor):
        self.kind, self.tensor = (t.shape, t.dtype, t.device), None


class EarlyStop(BaseException):
    """Ends the second forward when backward has all it needs. It is a BaseException, so that an
    `except Exception` in a block does not catch it."""


DIFFERS = "recompute: both forwards must save the same tensors, but "
REMEDY = "the function must not depend on what changes between forward and backward"


class Recompute:
    """Autograd keeps a Saved for each tensor that function(*xs) saves. When backward unpacks the
    first, function runs again until it has saved the last. It does not reach a block's last matmul
    and the all-reduce behind it."""

    def __init__(self, function: Callable, xs: list[Tensor], save_rng: Callable):
        self.function, self.restore_rng = function, save_rng()
        self.autocast = [
            torch.autocast(device, torch.get_autocast_dtype(device),
                           torch.is_autocast_enabled(device), torch.is_autocast_cache_enabled())
            for device in ("cpu", "cuda")
        ]  # fmt: skip
        self.inputs = Inputs.apply(torch.empty(0, requires_grad=True), *xs)
        self.saved: list[weakref.ref[Saved]] = []  # weak: only the nodes keep them

    def pack(self, t: Tensor) -> Saved:
        saved = Saved(t)
        self.saved.append(weakref.ref(saved))
        return saved

    def unpack(self, saved: Saved) -> Tensor:
        if saved.tensor is None:
            inputs = self.inputs.grad_fn.saved_tensors
            xs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
            hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)
            self.count, (cpu, cuda) = 0, self.autocast
            rng, grad = self.restore_rng(), torch.enable_grad()
            with contextlib.suppress(EarlyStop), cpu, cuda, grad, rng, hooks:
                self.function(*xs)
            if self.count < len(self.saved):
                raise ValueError(f"{DIFFERS}the first saved {len(self.saved)}, and the second "
                                 f"{self.count}; {REMEDY}")  # fmt: skip
        return saved.tensor

    def _keep(self, t: Tensor) -> Tensor:
        t = t.detach()  # a node that kept its own output would hold itself, and never be freed
        saved, kind = self.saved[self.count](), (t.shape, t.dtype, t.device)
        if saved is not None:  # the node is alive
            if kind != saved.kind:
                raise ValueError(f"{DIFFERS}tensor {self.count} is {saved.kind} in the first, and "
                                 f"{kind} in the second; {REMEDY}")  # fmt: skip
            saved.tensor = t
        self.count += 1
        if self.count == len(self.saved):
            raise EarlyStop
        return t


def recompute(function: Callable, *args, save_rng: Callable = save_torch_rng, **kwargs) -> Any:
    """function(*args, **kwargs), recomputed in backward, under the same CPU and CUDA autocast.
    save_rng() returns a function that opens the context of the second forward: random numbers must
    repeat in it.

    Raises ValueError in backward if the second forward saves fewer tensors, or one of another
    shape, dtype or device. More tensors and other values are not noticed: if the function reads
    what has changed since (a counter, a buffer), its gradients are wrong. Tensors inside of tuples
    or dicts are kept as they are. With retain_graph=True recomputed tensors are kept until the
    graph is freed, as many as without recompute."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    given, names = [*args, *kwargs.values()], list(kwargs)
    others = [Tensor if isinstance(x, Tensor) else x for x in given]  # Tensor: the next of xs

    def call(*xs: Tensor) -> Any:
        left = iter(xs)
        again = [next(left) if x is Tensor else x for x in others]
        n = len(again) - len(names)
        return function(*again[:n], **dict(zip(names, again[n:], strict=True)))

    of = Recompute(call, [x for x in given if isinstance(x, Tensor)], save_rng)
    with torch.autograd.graph.saved_tensors_hooks(of.pack, of.unpack):
        return function(*args, **kwargs)


class HostCopies:
    """All copies between the device and pinned host memory, on one separate stream, so in order: a
    host buffer may be reused as soon as its run is freed. `under_way` keeps device tensors alive
    until the compute stream waits for their copies. Otherwise the allocator could give their memory
    to the next kernel. On a CPU, torch's streams and events are no-ops, and copies synchronous."""

    def __init__(self):
        self.free: dict[tuple, list[Tensor]] = collections.defaultdict(list)  # host buffers
        self.under_way, self.finished = collections.deque(), 0
        self.stream, self.last = None, lambda: None  # last: weak reference to the last run

    def start(self, to: list[Tensor], source: list[Tensor]) -> int:
        """Queues the copies. Returns a ticket for wait()."""
        device = torch.get_device_module("cuda" if torch.cuda.is_initialized() else "cpu")
        self.stream = self.stream or device.Stream()
        self.stream.wait_stream(device.current_stream())
        with device.stream(self.stream):
            for a, b in zip(to, source, strict=True):
                a.copy_(b, non_blocking=True)
        event = device.Event()
        event.record(self.stream)
        self.under_way.append((event, to, source))
        return self.finished + len(self.under_way)

    def wait(self, ticket: int) -> None:
        """The compute stream, not the host, waits for these copies and all earlier ones."""
        while self.finished < ticket:
            self.under_way[0][0].wait()
            self.under_way.popleft()
            self.finished += 1


class Offload:
    """One run of a block. What autograd saves in it is copied to the host while the next block
    computes, and copied back during the backward of the block after it, so the device holds the
    saved tensors of at most two blocks (more if a pipeline stage alternates between chunks).
    Parameters are not copied. The block must not change a saved tensor in place."""

    def __init__(self, module: nn.Module, copies: HostCopies):
        self.held = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.copies, self.ticket = copies, 0
        self.tensors: list[Tensor] | None = []  # None: on the host only
        self.saved: list[tuple] = []  # (device, host buffer, free list it returns to)
        self.previous, copies.last = copies.last, weakref.ref(self)

    def pack(self, t: Tensor) -> Tensor | int:
        if t.untyped_storage().data_ptr() in self.held:
            return t
        free = self.copies.free[t.shape, t.dtype]
        # Contiguous: to another layout CUDA copies through pageable memory, and the host waits.
        host = free.pop() if free else torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        self.saved.append((t.device, host, free))
        self.tensors.append(t.detach())
        return len(self.saved) - 1

    def send(self) -> None:
        if self.saved:
            self.ticket = self.copies.start([host for _, host, _ in self.saved], self.tensors)
        if previous := self.previous():  # the last block of a forward stays on the device
            self.copies.wait(previous.ticket)
            previous.tensors = None

    def fetch(self) -> None:
        if self.tensors is None:
            self.tensors = [torch.empty_like(host, device=device) for device, host, _ in self.saved]
            self.ticket = self.copies.start(self.tensors, [host for _, host, _ in self.saved])

    def unpack(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.fetch()  # usually prefetched during the next block's backward
        if previous := self.previous():
            previous.fetch()
        self.copies.wait(self.ticket)
        return self.tensors[packed]

    def __del__(self):
        for _, host, free in self.saved:
            free.append(host)


POLICIES = ("none", "selective", "full", "offload")


def checkpoint_blocks(
    blocks: nn.ModuleDict | nn.ModuleList, policy: str, every: int = 1, layers: int | None = None,
    save_rng: Callable = save_torch_rng, core: str = "attn.core",
) -> None:  # fmt: skip
    """Apply the policy to the first of every `every` blocks, among the first `layers` (default:
    all), in place. A block keeps its name, parameters and hooks; only its forward is replaced, or,
    if selective, that of its part `core`. Raises ValueError for an unknown policy."""
    if policy not in POLICIES:
        raise ValueError(f"recompute policy {policy!r} is none of {', '.join(POLICIES)}")
    chain = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
    copies = HostCopies()
    for block in chain[:layers:every] if policy != "none" else ():
        module = block.get_submodule(core) if policy == "selective" else block
        plain = module.forward
        module.forward = (
            functools.partial(_offloaded, plain, module, copies)
            if policy == "offload"
            else functools.partial(recompute, plain, save_rng=save_rng)
        )


def _offloaded(plain: Callable, module: nn.Module, copies: HostCopies, *args, **kwargs) -> Any:
    run = Offload(module, copies)
    with torch.autograd.graph.saved_tensors_hooks(run.pack, run.unpack):
        output = plain(*args, **kwargs)
    run.send()
    return output


# --- cost -----------------------------------------------------------------------------------------


def predicted_block_bytes(
    b: int, s: int, h: int, a: int, attention: str, itemsize: int, policy: str = "none",
    dropout: bool = False, t: int = 1, sequence: bool = False, stat: int | None = None,
) -> int:  # fmt: skip
    """Bytes that autograd keeps of one GPT-2 block of gpt.py on the CPU, per microbatch, on one of
    t tensor-parallel ranks. In units of b s h numbers: whole, or 1/t under sequence parallelism,
    the inputs of ln_1, c_attn, ln_2 and c_fc; 1/t in any case q k v (3), the input of attn.c_proj,
    gelu's input (4) and output (4). Norms: mean and 1/std, 2 b s each, of `stat` bytes (default:
    itemsize, as on a CPU; a GPU has 4 in bf16 too). Dropout of the residual: two masks of a byte.
    Attention's core, 1/t: sdpa a log-sum-exp of b a s; explicit the softmax, b a s s, at least in
    fp32, again in bf16 or dropped out, if that is another tensor, and the dropout's mask of a byte.
    The causal mask, s s of a byte, is whole on every rank.

    Korthikanti et al., section 4.1, with numbers of 16 bits and dropout: 34 s b h + 5 a s s b
    bytes. Ours in bf16: 16 units of 2 bytes and 2 masks, the same 34; but 7 a s s b, since the
    softmax is kept in fp32 (4, theirs 2) beside what was dropped out (2) and the mask (1). The
    norms' 8 b s and the causal mask s s they leave out as small."""
    if policy == "offload":
        return 0
    wide = max(4, itemsize)
    tokens = (b * s * h) // t if sequence else b * s * h
    if policy == "full":
        return tokens * itemsize
    norms = 4 * b * s // (t if sequence else 1) * (stat or itemsize)
    core = b * a * s // t * wide
    if attention == "explicit" or dropout:
        again = itemsize if dropout or itemsize < wide else 0
        core = b * a * s * s // t * (wide + again + dropout) + s * s
    return (
        4 * tokens * itemsize + norms + 2 * tokens * dropout + 12 * b * s * h // t * itemsize
        + (core if policy == "none" else 0)
    )  # fmt: skip


def predicted_blocks_bytes(
    n_layer: int, policy: str, every: int = 1, layers: int | None = None, **sizes
) -> int:
    """Bytes kept of a chain of n_layer blocks; sizes: of predicted_block_bytes."""
    n = len(range(n_layer)[:layers:every])
    under, plain = (predicted_block_bytes(policy=p, **sizes) for p in (policy, "none"))
    return n * under + (n_layer - n) * plain


def predicted_activation_bytes(
    n_layer: int, b: int, s: int, h: int, v: int, itemsize: int, first: bool, last: bool,
    in_flight: int = 1, t: int = 1, sequence: bool = False, dropout: bool = False,
    stat: int | None = None, **rest,
) -> int:  # fmt: skip
    """Bytes kept of a whole stage of the trainer, with in_flight microbatches. Besides the blocks
    (rest: policy, every, layers, a, attention): the `first` has for each token its row number (8)
    and whether that is on this rank (1), and a dropout mask; the `last` the norm's input, mean and
    1/std, the head's input, the probabilities of this rank's v words in fp32, of each token the
    target (8) and, with t > 1, whether it is on this rank and valid (2); with t = 1, whose loss is
    torch's, one number more; once, the global count (8)."""
    sizes = dict(b=b, s=s, h=h, itemsize=itemsize, t=t, sequence=sequence, dropout=dropout,
                 stat=stat)  # fmt: skip
    wide, of_sequence = max(4, itemsize), t if sequence else 1
    tokens = b * s * h // of_sequence
    each = predicted_blocks_bytes(n_layer, **sizes, **rest)
    if first:
        each += 9 * b * s + tokens * dropout
    if last:
        each += 2 * tokens * itemsize + 2 * b * s // of_sequence * (stat or itemsize)
        each += b * s * v * wide + (8 * b * s + wide if t == 1 else 10 * b * s)
    return in_flight * each + 8 * last


def predicted_flops(
    n_layer: int, b: int, s: int, h: int, policy: str, every: int = 1, layers: int | None = None,
    dropout: bool = False, deferred: bool = False, fused: bool = False,
) -> int:  # fmt: skip
    """FLOPs of the matmuls of n_layer blocks, forward and backward: 2 per multiply-add;
    forward 24 b s h^2 + 4 b s^2 h a block (the mask saves none), backward twice that. What is
    recomputed ends before its last matmul, the core's second, or a block's mlp.c_proj of
    8 b s h^2; but for dropout, whose mask comes behind that of a block, and for linear layers whose
    weights' gradients are `deferred`: what such a layer keeps, autograd hears of when it is done;
    a `fused` core is one operation, so it is done again whole."""
    core = 4 * b * s * s * h
    forward = 24 * b * s * h * h + core
    full = forward - (0 if dropout or deferred else 8 * b * s * h * h)
    selective = core if fused else core // 2
    again = {"none": 0, "offload": 0, "selective": selective, "full": full}[policy]
    return 3 * n_layer * forward + len(range(n_layer)[:layers:every]) * again


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import dataclasses

    from torch.utils.flop_counter import FlopCounterMode

    import data
    import gpt
    import measure

    steps, b, n_layer = 3, 2, 5
    config = gpt.GPTConfig(n_layer, 3, 48, 256, 32, attention="explicit")
    s, h, a = config.seq_len, config.n_embd, config.n_head
    with measure.Report("activation_ckpt.py") as report:
        # Each rank has rows of its own, and checkpointing talks to nobody; losses are summed to be
        # shown. A mask drawn anew in the second forward would show in every gradient.
        tokens = data.example()
        rows = range(b * report.group.rank(), b * (report.group.rank() + 1))

        def train(policy: str, every: int, layers: int | None, dropout: float):
            model = gpt.build(dataclasses.replace(config, dropout=dropout), 0, dtype=torch.float64)
            checkpoint_blocks(model.h, policy, every, layers, model.draws.save)
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
            return saved.peak, flops.get_total_flops()

        losses, whole = train("none", 1, None, dropout=0.1)
        expected = {n: p.grad for n, p in whole.named_parameters()}
        for policy, every, layers in (
            ("none", 1, None), ("selective", 1, None), ("full", 1, None), ("full", 2, None),
            ("full", 1, 3), ("offload", 1, None),
        ):  # fmt: skip
            what = policy + f", every {every}" * (every > 1) + f", {layers} layers" * bool(layers)
            mine, model = train(policy, every, layers, dropout=0.1)
            for loss, one in zip(mine, losses, strict=True):
                assert torch.equal(loss, one), "forward is the same computation: bitwise"
            gradients = {n: p.grad for n, p in model.named_parameters()}
            report.losses(what, mine, losses)
            report.close(f"{what} max |d gradient|", gradients, expected)
            saved, flops = costs(model)
            sizes = dict(b=b, s=s, h=h, a=a, attention=config.attention, itemsize=8, dropout=True)
            bytes_ = predicted_blocks_bytes(n_layer, policy, every, layers, **sizes)
            report.equal(f"{what} bytes kept by the blocks", bytes_, saved)
            flops_ = predicted_flops(n_layer, b, s, h, policy, every, layers, dropout=True)
            report.equal(f"{what} FLOPs", flops_, flops)


if __name__ == "__main__":
    main()
