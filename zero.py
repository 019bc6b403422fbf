"""ZeRO-1 and ZeRO-2: data parallelism with sharded optimizer state and, in ZeRO-2, gradients.

                gradients                          sums                      parameters
        rank 0  [a0|b0] -+                  +-> [a] -> optimizer -> [a] -+              +-> [a|b]
                         +- reduce-scatter -+                            +- all-gather -+
        rank 1  [a1|b1] -+                  +-> [b] -> optimizer -> [b] -+              +-> [a|b]

The all-reduce of ddp.py is a reduce-scatter followed by an all-gather. After the reduce-scatter,
each rank has one shard of the summed gradients. ZeRO-1 runs the optimizer at this point, on one
shard of the parameters, and then all-gathers parameters instead of gradients. Each rank stores
optimizer state for its shard only, and the communication volume does not change. ZeRO-2 also shards
the gradients. ZeRO-3, in zero3.py, also shards the parameters.

Psi is the number of parameters, d the number of ranks that shard state, m the number of
microbatches per step. The payload of a collective is the number of elements of its full tensor: the
input of a reduce-scatter, the output of an all-gather. An all-reduce sends as much as one of each.

    per rank  bytes after finish()                    payload per step
              parameters  gradients  optimizer state  reduce-scatter  all-gather
    ddp.py    2 Psi       4 Psi      12 Psi           Psi, as an all-reduce
    ZeRO-1    2 Psi       4 Psi      12 Psi / d       Psi             Psi
    ZeRO-2    2 Psi       4 Psi / d  12 Psi / d       m Psi           Psi
    ZeRO-3    2 Psi / d   4 Psi / d  12 Psi / d       m Psi           up to 2 m Psi

The bytes are for bf16 parameters and fp32 gradients. The optimizer state is an fp32 master copy of
the parameters, stored by ZeRO or DDP, and the two moments of AdamW. In fp32, the factors are 4, 4
and 8. During a step, ZeRO-2 also stores the gradients that are not reduced yet, and one flat buffer
for the gradients that are being reduced. In bf16, ZeRO-1 also needs such a buffer.

In hybrid sharding, each of several groups of d ranks stores all shards. The ranks that store the
same shard all-reduce its Psi / d gradients.

    torchrun --standalone --nproc-per-node 2 zero.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 3.1, 5 and 7; Zhao et al. 2023, PyTorch
FSDP (arXiv 2304.11277), section 3.2 (flat, padded buffers; hybrid sharding).
"""

import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ddp import (
    Piece,
    accumulate,
    all_gather,
    check_accumulations,
    check_norm_is_local,
    check_optimizer,
    check_same_parameters,
    gradient_group,
    is_unused,
    reduce_scatter,
)

# --- version 1: the whole idea of ZeRO-1 ----------------------------------------------------------


class MinimalZero1:
    """ZeRO-1 with two flat buffers. The parameters become views of one, and their gradients of the
    other. The optimizer updates this rank's shard, so it stores 1/d of the moments.

        zero1 = MinimalZero1(model.parameters(), group)
        optimizer = AdamW([zero1.shard])
        zero1.start()                     # not zero_grad(): each .grad must stay a view
        for x, y in microbatches:         # gradients accumulate in the flat buffer
            loss = F.cross_entropy(model(x), y, ignore_index=-1, reduction="sum")
            (loss / tokens).backward()
        zero1.step(optimizer)             # instead of optimizer.step()

    tokens: the number of valid targets in the global batch. Every rank divides its loss by it, so
    the sum of the ranks' gradients is the gradient of the global mean loss.
    parameters: equal on all ranks, and of one dtype. Frozen parameters are left unchanged.

    Not supported: fp32 master copies of bf16 parameters; clipping, because clip_grad_norm_([shard])
    would use the norm of one shard; model.to() after construction, which replaces the views.

    After step(), only this rank's shard of the gradients has been summed. The gradient of an unused
    parameter is 0 and not None, so AdamW applies weight decay to it."""

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup):
        trainable = [p for p in parameters if p.requires_grad]
        d, rank, self.group = group.size(), group.rank(), group
        n = -(-sum(p.numel() for p in trainable) // d)  # elements per shard
        self.parameters = trainable[0].detach().new_zeros(n * d)  # may end with padding
        self.gradients = torch.zeros_like(self.parameters)
        start = 0
        for p in trainable:
            end = start + p.numel()
            self.parameters[start:end] = p.detach().flatten()
            p.data = self.parameters[start:end].view_as(p)
            p.grad = self.gradients[start:end].view_as(p)
            start = end
        mine = slice(rank * n, (rank + 1) * n)
        self.shard = self.parameters[mine].requires_grad_()
        self.shard.grad = self.gradients[mine]

    def start(self) -> None:
        self.gradients.zero_()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        # Both collectives work in place: the shard is a slice of the buffer.
        reduce_scatter(self.shard.grad, self.gradients, group=self.group)  # payload: Psi
        optimizer.step()
        all_gather(self.parameters, self.shard.detach(), group=self.group)  # payload: Psi


# --- the full version -----------------------------------------------------------------------------
# ZeRO-2 saves (1 - 1/d) of the gradient memory. As soon as backward has computed the gradients of a
# layer, they are reduce-scattered, added to a stored shard, and freed. This costs m reduce-scatters
# per layer and step instead of one.
#
# The full version has one flat buffer per layer instead of one per model, so the collective of one
# layer overlaps with the computation of other layers. For each parameter that lies at least partly
# in this rank's shards, the optimizer gets a tensor with that part, so parameter groups work. Also
# supported: bf16 with fp32 master weights, unused and tied parameters, gradient clipping,
# load_state_dict(), hybrid sharding. Most misuse raises ValueError.


def aligned(numel: int) -> int:
    """numel, rounded up to a multiple of 8. GPU kernels are slower on unaligned tensors."""
    return -(-numel // 8) * 8


def padded(numels: Iterable[int], d: int) -> int:
    """The number of elements in a unit's flat buffer for d ranks. numels: the sizes of its
    parameters."""
    return d * aligned(-(-sum(map(aligned, numels)) // d))


class Unit:
    """Parameters of one layer that are communicated together, in one flat buffer. A layer usually
    has one unit, see unit_key().

        parameters  [ p0 | p1      | p2  | padding ]       d * n elements
        shards      [ rank 0 | rank 1 | .. | rank d-1 ]    n elements each

    A shard may contain several parameters, and a parameter may span several shards. Parameters and
    shards start at multiples of 8 elements, see aligned(). A piece is the range of a parameter that
    lies in this rank's shard. Padding is in no piece, so it has no effect on the gradient norm.

    ZeRO-2 stores only this rank's shard of the gradients. The parameters of a unit have one dtype,
    and are all trainable or all frozen. A frozen unit has no gradients and no pieces. Only ZeRO-3
    has frozen units. It uses the subclass in zero3.py."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup, stage: int,
        grad_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None,
    ):  # fmt: skip
        like = members[0][1].detach()
        self.group, self.trainable = group, members[0][1].requires_grad
        is_narrow = like.dtype.itemsize < 4  # bf16
        grad_dtype = (grad_dtype or torch.float32) if is_narrow else like.dtype
        self.reduce_dtype = reduce_dtype if is_narrow and reduce_dtype else like.dtype

        size = padded([p.numel() for _, p in members], group.size())
        n = size // group.size()
        self.mine = slice(group.rank() * n, (group.rank() + 1) * n)  # this rank's shard

        # The parameters become views of a flat buffer.
        self.parameters = like.new_zeros(size)
        self.place: dict[nn.Parameter, slice] = {}  # in the flat buffer
        end = 0
        for _, p in members:
            here = self.place[p] = slice(end, end + p.numel())
            end += aligned(p.numel())
            self.parameters[here] = p.detach().flatten()
            p.data = self.parameters[here].view_as(p)
            p.grad = None
        self.parameter_shard = self.take_shard()

        # ZeRO-1 also has a flat buffer for gradients. ZeRO-2 has only a shard.
        self.gradients: Tensor | None = None
        self.gradient_of: dict[nn.Parameter, Tensor] = {}  # views of `gradients`
        if self.trainable and stage == 1:
            self.gradients = like.new_zeros(size, dtype=grad_dtype)
            self.gradient_shard = self.gradients[self.mine]
            for p, here in self.place.items():
                self.gradient_of[p] = self.gradients[here].view_as(p)
                # p.grad_dtype is a tensor attribute of PyTorch: the dtype that p.grad must have.
                # None allows any. A tied matrix can get two gradients per backward, which autograd
                # sums before it calls the hook Zero1._accumulated(). With the dtype of the buffer
                # as p.grad_dtype, it sums them in that dtype. gpt.py sets tied_name on tied
                # matrices. ZeRO-2 does not set p.grad_dtype, so that all gradients have the dtype
                # of the parameter.
                p.grad_dtype = grad_dtype if hasattr(p, "tied_name") else None
        else:
            self.gradient_shard = like.new_zeros(n if self.trainable else 0, dtype=grad_dtype)
        self.placeholder_of = {p: ReducedGradient.like(p) for p in self.place}

        # The optimizer updates pieces of `master`. For fp32 parameters, this is the shard. For bf16
        # parameters, it is an fp32 copy, because bf16 rounding would lose small updates.
        self.master = self.parameter_shard
        if is_narrow and self.trainable:
            self.master = self.parameter_shard.float()
        self.pieces: list[Piece] = []
        self.place_in_shard: list[slice] = []  # of each piece
        for name, p in members if self.trainable else ():
            start = max(self.place[p].start, self.mine.start)
            stop = min(self.place[p].stop, self.mine.stop)
            if start < stop:
                here = slice(start - self.mine.start, stop - self.mine.start)
                self.add_piece(name, p, here, start - self.place[p].start)

        self.gathered = True  # `parameters` is complete, or `gathering` is filling it
        self.gathering: dist.Work | None = None
        self.sum: Tensor | None = None  # written by `reducing`, not yet added to the shard
        self.first = True  # whether `sum` replaces the shard rather than being added
        self.reducing: dist.Work | None = None

    def take_shard(self) -> Tensor:
        """This rank's shard of the parameters: a slice of the buffer."""
        return self.parameters[self.mine]

    def add_piece(self, name: str, p: nn.Parameter, here: slice, start: int) -> None:
        self.pieces.append(Piece(name, self.master[here].detach().requires_grad_(), p, start))
        self.place_in_shard.append(here)

    def allow_reads(self, allowed: bool) -> None:
        """Allow reads of the parameters, or make them raise an error (see ShardedParameter)."""
        for p in self.place:
            if type(p) in (nn.Parameter, ShardedParameter):  # leave other subclasses unchanged
                p.__class__ = nn.Parameter if allowed else ShardedParameter

    def unshard(self) -> None:
        """Start to all-gather the parameters, unless this is done or started. Call wait() before
        use."""
        if self.gathered:
            return
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
        """Mark the full parameters as out of date, which makes reads raise an error. No-op with one
        rank."""
        if self.group.size() == 1:
            return
        self.wait()
        self.gathered = False
        self.allow_reads(False)

    def refresh(self) -> None:
        """If gathered, copy this rank's slice of the parameters to the shard and to `master`."""
        if self.gathered and self.gathering is None:
            self.parameter_shard.copy_(self.parameters[self.mine])
            self.master.detach().copy_(self.parameter_shard)

    def reduce(self, flat: Tensor, first: bool) -> None:
        """Start the reduce-scatter of `flat`. Call wait_reduce() before the next one. If `first`,
        the sum replaces the stored shard, else it is added to it."""
        if self.group.size() > 1:
            flat = flat.to(self.reduce_dtype)
        self.sum, self.first = flat[self.mine], first  # a view: keeps `flat` until wait_reduce()
        if self.group.size() > 1:
            self.reducing = reduce_scatter(  # payload: the unit
                self.sum, flat, group=self.group, async_op=True
            )

    def reduce_over_replicas(self, replicas: dist.ProcessGroup) -> None:
        """Start the all-reduce of the gradient shard. Call wait_reduce() before using it."""
        self.sum, self.first = self.gradient_shard.to(self.reduce_dtype), True
        self.reducing = dist.all_reduce(self.sum, group=replicas, async_op=True)  # payload: shard

    def wait_reduce(self) -> None:
        """Wait for the pending reduction, if any. Its result replaces the gradient shard or is
        added to it, see reduce()."""
        if self.reducing is not None:
            self.reducing.wait()
        if self.sum is not None:
            # In fp32, the `sum` of ZeRO-1 is the shard itself, so this copy has no effect.
            accumulate(self.sum, self.gradient_shard, self.first)
        self.sum = self.reducing = None


def layers(model: nn.Module, blocks: Collection[nn.Module] | None = None) -> dict:
    """{layer: its parameters}, in the order of model.modules(). A layer is a module whose
    parameters ZeRO gathers before its forward. It is either a block, or a module that directly
    holds parameters and is not inside a block. A block includes the parameters of all its
    submodules.

    By default, the outermost modules of two kinds are blocks: (1) elements of an nn.ModuleList or
    nn.ModuleDict that are not such containers, (2) modules that directly hold parameters and do not
    contain an nn.ModuleList or nn.ModuleDict. The model itself is no block. `blocks` replaces the
    default.

    Raises ValueError if a layer has no forward()."""
    containers = (nn.ModuleDict, nn.ModuleList)
    found: dict[nn.Module, list[nn.Parameter]] = {}
    if unknown := set(blocks or ()) - set(model.modules()):
        raise ValueError(f"blocks: the model does not contain {unknown.pop()}")

    def visit(name: str, module: nn.Module, is_block: bool) -> None:
        own = list(module.parameters(recurse=False))
        if blocks is None and own and module is not model:
            is_block |= not any(isinstance(m, containers) for m in module.modules())
        parameters = list(module.parameters()) if is_block else own
        if parameters:
            if getattr(module.forward, "__func__", None) is nn.Module.forward:
                raise ValueError(
                    f"{name} has parameters but no forward(), so ZeRO cannot tell when to gather "
                    "them: pass blocks= with every block, including the module that uses them"
                )
            found[module] = parameters
        for child_name, child in module.named_children() if not is_block else ():
            is_element = isinstance(module, containers) and not isinstance(child, containers)
            is_child_block = is_element if blocks is None else child in blocks
            visit(f"{name}.{child_name}", child, is_child_block)

    visit(type(model).__name__, model, model in (blocks or ()))
    return found


def unit_key(p: nn.Parameter, layer: list[nn.Parameter]) -> tuple:
    """Parameters of a layer with equal keys form one unit.

    Some gradients are also summed over pipeline or tensor-parallel ranks. A shard of such a
    parameter must start and end at the same elements on all these ranks. So such parameters are
    kept out of the main unit of the layer if their offsets in it would differ between ranks. There
    are two cases. (1) A matrix tied across two pipeline stages, which has a tied_name. (2) If
    matrices of the layer are split unevenly: the parameters that tensor_parallel.py marks as
    partial, which means that each rank computes only part of their gradient. split.sizes: the full
    sizes of the fused matrices along the split dimension.

    A parameter with a smaller gradient_group(), see ddp.py, is sharded over other ranks, so it is
    not in the main unit either."""
    known = [q.distribution for q in layer if hasattr(q, "distribution")]
    splits = [split for distribution in known for split in distribution.splits]
    is_uneven = any(n % split.group.size() for split in splits for n in split.sizes)
    is_partial = is_uneven and hasattr(p, "distribution") and p.distribution.partial is not None
    replicas = gradient_group(p, None)
    return getattr(p, "tied_name", None), p.dtype, p.requires_grad, is_partial, replicas


class Zero1:
    """ZeRO-1: each rank's optimizer updates one shard of every unit, and stores optimizer state for
    it only. The model is not wrapped: Zero1 attaches hooks to its layers and parameters.

        sync = Zero1(model, accumulations=m)
        optimizer = AdamW([piece.tensor for piece in sync.pieces()])
        sync.start()                      # instead of optimizer.zero_grad()
        for x, y in microbatches:         # m of them
            loss = F.cross_entropy(model(x), y, ignore_index=-1, reduction="sum")
            (loss / tokens).backward()
        sync.finish()                     # gradient shards are sums over the ranks
        sync.step(optimizer, clip=1.0)    # instead of clip_grad_norm_() and optimizer.step()

    tokens: the number of valid targets in the global batch, from global_count() in ddp.py.

    model: must have the same parameters, with the same values, on all ranks of `group` and
        `replicas`. Buffers are neither checked nor synchronized. Frozen parameters are not updated.
    group: the ranks over which the state is sharded. Default: all ranks. The state of a parameter
        with another gradient_group() (ddp.py) is sharded over that group.
    accumulations: the number of gradients that a parameter receives per step, which is the number
        of microbatches m. Pass a dict {parameter: count} if it differs between parameters. A
        parameter that receives fewer is reduced in finish(), without an error.
    replicas: in hybrid sharding, the ranks that store the same shards, including this rank.
    grad_dtype: the dtype in which gradients of bf16 parameters are accumulated over microbatches.
        Default: fp32. No effect on fp32 parameters.
    reduce_dtype: the dtype in which gradients of bf16 parameters are sent. Default: bf16; fp32
        sends twice the bytes. No effect on fp32 parameters, or with one rank.
    blocks: modules that are one layer each: all parameters of a block are gathered together.
        Default: see layers().
    overlap: False reduces all gradients in finish(). DDP in ddp.py explains when to use it. ZeRO-2
        then stores full gradients until finish(), in the dtype of the parameters.

    Raises ValueError if ranks have different parameters or values, if requires_grad changes later,
    if a call is missing or out of order, or if the optimizer holds a model parameter. If only one
    rank raises an error, the others wait in their next collective until it times out."""

    stage = 1
    unit_class = Unit  # ZeRO-3 has another one

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None,
        accumulations: int | dict[nn.Parameter, int] = 1,
        replicas: dist.ProcessGroup | None = None, grad_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None, blocks: Collection[nn.Module] | None = None,
        overlap: bool = True,
    ):  # fmt: skip
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("there is no process group: call dist.init_process_group() first")
        # Two pipeline stages may hold copies of a tied matrix. Checkpoints need one name for both.
        self.named = [(getattr(p, "tied_name", name), p) for name, p in model.named_parameters()]
        self.parameters = [(name, p) for name, p in self.named if p.requires_grad]
        self.name_of = {p: name for name, p in self.named}
        self.group, self.replicas, self.overlap = group, replicas, overlap
        if isinstance(accumulations, int):
            accumulations = dict.fromkeys(model.parameters(), accumulations)
        check_accumulations(model, accumulations)
        self.accumulations = {p: accumulations[p] for _, p in self.parameters}
        for name, p in self.named if replicas is not None else ():
            if gradient_group(p, group) is not group:
                raise ValueError(f"{name} has a gradient group of its own, which hybrid sharding "
                                 "does not support: leave out `replicas`")  # fmt: skip
        for ranks in (group,) if replicas is None else (group, replicas):
            check_same_parameters(self.named, ranks)
        self.layers, self.modules = layers(model, blocks), {*model.modules()}
        self._make_units(grad_dtype, reduce_dtype)
        self._attach_hooks(model)

        # A round reduce-scatters every unit once. ZeRO-2 has a round per microbatch. A pipeline
        # rank that holds the first and the last stage runs two backwards per microbatch, and each
        # adds a gradient to a tied matrix, whose count is 2 m. The number of rounds is the smallest
        # count.
        one_round = self.stage == 1 or not overlap
        self.rounds = 1 if one_round else min(self.accumulations.values(), default=1)
        # The order in a round. Backward usually completes the last unit first.
        self.order = [unit for unit in reversed(self.units) if unit.trainable]
        self.position = {unit: i for i, unit in enumerate(self.order)}
        self.phase = "idle"  # then "backward", "finished", "update", "idle"
        self.start()  # so that the call may be omitted before the first step

    def _make_units(self, *dtypes: torch.dtype | None) -> None:
        self.units: list[Unit] = []  # in the order of the layers
        self.unit_of: dict[nn.Parameter, Unit] = {}
        self.needs: list[list[Unit]] = []  # by layer
        for parameters in self.layers.values():
            # A frozen parameter has no gradient or optimizer state. Only ZeRO-3 shards it. If
            # several layers share a parameter, it is in a unit of the first of them.
            sharded = [p for p in parameters if p.requires_grad or self.stage == 3]
            key_of = {p: unit_key(p, parameters) for p in sharded if p not in self.unit_of}
            for key in dict.fromkeys(key_of.values()):
                members = [(self.name_of[p], p) for p in key_of if key_of[p] == key]
                group = gradient_group(members[0][1], self.group)
                unit = self.unit_class(members, group, self.stage, *dtypes)
                self.units.append(unit)
                self.unit_of.update((p, unit) for _, p in members)
            self.needs.append(list(dict.fromkeys(self.unit_of[p] for p in sharded)))
        if self.parameters and not self.pieces():  # PyTorch's optimizers reject an empty list
            name, p = self.parameters[0]
            self.unit_of[p].add_piece(name, p, slice(0, 0), 0)

    def _attach_hooks(self, model: nn.Module) -> None:
        for i, layer in enumerate(self.layers):
            hook = not_compiled(weak(self._before_forward, i))
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        for _, p in self.parameters:
            p.register_post_accumulate_grad_hook(weak(self._accumulated))
        gather, loaded = weak(self.gather), weak(self._loaded)
        model.register_state_dict_pre_hook(lambda *_: gather())
        model.register_load_state_dict_pre_hook(lambda *_: gather())
        for module in self.modules:
            module.register_load_state_dict_post_hook(lambda module, _: loaded(module))
        # check_optimizer() looks up each tensor of the optimizer here, and raises if the Piece has
        # another tensor. A model parameter in the optimizer must raise on every rank, even on one
        # that has no piece of it. So every model parameter is mapped to a Piece, too.
        pieces = self.pieces()
        self.piece_of = {p: Piece(name, pieces[0].tensor, p, 0) for name, p in self.parameters}
        self.piece_of |= {piece.tensor: piece for piece in pieces}
        me = weakref.ref(self)  # not weak(): this hook must do nothing after this object is deleted
        check = register_optimizer_step_pre_hook(lambda o, *_: me() and me()._check(o))
        weakref.finalize(self, check.remove)

    def start(self) -> None:
        """Call before the first backward of a step. Until finish(), every `.grad` is None or a
        gradient of this rank.

        Before before_step(), start() can also abandon a step: it waits for the pending collectives
        and discards the gradients. All ranks must have launched the same collectives, for example
        because all stopped after the same microbatch and had used the same parameters."""
        if self.phase == "update":
            raise ValueError("start() before after_step(): call after_step() after "
                             "optimizer.step(), to update the model")  # fmt: skip
        with not_intercepted():
            for name, p in self.named:
                if p.requires_grad != (p in self.accumulations):
                    change = "unfrozen" if p.requires_grad else "frozen"
                    raise ValueError(f"{name} was {change} after ZeRO was constructed: construct a "
                                     "new model and ZeRO after each change of "
                                     "requires_grad")  # fmt: skip
            for unit in self.units:
                unit.wait_reduce()
                storage = unit.parameters.untyped_storage()._cdata
                for p in unit.place:
                    if p.untyped_storage()._cdata != storage:
                        raise ValueError(f"{self.name_of[p]}: its data was replaced after ZeRO was "
                                         "constructed, for example by model.to(): call model.to() "
                                         "before constructing ZeRO")  # fmt: skip
                    p.grad = None
                for piece in unit.pieces:
                    piece.tensor.grad = None
        self.missing = self.accumulations.copy()  # gradients still expected, per parameter
        # For each reduce-scatter, in launch order: the number of parameters whose gradient is not
        # complete. All units of round 0 come first, then all units of round 1, and so on.
        self.waiting = [len(unit.place) for unit in self.order] * self.rounds
        self.launched = 0  # reduce-scatters started in this step
        self.phase = "backward"

    def _accumulated(self, p: nn.Parameter) -> None:
        """Autograd calls this after it has stored a gradient of p in p.grad. Start every
        reduce-scatter whose gradients are complete and which is next in order."""
        if p.grad is None:  # a custom backward returned None
            return
        if self.phase != "backward":
            raise ValueError("backward() ran before start() or after finish(): call start() before "
                             "the first backward. If it computes gradients for another model only, "
                             "call backward(inputs=[*other.parameters()])")  # fmt: skip
        unit, count = self.unit_of[p], self.accumulations[p]
        if self.missing[p] == 0:
            raise ValueError(f"{self.name_of[p]} received {count + 1} gradients in one step, "
                             f"but accumulations is {count}: pass accumulations=m for m "
                             "microbatches")  # fmt: skip
        if self.stage == 1:
            accumulate(p.grad, unit.gradient_of[p], first=self.missing[p] == count)
            p.grad = None
        self.missing[p] -= 1
        # A round has count / self.rounds gradients of p. For example, with m = 2 and a count of 4,
        # the first two gradients complete round 0, and the others round 1.
        done = count - self.missing[p]
        rounds, rounds_before = done * self.rounds // count, (done - 1) * self.rounds // count
        if rounds > rounds_before:  # p has completed the round with index rounds_before
            self.waiting[rounds_before * len(self.order) + self.position[unit]] -= 1
        # Ranks may complete units in different orders, but collectives are matched by call order.
        # So units are launched in order, and a complete unit waits for all earlier ones.
        while (self.overlap and self.launched < len(self.waiting)
               and self.waiting[self.launched] == 0):  # fmt: skip
            self._launch()

    def _launch(self) -> None:
        """Start the next reduce-scatter."""
        self._wait_reduce()  # so that at most one flat buffer, or bf16 copy of it, is in use
        round_, i = divmod(self.launched, len(self.order))
        unit = self.order[i]
        unit.reduce(self._take_gradients(unit), first=round_ == 0)
        self.launched += 1

    def _wait_reduce(self) -> None:
        """Wait for the reduce-scatter that was started last. In the last round, also start the
        all-reduce over the replicas."""
        if self.launched == 0:
            return
        round_, i = divmod(self.launched - 1, len(self.order))
        unit = self.order[i]
        unit.wait_reduce()
        if round_ == self.rounds - 1 and self.replicas is not None and self.replicas.size() > 1:
            unit.reduce_over_replicas(self.replicas)

    def _take_gradients(self, unit: Unit) -> Tensor:
        """The flat gradients to reduce. Those of an unused parameter are -0.0. If all ranks send
        -0.0, the sum is -0.0, and is_unused() recognizes that no rank used the parameter."""
        for p, gradient in unit.gradient_of.items():
            if self.missing[p] == self.accumulations[p]:
                gradient.fill_(-0.0)
        return unit.gradients

    def finish(self) -> None:
        """Call after the last backward of a step. On return, this rank's gradient shards are sums
        over all ranks. If a parameter received fewer gradients than `accumulations`, the
        reduce-scatter that waits for it and all later ones are started here. Until the next
        start(), using the `.grad` of a model parameter raises ValueError."""
        if self.phase != "backward":
            raise ValueError("finish() without start(): call start() before the first backward of "
                             "a step, and finish() once after the last")  # fmt: skip
        while self.launched < len(self.waiting):
            self._launch()
        self._wait_reduce()
        for unit in self.order:
            unit.wait_reduce()  # for the all-reduce over the replicas
            with not_intercepted():
                for p, placeholder in unit.placeholder_of.items():
                    p.grad = placeholder
        self.phase = "finished"

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor | None:
        """Call after finish(). Runs before_step(), clips the gradients to the global norm `clip`,
        runs optimizer.step() and after_step(). Returns the norm before clipping; None without clip.

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
            pieces = [piece.tensor for piece in self.pieces()]
            local = nn.utils.get_total_norm([t.grad for t in pieces if t.grad is not None])
            square = local.to(pieces[0].device, torch.float64).square()
            if self.group.size() > 1:  # not over the replicas, which have equal shards
                dist.all_reduce(square, group=self.group)  # payload: 1
            norm = square.sqrt()
            nn.utils.clip_grads_with_norm_(pieces, clip, norm)
        optimizer.step()
        self.after_step()
        return norm

    def before_step(self) -> None:
        """Set the `.grad` of each piece to its reduced gradient, or to None if no rank used the
        parameter in this step. Without this call, optimizer.step() raises ValueError."""
        if self.phase != "finished":
            raise ValueError("before_step() or step() without finish(): call finish() first, to "
                             "reduce the gradients")  # fmt: skip
        for unit in self.order:
            for piece, here in zip(unit.pieces, unit.place_in_shard, strict=True):
                p, gradient = piece.parameter, unit.gradient_shard[here]
                unused = self.missing[p] == self.accumulations[p] and is_unused(gradient)
                piece.tensor.grad = None if unused else gradient.to(piece.tensor.dtype)
        self.phase = "update"

    def after_step(self) -> None:
        """Call after optimizer.step(). Copies the updated masters to this rank's shards of the
        parameters, and starts to all-gather them. The next forward waits for them layer by
        layer."""
        for unit in self.units:
            unit.reshard()
        copied = [unit for unit in self.units if unit.master is not unit.parameter_shard]
        if copied:
            shards = [unit.parameter_shard for unit in copied]
            torch._foreach_copy_(shards, [unit.master for unit in copied])
        self.start_gathering()
        self.phase = "idle"

    def start_gathering(self) -> None:  # ZeRO-3 overrides it
        for unit in self.units:
            unit.unshard()

    def gather(self) -> None:
        """All-gather all parameters. Call on all ranks before reading a parameter outside of the
        model's forward. model.state_dict() and load_state_dict() call it, so call these on all
        ranks too. Manual writes to a bf16 parameter are lost: use load_state_dict()."""
        for unit in self.units:
            unit.unshard()
            unit.wait()

    def pieces(self) -> list[Piece]:
        """The tensors that this rank's optimizer must update. The optimizer must be element-wise,
        like AdamW and SGD. If all shards of this rank are padding, there is one empty piece.

        To resume a run, save the pieces and the optimizer state of every rank. In bf16, the values
        in model.state_dict() are rounded. checkpoint.py saves pieces by name and start, so that
        they can be loaded on a different number of ranks."""
        return [piece for unit in self.units for piece in unit.pieces]

    def replicas_of(self, p: nn.Parameter) -> dist.ProcessGroup | None:
        """The ranks that have the same piece of p. None: only this rank has it."""
        return self.replicas

    def held(self) -> dict[str, list[Tensor]]:
        """Tensors whose storages are all that this object keeps between steps, without the moments
        in the optimizer. Some share a storage, and the gradient shard of ZeRO-1 is a view of the
        full buffer. tools/verify/counting.py counts storages."""
        held = {"parameters": [p for _, p in self.named], "gradients": [], "optimizer": []}
        for unit in self.units:
            held["parameters"].append(unit.parameter_shard)
            held["gradients"].append(unit.gradient_shard)
            if unit.master is not unit.parameter_shard:
                held["optimizer"].append(unit.master)
        return held

    def _before_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Wait for the updated parameters of layer i."""
        if layer not in self.modules:  # a deep copy of the model, which keeps these hooks
            return
        for unit in self.needs[i]:
            unit.wait()

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer, self.piece_of, ready=self.phase == "update")

    def _loaded(self, module: nn.Module) -> None:
        """Update the shards after load_state_dict() has written to the parameters of `module`."""
        if module not in self.modules:  # a deep copy of the model, which keeps these hooks
            return
        for name, p in module.named_parameters(recurse=False):
            if p not in self.name_of:
                raise ValueError(f"load_state_dict(assign=True) replaced {name}: ZeRO would train "
                                 "the old tensor. Load with assign=False")  # fmt: skip
            if p in self.unit_of:
                self.unit_of[p].refresh()


def weak(method: Callable, *bound) -> Callable:
    """A hook that calls method(*bound, *args). It has only a weak reference to the ZeRO object,
    because otherwise the model would keep the object and its process group alive."""
    reference = weakref.WeakMethod(method)

    def hook(*args):
        if (alive := reference()) is None:
            raise ValueError("the ZeRO object of this model was deleted, and the shards with it: "
                             "keep it in a variable as long as you use the model")  # fmt: skip
        return alive(*bound, *args)

    return hook


def not_compiled(hook: Callable) -> Callable:
    """Keep torch.compile from tracing the hook. Compile layers before constructing ZeRO: the hook
    is excluded only if torch._dynamo is already imported. This function does not import it, because
    that is slow and only needed for compiled models."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


class Zero2(Zero1):
    """ZeRO-2: gradients are sharded too. The gradients of a unit are moved to a flat buffer, which
    is freed after its reduce-scatter."""

    stage = 2

    def _take_gradients(self, unit: Unit) -> Tensor:
        flat, views, gradients = torch.zeros_like(unit.parameters), [], []
        with not_intercepted():
            for p, here in unit.place.items():
                if p.grad is None:
                    flat[here] = -0.0  # no gradient in this round, see is_unused()
                else:
                    views.append(flat[here].view(p.shape))
                    gradients.append(p.grad.detach().to_dense())
                p.grad = None
            if views:
                torch._foreach_copy_(views, gradients)
        return flat


# --- parameters and gradients that must not be read -----------------------------------------------

# Disables __torch_function__: inside, parameters behave as nn.Parameter, and calls cost less.
not_intercepted = torch._C.DisableTorchFunctionSubclass


class ShardedParameter(nn.Parameter):
    """The class of a parameter while its values are out of date, being gathered or, in ZeRO-3,
    freed. Reading its values raises ValueError. Its gradient and metadata such as the shape can be
    read.

    torch calls __torch_function__ for every operation on the parameter. An attribute like p.data
    arrives as the __get__ of a descriptor with that name."""

    TENSORS = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that return values
    # Methods that do not return values of the parameter. All others raise ValueError.
    METHODS = ("size", "numel", "nelement", "dim", "stride", "storage_offset", "element_size",
               "is_contiguous", "get_device", "is_floating_point", "is_complex",
               "untyped_storage", "requires_grad_", "register_hook",
               "register_post_accumulate_grad_hook", "backward")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        is_attribute = function.__name__ in ("__get__", "__set__")
        name = function.__self__.__name__ if is_attribute else function.__name__
        is_allowed = name not in cls.TENSORS if is_attribute else name in cls.METHODS
        if is_allowed:
            with not_intercepted():
                return function(*args, **(kwargs or {}))
        raise ValueError(
            f"{name}: ZeRO has not gathered this parameter. Outside of the model's forward, call "
            "sync.gather() on all ranks before you read it. If the forward of another layer reads "
            "it, pass blocks= with a module that contains both layers"
        )


class ReducedGradient(Tensor):
    """The class of the `.grad` of every trainable parameter of the model from finish() to start().
    Reading it or adding to it raises ValueError."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def like(cls, p: nn.Parameter) -> "ReducedGradient":
        # One element in memory, with the shape of p.
        zero = p.detach().new_zeros((), dtype=p.grad_dtype or p.dtype)
        return Tensor._make_subclass(cls, zero.expand(p.shape))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ValueError(
            f"{function}: this gradient was reduced, and each rank stores a shard of it. To clip, "
            "use sync.step(optimizer, clip=...). To read it, use piece.tensor.grad after "
            "sync.before_step(). Before the next backward, call sync.start()"
        )


# --- cost -----------------------------------------------------------------------------------------


def predicted_payload(
    sizes: list[int], d: int, stage: int = 1, m: int = 1, replicas: int = 1
) -> dict[str, int]:
    """Payload per step of ZeRO-1 and ZeRO-2, as defined in the module docstring. sizes: the padded
    sizes of the units."""
    psi, rounds = sum(sizes), m if stage == 2 else 1
    return {
        "reduce_scatter": (d > 1) * rounds * psi,
        "all_gather": (d > 1) * psi,
        "all_reduce": (replicas > 1) * psi // d,
    }


# --- demo -----------------------------------------------------------------------------------------


def train(rows: range, world: dist.ProcessGroup, m: int, attach: Callable = lambda model: None):
    """Train on `rows` of each batch, in float64, in m microbatches. A batch has 4 rows per rank of
    `world`. attach(model) returns an object like Zero1 or MinimalZero1, or None for plain training.
    Returns the losses, the model, the result of attach() and the collectives."""
    import data
    import gpt
    import measure

    config, steps, tokens = gpt.GPTConfig(3, 2, 32, 251, 32, tied=False), 3, data.example()
    model = gpt.build(config, seed=0, dtype=torch.float64)
    sync = attach(model)
    tensors = [*model.parameters()]
    if isinstance(sync, MinimalZero1):
        tensors = [sync.shard]
    elif sync is not None:
        tensors = [piece.tensor for piece in sync.pieces()]
    optimizer = torch.optim.AdamW(tensors, lr=1e-2, eps=1e-4)
    start = sync.start if sync else optimizer.zero_grad
    update = functools.partial(sync.step, optimizer) if sync else optimizer.step
    losses = torch.zeros(steps, dtype=torch.float64)
    with measure.Collectives() as seen:
        for step in range(steps):
            start()
            x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
            for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                loss = gpt.cross_entropy(model(xs), ys) / (4 * world.size() * config.seq_len)
                loss.backward()
                losses[step] += loss.detach()
            if isinstance(sync, Zero1):
                sync.finish()
            update()
    if isinstance(sync, Zero1):
        sync.gather()
    return losses, model, sync, seen


def compare(report, name: str, trained: tuple, expected: tuple, predicted: dict) -> None:
    """Compare the losses, parameters and gradient shards of `trained` with those of `expected`, a
    run in one process, and the payload with `predicted`. trained, expected: results of train().
    Gradients are compared for Zero1 and its subclasses. Parameters are compared if the model has
    its original ones, which is not so for version 1 of zero3.py."""
    losses, model, sync, seen = trained
    dist.all_reduce(losses)
    report.losses(name, [*losses], [*expected[0]])
    full = dict(expected[1].named_parameters())
    parameters = {key: p for key, p in model.named_parameters() if key in full}
    if parameters:
        report.close(f"{name} max |d parameter|", parameters, full)
    if isinstance(sync, Zero1):
        gradients, true = {}, {}
        for piece in sync.pieces():
            gradients[piece.name] = piece.tensor.grad
            shard = slice(piece.start, piece.start + piece.tensor.numel())
            true[piece.name] = full[piece.name].grad.flatten()[shard]
        report.close(f"{name} max |d gradient|", gradients, true)
    for operation, payload in predicted.items():
        measured = seen.total(None, operation).payload // len(losses)  # per step
        report.equal(f"{name} {operation} payload", payload, measured)


def main() -> None:
    """Compare each version with one process that has all rows."""
    import measure

    with measure.Report("zero.py") as report:
        group, d, m = report.group, report.group.size(), 2
        # Ranks per hybrid group: the largest proper divisor of d. If d is prime, it is 1, and
        # nothing is sharded.
        k = max(k for k in range(1, max(2, d)) if d % k == 0)
        mesh = dist.init_device_mesh("cpu", (d // k, k), mesh_dim_names=("replicas", "group"))
        hybrid = {name: mesh[name].get_group() for name in mesh.mesh_dim_names}
        expected = train(range(4 * d), group, m)
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        trained = train(rows, group, m, lambda model: MinimalZero1(model.parameters(), group))
        n = trained[2].parameters.numel()
        predicted = {"reduce_scatter": n, "all_gather": n, "all_reduce": 0}
        compare(report, "version 1", trained, expected, predicted)
        for name, kind, options in (
            ("ZeRO-1", Zero1, {}),
            ("ZeRO-2", Zero2, {}),
            (f"ZeRO-1 hybrid {d // k} x {k}", Zero1, hybrid),
        ):
            trained = train(rows, group, m, functools.partial(kind, accumulations=m, **options))
            shards = trained[2].group.size()
            sizes = [padded([p.numel() for p in unit.place], shards) for unit in trained[2].units]
            predicted = predicted_payload(sizes, shards, kind.stage, m, d // shards)
            compare(report, name, trained, expected, predicted)


if __name__ == "__main__":
    main()
