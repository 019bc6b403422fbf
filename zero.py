"""ZeRO: data parallelism in which each rank owns a share of the state, and keeps only that.

              flat gradients of a unit              flat parameters of the same unit
      rank 0  [ g0 | .. | .. | .. ] --reduce-scatter--> sum in shard 0 -> optimizer -> [ w0 |    ]
      rank 1  [ .. | g1 | .. | .. ] --reduce-scatter--> sum in shard 1 -> optimizer -> [    | w1 ]
                                                           all-gather: everyone has  [ w0 | w1 ]

An all-reduce is a reduce-scatter and then an all-gather. Between the two each rank holds the sum of
one shard of the gradients; ZeRO-1 puts the optimizer there. So its moments are sharded, and the
payload is what ddp.py's was: the second half carries parameters in place of gradients.

    per rank    bytes held after the last backward    payload per step
    and step    parameters  gradients  optimizer      reduce-scatter  all-gather
    ddp.py      2 Psi       4 Psi      12 Psi         (Psi all-reduced: both in one)
    ZeRO-1      2 Psi       4 Psi      12 Psi / d     Psi             Psi
    ZeRO-2      2 Psi       4 Psi / d  12 Psi / d     m Psi           Psi
    ZeRO-3      2 Psi / d   4 Psi / d  12 Psi / d     m Psi           about 2 m Psi; or Psi, if
                                                                      kept from F to the last B
    (bf16 parameters, gradients added up in fp32, AdamW on fp32 copies: 18 bytes in all; ZeRO's 16
    with bf16 gradients. In fp32: 4, 4, 8. m microbatches. Hybrid, `replicas`: d is the size of the
    group that shards; each shard of the gradients is all-reduced over the ranks that replicate it.)

A unit is a block, or a layer outside of the blocks. Its parameters lie in a flat buffer, which is
split into d shards of equal length: a matrix may span several ranks. Parameters and shards start at
multiples of 8 elements (`aligned`). The optimizer gets *pieces*: a view for each parameter that
overlaps my shard. Padding belongs to no piece, so it enters neither the norm nor weight decay.

    torchrun --standalone --nproc-per-node 2 zero.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 3.1, 5 and 7; Zhao et al. 2023, PyTorch
FSDP (arXiv 2304.11277), sections 3.2 (flat, padded buffers; hybrid) and 3.3 (prefetching).
"""

import contextlib
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# --- collectives ----------------------------------------------------------------------------------
# torch 2.13 gave the two halves of an all-reduce new names and warns at the old; 2.11 has the old.

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- strategy -------------------------------------------------------------------------------------
# The same words in the same order as in ddp.py: read them side by side. Rung 1: ZeRO-1.


class Piece(NamedTuple):
    """The range of one parameter that this rank's optimizer updates, 1-D."""

    name: str
    tensor: Tensor
    parameter: nn.Parameter
    start: int  # of the tensor in the flattened parameter


class Unit:
    """Parameters that travel together: flat, padded to d shards of equal length, one of them mine.
    Without `full_parameters` or `full_gradients` only my shard of them is held for good. A
    unit's parameters have one dtype and are all trainable or all frozen. A frozen unit has no
    gradients and no pieces."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup,
        full_parameters: bool, full_gradients: bool, grad_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ):  # fmt: skip
        self.group, like = group, members[0][1].detach()
        self.trainable = members[0][1].requires_grad
        narrow = like.dtype.itemsize < 4
        grad_dtype = (grad_dtype or torch.float32) if narrow else like.dtype
        self.reduce_dtype = reduce_dtype if narrow and reduce_dtype else like.dtype
        size = padded([p.numel() for _, p in members], group.size())
        n = size // group.size()
        mine = self.mine = slice(group.rank() * n, (group.rank() + 1) * n)
        self.parameters = like.new_zeros(size)
        self.gradients = None
        if full_gradients and self.trainable:
            self.gradients = like.new_zeros(size, dtype=grad_dtype)
        self.place: dict[nn.Parameter, slice] = {}
        self.gradient_of: dict[nn.Parameter, Tensor] = {}  # views of `gradients`
        self.reduced: dict[nn.Parameter, Tensor] = {}  # what `.grad` is after finish()
        end = 0
        for _, p in members:
            here = self.place[p] = slice(end, end + p.numel())
            end += aligned(p.numel())
            self.parameters[here] = p.detach().flatten()
            p.data = self.parameters[here].view_as(p)
            p.grad = None
            if self.gradients is not None:
                p.grad_dtype = grad_dtype if hasattr(p, "tied_name") else None  # see ddp.py
                self.gradient_of[p] = self.gradients[here].view_as(p)
            zero = like.new_zeros((), dtype=p.grad_dtype or p.dtype).expand(p.shape)
            self.reduced[p] = Tensor._make_subclass(ReducedGradient, zero)
        shard = self.parameters[mine]
        kept = full_parameters or group.size() == 1
        self.parameter_shard = shard if kept else shard.clone()
        if self.gradients is not None:
            self.gradient_shard = self.gradients[mine]
        else:
            self.gradient_shard = like.new_zeros(n if self.trainable else 0, dtype=grad_dtype)
        # What the optimizer updates: in bf16 a small update, added to a weight, is rounded away.
        self.master = self.parameter_shard
        if narrow and self.trainable:
            self.master = self.parameter_shard.float()
        self.pieces: list[Piece] = []
        for name, p in members if self.trainable else ():
            start = max(self.place[p].start, mine.start)
            stop = min(self.place[p].stop, mine.stop)
            if start < stop:
                here = slice(start - mine.start, stop - mine.start)  # in my shard
                self.add_piece(name, p, here, start - self.place[p].start)
        self.gathered, self.gathering, self.reducing, self.sum = True, None, None, None
        self.readable = True

    def add_piece(self, name: str, p: nn.Parameter, here: slice, start: int) -> None:
        piece = self.master[here].detach().requires_grad_()
        piece.place = here
        self.pieces.append(Piece(name, piece, p, start))

    def allow_reads(self, allowed: bool) -> None:
        """Switch the class of the parameters, so that reading them works or raises."""
        if allowed == self.readable:
            return
        self.readable = allowed
        for p in self.place:
            if type(p) in (nn.Parameter, ShardedParameter):  # not a subclass of the user's
                p.__class__ = nn.Parameter if allowed else ShardedParameter

    def unshard(self) -> None:
        """Start to fill `parameters` from all shards, unless that is done; wait() before use."""
        if not self.gathered:
            self.allow_reads(False)
            storage = self.parameters.untyped_storage()
            if not storage.nbytes():
                storage.resize_(self.parameters.numel() * self.parameters.itemsize)
            self.gathering = all_gather(  # payload: the unit
                self.parameters, self.parameter_shard, group=self.group, async_op=True
            )
            self.gathered = True

    def wait(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None
            self.allow_reads(True)

    def reshard(self) -> None:
        """Give the memory back, but not the storage: the parameters and what autograd has saved of
        them are views of it, and see it filled again."""
        if self.group.size() > 1:
            self.wait()
            self.parameters.untyped_storage().resize_(0)
            self.gathered = False
            self.allow_reads(False)

    def refresh(self) -> None:
        """load_state_dict wrote to the full parameters: copy my range to my shard."""
        if self.gathered and self.gathering is None:
            self.parameter_shard.copy_(self.parameters[self.mine])
            self.master.detach().copy_(self.parameter_shard)

    def reduce(self, flat: Tensor, first: bool) -> None:
        """Start the reduce-scatter of `flat` in reduce_dtype. Call wait_reduce() before another."""
        if self.group.size() > 1:
            flat = flat.to(self.reduce_dtype)
        self.sum, self.first = flat[self.mine], first
        if self.group.size() > 1:
            self.reducing = reduce_scatter(  # payload: the unit
                self.sum, flat, group=self.group, async_op=True
            )

    def wait_reduce(self, replicas: dist.ProcessGroup | None = None) -> None:
        """Add to my shard what arrived, or begin it; then, with `replicas`, start to sum the shard
        over these, which lands in its turn."""
        if self.sum is None:
            return
        if self.reducing is not None:
            self.reducing.wait()
        (self.gradient_shard.copy_ if self.first else self.gradient_shard.add_)(self.sum)
        self.sum = self.reducing = None
        if replicas is not None and replicas.size() > 1:
            self.sum, self.first = self.gradient_shard.to(self.reduce_dtype), True
            self.reducing = dist.all_reduce(  # payload: my shard
                self.sum, group=replicas, async_op=True
            )


def layers(model: nn.Module, blocks: Collection[nn.Module] | None = None) -> dict:
    """{module: its parameters}, in the order in which the model lists them. The parameters are
    gathered before the module's forward.

    A block is listed once, with all its parameters. Blocks are the entries of each nn.ModuleList or
    nn.ModuleDict that are not containers themselves, or, if given, `blocks` instead. Any other
    module that has parameters of its own is listed with all its parameters too, unless it contains
    a container, is the model itself, or `blocks` is given: then with its own alone. Raises
    ValueError for a listed module without a forward()."""
    containers = (nn.ModuleDict, nn.ModuleList)
    found: dict[nn.Module, list[nn.Parameter]] = {}
    if lost := set(blocks or ()) - set(model.modules()):
        raise ValueError(f"blocks: the model does not contain {lost.pop()}")

    def visit(name: str, module: nn.Module, is_block: bool) -> None:
        own = list(module.parameters(recurse=False))
        outer = module is model or any(isinstance(m, containers) for m in module.modules())
        if own and blocks is None and not outer:
            is_block = True
        if is_block or own:
            parameters = list(module.parameters()) if is_block else own
            if parameters and getattr(module.forward, "__func__", None) is nn.Module.forward:
                raise ValueError(
                    f"{name} has parameters and no forward() to gather them before: pass blocks=[] "
                    "with the module that uses them and all other blocks"
                )
            if parameters:
                found[module] = parameters
        for child_name, child in module.named_children() if not is_block else ():
            entry = isinstance(module, containers) and not isinstance(child, containers)
            visit(f"{name}.{child_name}", child, entry if blocks is None else child in blocks)

    visit(type(model).__name__, model, model in (blocks or ()))
    return found


class Zero1:
    """Attaches to the model by hooks; its parameters now live in flat buffers.

        sync = Zero1(model, accumulations=m)
        optimizer = AdamW([piece.tensor for piece in sync.pieces()])
        sync.start()                      # instead of optimizer.zero_grad()
        for x, y in microbatches:         # m of them
            (loss_sum(model(x), y) / tokens).backward()  # tokens: of the global batch
        sync.finish()                     # this rank's shards of the gradients are sums
        sync.step(optimizer, clip=1.0)    # instead of clip_grad_norm_ and optimizer.step()

    model: the same on every rank of `group`, values included.
    group: over which state is sharded; default: all ranks.
    accumulations: how many times per step a gradient is added to each parameter: the number of
        microbatches (several uses in one backward count once), or a dict by parameter.
    replicas: hybrid: the ranks that hold the same shard in other groups.
    grad_dtype: the dtype in which bf16 gradients are summed over microbatches (default: fp32).
    reduce_dtype: the dtype in which bf16 gradients are reduced over ranks (default: the
        parameters'; fp32 sends twice the bytes). It has no effect with one rank. Both do nothing
        for fp32 parameters.
    blocks: modules to gather at a time, instead of the default; see `layers`.
    overlap: False: finish() reduces all units, see DDP. ZeRO-2 and 3 then hold full gradients until
        finish(), and sum them over microbatches in the parameters' dtype.

    step() runs before_step(), clipping, optimizer.step() and after_step(). Call these yourself to
    do something in between, or with several optimizers. If no rank uses a parameter in a step, its
    pieces have no gradient. If this rank does not use one, its unit and all later ones in backward
    are reduced by finish() only, with no overlap, and ZeRO-2 and 3 keep the full gradients of those
    units until then. ZeRO-1 and 2 do not touch frozen parameters; ZeRO-3 shards them.

    To read parameters outside of the model's forward, call gather() on every rank first. They stay
    readable until the next call of the model or of this object. Values that you write to them by
    hand are lost in bf16 and under ZeRO-3: use load_state_dict(). load_state_dict() and
    model.state_dict() call gather(), so every rank must call them. The optimizer must update
    element by element (AdamW, SGD; not Muon, LAMB or Adafactor). Its state covers this rank's
    shards only: every rank saves its own.

    Raises ValueError if ranks have different parameters or values; if requires_grad changes later;
    if a call is missing or out of order; or if the optimizer holds parameters instead of pieces."""

    full_parameters = full_gradients = True

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None,
        accumulations: int | dict[nn.Parameter, int] = 1,
        replicas: dist.ProcessGroup | None = None, grad_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None, blocks: Collection[nn.Module] | None = None,
        overlap: bool = True,
    ):  # fmt: skip
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("ZeRO needs a process group: call dist.init_process_group() first")
        self.group, self.replicas, self.overlap = group, replicas, overlap
        if isinstance(accumulations, int):
            accumulations = dict.fromkeys(model.parameters(), accumulations)
        self.accumulations = accumulations
        check_accumulations(model, accumulations)
        names = self.names = {
            p: getattr(p, "tied_name", name) for name, p in model.named_parameters()
        }
        self.was_trainable = {p: p.requires_grad for p in names}
        for ranks in (group,) if replicas is None else (group, replicas):
            check_same_parameters([(name, p) for p, name in names.items()], ranks)
        self.layers, self.modules = layers(model, blocks), {*model.modules()}
        self.units: list[Unit] = []  # in forward order
        self.unit_of: dict[nn.Parameter, Unit] = {}
        self.needs: list[list[Unit]] = []  # by layer
        me = self.me = weakref.ref(self)  # a hook that held self would keep it for ever
        for i, (layer, parameters) in enumerate(self.layers.items()):
            new: dict[tuple, list] = {}
            for p in parameters:  # ZeRO-1 and 2 leave frozen ones alone
                if p not in self.unit_of and (p.requires_grad or not self.full_parameters):
                    new.setdefault(self._kind(p, parameters), []).append((names[p], p))
            for members in new.values():
                unit = Unit(
                    members, group, self.full_parameters, self.full_gradients, grad_dtype,
                    reduce_dtype,
                )  # fmt: skip
                self.units.append(unit)
                self.unit_of.update((p, unit) for _, p in members)
            needs = [self.unit_of[p] for p in parameters if p in self.unit_of]
            self.needs.append(list(dict.fromkeys(needs)))
            layer.register_forward_pre_hook(
                not_compiled(lambda *args, i=i: alive(me)._before_forward(i, *args)),
                with_kwargs=True,
            )
        trainable = [unit for unit in self.units if unit.trainable]
        if trainable and not self.pieces():  # torch's optimizers refuse an empty list
            p = next(iter(trainable[0].place))
            trainable[0].add_piece(names[p], p, slice(0, 0), 0)
        for unit in trainable:
            for p in unit.place:
                p.register_post_accumulate_grad_hook(lambda p: alive(me)._accumulated(p))
        owned = self.pieces()  # other ranks own other parameters, and all must refuse alike
        self.piece_of = {p: Piece(names[p], owned[0].tensor, p, 0)
                         for unit in trainable for p in unit.place}  # fmt: skip
        self.piece_of |= {piece.tensor: piece for piece in owned}
        check = register_optimizer_step_pre_hook(
            lambda optimizer, *_: me() and me()._before_optimizer(optimizer)
        )
        weakref.finalize(self, check.remove)
        model.register_state_dict_pre_hook(lambda *_: alive(me).gather())
        model.register_load_state_dict_pre_hook(lambda *_: alive(me).gather())
        for module in model.modules():
            module.register_load_state_dict_post_hook(lambda module, _: alive(me)._loaded(module))
        # How often gradients travel in a step: once, or m times (a tied matrix may be added to 2 m
        # times). In this order and no other, though another unit may fill first on some rank:
        # collectives are matched by order, and the ranks must agree on it.
        counts = [accumulations[p] for unit in trainable for p in unit.place]
        rounds = self.rounds = 1 if self.full_gradients else min(counts, default=1)
        self.launches = [(i + 1, unit) for i in range(rounds) for unit in reversed(trainable)]
        self.place_in_round = {unit: i for i, unit in enumerate(reversed(trainable))}
        self.last_round = len(self.launches) - len(trainable)
        self.phase = "idle"  # then "backward", "finished" and "update"
        self.start()

    @staticmethod
    def _kind(p: nn.Parameter, parameters: list[nn.Parameter]) -> tuple:
        """Parameters of a layer that are equal in this share a unit. A tied matrix has its own:
        both pipeline stages then shard it the same way and can add their shards. So have parameters
        whose gradient is partial over tensor-parallel ranks, if the layer's matrices differ in size
        between these ranks: in one buffer, their shards would begin at different places."""
        shardings = [q.sharding for q in parameters if hasattr(q, "sharding")]
        uneven = any(n % sharding.size for sharding in shardings for n in sharding.sizes)
        partial = uneven and getattr(p, "partial", False)
        return getattr(p, "tied_name", None), p.dtype, p.requires_grad, partial

    def start(self) -> None:
        """Before the first backward of a step: clears gradients and counters. If an exception
        interrupted the last step, at the same place on all ranks, this completes its collectives
        and drops its gradients."""
        if self.phase == "update":
            raise ValueError("start() before after_step(): call after_step() after "
                             "optimizer.step(), to write the update to the model")  # fmt: skip
        with not_intercepted():
            for p, trainable in self.was_trainable.items():
                if p.requires_grad != trainable:
                    change = "unfrozen" if p.requires_grad else "frozen"
                    raise ValueError(f"{self.names[p]} was {change} after ZeRO was set up, and its "
                                     "units are fixed: rebuild the model and ZeRO")  # fmt: skip
            for unit in self.units:
                unit.wait_reduce()
                storage = unit.parameters.untyped_storage()._cdata
                for p in unit.place:
                    if p.untyped_storage()._cdata != storage:
                        raise ValueError(f"{self.names[p]}: its data was replaced and is not in "
                                         "the buffer: call model.to() before ZeRO")  # fmt: skip
                    p.grad = None
                for piece in unit.pieces:
                    piece.tensor.grad = None
            self.done = {p: 0 for p in self.unit_of if p.requires_grad}  # accumulations
        # By launch: the number of parameters whose gradients it still waits for.
        self.waiting = [len(unit.place) for _, unit in self.launches]
        self.launched = 0
        self.phase = "backward"

    def _before_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Layer i is about to run: parameters that other ranks have updated must be here."""
        for unit in self.needs[i] if layer in self.layers else ():  # it may be a copy of the model
            unit.wait()

    def _accumulated(self, p: nn.Parameter) -> None:
        if p.grad is None:  # a custom backward returned None
            return
        if self.phase != "backward":
            raise ValueError("backward outside of start() and finish(): call start() first, or "
                             "freeze this model while the loss of another one uses it")  # fmt: skip
        unit, n = self.unit_of[p], self.accumulations[p]
        if self.full_gradients:
            add(p.grad, unit.gradient_of[p], first=self.done[p] == 0)
            p.grad = None
        before = self.done[p] * self.rounds // n  # rounds that were complete for p
        self.done[p] += 1
        if self.done[p] > n:
            raise ValueError(f"more than {n} accumulations in a step: pass accumulations=m for m "
                             "microbatches")  # fmt: skip
        if self.done[p] * self.rounds // n > before:
            self.waiting[before * len(self.place_in_round) + self.place_in_round[unit]] -= 1
            while (self.overlap and self.launched < len(self.launches)
                   and self.waiting[self.launched] == 0):  # fmt: skip
                self._launch()

    def _launch(self) -> None:
        self._wait_reduce()
        round_, unit = self.launches[self.launched]
        unit.reduce(self._take_gradients(unit), first=round_ == 1)
        self.launched += 1

    def _wait_reduce(self) -> None:
        """What was launched last arrives before the next: its buffer can go."""
        if self.launched:
            in_last_round = self.last_round < self.launched
            unit = self.launches[self.launched - 1][1]
            unit.wait_reduce(self.replicas if in_last_round else None)

    def _take_gradients(self, unit: Unit) -> Tensor:
        for p, gradient in unit.gradient_of.items():
            if not self.done[p]:
                gradient.fill_(-0.0)  # see is_unused
        return unit.gradients

    def finish(self) -> None:
        """After the last backward: when this returns, my shards of the gradients are sums. Reading
        the `.grad` of a parameter raises ValueError from here to the next start()."""
        if self.phase != "backward":
            raise ValueError("finish() without start(): call start() before the first backward of "
                             "a step, and finish() once after the last")  # fmt: skip
        while self.launched < len(self.launches):
            self._launch()
        self._wait_reduce()
        for unit in self.units:
            unit.wait_reduce()
            with not_intercepted():
                for p in unit.place if unit.trainable else ():
                    p.grad = unit.reduced[p]
        self.phase = "finished"

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor | None:
        """After finish(): updates the model. clip: the maximum norm, as in clip_grad_norm_. Returns
        the norm before clipping, or None without clip. Raises ValueError if clip is given and
        tensor-parallel ranks hold a part of the norm. There, and with pipeline stages, call the
        four parts and compute the norm as train_3d.py does."""
        if clip is not None:
            check_norm_is_local([(self.names[p], p) for p in self.done])
        self.before_step()
        norm = None
        if clip is not None:
            pieces = [piece.tensor for piece in self.pieces()]
            mine = nn.utils.get_total_norm([t.grad for t in pieces if t.grad is not None])
            square = mine.to(pieces[0].device, torch.float64).square()
            if self.group.size() > 1:
                dist.all_reduce(square, group=self.group)  # payload: 1
            norm = square.sqrt()
            nn.utils.clip_grads_with_norm_(pieces, clip, norm)
        optimizer.step()
        self.after_step()
        return norm

    def _before_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer, self.piece_of, ready=self.phase == "update")

    def _loaded(self, module: nn.Module) -> None:
        """load_state_dict wrote to the parameters of `module`: update this rank's shards."""
        if module not in self.modules:  # a copy of the model
            return
        for name, p in module.named_parameters(recurse=False):
            if p not in self.names:
                raise ValueError(f"load_state_dict(assign=True) replaced {name}, and the new "
                                 "tensor is not in ZeRO's buffer: load without assign")  # fmt: skip
            if p in self.unit_of:
                self.unit_of[p].refresh()

    def pieces(self) -> list[Piece]:
        """What this rank's optimizer updates: ranges of flattened parameters, or fp32 copies of
        those in bf16. At least one, empty if this rank owns nothing: torch's optimizers refuse an
        empty list."""
        return [piece for unit in self.units for piece in unit.pieces]

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept from step to step, by kind; the optimizer has its moments besides."""
        held = {"parameters": list(self.names), "gradients": [], "optimizer": []}
        for unit in self.units:
            held["parameters"].append(unit.parameter_shard)
            held["gradients"].append(unit.gradient_shard)
            if unit.master is not unit.parameter_shard:
                held["optimizer"].append(unit.master)
        return held

    def before_step(self) -> None:
        """Pieces get their `.grad`, in their own dtype: with bf16 gradients, a copy in fp32."""
        if self.phase != "finished":
            raise ValueError("before_step() or step() without finish(): gradients are not yet "
                             "summed over the ranks")  # fmt: skip
        for unit in self.units:
            for piece in unit.pieces:
                gradient = unit.gradient_shard[piece.tensor.place]
                unused = not self.done[piece.parameter] and is_unused(gradient)
                piece.tensor.grad = None if unused else gradient.to(piece.tensor.dtype)
        self.phase = "update"

    def after_step(self) -> None:
        """After the optimizer: everyone gets the parameters that the others have updated, while the
        next forward begins; a layer waits for its own."""
        for unit in self.units:
            unit.wait()  # no forward may have used it since the last step
            unit.parameter_shard.copy_(unit.master)  # itself, unless in bf16
            unit.gathered = self.group.size() == 1
            unit.unshard()
        self.phase = "idle"

    def gather(self) -> None:
        """Every parameter whole, for who reads them outside of the model's forward."""
        for unit in self.units:
            unit.unshard()
            unit.wait()


def add(gradient: Tensor, total: Tensor, first: bool) -> None:
    """As in ddp.py: total = gradient if first, else total += gradient."""
    if gradient.requires_grad or gradient.is_sparse:
        gradient = gradient.detach().to_dense()
    total.copy_(gradient) if first else total.add_(gradient)


def is_unused(gradient: Tensor) -> bool:
    """As in ddp.py. True if no rank used the parameter: every rank sent -0.0, so the sum is -0.0
    too. The gradient is then None, and the optimizer skips the parameter."""
    return bool((gradient == 0).all() and gradient.signbit().all())


# Rung 2: ZeRO-2. A gradient that was summed is needed on its owner only, so the buffer can go.
# Measured (`make memory`, 28.6 M parameters in fp32 on 4 ranks): 457 MB of ddp.py, 286 of ZeRO-1
# become 200.


class Zero2(Zero1):
    """ZeRO-1, and gradients are held as shards: a unit's are reduce-scattered as soon as backward
    has them, and dropped. The price is a reduce-scatter for each microbatch, where ZeRO-1 has one a
    step, and a buffer of Psi to add up in."""

    full_gradients = False

    def _take_gradients(self, unit: Unit) -> Tensor:
        flat, views, gradients = torch.zeros_like(unit.parameters), [], []
        with not_intercepted():
            for p, here in unit.place.items():
                if p.grad is None:
                    flat[here] = -0.0  # see is_unused
                else:
                    views.append(flat[here].view(p.shape))
                    gradients.append(p.grad.detach().to_dense())  # see add()
                p.grad = None
            if views:
                torch._foreach_copy_(views, gradients)
        return flat


# Rung 3: ZeRO-3. The same for parameters: whole when a layer needs them, and only then.
# Measured (the same): 114 MB.


class Zero3(Zero2):
    """ZeRO-2, and parameters are held as shards: a layer is unsharded before its forward and again
    before its backward, one ahead of time, and resharded after each.

    With m microbatches that is nearly 2 m all-gathers of each layer. `reshard_after_forward=False`
    is the middle way: whole from the first forward of a step to the last backward, one all-gather,
    whatever the schedule; between steps a shard. Gathers and sums are matched by order, so ranks
    must run the same layers in the same order.

    A layer is gathered again when a gradient reaches a tensor that its forward returned, in tuples,
    lists and dicts. The loss must not use a tensor that a layer stored in an attribute. A layer
    that returns other objects, or is in a backward with create_graph=True, stays whole until
    finish(). So do parameters of a module that contains other layers (a position table on the
    model). starts: the first layer of each chunk of a pipeline; no layer is gathered ahead across
    the boundary of a chunk."""

    full_parameters = False

    def __init__(
        self, model: nn.Module, *args, reshard_after_forward: bool = True,
        starts: Collection[nn.Module] = (), **kwargs,
    ):  # fmt: skip
        super().__init__(model, *args, **kwargs)
        self.reshard_after_forward = reshard_after_forward
        self.starts = {i for i, layer in enumerate(self.layers) if layer in starts}
        self.starts |= {0, len(self.needs)}
        me = self.me
        model.register_state_dict_post_hook(lambda _, *args: alive(me)._copy_out(*args))
        # By layer: does it contain other layers? Is it a table, whose backward reads no weight?
        self.is_outer = [len(self.layers.keys() & {*layer.modules()}) > 1 for layer in self.layers]
        self.is_table = [type(layer) is nn.Embedding for layer in self.layers]
        # Parameters whose gradient is complete while their unit is unsharded: not those of tables,
        # and not those whose gradient a pipeline's W computes later.
        deferred = {module.weight for module in self.modules
                    if getattr(module, "weight_grad_queue", None) is not None}  # fmt: skip
        self.unsharded = self.done.keys() - deferred
        for i, layer in enumerate(self.layers):
            layer.register_forward_hook(
                not_compiled(lambda *args, i=i: alive(me)._after_forward(i, *args)),
                with_kwargs=True,
            )

    def start(self) -> None:
        super().start()
        self.create_graph, self.keeps = False, set()  # keeps: layers that stay whole in this step
        for unit in self.units:
            unit.reshard()

    def _use(self, i: int, following: int | None) -> None:
        for unit in self.needs[i]:
            unit.unshard()
        if following is not None:
            for unit in self.needs[following]:
                unit.unshard()  # arrives while layer i computes
        for unit in self.needs[i]:
            unit.wait()

    def _before_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if layer not in self.layers:  # a copy of the model
            return
        last = i + 1 in self.starts or in_backward()
        self._use(i, following=None if last else i + 1)
        if in_backward() or self.is_outer[i] or not torch.is_grad_enabled():
            return
        # Hooks before the layer may write to an input in place. Autograd runs newer nodes first: at
        # the node that made an input, all nodes of this layer have run.
        me, xs = self.me, [x for x in tensors_in((args, kwargs)) if x.requires_grad]
        made = [x for x in xs if not x.is_leaf]
        for x in made:
            x.register_hook(lambda _: alive(me)._after_backward(i))
        if xs and not made:  # a leaf's gradient may be complete before: wait for the whole backward

            def leaf_complete(_) -> None:
                handle.remove()
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: alive(me)._after_backward(i))

            handle = xs[0].register_hook(leaf_complete)

    def _after_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        if layer not in self.layers or in_backward():
            return  # a copy; or activation recomputation, and the backward of this layer follows
        me, inputs, outputs = self.me, [*tensors_in((args, kwargs))], [*tensors_in(output)]
        ys = [y for y in outputs if y.requires_grad]
        if self.is_outer[i]:
            if not ys and self.phase != "backward":
                self._reshard(i)
            return
        # In this call the module indexes its only parameter by token ids.
        ids = (torch.int32, torch.int64)
        takes_ids = len(inputs) > 0 and all(x.dtype in ids for x in inputs)
        self.is_table[i] = takes_ids and len(self.layers[layer]) == 1
        if self.is_table[i]:
            self.unsharded -= {*self.layers[layer]}
        for y in ys if not self.is_table[i] else ():
            # Not a hook of y: those of the next input run first, and y may be that. An in-place
            # operation on a view replaces its node, but not that of its base.
            node = (y._base if y._is_view() else y).grad_fn
            if node is not None and not any(y is x for x in inputs):
                node.register_prehook(lambda _: alive(me)._before_backward(i))
        storages = {unit.parameters.untyped_storage()._cdata for unit in self.needs[i]}
        is_view = any(y.untyped_storage()._cdata in storages for y in ys)  # of a parameter
        wants = any(x.requires_grad for x in (*inputs, *self.layers[layer]))
        if wants and not ys and torch.is_grad_enabled():  # outputs in another kind of object
            self.keeps.add(i)
        last = i + 1 in self.starts  # backward begins with it
        if not is_view and not (ys and (last or not self.reshard_after_forward)):
            self._reshard(i)

    def _before_backward(self, i: int) -> None:
        # A backward with create_graph=True makes a graph that reads parameters at other times.
        self.create_graph |= torch.is_grad_enabled()
        # Nothing to gather ahead if a chunk begins here, or the backward before reads no weight.
        first = i in self.starts or self.is_table[i - 1]
        self._use(i, following=None if first else i - 1)

    def _after_backward(self, i: int) -> None:
        if self.reshard_after_forward:
            self._reshard(i)

    def _reshard(self, i: int) -> None:
        for unit in self.needs[i] if i not in self.keeps and not self.create_graph else ():
            unit.reshard()

    def _accumulated(self, p: nn.Parameter) -> None:
        super()._accumulated(p)
        unit = self.unit_of[p]
        if p in self.unsharded and (not unit.gathered or unit.gathering is not None):
            raise ValueError(f"the gradient of {self.names[p]} was computed while its layer was "
                             "not gathered, and is wrong: return every tensor that the loss uses "
                             "from the layer's forward")  # fmt: skip
        done = all(self.done[q] == self.accumulations[q] for q in unit.place)
        if done and not self.create_graph:
            unit.reshard()  # the last use in this step

    def finish(self) -> None:
        super().finish()
        for unit in self.units:
            unit.reshard()

    def after_step(self) -> None:
        narrow = [unit for unit in self.units if unit.master is not unit.parameter_shard]
        if narrow:
            torch._foreach_copy_([unit.parameter_shard for unit in narrow],
                                 [unit.master for unit in narrow])  # fmt: skip
        for unit in self.units:
            unit.reshard()  # if somebody has gathered it since
        self.phase = "idle"

    def _copy_out(self, state: dict, prefix: str, _) -> None:
        """model.state_dict() gave views of memory that is freed here: replace them by copies."""
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, Tensor):
                state[name] = value.clone()
        for unit in self.units:
            unit.reshard()


def not_compiled(hook: Callable) -> Callable:
    """torch.compile(block) traces the block's hooks too."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)


STAGES = {1: Zero1, 2: Zero2, 3: Zero3}

# --- checks ---------------------------------------------------------------------------------------
# Mistakes that would otherwise train the wrong thing silently.


def check_same_parameters(
    parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raises ValueError, on every rank and naming the first difference, if the ranks do not have
    the same parameters, with the same values, in the same order."""
    if group.size() == 1:
        return
    mine = [f"{name} {tuple(p.shape)} {p.dtype} with checksum {checksum(p)}"
            for name, p in parameters]  # fmt: skip
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for i, (a, b) in enumerate(itertools.zip_longest(everyone[0], theirs)):
            if a != b:
                raise ValueError(f"parameter {i} is {a} on rank 0 of the group and {b} on rank "
                                 f"{rank}: every rank must build the same model with the same "
                                 "values (set the same seed, or load one file)")  # fmt: skip


def checksum(p: Tensor) -> int:
    """Sum of the elements' bit patterns as integers: the order of addition does not matter."""
    if p.is_meta:
        return 0
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[p.itemsize]
    return p.detach().view(integer).sum(dtype=torch.int64).item()


def check_accumulations(model: nn.Module, accumulations: dict[nn.Parameter, int]) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad and not accumulations.get(p, 0) >= 1:
            raise ValueError("accumulations must be an int >= 1, or a dict with one for each "
                             f"parameter; for {name} it is {accumulations.get(p)}")  # fmt: skip


def check_optimizer(
    optimizer: torch.optim.Optimizer, pieces: dict[Tensor, Piece], ready: bool
) -> None:
    """Runs before the step of every optimizer in the process. pieces: by tensor and by parameter.
    ready: gradients are summed. Raises ValueError if the optimizer holds a parameter instead of its
    piece, or steps too early."""
    for p in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        piece = pieces.get(p)
        if piece is not None and p is not piece.tensor:
            raise ValueError(f"the optimizer holds {piece.name}, whose shard must be "
                             "updated instead: build the optimizer over "
                             "[piece.tensor for piece in sync.pieces()]")  # fmt: skip
        if piece is not None and not ready:
            raise ValueError("optimizer.step() before the gradients are summed over the ranks: "
                             "call finish() and step(optimizer)")  # fmt: skip


def check_norm_is_local(parameters: list[tuple[str, nn.Parameter]]) -> None:
    """Raises ValueError if tensor-parallel ranks hold a part of a gradient's norm."""
    for name, p in parameters:
        sharded = hasattr(p, "sharding") and p.sharding.size > 1
        if sharded or getattr(p, "partial", False):
            raise ValueError(f"clip: the gradient of {name} is spread over tensor-parallel ranks, "
                             "and so is the norm: call before_step(), clip by the norm over all of "
                             "them, optimizer.step() and after_step()")  # fmt: skip


def alive(reference: weakref.ref) -> Zero1:
    if (sync := reference()) is None:
        raise ValueError(
            "the ZeRO object of this model was deleted, and with it the shards: keep "
            "it in a variable as long as the model is used, or rebuild both"
        )
    return sync


class ShardedParameter(nn.Parameter):
    """The class of a parameter while its memory is freed, or an all-gather fills it. Reading its
    values raises ValueError. Its shape, gradient and other metadata can be read."""

    TENSORS = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that expose values
    METHODS = ("size", "numel", "nelement", "dim", "stride", "storage_offset", "element_size",
               "is_contiguous", "get_device", "is_floating_point", "is_complex",
               "untyped_storage", "requires_grad_", "register_hook",
               "register_post_accumulate_grad_hook", "backward")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        attribute = function.__name__ in ("__get__", "__set__")
        name = function.__self__.__name__ if attribute else function.__name__
        metadata = name not in cls.TENSORS if attribute else name in cls.METHODS
        if metadata:
            with not_intercepted():
                return function(*args, **(kwargs or {}))
        raise ValueError(
            f"{name}: this parameter is sharded by ZeRO, or its all-gather is not complete. Read "
            "it in the forward of its own layer, or call sync.gather() on all ranks first. If the "
            "forward of another layer reads it, pass blocks= with a module that contains both"
        )


not_intercepted = torch._C.DisableTorchFunctionSubclass  # for our own reads of metadata: faster


class ReducedGradient(Tensor):
    """The class of a parameter's `.grad` after finish(). Reading and accumulating raise."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ValueError(
            f"{function}: ZeRO has summed this gradient into the shards of the ranks. Clip with "
            "sync.step(optimizer, clip=...), read piece.tensor.grad after sync.before_step(), and "
            "call sync.start() before the next backward"
        )


# --- cost -----------------------------------------------------------------------------------------


class Use(NamedTuple):
    """A layer of the forward: the unit it needs, whether it multiplies matrices, is a table."""

    unit: int
    matmul: bool
    table: bool = False


class Payload(NamedTuple):
    """Calls, and elements in calls that a matrix multiplication runs beside, and in the others."""

    calls: int
    exposed: int
    hidden: int


def aligned(numel: int) -> int:
    """numel, rounded up to a multiple of 8 (16 bytes in bf16): GPU kernels use slower loads for
    tensors that are not aligned to 16 bytes."""
    return -(-numel // 8) * 8


def padded(numels: Iterable[int], d: int) -> int:
    """Elements of a unit's flat buffer: parameters of `numels` elements, each aligned, in d aligned
    shards of equal length."""
    return d * aligned(-(-sum(map(aligned, numels)) // d))


def predicted_payload(
    sizes: list[int], d: int, uses: list[Use], stage: int = 1, m: int = 1, replicas: int = 1,
    reshard: bool = True,
) -> dict[str, Payload]:  # fmt: skip
    """Per rank and step, by collective. sizes: of the units' buffers (`padded`). Time is counted in
    layers: m times forward and backward. Under another schedule nothing changes but what is hidden:
    the last layer stays whole from a forward to a backward, whichever microbatch's that is, and
    each backward consumes it, so that a naive 2 m all-gathers of it are m."""
    n = len(uses)
    work = [use.matmul for use in (*uses, *reversed(uses))] * m
    first = {use.unit: k for k, use in reversed([*enumerate(uses)])}  # in forward; last in backward
    calls = {"reduce_scatter": [], "all_gather": [], "all_reduce": []}  # (elements, start, end)
    order = range(len(sizes))[::-1]
    rounds = range(1, m + 1) if stage >= 2 else [m]
    full = [2 * n * i - first[unit] for i in rounds for unit in order] + [len(work)]
    for j, start in enumerate(full[:-1]):
        unit, landed = order[j % len(order)], full[j + 1]  # before the next is launched
        calls["reduce_scatter"].append((sizes[unit], start, landed))
        if replicas > 1 and j >= len(full) - 1 - len(order):
            calls["all_reduce"].append((sizes[unit] // d, landed, len(work)))
    if stage < 3:  # after the optimizer, until the layer runs
        calls["all_gather"] = [(sizes[unit], 0, k) for unit, k in first.items()]
    for i in range(m) if stage == 3 else ():
        for k, use in enumerate(uses):  # while the layer before computes
            if reshard or (i == 0 and first[use.unit] == k):
                now = 2 * n * i + k
                calls["all_gather"].append((sizes[use.unit], now - (k > 0), now))
            if reshard and k + 1 < n and not use.table:
                now = 2 * n * (i + 1) - 1 - k
                calls["all_gather"].append((sizes[use.unit], now - 1, now))
    if d == 1:  # only replicas communicate
        calls |= {"reduce_scatter": [], "all_gather": []}
    return {
        operation: Payload(
            len(spans),
            sum(size for size, start, end in spans if not any(work[start:end])),
            sum(size for size, start, end in spans if any(work[start:end])),
        )
        for operation, spans in calls.items()
    }


def predicted_bytes(
    units: list[list[int]], d: int, rank: int, stage: int = 1,
    dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes held per rank after the last backward, with AdamW: two moments, and for bf16 an fp32
    master copy, for each element that this rank owns (padding has no moments). units: for each
    unit, the sizes of its parameters. ZeRO, section 3.1."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    whole = owned = 0
    for numels in units:
        size, start = padded(numels, d), 0
        mine = range(size // d * rank, size // d * (rank + 1))
        for n in numels:
            owned += max(0, min(start + n, mine.stop) - max(start, mine.start))
            start += aligned(n)
        whole += size
    return {
        "parameters": whole // (d if stage >= 3 else 1) * dtype.itemsize,
        "gradients": whole // (d if stage >= 2 else 1) * grad_dtype.itemsize,
        "optimizer": 2 * owned * max(4, dtype.itemsize)
        + (whole // d * 4 if dtype.itemsize < 4 else 0),
    }


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, m, steps = gpt.GPTConfig(3, 2, 32, 251, 32), 2, 3  # an odd vocabulary: uneven shards
    with measure.Report("zero.py") as report:
        world, tokens = report.group.size(), data.example()
        k = max(k for k in range(1, max(2, world)) if world % k == 0)  # the hybrid's shard size
        mesh = dist.init_device_mesh("cpu", (world // k, k), mesh_dim_names=("replica", "shard"))
        across, within = mesh["replica"].get_group(), mesh["shard"].get_group()

        def train(rows: range, attach: Callable | None, dtype=torch.float64, seen=None):
            """Train on `rows` of each batch, in m microbatches. One process has all of them."""
            model = gpt.build(config, seed=0, dtype=dtype)
            named = dict(gpt.named_parameters(model))
            sync = attach(model) if attach else None
            pieces = [piece.tensor for piece in sync.pieces()] if sync else named.values()
            optimizer, losses, held = torch.optim.AdamW(pieces, lr=1e-2, eps=1e-4), [], None
            for step in range(steps):
                # The last step is watched, from the update before it on: its layers wait for that.
                with seen if seen and step + 1 == steps else contextlib.nullcontext():
                    if sync and step > 0:
                        sync.after_step()
                    sync.start() if sync else optimizer.zero_grad()
                    x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
                    losses.append(torch.zeros((), dtype=torch.float64))
                    for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                        loss = gpt.cross_entropy(model(xs), ys) / (4 * world * config.seq_len)
                        loss.backward()
                        losses[-1] += loss.detach()
                    if sync:
                        sync.finish()
                        held = measure.bytes_by_kind(sync.held(), optimizer)
                        sync.before_step()
                    optimizer.step()
            if sync:
                sync.after_step()
                sync.gather()
            return losses, named, model, sync, held

        losses, whole, *_ = train(range(4 * world), None)
        rows = range(4 * report.group.rank(), 4 * report.group.rank() + 4)
        for what, stage, d, options in (
            ("ZeRO-1", 1, world, {}), ("ZeRO-2", 2, world, {}), ("ZeRO-3", 3, world, {}),
            ("ZeRO-3 kept", 3, world, {"reshard_after_forward": False}),
            (f"ZeRO-3 {world // k} x {k}", 3, k, {"replicas": across}),
        ):  # fmt: skip
            group = within if "replicas" in options else report.group
            attach = functools.partial(STAGES[stage], group=group, accumulations=m, **options)
            seen = measure.Collectives({"shard": group, "replica": across})
            mine, named, model, sync, held = train(rows, attach, seen=seen)
            for loss in mine:
                dist.all_reduce(loss)
            report.losses(what, mine, losses)
            cut = {n: whole[n].grad.flatten()[at : at + t.numel()] for n, t, _, at in sync.pieces()}
            gradients = {n: t.grad for n, t, _, _ in sync.pieces()}
            report.close(f"{what} max |d gradient|, my pieces", gradients, cut)
            report.close(f"{what} max |d parameter|", named, whole)

            uses = [
                Use(sync.units.index(unit), "Linear" in str(layer), type(layer) is nn.Embedding)
                for (unit,), layer in zip(sync.needs, layers(model), strict=True)
            ]
            reshard = options.get("reshard_after_forward", True)
            units = [[p.numel() for p in unit.place] for unit in sync.units]
            sizes = [padded(numels, d) for numels in units]
            payload = predicted_payload(sizes, d, uses, stage, m, world // d, reshard)
            for operation, predicted in payload.items():
                total, hidden = (seen.total(None, operation, hidden=h) for h in (None, True))
                measured = Payload(total.calls, total.payload - hidden.payload, hidden.payload)
                if predicted.calls or measured.calls:
                    report.costs("a step, elements", f"{what} {operation}", predicted, measured)
            for table, *dtypes in (
                ("bytes, float64", torch.float64, None), ("bytes, bf16", torch.bfloat16, None),
                ("bytes, bf16 gradients", torch.bfloat16, torch.bfloat16),
            ):  # fmt: skip
                *_, held = train(rows, functools.partial(attach, grad_dtype=dtypes[1]), dtypes[0])
                predicted = predicted_bytes(units, d, group.rank(), stage, *dtypes)
                report.costs(table, what, predicted, held)


if __name__ == "__main__":
    main()
