"""Data parallelism: every rank holds the whole model and trains on rows of its own; gradients meet.

      rows 0..3 -> F, B -> rank 0  [a0|b0]           [a0+a1|     ]           [a0+a1|b0+b1] -> same
                                           ----->                  ----->                    update
      rows 4..7 -> F, B -> rank 1  [a1|b1]           [     |b0+b1]           [a0+a1|b0+b1] -> same
                                       reduce-scatter             all-gather
                                        |______ together: an all-reduce ______|

Either half sends (d-1)/d of the gradients from each rank. Half-way each rank has the whole sum of a
share, and that is why ZeRO-1 costs nothing extra. Here the sums go on, and all do the same update.

Each rank's loss is (sum over its tokens) / (tokens of the whole batch), so gradients are *summed*:
no 1/d anywhere, and ranks with fewer valid tokens weigh less, as they should. Under gradient
accumulation they meet once a step, when the last accumulation is in, whoever makes it.

Four rungs. (1) `all_reduce_gradients`: after backward, one all-reduce a parameter. The whole idea.
(2) `all_reduce_flat`: copied into one buffer, one call: latency is paid once.
(3) `DDP`: gradients live in a few flat buckets, laid out in the order in which backward fills them
(learned in the first step, at whose end all leave); a full bucket leaves at once from then on,
while backward goes on below it.
(4) `Hierarchical`, on k hosts: sums inside a host first, so that less crosses the slow links.

    per rank and step   bytes held (AdamW)          payload  calls        after backward (exposed)
    naive               16 Psi (4 + 4 + 8)          Psi      parameters   all of it
    flat                16 Psi, and 4 Psi a moment  Psi      1            all of it
    bucketed            16 Psi                      Psi      buckets      the last buckets
    bucketed, bf16      18 Psi (2 + 4 + 12), or 16 Psi with gradients in bf16; and 2 Psi a moment
    hierarchical        16 Psi                      2 Psi inside, k Psi / d across; 3 x buckets

Memory is what it does not save: parameters, gradients and optimizer states on every rank. zero.py
is this file with that mended; read the two side by side.

    torchrun --standalone --nproc-per-node 4 ddp.py

Li et al. 2020, PyTorch Distributed (arXiv 2006.15704), section 3.2; Goyal et al. 2017
(arXiv 1706.02677), section 2, on summing and averaging, and section 4 on sums inside a host first.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# --- collectives ----------------------------------------------------------------------------------
# all-reduce, every step. Payload: the gradient of every parameter once, and one number. Besides,
# once: who holds which parameters, and in what order gradients come. Rung 4 needs the two halves
# (inside a host each has every gradient once), to which torch 2.13 gave new names.

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def global_count(targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Valid targets (not -1) of the whole batch, known before the first backward: every loss is
    divided by it. The mean of each rank's mean would weigh ranks and not tokens. At least 1: a
    batch without any has a loss of 0, and not 0/0, which no later step would get rid of."""
    count = (targets >= 0).sum()
    if group.size() > 1:
        dist.all_reduce(count, group=group)  # payload: 1
    return count.clamp(min=1)


def all_reduce_bucket(flat: Tensor, group: dist.ProcessGroup):
    """The default `reduce`: starts the sum of `flat` over the group, returns what can be waited
    for. Another one (fp16 on the wire, say) has the same signature: see tests/test_forks.py."""
    return dist.all_reduce(flat, group=group, async_op=True)  # payload: the bucket


# --- strategy -------------------------------------------------------------------------------------
# Rung 1: the idea.


def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Call after the last backward of a step. Every rank must pass the same parameters in the same
    order. If this rank did not use a parameter, another rank may have: it sends -0.0, see
    is_unused. Frozen parameters are skipped."""
    for p in parameters:
        if p.requires_grad:
            used = p.grad is not None
            if not used:
                p.grad = torch.full_like(p, -0.0)
            dist.all_reduce(p.grad, group=group)  # payload: p.numel()
            if not used and is_unused(p.grad):
                p.grad = None


def is_unused(gradient: Tensor) -> bool:
    """Whether no rank used the parameter, given its reduced gradient.

    A rank that did not use the parameter contributes -0.0. A floating-point sum is -0.0 only if
    every term is -0.0."""
    return bool((gradient == 0).all() and gradient.signbit().all())


# Rung 2: the same sums in one call; the price is a copy in, a copy out, and a second Psi meanwhile.
# Measured (2 ranks x 1 thread, 2 cores, gloo): 0.8 to 0.9 of rung 1's step at h 256, where most of
# the 100 calls are small; no gain at h 768. `make bench-dp` says it for your machine.


def all_reduce_flat(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Call after the last backward of a step, like all_reduce_gradients."""
    parameters = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.full_like(p, -0.0) if p.grad is None else p.grad).flatten()
                      for p in parameters])  # fmt: skip
    dist.all_reduce(flat, group=group)  # payload: Psi
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        unused = p.grad is None and is_unused(summed)
        p.grad = None if unused else summed.view_as(p)


# Rung 3: few calls, and all but the last of them overlap with the rest of backward. Gradients are
# added to a bucket as they come, so there is no copy after backward. `make bench-dp` measures it.


class Piece(NamedTuple):
    """What the optimizer updates of one parameter: all of it here, a shard of it in zero.py."""

    name: str
    tensor: Tensor
    parameter: nn.Parameter
    start: int  # of the tensor in the flattened parameter


class DDP:
    """All-reduces gradients in buckets, overlapped with backward. The model is not wrapped: DDP
    attaches hooks to its parameters.

        sync = DDP(model, accumulations=m)
        optimizer = AdamW([piece.tensor for piece in sync.pieces()])
        sync.start()                      # instead of optimizer.zero_grad()
        for x, y in microbatches:         # m of them
            (F.cross_entropy(model(x), y, reduction="sum") / tokens).backward()
        sync.finish()                     # gradients are sums over the ranks
        sync.step(optimizer, clip=1.0)    # instead of clip_grad_norm_() and optimizer.step()

    tokens: the number of targets in the global batch, see global_count().

    model: equal on all ranks of `group`, including the values. Frozen parameters are skipped.
    group: the ranks to sum over. Default: all ranks.
    accumulations: the number of backward passes per step that reach a parameter, which is the
        number of microbatches m. Pass a dict {parameter: count} if it differs between parameters.
    bucket_bytes: size of a bucket. The first bucket is 25 times smaller, so that communication
        starts early.
    reduce: a function (flat, group) that starts an in-place sum of the 1-D tensor `flat` and
        returns a handle with wait(). Replace it to compress gradients. It must preserve -0.0.
    grad_dtype: the dtype in which gradients of bf16 parameters are accumulated over microbatches.
        Default: fp32. No effect on fp32 parameters.
    reduce_dtype: the dtype in which gradients of bf16 parameters are sent. Default: bf16; fp32
        sends twice the bytes. No effect on fp32 parameters, or with one rank.
    overlap: False reduces all gradients in finish(), without overlap. This is needed in a pipeline
        if the replicas of a stage use different parameters in one step: they would start the
        all-reduce at different points between their transfers, and could deadlock.

    A parameter that no rank uses in a step has `.grad` None after finish(). If this rank does not
    use a parameter, its bucket and all later buckets are reduced in finish(), without overlap.
    Manual writes to a bf16 parameter are lost at the next step, since the optimizer updates an fp32
    copy. load_state_dict() updates both.

    Raises ValueError if ranks have different parameters or values, if requires_grad changes later,
    if a call is missing or out of order, or if the optimizer holds a bf16 parameter instead of its
    fp32 copy."""

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None,
        accumulations: int | dict[nn.Parameter, int] = 1,
        bucket_bytes: int = 25 * 2**20, reduce: Callable = all_reduce_bucket,
        grad_dtype: torch.dtype | None = None, reduce_dtype: torch.dtype | None = None,
        overlap: bool = True,
    ):  # fmt: skip
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("there is no process group: call dist.init_process_group() first")
        self.named = [(getattr(p, "tied_name", name), p) for name, p in model.named_parameters()]
        self.parameters = [(name, p) for name, p in self.named if p.requires_grad]
        self.group, self.reduce = group, reduce
        self.overlap = overlap and group.size() > 1  # one rank sends nothing
        if isinstance(accumulations, int):
            accumulations = dict.fromkeys(model.parameters(), accumulations)
        check_accumulations(model, accumulations)
        self.accumulations = [accumulations[p] for _, p in self.parameters]
        self.bucket_bytes = bucket_bytes
        self.grad_dtype = grad_dtype or torch.float32
        self.reduce_dtype = reduce_dtype
        check_same_parameters(self.named, group)
        me = weakref.ref(self)  # a hook that held self would keep it, and the group, for ever
        for i, (_, p) in enumerate(self.parameters):
            p.register_post_accumulate_grad_hook(lambda p, i=i: me() and me()._accumulated(i, p))
        # What the optimizer updates: in bf16 a small update, added to a weight, is rounded away.
        self.masters = {
            p: p.detach().float().requires_grad_() if p.dtype.itemsize < 4 else p
            for _, p in self.parameters
        }
        self.modules = {*model.modules()}
        for module in self.modules:
            module.register_load_state_dict_post_hook(
                lambda module, _: me() and me()._loaded(module)
            )
        pieces = self.pieces()
        self.piece_of = {t: piece for piece in pieces for t in (piece.parameter, piece.tensor)}
        check = register_optimizer_step_pre_hook(
            lambda optimizer, *_: me() and me()._before_optimizer(optimizer)
        )
        weakref.finalize(self, check.remove)
        # Indexed like self.parameters: the gradient (a view of its bucket), the bucket's number.
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.bucket_of = [0] * len(self.parameters)
        # A guess until the first step has shown it: the last layer's gradients are ready first.
        self._lay_out(range(len(self.parameters))[::-1])
        self.ready: list[int] = []  # parameters, in the order in which gradients were completed
        self.learned = False
        self.launched: list = []  # (what was sent, handle), by bucket
        self.phase = "idle"  # then "backward", "finished" and "update"
        self.start()

    def _lay_out(self, order: Iterable[int]) -> None:
        """Make the buckets, each of one dtype. order: indices into self.parameters."""
        self.buckets: list[Tensor] = []
        self.sent_dtypes: list[torch.dtype] = []
        filling: dict[torch.dtype, list[int]] = {}
        for i in order:
            _, p = self.parameters[i]
            members = filling.setdefault(p.dtype, [])
            members.append(i)
            size = sum(self.parameters[j][1].nbytes for j in members)
            if size >= (self.bucket_bytes if self.buckets else self.bucket_bytes // 25):
                self._add_bucket(filling.pop(p.dtype))
        for members in filling.values():
            self._add_bucket(members)

    def _add_bucket(self, members: list[int]) -> None:
        """self.gradients[i] becomes a view of the new bucket."""
        parameters = [self.parameters[i][1] for i in members]
        dtype = sent_dtype = parameters[0].dtype
        if dtype.itemsize < 4:
            dtype, sent_dtype = self.grad_dtype, self.reduce_dtype or dtype
        sizes = [p.numel() for p in parameters]
        flat = parameters[0].new_zeros(sum(sizes), dtype=dtype)
        for i, p, part in zip(members, parameters, flat.split(sizes), strict=True):
            if self.gradients[i] is not None:  # of the first step, from its old bucket
                part.copy_(self.gradients[i].flatten())
            # None: `.grad` may have the bucket's dtype. Autograd sums the two gradients of a tied
            # matrix before the hook sees them: in the bucket's dtype.
            p.grad_dtype = dtype if hasattr(p, "tied_name") else None
            self.gradients[i] = part.view_as(p)
            self.bucket_of[i] = len(self.buckets)
        self.buckets.append(flat)
        self.sent_dtypes.append(sent_dtype)

    def _learn(self) -> None:
        """After the first step's last backward: lay the buckets out anew, in the order seen on the
        group's first rank; parameters without a gradient in that step come last. Before any has
        left, so that all steps are summed in one layout: a ring adds in an order that depends on
        the place in a bucket, and a run that begins again must come to the same bits."""
        if self.parameters:
            order = [*dict.fromkeys([*self.ready, *range(len(self.parameters))])]
            numbers = torch.tensor(order, device=self.buckets[0].device)
            if self.group.size() > 1:
                dist.broadcast(numbers, group=self.group, group_src=0)  # payload: parameters, once
            self._lay_out(numbers.tolist())
        self.learned = True

    def start(self) -> None:
        """Before the first backward of a step: every `.grad` is None until finish(), which sets it
        to the sum. If an exception interrupted the last step, at the same place on all ranks, this
        completes its collectives."""
        if self.phase == "update":
            raise ValueError("start() before after_step(): call after_step() after "
                             "optimizer.step(), to update the model")  # fmt: skip
        for name, p in self.named:
            if p.requires_grad != (p in self.masters):
                change = "unfrozen" if p.requires_grad else "frozen"
                raise ValueError(f"{name} was {change} after DDP was constructed: construct a new "
                                 "DDP after each change of requires_grad")  # fmt: skip
        for _, handle in self.launched:  # they still write to the buckets
            handle.wait()
        self.launched = []
        for p, master in self.masters.items():
            p.grad = master.grad = None
        self.missing = self.accumulations.copy()
        self.waiting = [0] * len(self.buckets)  # parameters that a bucket still waits for
        for bucket in self.bucket_of:
            self.waiting[bucket] += 1
        self.ready = []
        self.phase = "backward"

    def _accumulated(self, i: int, p: nn.Parameter) -> None:
        """Autograd calls this once per backward, with that backward's gradient in p.grad. Add it to
        the bucket and clear `.grad`: the next backward would add to it. (`.grad` is not the bucket
        itself, since torch.compile does not compile a layer whose `.grad` has another dtype.)"""
        if p.grad is None:  # a custom backward returned None
            return
        if self.phase != "backward":
            raise ValueError("backward outside of start() and finish(): call start() first. If "
                             "this is the loss of another model, freeze this one")  # fmt: skip
        first = self.missing[i] == self.accumulations[i]
        add(p.grad, self.gradients[i], first)
        p.grad = None
        self.missing[i] -= 1
        if self.missing[i] > 0:
            return
        if self.missing[i] < 0:
            raise ValueError(f"more than {self.accumulations[i]} accumulations in a step: pass "
                             "accumulations=m for m microbatches")  # fmt: skip
        self.ready.append(i)
        self.waiting[self.bucket_of[i]] -= 1
        # In bucket order and no other, though a later bucket may fill first on some rank:
        # collectives are matched by order, and the ranks must agree on it.
        while (self.overlap and self.learned and len(self.launched) < len(self.buckets)
               and self.waiting[len(self.launched)] == 0):  # fmt: skip
            self._launch()

    def _launch(self) -> None:
        i = len(self.launched)
        flat, dtype = self.buckets[i], self.sent_dtypes[i]
        sent = flat.to(dtype)  # no copy if the dtype is the same
        self.launched.append((sent, self.reduce(sent, self.group)))

    def finish(self) -> None:
        """After the last backward: every `.grad` is the sum over the group when this returns. A
        bucket that still waits for a parameter unused in this step is sent as it is."""
        if self.phase != "backward":
            raise ValueError("finish() without start(): call start() before the first backward of "
                             "a step, and finish() once after the last")  # fmt: skip
        unused = {i for i, n in enumerate(self.missing) if n == self.accumulations[i]}
        for i in unused:
            self.gradients[i].fill_(-0.0)  # see is_unused
        if not self.learned:
            self._learn()
        while self.group.size() > 1 and len(self.launched) < len(self.buckets):
            self._launch()
        for i, (sent, handle) in enumerate(self.launched):
            handle.wait()
            self.buckets[i].copy_(sent)
        self.launched = []
        for i, (_, p) in enumerate(self.parameters):
            unused_by_all = i in unused and is_unused(self.gradients[i])
            p.grad = None if unused_by_all else self.gradients[i]
        self.phase = "finished"

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor | None:
        """Call after finish(). Runs before_step(), clips the gradients to the global norm `clip`,
        runs optimizer.step() and after_step(). Returns the norm before clipping; None without clip.

        Raises ValueError if clip is given and a gradient is distributed over tensor-parallel ranks.
        In that case, and with pipeline stages, make the four calls yourself, as train_3d.py does:
        the norm needs a sum over those ranks."""
        if clip is not None:
            check_norm_is_local(self.parameters)
        self.before_step()
        norm = None
        if clip is not None:
            norm = nn.utils.clip_grad_norm_([piece.tensor for piece in self.pieces()], clip)
        optimizer.step()
        self.after_step()
        return norm

    def _before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer, self.piece_of, ready=self.phase == "update")

    def _loaded(self, module: nn.Module) -> None:
        """load_state_dict wrote to the parameters of `module`: update their fp32 copies."""
        if module not in self.modules:  # a copy of the model
            return
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in self.masters:
                raise ValueError(f"load_state_dict(assign=True) replaced {name}: DDP would train "
                                 "the old tensor. Load with assign=False")  # fmt: skip
            if p.requires_grad:
                self.masters[p].detach().copy_(p.detach())

    def pieces(self) -> list[Piece]:
        """What this rank's optimizer updates: the parameters, or fp32 copies of those in bf16."""
        return [Piece(name, self.masters[p], p, 0) for name, p in self.parameters]

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept from step to step, by kind; the optimizer has its moments besides."""
        copies = [master for p, master in self.masters.items() if master is not p]
        parameters = [p for _, p in self.named]
        return {"parameters": parameters, "gradients": self.buckets, "optimizer": copies}

    def before_step(self) -> None:
        """Pieces get their `.grad`, in their own dtype: with bf16 gradients, a copy in fp32."""
        if self.phase != "finished":
            raise ValueError("before_step() or step() without finish(): call finish() first, to "
                             "reduce the gradients")  # fmt: skip
        for p, master in self.masters.items():
            if master is not p:
                master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.phase = "update"

    def after_step(self) -> None:
        """After the optimizer: every rank has updated everything."""
        narrow = {p: master for p, master in self.masters.items() if master is not p}
        if narrow:
            with torch.no_grad():
                torch._foreach_copy_([*narrow], [*narrow.values()])
        for p in narrow:
            p.grad = None  # its dtype differs: a forward before start() would not be compiled
        self.phase = "idle"

    def gather(self) -> None:
        """Every parameter whole, for who reads them: they are."""


def add(gradient: Tensor, total: Tensor, first: bool) -> None:
    """Set `total` to the gradient if `first`, else add the gradient to it. Dtypes may differ."""
    # backward(create_graph=True) returns gradients with a graph, nn.Embedding(sparse=True) sparse.
    if gradient.requires_grad or gradient.is_sparse:
        gradient = gradient.detach().to_dense()
    if first:
        total.copy_(gradient)
    else:
        total.add_(gradient)


# Rung 4 (`--dp-nodes k`): links between hosts are slow. In a flat ring over d ranks, neighbours on
# a host side by side, each host's last rank sends 2 (d-1)/d Psi to the next host. Summed inside
# first, 2 (k-1)/k Psi leave each of k hosts: 2/3 of that on 2 hosts of 2 ranks, half on 2 hosts of
# many ranks, about as much on many hosts, but after 2 (k-1) turns of the slow link, not 2 (d-1).
# Measured (2 hosts of 2 ranks x 1 thread, 2 cores, gloo): 25 MB in buckets of 4 MiB take 0.70 to
# 0.74 of a flat all-reduce's time at 1 Gbit/s between the hosts, 0.67 at 200 Mbit/s; 0.26 MB take
# up to 2.2 of it: three latencies in place of one. `make hierarchy` says it for your machine.


class Hierarchical:
    """`reduce` of DDP: reduce-scatter inside a host, all-reduce of that share across, all-gather
    inside. While one bucket is scattered, the one before it crosses and a third is gathered: each
    launch takes all that are under way one phase further, and waits for the phase they are in.
    On a GPU a side stream waits between the phases; the compute stream waits once, in wait().

    inside: the ranks of the DDP's group that are on this host, equally many on each.
    across: the ranks that have this one's place on theirs."""

    def __init__(self, inside: dist.ProcessGroup, across: dist.ProcessGroup):
        self.inside, self.across = inside, across
        self.under_way: list[Iterator] = []  # a bucket each
        self.stream = None

    def __call__(self, flat: Tensor, group: dist.ProcessGroup) -> "Hierarchical":
        self.streams = torch.get_device_module("cuda" if flat.is_cuda else "cpu")
        self.stream = self.stream or self.streams.Stream()
        self.stream.wait_stream(self.streams.current_stream())  # until backward has filled `flat`
        self.under_way.append(self._phases(flat))
        self._advance()
        return self

    def wait(self) -> None:
        """For all that are under way, whichever bucket asks: every handle is this object."""
        while self.under_way:
            self._advance()
        self.streams.current_stream().wait_stream(self.stream)

    def _advance(self) -> None:
        """Oldest first, and by one phase: in the same order on all ranks."""
        with self.streams.stream(self.stream):
            self.under_way = [phases for phases in self.under_way if next(phases, None)]

    def _phases(self, flat: Tensor) -> Iterator[dist.Work]:
        n = self.inside.size()
        rest = -flat.numel() % n
        whole = nn.functional.pad(flat, (0, rest)) if rest else flat
        mine = whole.chunk(n)[self.inside.rank()]
        work = reduce_scatter(mine, whole, group=self.inside, async_op=True)  # payload: the bucket
        yield work
        work.wait()
        work = dist.all_reduce(mine, group=self.across, async_op=True)  # payload: an n-th of it
        yield work
        work.wait()
        work = all_gather(whole, mine, group=self.inside, async_op=True)  # payload: the bucket
        yield work
        work.wait()
        flat.copy_(whole[: flat.numel()])  # itself, unless n does not divide it


# --- checks ---------------------------------------------------------------------------------------
# Mistakes that would otherwise train the wrong thing silently.


def check_same_parameters(
    parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raise ValueError on every rank unless all ranks of `group` have the same parameters, in the
    same order and with equal values. The message names the first difference."""
    if group.size() == 1:
        return
    mine = [f"{name} {tuple(p.shape)} {p.dtype} with checksum {checksum(p)}"
            for name, p in parameters]  # fmt: skip
    by_rank: list = [None] * group.size()
    dist.all_gather_object(by_rank, mine, group=group)
    for rank, theirs in enumerate(by_rank):
        for i, (a, b) in enumerate(itertools.zip_longest(by_rank[0], theirs)):
            if a != b:
                raise ValueError(f"parameter {i} is {a} on rank 0 of the group and {b} on rank "
                                 f"{rank}: build the same model on every rank, with the same seed "
                                 "or from the same checkpoint")  # fmt: skip


def checksum(p: Tensor) -> int:
    """The sum of the elements' bit patterns as integers. It does not depend on the order of
    summation, so equal tensors always have equal checksums."""
    if p.is_meta:
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
    """Raise ValueError if the optimizer holds a parameter whose Piece has a different tensor, or if
    the gradients are not `ready`. Runs before the step of every optimizer in the process.

    pieces: by parameter and by tensor."""
    for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        piece = pieces.get(p)
        if piece is not None and p is not piece.tensor:
            raise ValueError(f"the optimizer holds {piece.name} instead of its fp32 copy or shard: "
                             "construct the optimizer over "
                             "[piece.tensor for piece in sync.pieces()]")  # fmt: skip
        if piece is not None and not ready:
            raise ValueError("optimizer.step() was called before the gradients were reduced: "
                             "call finish() and then step(optimizer)")  # fmt: skip


def check_norm_is_local(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Raise ValueError if the gradient norm depends on other tensor-parallel ranks."""
    for name, p in parameters:
        sharded = hasattr(p, "sharding") and p.sharding.size > 1
        if sharded or getattr(p, "partial", False):
            raise ValueError(f"clip: the gradient of {name} is distributed over tensor-parallel "
                             "ranks, so one rank cannot compute the norm: call before_step(), "
                             "clip by the norm over all ranks, then call optimizer.step() and "
                             "after_step()")  # fmt: skip


# --- cost -----------------------------------------------------------------------------------------


def predicted_payload(numel: int) -> int:
    """Elements all-reduced per rank and step, Psi = numel, under any number of microbatches."""
    return numel


def predicted_wire_bytes(numel: int, d: int, itemsize: int) -> float:
    """Bytes that a ring sends per rank and step: 2 (d-1)/d of the payload. From a host to the next
    the same, however many of the ranks it has: they are neighbours, and only the last one's go."""
    return 2 * (d - 1) / d * numel * itemsize


def predicted_hierarchical_payload(numels: Iterable[int], n: int) -> dict[tuple[str, str], int]:
    """Elements per rank and step, by (group, operation), of buckets of so many; n ranks a host. A
    bucket that n does not divide is padded, in a copy that is held until it is gathered."""
    padded = sum(-(-numel // n) * n for numel in numels)
    return {("inside", "reduce_scatter"): padded, ("across", "all_reduce"): padded // n,
            ("inside", "all_gather"): padded}  # fmt: skip


def predicted_hierarchical_wire_bytes(numel: int, k: int, itemsize: int) -> float:
    """Bytes from a host to others, per step: n rings go there, a rank a host in each, and each has
    an n-th of the payload, so that n cancels."""
    return predicted_wire_bytes(numel, k, itemsize)


def predicted_bytes(
    numel: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Bytes held per rank after the last backward, with AdamW: parameters, gradients, two moments,
    and in bf16 an fp32 copy to update: 16 Psi, or 18, whatever d is."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    update = 12 if dtype.itemsize < 4 else 2 * dtype.itemsize
    each = {"parameters": dtype.itemsize, "gradients": grad_dtype.itemsize, "optimizer": update}
    return {kind: numel * size for kind, size in each.items()}


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, m, steps = gpt.GPTConfig(2, 2, 32, 256, 32), 2, 3
    with measure.Report("ddp.py") as report:
        group, batch = report.group, 4 * report.group.size()
        hosts = torch.arange(group.size()).view(2 - group.size() % 2, -1)  # as if on two
        inside, _ = dist.new_subgroups_by_enumeration(hosts.tolist())
        across, _ = dist.new_subgroups_by_enumeration(hosts.T.tolist())
        tokens = data.example()

        def train(rows: range, rung: str, dtype=torch.float64, seen=None, grad_dtype=None):
            """Train on `rows` of each batch, in m microbatches. One process has all of them."""
            model = gpt.build(config, seed=0, dtype=dtype)
            named = dict(gpt.named_parameters(model))
            sync = None
            if rung in ("bucketed", "hierarchical"):
                how = {"reduce": Hierarchical(inside, across)} if rung == "hierarchical" else {}
                sync = DDP(model, group, m, bucket_bytes=2**16, grad_dtype=grad_dtype, **how)
            pieces = [piece.tensor for piece in sync.pieces()] if sync else named.values()
            optimizer, losses, held = torch.optim.AdamW(pieces, lr=1e-2, eps=1e-4), [], None
            for step in range(steps):
                with seen if seen and step + 1 == steps else contextlib.nullcontext():
                    sync.start() if sync else optimizer.zero_grad()
                    x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
                    losses.append(torch.zeros((), dtype=torch.float64))
                    for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                        # Divided by the tokens of the whole batch, whoever has them: gradients add.
                        loss = gpt.cross_entropy(model(xs), ys) / (batch * config.seq_len)
                        loss.backward()
                        losses[-1] += loss.detach()
                    if sync:
                        sync.finish()
                        held = measure.bytes_by_kind(sync.held(), optimizer)
                        sync.before_step()
                    elif rung != "one process":
                        meet = {"naive": all_reduce_gradients, "flat": all_reduce_flat}[rung]
                        meet(model.parameters(), group)
                    optimizer.step()
                    if sync:
                        sync.after_step()
            return losses, {n: p.grad for n, p in named.items()}, named, sync, held

        losses, gradients, parameters, *_ = train(range(batch), "one process")
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        psi = sum(p.numel() for p in parameters.values())
        for rung in ("naive", "flat", "bucketed", "hierarchical"):
            seen = measure.Collectives({"dp": group, "inside": inside, "across": across})
            mine, g, p, sync, _ = train(rows, rung, seen=seen)
            for loss in mine:
                dist.all_reduce(loss)  # its share of the batch's mean, from each rank
            report.losses(rung, mine, losses)
            report.close(f"{rung} max |d gradient|", g, gradients)
            report.close(f"{rung} max |d parameter|", p, parameters)
            if sync and group.size() == 1:
                continue  # nothing was sent
            if rung == "hierarchical":
                buckets = [flat.numel() for flat in sync.buckets]
                predicted = predicted_hierarchical_payload(buckets, inside.size())
                measured = {key: seen.total(*key).payload for key in predicted}
                both = [{" ".join(k): n for k, n in x.items()} for x in (predicted, measured)]
                report.costs("elements by group", rung, *both)
                continue
            exposed = psi
            if sync:  # all but the buckets that wait for one of these: below is no matrix
                last = [
                    i
                    for i, (n, _) in enumerate(sync.parameters)
                    if n.startswith(("wte", "wpe", "h.0.ln_1", "h.0.attn.c_attn"))
                ]
                late = {sync.bucket_of[i] for i in last}
                exposed = sum(sync.buckets[i].numel() for i in range(min(late), len(sync.buckets)))
            calls = {"naive": len(p), "flat": 1, "bucketed": sync and len(sync.buckets)}[rung]
            total, hidden = (seen.total("dp", "all_reduce", hidden=h) for h in (None, True))
            measured = (total.calls, total.payload - hidden.payload, hidden.payload)
            predicted = (calls, exposed, predicted_payload(psi) - exposed)
            kinds = ("calls", "exposed", "hidden")
            report.costs(
                "a step, elements",
                f"{rung} all_reduce",
                *(dict(zip(kinds, x, strict=True)) for x in (predicted, measured)),
            )
        for table, *dtypes in (
            ("bytes, float64", torch.float64, None), ("bytes, bf16", torch.bfloat16, None),
            ("bytes, bf16 gradients", torch.bfloat16, torch.bfloat16),
        ):  # fmt: skip
            *_, held = train(rows, "bucketed", dtypes[0], grad_dtype=dtypes[1])
            report.costs(table, "bucketed", predicted_bytes(psi, *dtypes), held)


if __name__ == "__main__":
    main()
