"""Data parallelism: replicas of one model train on different rows, and gradients are summed.

    rank 0   rows 0-3 -> forward, backward -> [a0|b0] -+                +-> [a0+a1|b0+b1] -> update
                                                       +-- all-reduce --+
    rank 1   rows 4-7 -> forward, backward -> [a1|b1] -+                +-> [a0+a1|b0+b1] -> update

Each of d ranks holds a replica of the model and computes gradients for its rows of the global
batch. An all-reduce sums the gradients, so all ranks apply the same update and replicas stay equal.
Replicas must be equal at the start. DDP checks this at construction, versions 1 and 2 do not. Each
rank divides its loss by the number of targets in the global batch, so gradients are summed and not
averaged. With gradient accumulation, they are all-reduced once per step. Ranks may have different
numbers of rows and microbatches.

A ring all-reduce is a reduce-scatter followed by an all-gather. In each half, every rank sends
(d-1)/d of the gradient. After the first half, each rank holds 1/d of the summed gradient. ZeRO-1
(zero.py) runs the optimizer at that point and then gathers parameters instead of gradients.

    per rank and step       payload                 calls            overlaps with backward
    1 all_reduce_gradients  Psi                     1 per parameter  no
    2 all_reduce_flat       Psi                     1                no
    DDP                     Psi                     1 per bucket     all but the last bucket,
                                                                     from step 2 on
    DDP with Hierarchical   2 Psi inside a host,    3 per bucket     all but the last phases of
                            k Psi / d between hosts                  3 buckets, from step 2 on

The payload is the number of elements that a collective reduces or gathers. Psi is the number of
trainable parameters, and k the number of hosts.

Data parallelism does not reduce the memory per rank for parameters, gradients or optimizer state.
In fp32 with AdamW, each rank stores 16 Psi bytes: parameters (4), gradients (4), moments (8). With
bf16 parameters, DDP stores 18 Psi bytes: parameters (2), gradients (4), fp32 copies of the
parameters (4), moments (8). With several ranks, the bf16 copies of the gradients that are sent take
2 Psi bytes more, until finish() has received all sums. zero.py shards this state.

    torchrun --standalone --nproc-per-node 4 ddp.py

Li et al. 2020, PyTorch Distributed (arXiv 2006.15704), section 3.2, on buckets and overlap.
Goyal et al. 2017 (arXiv 1706.02677), section 3 on sums and averages, section 4 on hosts.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# --- version 1: the whole idea --------------------------------------------------------------------


def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum the gradients over the ranks of `group`. Call it after the last backward of a step:

        optimizer.zero_grad()
        tokens = global_count(y, group)  # x, y: this rank's rows of the global batch
        for xs, ys in zip(x.chunk(m), y.chunk(m)):  # m microbatches
            loss = cross_entropy(model(xs), ys, ignore_index=-1, reduction="sum") / tokens
            loss.backward()  # adds to p.grad
        all_reduce_gradients(model.parameters(), group)
        clip_grad_norm_(model.parameters(), 1.0)  # optional
        optimizer.step()

    All ranks must pass the same parameters in the same order. Frozen parameters are skipped.
    Gradients are accumulated and sent in the dtype of the parameters. If no rank used a parameter,
    its `.grad` stays None, as in single-process training, so the optimizer skips it. A gradient of
    0 would make AdamW apply weight decay."""
    for p in parameters:
        if not p.requires_grad:
            continue
        used = p.grad is not None  # on this rank
        if not used:
            p.grad = torch.full_like(p, -0.0)  # see is_unused
        dist.all_reduce(p.grad, group=group)  # payload: p.numel()
        if not used and is_unused(p.grad):
            p.grad = None


# Limitation: if some ranks used the parameter, but every element of the sum is -0.0, the ranks that
# did not use it skip the update, the others apply it, and the replicas diverge. This also applies
# to the replicas of hybrid sharding in zero.py.
def is_unused(gradient: Tensor) -> bool:
    """Whether no rank used the parameter, given its reduced gradient.

    A rank that did not use the parameter contributes -0.0. A floating-point sum is -0.0 only if
    every term is -0.0."""
    return bool((gradient == 0).all() and gradient.signbit().all())


def global_count(targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the number of valid targets (not -1) in the global batch. `targets` are those of this
    rank's rows. The result is at least 1, so that a batch without valid targets has a loss of 0
    instead of 0/0."""
    count = (targets >= 0).sum()
    if group.size() > 1:
        dist.all_reduce(count, group=group)  # payload: 1
    return count.clamp(min=1)


# --- version 2: one collective --------------------------------------------------------------------
# Version 1 pays the latency of a collective once per parameter, version 2 once per step. On a CPU,
# version 2 shortens the step of a small model by 10 to 20%. At hidden sizes of 768 and above, it
# makes no difference. Version 2 copies the gradients into a buffer of Psi elements.


def all_reduce_flat(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """A drop-in replacement for all_reduce_gradients. The results are equal up to rounding. All
    parameters must have the same dtype."""
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.full_like(p, -0.0) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)  # payload: Psi
    for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        unused = p.grad is None and is_unused(total)
        p.grad = None if unused else total.view_as(p)


# --- the full version: buckets --------------------------------------------------------------------
# Versions 1 and 2 communicate after backward, while no rank computes. DDP accumulates gradients in
# flat buckets and starts the all-reduce of a bucket when all of its gradients are complete, so that
# communication overlaps with the rest of backward. Gradients are assigned to buckets in the order
# in which backward completes them. DDP records this order in the first step. That step already
# reduces in the recorded layout, see _learn(), so it has no overlap.


def gradient_group(p: nn.Parameter, default: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group over which the gradient of p is summed. A model may give a parameter a smaller
    group than `default`, for example the ranks that hold the same expert. See Distribution in
    tensor_parallel.py."""
    distribution = getattr(p, "distribution", None)
    return (distribution and distribution.replicas) or default


class Piece(NamedTuple):
    """The tensor that the optimizer updates for a parameter. In ddp.py it is the parameter or its
    fp32 copy. In zero.py it is a range of the flattened parameter."""

    name: str
    tensor: Tensor
    parameter: nn.Parameter
    start: int  # offset of `tensor` in the flattened parameter


def all_reduce_bucket(flat: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """The default `reduce` of DDP."""
    return dist.all_reduce(flat, group=group, async_op=True)  # payload: the bucket


class DDP:
    """All-reduces gradients in buckets, overlapped with backward. The model is not wrapped: DDP
    attaches hooks to its parameters.

        sync = DDP(model, accumulations=m)
        optimizer = AdamW([piece.tensor for piece in sync.pieces()])
        sync.start()                      # instead of optimizer.zero_grad()
        for x, y in microbatches:         # m of them
            loss = F.cross_entropy(model(x), y, ignore_index=-1, reduction="sum")
            (loss / tokens).backward()
        sync.finish()                     # gradients are sums over the ranks
        sync.step(optimizer, clip=1.0)    # instead of clip_grad_norm_() and optimizer.step()

    Above, tokens is the number of valid targets in the global batch, from global_count().

    model: must have the same parameters on all ranks of `group`. A parameter must have the same
        values on all ranks of its gradient_group(), which is `group` by default. Buffers are
        neither checked nor synchronized. Frozen parameters are skipped.
    group: the ranks to sum over. Default: all ranks.
    accumulations: the number of gradients that a parameter receives per step, which is the number
        of microbatches m. Pass a dict {parameter: count} if it differs between parameters. A
        parameter that receives fewer is reduced in finish(), without an error.
    bucket_bytes: a bucket is closed when it holds at least this many bytes of parameters. The
        first is closed at 1/25 of that (1 MiB by default), so that communication starts early.
    reduce: a function (flat, group) that starts summing the 1-D tensor `flat` over the ranks of
        `group`, in place, and returns a handle with wait(). Replace it to compress gradients. Where
        all ranks pass -0.0, the result must be -0.0, see is_unused().
    grad_dtype: the dtype in which gradients of bf16 parameters are accumulated over microbatches.
        Default: fp32. No effect on fp32 parameters.
    reduce_dtype: the dtype in which gradients of bf16 parameters are sent. Default: bf16; fp32
        sends twice the bytes. No effect on fp32 parameters, or with one rank.
    overlap: False reduces all gradients in finish(). Set it to False in a pipeline if the replicas
        of a stage may use different parameters in one step. With overlap they would start
        all-reduces at different points relative to their sends and receives, which can deadlock.

    A parameter may have a smaller gradient_group(). That group must be a subset of `group`, and all
    ranks of `group` must have their parameters in the same order and with the same sizes.

    A parameter that no rank uses in a step has `.grad` None after finish(). If, on some rank, a
    parameter is unused or receives fewer gradients than `accumulations`, that rank launches the
    parameter's bucket and all later ones only in finish(), and the other ranks wait for it.

    From the first backward of a step until finish() returns, issue no other collective on `group`,
    on a smaller gradient_group(), or on the groups of a `reduce` such as Hierarchical.
    Manual writes to a bf16 parameter are lost at the next step, since the optimizer updates an fp32
    copy. load_state_dict() updates both.

    Construction raises ValueError if ranks have different parameters or values, or if a count in
    `accumulations` is missing or below 1. Later, ValueError is raised if requires_grad has changed,
    if calls are out of order, if a parameter receives too many gradients, or if the optimizer holds
    a bf16 parameter instead of its fp32 copy. If only one rank raises an error, the others wait in
    their next collective until it times out."""

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None,
        accumulations: int | dict[nn.Parameter, int] = 1,
        bucket_bytes: int = 25 * 2**20, reduce: Callable = all_reduce_bucket,
        grad_dtype: torch.dtype | None = None, reduce_dtype: torch.dtype | None = None,
        overlap: bool = True,
    ):  # fmt: skip
        group = dist.group.WORLD if group is None else group
        if group is None:  # WORLD is None before init_process_group()
            raise ValueError("there is no process group: call dist.init_process_group() first")
        self.group, self.reduce, self.bucket_bytes = group, reduce, bucket_bytes
        self.grad_dtype = grad_dtype or torch.float32
        self.reduce_dtype = reduce_dtype
        self.overlap = overlap and group.size() > 1
        # Two pipeline stages may hold copies of a tied matrix. Checkpoints need one name for both.
        self.named = [(getattr(p, "tied_name", name), p) for name, p in model.named_parameters()]
        self.parameters = [(name, p) for name, p in self.named if p.requires_grad]
        self.modules = {*model.modules()}
        if isinstance(accumulations, int):
            accumulations = dict.fromkeys(model.parameters(), accumulations)
        check_accumulations(model, accumulations)
        self.accumulations = [accumulations[p] for _, p in self.parameters]
        check_same_parameters(self.named, group)
        # fp32 master weights: bf16 rounding would lose small updates.
        narrow = [p for _, p in self.parameters if p.dtype.itemsize < 4]
        self.masters = {p: p.detach().float().requires_grad_() for p in narrow}
        # Maps each trainable parameter, and the tensor that the optimizer must hold for it, to its
        # Piece. For a bf16 parameter the second is its fp32 copy. Otherwise both are the same.
        self.piece_of = {piece.parameter: piece for piece in self.pieces()}
        self.piece_of |= {piece.tensor: piece for piece in self.pieces()}  # adds the fp32 copies
        # A weak reference, so that the hooks do not keep this object and its group alive.
        me = weakref.ref(self)
        for i, (_, p) in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(lambda p, i=i: me() and me()._accumulated(i, p))
        for module in self.modules:
            module.register_load_state_dict_post_hook(lambda m, _: me() and me()._loaded(m))
        check = register_optimizer_step_pre_hook(lambda o, *_: me() and me()._check(o))
        weakref.finalize(self, check.remove)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)  # views of buckets
        self.bucket_of = [0] * len(self.parameters)
        # Backward usually starts with the last parameters. The first step shows the actual order.
        self._lay_out(reversed(range(len(self.parameters))))
        self.learned = False
        self.launched: list[tuple[Tensor, dist.Work | None]] = []  # by bucket
        self.phase = "idle"  # then "backward", "finished", "update", "idle"
        self.start()  # so that the call may be omitted before the first step

    def start(self) -> None:
        """Call before the first backward of a step. Until finish(), every `.grad` is None.

        start() can also abandon a step: it waits for the pending all-reduces and discards the
        gradients. All ranks must have launched the same buckets, for example because all stopped
        after the same microbatch and had used the same parameters."""
        if self.phase == "update":
            raise ValueError("start() before after_step(): call after_step() after "
                             "optimizer.step(), to update the model")  # fmt: skip
        for name, p in self.named:
            if p.requires_grad != (p in self.piece_of):
                change = "unfrozen" if p.requires_grad else "frozen"
                raise ValueError(f"{name} was {change} after DDP was constructed: construct a new "
                                 "DDP after each change of requires_grad")  # fmt: skip
        for _, handle in self.launched:  # of an interrupted step
            if handle is not None:
                handle.wait()
        for t in self.piece_of:  # the parameters and their fp32 copies
            t.grad = None
        self.launched = []
        self.missing = self.accumulations.copy()  # gradients still expected, per parameter
        self.waiting = [len(members) for members in self.members]  # incomplete gradients per bucket
        self.ready: list[int] = []  # parameters whose gradient is complete, in completion order
        self.phase = "backward"

    def _accumulated(self, i: int, p: nn.Parameter) -> None:
        """Autograd calls this after it has stored a gradient of parameter i in p.grad. Move the
        gradient to its bucket, then launch the buckets that are complete and next in order.

        During backward, p.grad is not a view of the bucket, because the bucket may have another
        dtype than the parameter, and torch.compile cannot compile a layer whose parameter has a
        `.grad` of another dtype."""
        if p.grad is None:  # a custom backward returned None
            return
        if self.phase != "backward":
            raise ValueError("backward() ran before start() or after finish(): call start() before "
                             "the first backward. If it computes gradients for another model only, "
                             "call backward(inputs=[*other.parameters()])")  # fmt: skip
        count = self.accumulations[i]
        if self.missing[i] == 0:
            raise ValueError(f"{self.parameters[i][0]} received {count + 1} gradients in one step, "
                             f"but accumulations is {count}: pass accumulations=m for m "
                             "microbatches")  # fmt: skip
        accumulate(p.grad, self.gradients[i], first=self.missing[i] == count)
        p.grad = None
        self.missing[i] -= 1
        if self.missing[i] > 0:
            return
        self.ready.append(i)
        self.waiting[self.bucket_of[i]] -= 1
        # Ranks may complete buckets in different orders, but collectives are matched by call order.
        # So buckets are launched in order, and a complete bucket waits for all earlier ones.
        while (self.overlap and self.learned and len(self.launched) < len(self.buckets)
               and self.waiting[len(self.launched)] == 0):  # fmt: skip
            self._launch()

    def _launch(self) -> None:
        """Start the all-reduce of the next bucket."""
        i = len(self.launched)
        flat, dtype, group = self.buckets[i], self.sent_dtypes[i], self.groups[i]
        if group.size() == 1:
            self.launched.append((flat, None))
            return
        sent = flat.to(dtype)  # the bucket itself if the dtype is the same
        self.launched.append((sent, self.reduce(sent, group)))

    def finish(self) -> None:
        """Call after the last backward of a step. On return, every `.grad` is the sum over the
        group, or None if no rank used the parameter. Buckets that were not reduced during backward
        are reduced here."""
        if self.phase != "backward":
            raise ValueError("finish() without start(): call start() before the first backward of "
                             "a step, and finish() once after the last")  # fmt: skip
        unused_here = {i for i, n in enumerate(self.missing) if n == self.accumulations[i]}
        for i in unused_here:  # before _learn(), which copies the gradients to new buckets
            self.gradients[i].fill_(-0.0)  # see is_unused
        if self.overlap and not self.learned:
            self._learn()
        while len(self.launched) < len(self.buckets):
            self._launch()
        for i, (sent, handle) in enumerate(self.launched):
            if handle is not None:  # None: one rank
                handle.wait()
                self.buckets[i].copy_(sent)  # no-op if `sent` is the bucket
        self.launched = []
        for i, (_, p) in enumerate(self.parameters):
            unused_by_all = i in unused_here and is_unused(self.gradients[i])
            p.grad = None if unused_by_all else self.gradients[i]
        self.phase = "finished"

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor | None:
        """Call after finish(). Runs before_step(), scales the gradients so that their norm is at
        most `clip`, then runs optimizer.step() and after_step(). Returns the norm before clipping;
        None without clip.

        Raises ValueError if clip is given and a parameter is split over tensor-parallel ranks,
        has a partial gradient, or has a smaller gradient_group().
        In that case call before_step(), clip by the gradient norm of the full model, then call
        optimizer.step() and after_step(), as train_3d.py does. Do the same with pipeline stages:
        step() raises no error there, but its norm would cover only the stages of this rank."""
        if clip is not None:
            check_norm_is_local(self.parameters)
        self.before_step()
        norm = None
        if clip is not None:
            norm = nn.utils.clip_grad_norm_([piece.tensor for piece in self.pieces()], clip)
        optimizer.step()
        self.after_step()
        return norm

    def before_step(self) -> None:
        """Set the `.grad` of the fp32 copies to the reduced gradients. Required even without fp32
        copies: otherwise optimizer.step() raises ValueError."""
        if self.phase != "finished":
            raise ValueError("before_step() or step() without finish(): call finish() first, to "
                             "reduce the gradients")  # fmt: skip
        for p, master in self.masters.items():
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.phase = "update"

    def after_step(self) -> None:
        """Write the updated values of the fp32 copies to the bf16 parameters."""
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_([*self.masters], [*self.masters.values()])
        for p in self.masters:
            p.grad = None  # torch.compile rejects a gradient of another dtype, see _accumulated()
        self.phase = "idle"

    def gather(self) -> None:
        """No-op, so that callers can treat DDP and ZeRO alike."""

    def pieces(self) -> list[Piece]:
        """The tensors that the optimizer must update: the parameters, or their fp32 copies."""
        return [Piece(name, self.masters.get(p, p), p, 0) for name, p in self.parameters]

    def replicas_of(self, p: nn.Parameter) -> dist.ProcessGroup | None:
        """The ranks that have the same piece of p. None: only this rank has it."""
        return gradient_group(p, self.group)

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors stored between steps, by kind, without the moments in the optimizer."""
        parameters = [p for _, p in self.named]
        copies = [*self.masters.values()]
        return {"parameters": parameters, "gradients": self.buckets, "optimizer": copies}

    def _learn(self) -> None:
        """Assign parameters to buckets in the order in which the first step completed their
        gradients on the group's first rank. Parameters whose gradient is incomplete come last.

        The first step already reduces in this layout. The position of an element in its bucket
        determines the order in which a ring adds the terms of the ranks, and so the rounding. A
        resumed run constructs a new DDP. If its first step reduced in another layout, the run would
        not be bitwise equal to an uninterrupted one."""
        if self.parameters:
            order = [*dict.fromkeys([*self.ready, *range(len(self.parameters))])]
            numbers = torch.tensor(order, device=self.buckets[0].device)
            dist.broadcast(numbers, group=self.group, group_src=0)  # payload: one per parameter
            self._lay_out(numbers.tolist())
        self.learned = True

    def _lay_out(self, order: Iterable[int]) -> None:
        """Assign parameters to buckets. `order` holds their indices. A bucket has one dtype and one
        group. It is closed when it holds at least bucket_bytes (the first: 1/25 of that), or at the
        end."""
        self.buckets: list[Tensor] = []
        self.members: list[list[int]] = []
        self.sent_dtypes: list[torch.dtype] = []
        self.groups: list[dist.ProcessGroup] = []
        open_buckets: dict[tuple, list[int]] = {}
        for i in order:
            _, p = self.parameters[i]
            key = p.dtype, gradient_group(p, self.group)
            members = open_buckets.setdefault(key, [])
            members.append(i)
            size = sum(self.parameters[j][1].nbytes for j in members)
            if size >= (self.bucket_bytes if self.buckets else self.bucket_bytes // 25):
                self._add_bucket(open_buckets.pop(key))
        for members in open_buckets.values():
            self._add_bucket(members)

    def _add_bucket(self, members: list[int]) -> None:
        parameters = [self.parameters[i][1] for i in members]
        dtype = sent_dtype = parameters[0].dtype
        if dtype.itemsize < 4:
            sent_dtype = self.reduce_dtype or dtype
            dtype = self.grad_dtype
        sizes = [p.numel() for p in parameters]
        flat = parameters[0].new_zeros(sum(sizes), dtype=dtype)
        for i, p, view in zip(members, parameters, flat.split(sizes), strict=True):
            if self.gradients[i] is not None:  # the gradient of the first step, in the old layout
                view.copy_(self.gradients[i].flatten())
            # p.grad_dtype is a tensor attribute of PyTorch: the dtype that p.grad must have. None
            # allows any. A tied matrix can get two gradients per backward, which autograd sums
            # before it calls the hook. With the dtype of the bucket as p.grad_dtype, autograd sums
            # them in that dtype instead of bf16. gpt.py sets tied_name on tied matrices.
            p.grad_dtype = dtype if hasattr(p, "tied_name") else None
            self.gradients[i] = view.view_as(p)
            self.bucket_of[i] = len(self.buckets)
        self.buckets.append(flat)
        self.groups.append(gradient_group(parameters[0], self.group))
        self.members.append(members)
        self.sent_dtypes.append(sent_dtype)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer, self.piece_of, ready=self.phase == "update")

    def _loaded(self, module: nn.Module) -> None:
        """Update the fp32 copies after load_state_dict() has written to `module`."""
        if module not in self.modules:  # a deep copy of the model, which keeps these hooks
            return
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in self.piece_of:
                raise ValueError(f"load_state_dict(assign=True) replaced {name}: DDP would train "
                                 "the old tensor. Load with assign=False")  # fmt: skip
            if p in self.masters:
                self.masters[p].detach().copy_(p.detach())


def accumulate(gradient: Tensor, total: Tensor, first: bool) -> None:
    """Set `total` to the gradient if `first`, else add the gradient to it. Dtypes may differ."""
    # Gradients from backward(create_graph=True) require grad.
    # Those from nn.Embedding(sparse=True) are sparse.
    if gradient.requires_grad or gradient.is_sparse:
        gradient = gradient.detach().to_dense()
    if first:
        total.copy_(gradient)
    else:
        total.add_(gradient)


# --- the full version: several hosts --------------------------------------------------------------
# Links between hosts are slower than links inside a host. In a ring over d ranks that visits the
# hosts one after the other, one rank of each host sends to the next host. So each host sends
# 2 (d-1)/d Psi elements. If gradients are first summed inside each of k
# hosts, a host sends only 2 (k-1)/k Psi. This saves a third with 2 hosts of 2 ranks, and little
# with many hosts. The rings between hosts have k ranks each, so they take 2 (k-1) rounds over the
# slow links instead of 2 (d-1). With 1 Gbit/s between 2 hosts of 2 ranks, Hierarchical reduces 25
# MB in about 30% less time than one ring. With few ranks, it takes longer for small payloads,
# because three collectives have more overhead than one. `make hierarchy` measures the time and the
# bytes between hosts.

# PyTorch 2.13 renamed reduce_scatter_tensor and all_gather_into_tensor, and warns if the old names
# are used. 2.11 has only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Hierarchical:
    """Sums in three phases: reduce-scatter inside the host, all-reduce of each shard across hosts,
    all-gather inside the host. Usage: DDP(model, reduce=Hierarchical(inside, across)).

    inside: the ranks of the DDP group on this host. Every host must have the same number of ranks.
    across: the ranks, one per host, that have the same index within their host as this rank.

    Each call starts the first phase of a bucket and the next phase of all earlier buckets, so links
    inside and between hosts work at the same time. The last three buckets are completed only in
    wait(), because no further call starts their next phases. On a CPU, each call waits for the
    phases in progress. On a GPU, only a side stream does, and the compute stream waits once, in
    wait()."""

    def __init__(self, inside: dist.ProcessGroup, across: dist.ProcessGroup):
        self.inside, self.across = inside, across
        self.in_flight: list[Iterator[dist.Work]] = []  # by bucket, oldest first
        self.stream = None

    def __call__(self, flat: Tensor, group: dist.ProcessGroup) -> "Hierarchical":
        """`inside` and `across` together must reach all ranks of `group`."""
        if group.size() != self.inside.size() * self.across.size():
            raise ValueError(f"Hierarchical sums over {self.inside.size() * self.across.size()} "
                             f"ranks, but a gradient must be summed over {group.size()}: pass a "
                             "`reduce` that calls Hierarchical for the group of DDP, and "
                             "all_reduce_bucket for other groups")  # fmt: skip
        self.device = torch.get_device_module("cuda" if flat.is_cuda else "cpu")
        self.stream = self.stream or self.device.Stream()
        # The phases must not start before `flat` is filled. On a CPU, streams are no-ops.
        self.stream.wait_stream(self.device.current_stream())
        self.in_flight.append(self._phases(flat))
        self._advance()
        return self

    def wait(self) -> None:
        """Complete all buckets: this object is the handle of every bucket."""
        while self.in_flight:
            self._advance()
        self.device.current_stream().wait_stream(self.stream)

    def _advance(self) -> None:
        """Start the next phase of each bucket, oldest first, in the same order on all ranks."""
        with self.device.stream(self.stream):
            unfinished = []
            for phases in self.in_flight:
                if next(phases, None) is not None:  # a handle, or None after the last phase
                    unfinished.append(phases)
            self.in_flight = unfinished

    def _phases(self, flat: Tensor) -> Iterator[dist.Work]:
        """Each next() waits for the phase in progress and starts the following one."""
        n = self.inside.size()
        padding = -flat.numel() % n
        padded = nn.functional.pad(flat, (0, padding)) if padding else flat
        shard = padded.chunk(n)[self.inside.rank()]  # a view: the collectives work in place
        work = reduce_scatter(shard, padded, group=self.inside, async_op=True)  # payload: bucket
        yield work
        work.wait()
        work = dist.all_reduce(shard, group=self.across, async_op=True)  # payload: bucket / n
        yield work
        work.wait()
        work = all_gather(padded, shard, group=self.inside, async_op=True)  # payload: bucket
        yield work
        work.wait()
        if padding:
            flat.copy_(padded[: flat.numel()])


# --- checks ---------------------------------------------------------------------------------------
# Most of the mistakes that these checks catch would otherwise produce a wrong model and no error.


def check_same_parameters(
    parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raise ValueError on every rank unless all ranks of `group` have the same parameters, in the
    same order and with equal values. The message names the first difference.

    Values are compared by checksum. A permutation of the elements is not detected. A parameter with
    a smaller gradient_group() is compared only within that group, including name and shape. Each
    parameter is compared with that of the first rank of its group."""
    if group.size() == 1:
        return
    mine: list[tuple[int, str]] = []  # (the rank to compare with, a description)
    for name, p in parameters:
        first = dist.get_global_rank(gradient_group(p, group), 0)
        what = f"{name} {tuple(p.shape)} {p.dtype} with checksum {checksum(p)}"
        mine.append((dist.get_group_rank(group, first), what))
    by_rank: list = [None] * group.size()
    dist.all_gather_object(by_rank, mine, group=group)
    n = max(map(len, by_rank))
    by_rank = [[*theirs, *[(0, "missing")] * (n - len(theirs))] for theirs in by_rank]
    for rank, theirs in enumerate(by_rank):
        for i, (first, b) in enumerate(theirs):
            a = by_rank[first][i][1]
            if a != b:
                raise ValueError(f"parameter {i} is {a} on rank {first} of the group and {b} on "
                                 f"rank {rank}: build the same model on every rank, with the same "
                                 "seed or from the same checkpoint")  # fmt: skip


def checksum(p: Tensor) -> int:
    """The sum of the elements' bit patterns as integers. It does not depend on the order of
    summation, so bitwise equal tensors always have equal checksums."""
    if p.is_meta:  # it has no values
        return 0
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize]
    return p.detach().view(integer).sum(dtype=torch.int64).item()


def check_accumulations(model: nn.Module, accumulations: dict[nn.Parameter, int]) -> None:
    """Raise ValueError unless every trainable parameter has a count of at least 1."""
    for name, p in model.named_parameters():
        if p.requires_grad and not accumulations.get(p, 0) >= 1:
            raise ValueError("accumulations must be an int >= 1, or a dict with an int >= 1 for "
                             f"every trainable parameter: for {name} it is "
                             f"{accumulations.get(p)}")  # fmt: skip


def check_optimizer(
    optimizer: torch.optim.Optimizer, pieces: dict[Tensor, Piece], ready: bool
) -> None:
    """Raise ValueError if the optimizer holds a model parameter instead of its fp32 copy or shard,
    or if the gradients are not `ready`. Runs before the step of every optimizer in the process.

    pieces: maps each parameter, and the tensor that the optimizer must hold, to a Piece.
    ready: whether before_step() has been called."""
    for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        piece = pieces.get(p)
        if piece is not None and p is not piece.tensor:
            raise ValueError(f"the optimizer holds {piece.name} instead of its fp32 copy or shard: "
                             "construct the optimizer over "
                             "[piece.tensor for piece in sync.pieces()]")  # fmt: skip
        if piece is not None and not ready:
            raise ValueError("optimizer.step() was called without before_step(): call finish() "
                             "and then sync.step(optimizer)")  # fmt: skip


def check_norm_is_local(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Raise ValueError if the gradient norm depends on gradients of other ranks."""
    for name, p in parameters:
        how = getattr(p, "distribution", None)  # see tensor_parallel.py
        sharded = how is not None and any(split.group.size() > 1 for split in how.splits)
        # partial: each rank has one term of the gradient. replicas: other ranks have other experts.
        if sharded or (how is not None and (how.partial or how.replicas) is not None):
            raise ValueError(f"clip: the gradient of {name} is distributed over several ranks, "
                             "so one rank cannot compute the norm: call before_step(), "
                             "clip by the gradient norm of the full model, then call "
                             "optimizer.step() and after_step()")  # fmt: skip


# --- cost -----------------------------------------------------------------------------------------
# Predicted costs. The demo, the tests and the tools compare them with measured values.


def predicted_payload(numel: int) -> int:
    """Elements all-reduced per rank and step, for Psi = numel and any number of microbatches."""
    return numel


def predicted_wire_bytes(numel: int, d: int, itemsize: int) -> float:
    """Bytes that a rank sends per step in a ring all-reduce over d ranks. If the ring visits the
    hosts one after the other, each host sends this number of bytes to the next host, because
    exactly one of its ranks has its successor there. With Hierarchical on k hosts, each host sends
    predicted_wire_bytes(numel, k, itemsize)."""
    return 2 * (d - 1) / d * numel * itemsize


def predicted_hierarchical_payload(numels: Iterable[int], n: int) -> dict[tuple[str, str], int]:
    """Elements per rank and step, by (group, operation), with n ranks per host. A bucket of `numel`
    elements is padded to a multiple of n."""
    padded = sum(-(-numel // n) * n for numel in numels)
    return {("inside", "reduce_scatter"): padded, ("across", "all_reduce"): padded // n,
            ("inside", "all_gather"): padded}  # fmt: skip


def predicted_bytes(
    numel: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Bytes per rank with AdamW, for Psi = numel: 16 Psi in fp32, 18 Psi in bf16. "optimizer": two
    moments and, in bf16, the fp32 copies of the parameters."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    update = 4 + 8 if dtype.itemsize < 4 else 2 * dtype.itemsize
    each = {"parameters": dtype.itemsize, "gradients": grad_dtype.itemsize, "optimizer": update}
    return {kind: numel * size for kind, size in each.items()}


# --- demo -----------------------------------------------------------------------------------------


def train(rows: range, group: dist.ProcessGroup, all_reduce: Callable, reduce: Callable | None):
    """Train on `rows` of each batch, in float64: with DDP if `reduce` is given, else with
    `all_reduce`. A batch has 4 rows per rank of the group."""
    import data
    import gpt

    config = gpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=256, seq_len=32)
    tokens, m, steps = data.example(), 2, 3
    model = gpt.build(config, seed=0, dtype=torch.float64)
    # A large eps: AdamW divides by the root of the mean squared gradient. Where that is tiny, it
    # would amplify rounding errors.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    sync = DDP(model, group, m, bucket_bytes=2**16, reduce=reduce) if reduce else None
    start = sync.start if sync else optimizer.zero_grad
    losses = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        start()
        x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
        for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
            total = gpt.cross_entropy(model(xs), ys)  # a sum over the targets, all of them valid
            loss = total / (4 * group.size() * config.seq_len)
            loss.backward()
            losses[step] += loss.detach()
        if sync:
            sync.finish()
            sync.step(optimizer)
        else:
            all_reduce(model.parameters(), group)
            optimizer.step()
    return losses, dict(model.named_parameters()), sync


def main() -> None:
    """Compare each version with one process that has all rows."""
    import measure

    with measure.Report("ddp.py") as report:
        group, d = report.group, report.group.size()
        k = 2 if d % 2 == 0 else 1  # simulated hosts
        ranks = torch.arange(d).view(k, -1)
        inside, _ = dist.new_subgroups_by_enumeration(ranks.tolist())
        across, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist())
        expected_losses, expected, _ = train(range(4 * d), group, lambda *_: None, None)
        expected_gradients = {name: p.grad for name, p in expected.items()}
        psi = sum(p.numel() for p in expected.values())
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        for name, all_reduce, reduce in (
            ("version 1", all_reduce_gradients, None),
            ("flat", all_reduce_flat, None),
            ("DDP", None, all_reduce_bucket),
            ("Hierarchical", None, Hierarchical(inside, across)),
        ):
            with measure.Collectives({"dp": group, "inside": inside, "across": across}) as seen:
                losses, parameters, sync = train(rows, group, all_reduce, reduce)
            dist.all_reduce(losses)
            gradients = {name: p.grad for name, p in parameters.items()}
            report.losses(name, [*losses], [*expected_losses])
            report.close(f"{name} max |d gradient|", gradients, expected_gradients)
            report.close(f"{name} max |d parameter|", parameters, expected)
            payloads = {("dp", "all_reduce"): predicted_payload(psi)}
            if name == "Hierarchical":
                sizes = [bucket.numel() for bucket in sync.buckets]
                payloads = predicted_hierarchical_payload(sizes, inside.size())
            for (axis, operation), payload in payloads.items():
                measured = seen.total(axis, operation).payload // len(losses)  # per step
                if d > 1:
                    report.equal(f"{name} {operation} payload", payload, measured)


if __name__ == "__main__":
    main()
