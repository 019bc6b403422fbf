"""Pipeline parallelism: the layers are split over ranks, which process each microbatch in turn.

A stage is a contiguous slice of the layers. Stages are numbered in model order. Each rank holds one
or more stages, which are called its chunks. The batch is split into microbatches. In a forward (F),
a stage sends its output to the next stage. In a backward (B), it sends its input gradient to the
previous stage. Different stages work on different microbatches at the same time.

              rank 0                rank 1                rank 2
    tokens -> stage 0 -- output --> stage 1 -- output --> stage 2 -> loss
                      <- gradient -         <- gradient -

    rank 0 |F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
    rank 1 |.  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
    rank 2 |.  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .

The timeline shows which microbatch each rank processes, with dots for idle time. This order, 1F1B,
is one of those in schedules.py, which explains them and compares their idle time and memory.

Cost: for each microbatch, a stage sends one tensor [b, s, h] to each neighbour on another rank. b:
rows of a microbatch, s: tokens per row, h: hidden size. This is little compared with tensor
parallelism, so the ranks of a pipeline can be on different nodes.

    torchrun --standalone --nproc-per-node 2 pipeline.py

GPipe: arXiv 1811.06965. 1F1B: 2104.04473. Split backward: 2401.10241.
"""

import collections
import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from schedules import SCHEDULES, Action, Schedule, consumer, simulate, splits_backward, stages_of

# --- version 1: the whole idea --------------------------------------------------------------------


def train_step(
    stage: nn.Module, inputs: Sequence[Tensor], loss_of: Callable, boundary: Tensor,
    group: dist.ProcessGroup, gpipe: bool = False,
) -> Tensor:  # fmt: skip
    """Runs one step of this rank's stage and adds the gradients to `.grad`. GPipe runs all forwards
    before the first backward. 1F1B runs each backward as early as possible, which saves memory.

    inputs: one tensor per microbatch, all of one shape. Only rank 0 reads their values; the other
    ranks use only their number. loss_of(output, i) -> scalar, used by the last rank: the loss
    summed over the tokens of microbatch i, divided by the number of tokens in the full batch.
    boundary: a tensor with the shape [b, s, h], dtype and device of the tensors sent between
    stages. Stage outputs are not checked against it. Returns the sum of the losses on the last rank
    and 0 on the others, so an all-reduce gives it to all. Under NCCL, neighbours must have
    exchanged a tensor before the first step: a first transfer in the middle of a schedule can hang
    (see Pipeline._connect)."""
    rank, last, m = group.rank(), group.size() - 1, len(inputs)
    in_flight = collections.deque()  # (input, output) of each microbatch between its F and its B
    total = boundary.new_zeros((), dtype=torch.promote_types(boundary.dtype, torch.float32))

    def exchange(peer: int, send: Tensor | None = None, receive: bool = False) -> Tensor | None:
        """Sends to and receives from `peer` in one batch. If two neighbours both waited for their
        send to complete before they posted their receive, they would deadlock."""
        if not 0 <= peer <= last:
            return None  # the first and the last stage have only one neighbour
        operations, received = [], torch.empty_like(boundary) if receive else None
        if send is not None:
            tensor = send.detach().contiguous()
            operations.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=peer))
        if receive:
            operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=peer))
        for handle in dist.batch_isend_irecv(operations):  # payload: b s h per operation
            handle.wait()
        return received

    def forward(i: int, x: Tensor | None) -> Tensor:
        nonlocal total
        x = inputs[i] if rank == 0 else x.requires_grad_()
        y = stage(x)
        if rank == last:
            y = loss_of(y, i)
            total = total + y.detach()
        in_flight.append((x, y))
        return y

    def backward(gradient: Tensor | None) -> Tensor | None:
        x, y = in_flight.popleft()
        if y.requires_grad:  # False if every parameter of the first stage is frozen
            y.backward(gradient)  # on the last rank, y is the loss and gradient is None
        return x.grad

    warmup = m if gpipe else min(m, last - rank)  # 1F1B: one forward for each later rank
    for i in range(warmup):  # warm-up: forwards only
        y = forward(i, exchange(rank - 1, receive=True))
        exchange(rank + 1, send=y)
    # x: the input of the next forward
    x = exchange(rank - 1, receive=True) if warmup < m else None
    for i in range(warmup, m):  # steady state: one forward, one backward
        gradient = exchange(rank + 1, send=forward(i, x), receive=True)
        x = exchange(rank - 1, send=backward(gradient), receive=i + 1 < m)
    for _ in range(warmup):  # drain: backwards only
        gradient = exchange(rank + 1, receive=True)
        exchange(rank - 1, send=backward(gradient))
    return total


# --- the full version -----------------------------------------------------------------------------
# Version 1 supports two schedules, with one stage per rank. The full version runs any schedule:
#
# - Apart from its exchanges, version 1 just executes a list of actions, such as F F B F B F B B. So
#   each schedule is written as data: one list of actions per rank, see schedules.py.
# - Pairing sends with receives by hand does not scale to several chunks per rank, to stages placed
#   in a V (zb-v: rank 0 holds the first and the last stage), or to a split backward (section 3). So
#   transfers are derived from one order of all actions.
# - `forward`, `backward` and `exchange` become methods of one executor, `Pipeline`.
#
# A list of actions with its transfers is called a program. This one is derived for rank 1 of 3 in
# 1F1B with 4 microbatches. Each pair of brackets is a batch of transfers. <F0 receives the input of
# F0, and >F0 sends its output. <B0 receives the output gradient that B0 needs, and >B0 sends the
# input gradient that B0 computes.
#
#     [<F0] F0 [<F1 >F0] F1 [<F2 >F1 <B0] B0 [>B0] F2 [<B1 >F2] B1 [>B1 <F3] F3 [<B2 >F3] B2
#     [>B2 <B3] B3 [>B3]


# 1. Transfers: they are derived from the schedule, in an order that cannot deadlock. So a new
# schedule needs no communication code.


class Transfer(NamedTuple):
    """Sends the result of `action`, an output (F) or an input gradient (B), from src to dst."""

    action: Action
    src: int
    dst: int


Program = list[Action | tuple[Transfer, ...]]  # the transfers of a tuple are posted as one batch


def actions_of(program: Program) -> list[Action]:
    return [step for step in program if isinstance(step, Action)]


def derive_programs(schedule: Schedule) -> list[Program]:
    """The program of each rank: its actions, and the transfers that they need.

    All actions and transfers are sorted into one global order. An action is placed at its simulated
    start, and a transfer at the end of the action whose result it sends. A program consists of the
    events of one rank in this order. Transfers with no action between them form one batch.

    This cannot deadlock, even if every transfer blocks until both ranks have posted it: the first
    unfinished event in the order is next on every rank that takes part in it, so it can always
    proceed. This also holds under NCCL, where one handle waits for a whole batch. The transfers of
    a batch are posted together, and all of them precede the rank's next action in the order. So an
    action only waits for earlier events."""
    rank_of = {stage: rank for rank, row in enumerate(stages_of(schedule)) for stage in row}
    events = []  # (key, ranks, event). Ties: transfers first, then by n, identically on all ranks.
    for n, (rank, action, start, end) in enumerate(simulate(schedule)):
        events.append(((start, 1, n), (rank,), action))
        dst = None if action.kind == "W" else rank_of.get(consumer(action).stage)
        if dst not in (None, rank):  # None: W, F of the last stage or B of the first
            events.append(((end, 0, n), (rank, dst), Transfer(action, rank, dst)))
    programs: list[Program] = [[] for _ in schedule]
    for _, ranks, event in sorted(events):
        for rank in ranks:
            program = programs[rank]
            if isinstance(event, Action):
                program.append(event)
            elif program and not isinstance(program[-1], Action):
                program[-1] += (event,)  # no action in between: same batch
            else:
                program.append((event,))
    return programs


def receive_ahead(program: Program, rank: int) -> Program:
    """The program of `rank` with each receive posted one batch earlier: [<F0] F0 [<F1 >F0] F1 [>F1]
    becomes [<F0] [<F1] F0 [>F0] F1 [>F1]. This is faster under gloo: if the receive is already
    posted, a send writes its data at once. Otherwise it waits for the receive, and then for the
    gloo thread of the sender to run. In each direction, the order of transfers between two ranks
    does not change, so receives still match their sends. Under gloo, a posted receive blocks no
    other transfer, so there is no deadlock.

    Do not use this with NCCL, which runs all transfers of a group in one queue: if two ranks both
    posted receives early, each receive could block the send that the other rank waits for."""
    result: Program = [()]  # a batch for the receives of the program's first batch
    previous = 0  # position of the latest batch in result
    for step in program:
        if isinstance(step, Action):
            result.append(step)
        else:
            result[previous] += tuple(t for t in step if t.dst == rank)
            previous = len(result)
            result.append(tuple(t for t in step if t.src == rank))
    return [step for step in result if step]


# 2. Stages of a model: a model that is a chain of blocks is split without changes to its code.


def split_layers(n_layer: int, n_stages: int, first: float = 0, last: float = 0) -> list[range]:
    """Assigns at least one block to each stage so that the most expensive stage costs as little as
    possible. first, last: costs of the embedding and of the head, if a block costs 1. Raises
    ValueError if there are more stages than blocks."""
    if n_stages > n_layer:
        raise ValueError(
            f"{n_stages} stages for {n_layer} blocks: lower --pp or --virtual-stages, or raise "
            "--n-layer"
        )
    cost, blocks = [1.0] * n_stages, [1] * n_stages
    cost[0] += first
    cost[-1] += last
    for _ in range(n_layer - n_stages):
        cheapest = cost.index(min(cost))
        cost[cheapest] += 1
        blocks[cheapest] += 1
    ends = [0, *itertools.accumulate(blocks)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


FIRST, LAST = ("wte", "wpe", "drop"), ("ln_f", "lm_head")  # in gpt.py: before and after the blocks


def take_stages(model: nn.Module, stages: Sequence[int], split: list[range]) -> nn.Module:
    """Removes all layers that are not in `stages` from `model`, in place, and returns it.

    split: the numbers of the blocks of every stage. Children must be named as in gpt.py: the first
    stage has those of FIRST, the last stage those of LAST, and model.h holds the blocks under their
    numbers. Children of other stages are replaced by nn.Identity and blocks of other stages are
    removed, so that the model's own forward runs the remaining layers.

    The model's forward must be a chain: each child is applied to the output of the previous one. In
    gpt.py, even wpe takes the output of wte. Any other computation is repeated on every stage. If
    the forward enumerates the blocks, the count restarts at 0 on every stage. Raises ValueError for
    parameters outside these children, and for blocks that are missing or in no stage."""
    for name, _ in model.named_parameters():
        if name.split(".")[0] not in (*FIRST, "h", *LAST):
            raise ValueError(f"{name} would be on every stage: add its layer to FIRST or to LAST")
    blocks, numbers = model.h._modules, {str(i) for stage in split for i in stage}
    kept = {str(i) for k in stages for i in split[k]}
    # Blocks outside `kept` may be gone: chunks_of passes a model with only this rank's stages.
    if not kept <= blocks.keys() <= numbers:
        raise ValueError(f"h has blocks {', '.join(blocks)}, but split is {split}: call "
                         "split_layers with the number of blocks")  # fmt: skip
    for name in (() if 0 in stages else FIRST) + (() if len(split) - 1 in stages else LAST):
        setattr(model, name, nn.Identity())
    model.h = copy.copy(model.h)  # a copy, because other chunks need the other blocks
    model.h._modules = {number: block for number, block in blocks.items() if number in kept}
    return model


def chunks_of(model: nn.Module, stages: Sequence[int], split: list[range]) -> dict[int, nn.Module]:
    """{stage: module that runs it}, from a model that has all stages of a rank. The modules share
    layers, parameters and hooks with `model`, so model.eval() applies to the layers of all of them.
    Their own `training` flag is a copy: the model's forward must not read it."""
    chunks = {}
    for k in stages:
        chunks[k] = copy.copy(model)
        chunks[k]._modules = dict(model._modules)  # take_stages changes it
        take_stages(chunks[k], [k], split)
    return chunks


def all_reduce_tied(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums each tensor of `gradients` over the ranks of `group`, in place: the gradient of a tied
    embedding, or with ZeRO this rank's pieces of it. The first stage uses the matrix as the
    embedding and the last stage uses it as the head, so each computes one term of its gradient.
    The two copies must start equal and get equal updates, and a global gradient norm must count
    only one of them. group: the ranks of these two stages. If one rank holds both, this is a no-op,
    because autograd has added the terms. train_3d.py calls it after data-parallel reduction."""
    if group.size() > 1:
        for gradient in gradients:
            dist.all_reduce(gradient, group=group)  # payload: the matrix, vocabulary x h


# 3. Split backward: for linear layers, B computes the input gradients and appends the work for the
# weight gradients to a queue. W does this work later, when the rank would otherwise be idle. B
# computes all gradients of embeddings, norms and biases, because they are cheap.


class DeferredLinear(torch.autograd.Function):
    """F.linear whose backward does not compute the gradient of layer.weight. Instead, it appends to
    layer.weight_grad_queue a function that computes this gradient.

    The weight is not an input of this Function. Otherwise autograd would call the weight's hooks in
    B, before its gradient exists. layer: see defer_weight_gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, layer: nn.Module) -> Tensor:
        ctx.layer, full_x = layer, call_if_defined(layer, "gather_input", x)
        # Tensor parallelism: x may be this rank's shard of the sequence. If so, W gathers it again.
        ctx.save_for_backward(full_x if keeps_gathered(layer) else x)
        return F.linear(full_x, layer.weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), layer = ctx.saved_tensors, ctx.layer
        # Detached, because the queue must not keep the graph that computed x. Under autocast, the
        # gradient has lower precision than x and the weight, so both are cast to its dtype.
        work = functools.partial(add_weight_gradient, layer, x.detach().to(grad.dtype), grad)
        layer.weight_grad_queue.append(work)
        d_x = grad @ layer.weight.to(grad.dtype)
        d_x = call_if_defined(layer, "reduce_input_gradient", d_x)
        d_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return d_x, d_bias, None


def call_if_defined(layer: nn.Module, method: str, x: Tensor) -> Tensor:
    return getattr(layer, method)(x) if hasattr(layer, method) else x


def keeps_gathered(layer: nn.Module) -> bool:
    return getattr(layer, "keep_gathered", False)


def add_weight_gradient(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """The work of W. x: the saved input. grad: the gradient of the output. backward() is called on
    the weight, because assigning to .grad would not call the hooks of DDP and ZeRO."""
    if not keeps_gathered(layer):
        x = call_if_defined(layer, "gather_input", x)
    layer.weight.backward(grad.flatten(0, -2).T @ x.flatten(0, -2))


def deferred_multiply(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    if not x.requires_grad:  # previous layers are frozen, or gradients are disabled
        x = x.detach().requires_grad_()  # otherwise autograd would not call backward()
    return DeferredLinear.apply(x, bias, layer)


def deferred_forward(linear: nn.Linear, x: Tensor) -> Tensor:
    return deferred_multiply(linear, x, linear.bias)


def defer_weight_gradients(model: nn.Module, queue: list) -> None:
    """Makes the backward of each linear layer append to `queue` a function that computes the weight
    gradient. Two kinds of layers do not change: those with a frozen weight, and subclasses of
    nn.Linear without the method `multiply`.

    This replaces the forward of each plain nn.Linear, even if it was already replaced on the
    instance. In layers that define multiply(x, bias), such as those of tensor_parallel.py, it
    replaces that method. multiply() returns gather_input(x) @ weight.T + bias, where gather_input()
    returns x if the layer does not define it. If layer.keep_gathered is true, its result is saved,
    otherwise x is saved and W calls it again. A layer that defines it may also define
    reduce_input_gradient(d_x), which returns the gradient of x from that of gather_input(x)."""
    for layer in model.modules():
        is_linear = type(layer) is nn.Linear
        if (is_linear or hasattr(layer, "multiply")) and layer.weight.requires_grad:
            layer.weight_grad_queue = queue
            if is_linear:
                layer.forward = functools.partial(deferred_forward, layer)
            else:
                layer.multiply = functools.partial(deferred_multiply, layer)


# 4. The executor: it runs the programs of every schedule. On two CPU ranks (gloo), interleaved and
# zb-v take a few percent less time per step than 1f1b. A split backward gains less than its smaller
# bubble suggests, because W reads inputs and gradients that are no longer in the CPU cache.


class Pipeline:
    """Runs the programs of this rank.

    chunks: {stage: module} for the stages of this rank. n_stages: the total number of stages of all
    ranks. dtype, device: those of all tensors sent between stages. program: the training program of
    this rank. If it has W actions, the linear layers defer their weight gradients.

    The attribute `watch` can be set to a function watch(action) that returns a context manager. The
    action's computation then runs under it, for example to trace it."""

    def __init__(
        self, chunks: dict[int, nn.Module], n_stages: int, group: dist.ProcessGroup,
        dtype: torch.dtype, device: torch.device | str, program: Program,
    ):  # fmt: skip
        self.chunks, self.last, self.group = chunks, n_stages - 1, group
        self.dtype, self.device = dtype, device
        self.m = 1 + max(action.microbatch for action in actions_of(program))
        self.is_gloo = group.size() > 1 and dist.get_backend(group) == "gloo"  # see receive_ahead
        self.watch: Callable = lambda action: contextlib.nullcontext()
        self.running = False  # stays True if run() raises after its checks
        self.queue: list[Callable] = []  # weight gradients deferred by the current B
        if splits_backward(actions_of(program)):
            for chunk in chunks.values():
                defer_weight_gradients(chunk, self.queue)
        if group.size() > 1:
            self._connect(program)

    def _connect(self, program: Program) -> None:
        """Exchanges one element with each peer of `program`. NCCL connects two ranks at their first
        transfer, and can hang if that is in the middle of a schedule (pytorch#160210). All ranks
        sort their pairs in the same way, so this cannot deadlock. The all-reduce comes first,
        because NCCL requires that all ranks of a group take part in its first operation."""
        zero, rank = torch.zeros(1, device=self.device), self.group.rank()
        dist.all_reduce(zero, group=self.group)  # payload: 1 element, once per Pipeline
        transfers = [t for step in program if not isinstance(step, Action) for t in step]
        for pair in sorted({(min(t.src, t.dst), max(t.src, t.dst)) for t in transfers}):
            peer = dict(group=self.group, group_peer=sum(pair) - rank)  # the other of the two
            send = dist.P2POp(dist.isend, zero, **peer)
            receive = dist.P2POp(dist.irecv, torch.empty_like(zero), **peer)
            for handle in dist.batch_isend_irecv([send, receive]):  # payload: 1 element each
                handle.wait()

    def accumulations(self) -> dict[nn.Parameter, int]:
        """How often the gradient of each trainable parameter is accumulated per training step: once
        per microbatch, in B, or in W if its layer defers it. A tied matrix can be accumulated in B
        and in W, and in two stages. train_3d.py passes this to DDP or ZeRO, which count gradients
        to know when one is complete."""
        uses: dict[nn.Parameter, set] = {}
        for stage, chunk in self.chunks.items():
            for module in chunk.modules():
                for name, p in module.named_parameters(recurse=False):
                    if p.requires_grad:
                        in_w = name == "weight" and "weight_grad_queue" in vars(module)
                        uses.setdefault(p, set()).add((stage, in_w))
        return {p: self.m * len(places) for p, places in uses.items()}

    def run(
        self, program: Program, inputs: Sequence[Tensor], loss_of: Callable,
        shape: tuple[int, ...], before: Callable[[int], None] = lambda microbatch: None,
    ) -> Tensor:  # fmt: skip
        """Runs one step. Gradients are added to `.grad`. Returns the sum of the losses on the rank
        of the last stage, and 0 on the others.

        program: the training program, or one without B, which runs without gradients. inputs: one
        tensor per microbatch, used by the first stage. loss_of(output, microbatch) -> scalar, used
        by the last stage. shape: (b, s, h), the same for all tensors sent between stages.
        before(microbatch) is called before each forward, for example to set the rows for dropout.

        Raises ValueError if the program does not match the chunks or the inputs, if a tensor for
        another stage does not have `shape` and the dtype of the Pipeline, or if the output of a
        stage does not depend on its input. Only ranks that detect the mistake raise; others time
        out. All ranks must pass programs of the same schedule. With several ranks, raises
        RuntimeError if an earlier run() failed after its checks."""
        if self.running and self.group.size() > 1:
            raise RuntimeError(
                "an earlier run was interrupted, and some of its transfers may be incomplete: "
                "restart all ranks and resume from the newest checkpoint"
            )
        actions = actions_of(program)
        stages, m = {action.stage for action in actions}, 1 + max(a.microbatch for a in actions)
        if stages != {*self.chunks} or (0 in stages and len(inputs) != m):
            raise ValueError(
                f"the program has stages {sorted(stages)} and {m} microbatches, but the chunks are "
                f"stages {sorted(self.chunks)}, and there are {len(inputs)} inputs"
            )
        self.running = True
        self.queue.clear()  # an interrupted run may have left functions in it
        self.inputs, self.loss_of, self.shape, self.before = inputs, loss_of, tuple(shape), before
        dtype = torch.promote_types(self.dtype, torch.float32)  # one loss dtype on all ranks
        self.loss = torch.zeros((), dtype=dtype, device=self.device)
        self.inbox: dict = {}  # action that needs a tensor -> (tensor, handle or None)
        self.outbox: dict = {}  # action that computed a tensor -> tensor to send
        self.sending: dict = {}  # (kind, stage) -> (tensor, handle) of the latest send
        self.in_flight: dict = {}  # (microbatch, stage), between F and B -> (input, root)
        self.pending: dict = {}  # (microbatch, stage), between B and W -> deferred functions
        execute = {"F": self._forward, "B": self._backward, "W": self._weights}
        if self.is_gloo:
            program = receive_ahead(program, self.group.rank())
        with torch.set_grad_enabled(any(action.kind == "B" for action in actions)):
            for step in program:
                if isinstance(step, Action):
                    execute[step.kind](step)
                else:
                    self._post(step)
        for _, handle in self.sending.values():
            handle.wait()
        left = (self.inbox, self.outbox, self.in_flight, self.pending)
        assert not any(left), "the program ended with unused tensors or unfinished microbatches"
        self.running = False
        return self.loss

    def _post(self, batch: tuple[Transfer, ...]) -> None:
        """Starts these transfers. Before a send, waits for the stage's previous send of the same
        kind (output or gradient), to free its tensor. That send is earlier in the global order, so
        the wait cannot deadlock. Under NCCL all transfers of a batch share one handle, so waiting
        for one waits for all. wait() blocks the current CUDA stream, not the host. In a simulation
        (tools/verify/waits.py), waiting for complete batches adds little to the bubble."""
        operations, slots = [], []
        for action, src, dst in batch:
            if src == self.group.rank():
                operation, peer, tensor = dist.isend, dst, self.outbox.pop(action)
                box, key = self.sending, (action.kind, action.stage)
                if key in self.sending:
                    _, handle = self.sending.pop(key)
                    handle.wait()
            else:
                tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
                operation, peer, box, key = dist.irecv, src, self.inbox, consumer(action)
            slots.append((box, key, tensor))
            operations.append(dist.P2POp(operation, tensor, group=self.group, group_peer=peer))
        handles = dist.batch_isend_irecv(operations)  # payload: b s h per transfer
        if len(handles) < len(operations):  # NCCL returns one handle for the batch
            handles = handles[:1] * len(operations)
        for (box, key, tensor), handle in zip(slots, handles, strict=True):
            box[key] = (tensor, handle)

    def _take(self, action: Action) -> Tensor:
        """The tensor from another stage that this F or B needs. Waits until it is received."""
        tensor, handle = self.inbox.pop(action)
        if handle is not None:
            handle.wait()
        return tensor

    def _deliver(self, action: Action, tensor: Tensor) -> None:
        """Stores the result of this F or B for its consumer: in `inbox` if the consumer is on this
        rank, else in `outbox`, from which the next _post sends it."""
        found = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)
        if found != (self.shape, self.dtype):  # (None, None): a tuple, or x.grad is None
            raise ValueError(
                f"the result of {action.kind}{action.microbatch} of stage {action.stage} has shape "
                f"{found[0]}, dtype {found[1]}: it must be one tensor of the shape given to run(), "
                f"{self.shape}, and the Pipeline's dtype, {self.dtype}"
            )
        if consumer(action).stage in self.chunks:
            self.inbox[consumer(action)] = (tensor.detach(), None)
        else:
            self.outbox[action] = tensor.detach().contiguous()

    def _forward(self, action: Action) -> None:
        _, microbatch, stage = action
        x = self.inputs[microbatch] if stage == 0 else self._take(action)
        with self.watch(action):
            if stage > 0 and torch.is_grad_enabled():
                x.requires_grad_()
            self.before(microbatch)
            y = self.chunks[stage](x)
            if stage == self.last:
                y = self.loss_of(y, microbatch)
                self.loss += y.detach()
        if stage < self.last:
            self._deliver(action, y)
        if torch.is_grad_enabled():
            root = y  # what B starts from: the loss, or the gradient edge of the output
            if stage < self.last:
                # An edge keeps the graph, but not the values of y, unless the graph has saved them.
                # A first stage without trainable parameters has no graph.
                root = torch.autograd.graph.get_gradient_edge(y) if y.requires_grad else None
            self.in_flight[microbatch, stage] = x, root

    def _backward(self, action: Action) -> None:
        _, microbatch, stage = action
        x, root = self.in_flight.pop((microbatch, stage))
        gradient = self._take(action) if stage < self.last else None
        with self.watch(action):
            if root is not None:
                torch.autograd.backward(root, gradient)
        if self.queue:
            self.pending[microbatch, stage] = self.queue[:]
            self.queue.clear()  # in place, because the layers append to this list
        if stage > 0:
            self._deliver(action, x.grad)

    def _weights(self, action: Action) -> None:
        with self.watch(action):
            functions = self.pending.pop((action.microbatch, action.stage), [])
            while functions:
                functions.pop(0)()  # pop, so that its tensors are freed after the call


# --- cost -----------------------------------------------------------------------------------------


def predicted_sends(
    stages: list[list[int]], rank: int, m: int, b: int, s: int, h: int
) -> tuple[int, int]:
    """The sends of a rank per step: (calls, payload in elements). For each microbatch, a stage
    sends its output to the next stage and a gradient to the previous stage, unless that stage is on
    the same rank. stages: [rank][chunk] -> stage."""
    last = max(map(max, stages))
    neighbours = [stage + offset for stage in stages[rank] for offset in (1, -1)]
    calls = m * sum(0 <= k <= last and k not in stages[rank] for k in neighbours)
    return calls, calls * b * s * h


# --- demo -----------------------------------------------------------------------------------------


def train(model: nn.Module, step: Callable[[], Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Two steps of SGD. step() returns the loss. If that requires no gradient, step() has also run
    the backward. Returns the losses and a dict with the parameters ("name") and last gradients
    ("name.grad")."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = step()
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    parameters = dict(model.named_parameters())
    return losses, parameters | {f"{name}.grad": p.grad for name, p in parameters.items()}


def main() -> None:
    import data
    import gpt
    import measure

    with measure.Report("pipeline.py") as report:
        group, p, rank = report.group, report.group.size(), report.group.rank()
        m = n_layer = 2 * p + 1  # p does not divide it, so stages have different sizes
        config = gpt.GPTConfig(n_layer, n_head=2, n_embd=32, vocab_size=251, seq_len=32, tied=False)
        boundary = torch.empty(2, config.seq_len, config.n_embd, dtype=torch.float64)
        x, y = data.batch(data.example(), 0, range(2 * m), config.seq_len, seed=0)
        inputs, targets = x.chunk(m), y.chunk(m)

        def loss_of(logits: Tensor, microbatch: int) -> Tensor:
            return gpt.cross_entropy(logits, targets[microbatch]) / y.numel()

        full = gpt.build(config, dtype=torch.float64)
        one_process = train(full, lambda: gpt.cross_entropy(full(x), y) / y.numel())
        for name in ("version 1", *SCHEDULES):
            schedule = SCHEDULES["1f1b" if name == "version 1" else name](p, m)
            stages, program = stages_of(schedule), derive_programs(schedule)[rank]
            split = split_layers(n_layer, sum(map(len, stages)))
            model = take_stages(gpt.build(config, dtype=torch.float64), stages[rank], split)
            if name == "version 1":
                step = functools.partial(train_step, model, inputs, loss_of, boundary, group)
            else:
                chunks = chunks_of(model, stages[rank], split)
                pipe = Pipeline(chunks, len(split), group, torch.float64, "cpu", program)
                step = functools.partial(pipe.run, program, inputs, loss_of, boundary.shape)
            with measure.Collectives({"pp": group}) as seen:
                losses, found = train(model, step)
            for loss in losses:
                dist.all_reduce(loss)  # payload: 1 element. The loss is 0 on all ranks but one.
            report.losses(name, losses, one_process[0])
            report.close(f"{name} largest error", found, {n: one_process[1][n] for n in found})
            sent = tuple(n // 2 for n in seen.total("pp", "send"))  # `seen` counts two steps
            predicted = predicted_sends(stages, rank, m, *boundary.shape)
            report.equal(f"{name} sends, elements", predicted, sent)


if __name__ == "__main__":
    main()
