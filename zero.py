"""ZeRO: data parallelism in which the ranks shard the optimizer state, gradients and parameters.

                gradients                          sums                      parameters
        rank 0  [a0|b0] -+                  +-> [a] -> optimizer -> [a] -+              +-> [a|b]
                         +- reduce-scatter -+                            +- all-gather -+
        rank 1  [a1|b1] -+                  +-> [b] -> optimizer -> [b] -+              +-> [a|b]

The all-reduce of ddp.py is a reduce-scatter followed by an all-gather. After the reduce-scatter,
each rank has one shard of the summed gradients. ZeRO-1 runs the optimizer at this point, on one
shard of the parameters, and then all-gathers parameters instead of gradients. Each rank stores
optimizer state for its shard only, and the communication volume does not change. ZeRO-2 also shards
the gradients. ZeRO-3 also shards the parameters.

Psi is the number of parameters, d the number of ranks that shard them, m the number of microbatches
per step. The payload of a collective is the number of elements of its full tensor: the input of a
reduce-scatter, the output of an all-gather. An all-reduce sends as much as one of each.

    per rank  bytes after the last backward           payload per step
              parameters  gradients  optimizer state  reduce-scatter  all-gather
    ddp.py    2 Psi       4 Psi      12 Psi           Psi, as an all-reduce
    ZeRO-1    2 Psi       4 Psi      12 Psi / d       Psi             Psi
    ZeRO-2    2 Psi       4 Psi / d  12 Psi / d       m Psi           Psi
    ZeRO-3    2 Psi / d   4 Psi / d  12 Psi / d       m Psi           m (2 Psi - S)
      kept    2 Psi / d   4 Psi / d  12 Psi / d       m Psi           Psi

The bytes are for bf16 parameters and fp32 gradients. The optimizer state is an fp32 master copy of
the parameters, stored by ZeRO itself, and the two moments of AdamW. In fp32, the factors are 4, 4
and 8. During a step, ZeRO-2 and ZeRO-3 also store the gradients that are not reduced yet and one
flat buffer for the gradients of a layer. ZeRO-3 also stores two gathered layers, or all (2 Psi) if
kept.

"kept" is ZeRO-3 with reshard_after_forward=False. Otherwise, ZeRO-3 gathers all but S elements
twice per microbatch. S counts the last layer, whose backward immediately follows its forward, and
embedding tables, whose backward does not read them. In hybrid sharding, each of several groups of d
ranks stores all shards. The ranks that store the same shard all-reduce its Psi / d gradients.

    torchrun --standalone --nproc-per-node 2 zero.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 3.1, 5 and 7; Zhao et al. 2023, PyTorch
FSDP (arXiv 2304.11277), sections 3.2 (flat, padded buffers; hybrid) and 3.3 (prefetching).
"""

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

# PyTorch 2.13 renamed these functions and warns about the old names. 2.11 has only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- version 1: the whole idea --------------------------------------------------------------------


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

    Not supported: fp32 master copies of bf16 parameters; clipping, as clip_grad_norm_([shard], 1)
    would use the norm of one shard; model.to() after construction, which replaces the views. After
    step(), gradients are sums only in this rank's shard, and those of unused parameters are 0."""

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
# ZeRO-3 also saves (1 - 1/d) of the parameter memory. The parameters of a layer are all-gathered
# before its forward and before its backward, and freed after each. This costs up to 2 m all-gathers
# per layer and step instead of one.
#
# The full version has one flat buffer per layer instead of one per model, so the collective of one
# layer overlaps with the computation of other layers. The optimizer gets a tensor for each
# parameter that overlaps the shards of the rank, so parameter groups work. Also supported: bf16
# with fp32 master weights, unused and tied parameters, gradient clipping, load_state_dict(), hybrid
# sharding. Most misuse raises ValueError.


class Piece(NamedTuple):
    """A range of one flattened parameter, which this rank's optimizer updates."""

    name: str
    tensor: Tensor  # 1-D
    parameter: nn.Parameter
    start: int  # offset of `tensor` in the flattened parameter


def aligned(numel: int) -> int:
    """numel, rounded up to a multiple of 8. GPU kernels are slower on unaligned tensors."""
    return -(-numel // 8) * 8


def padded(numels: Iterable[int], d: int) -> int:
    """Elements of a unit's flat buffer. numels: the sizes of its parameters."""
    return d * aligned(-(-sum(map(aligned, numels)) // d))


class Unit:
    """Parameters of one layer that are communicated together, in one flat buffer. A layer usually
    has one unit, see unit_key().

        parameters  [ p0 | p1      | p2  | padding ]       d * n elements
        shards      [ rank 0 | rank 1 | .. | rank d-1 ]    n elements each

    A shard may contain several parameters, and a parameter may span several shards. Parameters and
    shards start at multiples of 8 elements, see aligned(). A piece is a range of a parameter in
    this rank's shard. Padding is in no piece, so it has no effect on the gradient norm.

    Between uses, a rank stores only its shard of the gradients (ZeRO-2 and ZeRO-3) and of the
    parameters (ZeRO-3). The parameters of a unit have one dtype, and are all trainable or all
    frozen. A frozen unit has no gradients and no pieces."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup, stage: int,
        grad_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None,
    ):  # fmt: skip
        like = members[0][1].detach()
        self.group, self.trainable = group, members[0][1].requires_grad
        self.is_sharded = stage == 3 and group.size() > 1  # stores only a shard of the parameters
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
        shard = self.parameters[self.mine]
        self.parameter_shard = shard.clone() if self.is_sharded else shard

        # ZeRO-1 also has a flat buffer for gradients. ZeRO-2 and ZeRO-3 have only a shard.
        self.gradients: Tensor | None = None
        self.gradient_of: dict[nn.Parameter, Tensor] = {}  # views of `gradients`
        if self.trainable and stage == 1:
            self.gradients = like.new_zeros(size, dtype=grad_dtype)
            self.gradient_shard = self.gradients[self.mine]
            for p, here in self.place.items():
                self.gradient_of[p] = self.gradients[here].view_as(p)
                # grad_dtype = None allows a `.grad` of any dtype. A tied matrix can get two
                # gradients per backward. Autograd sums them before it calls the hook, in the dtype
                # of the buffer. ZeRO-2 and ZeRO-3 have no buffer to accumulate in.
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
        self.first = True  # whether `sum` replaces the shard instead
        self.reducing: dist.Work | None = None

    def add_piece(self, name: str, p: nn.Parameter, here: slice, start: int) -> None:
        self.pieces.append(Piece(name, self.master[here].detach().requires_grad_(), p, start))
        self.place_in_shard.append(here)

    def allow_reads(self, allowed: bool) -> None:
        """Allow reads of the parameters, or make them raise an error (see ShardedParameter)."""
        for p in self.place:
            if type(p) in (nn.Parameter, ShardedParameter):  # leave other subclasses unchanged
                p.__class__ = nn.Parameter if allowed else ShardedParameter

    def unshard(self) -> None:
        """Start to all-gather the parameters, unless they are gathered. Call wait() before use."""
        if self.gathered:
            return
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
        """Mark the full parameters as out of date. In stage 3, also free their memory but keep the
        storage object, of which parameters and saved tensors are views. On a GPU this is safe: the
        kernels that read the memory are queued on the stream that will reuse it. No-op with one
        rank."""
        if self.group.size() == 1:
            return
        self.wait()
        if self.is_sharded:
            self.parameters.untyped_storage().resize_(0)
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
        self.sum, self.first = flat[self.mine], first
        if self.group.size() > 1:
            self.reducing = reduce_scatter(  # payload: the unit
                self.sum, flat, group=self.group, async_op=True
            )

    def reduce_over_replicas(self, replicas: dist.ProcessGroup) -> None:
        """Start the all-reduce of the gradient shard. Call wait_reduce() before using it."""
        self.sum, self.first = self.gradient_shard.to(self.reduce_dtype), True
        self.reducing = dist.all_reduce(self.sum, group=replicas, async_op=True)  # payload: shard

    def wait_reduce(self) -> None:
        """Wait for the pending reduction, if any, and store its result in the gradient shard."""
        if self.reducing is not None:
            self.reducing.wait()
        if self.sum is not None:
            accumulate(self.sum, self.gradient_shard, self.first)
        self.sum = self.reducing = None


def layers(model: nn.Module, blocks: Collection[nn.Module] | None = None) -> dict:
    """{layer: its parameters}, in the order of model.modules(). A layer is a module whose
    parameters ZeRO gathers before its forward. It is a block, or a module outside every block that
    directly holds parameters. A block includes the parameters of all its submodules.

    By default, the blocks are (1) the elements of every nn.ModuleList and nn.ModuleDict outside of
    other blocks and (2) every other module that directly holds parameters, except the model itself
    and modules that contain an nn.ModuleList or nn.ModuleDict. `blocks` replaces the default.

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

    Parameters whose gradients are also summed over other ranks than those of the sharding group
    have their own unit, so that their shards start and end at the same elements on all these ranks.
    There are two cases. (1) A matrix tied across two pipeline stages, which has a tied_name. (2)
    Parameters marked partial by tensor_parallel.py, if it splits other matrices of the layer
    unevenly: in a common buffer, their offsets would differ between ranks."""
    shardings = [q.sharding for q in layer if hasattr(q, "sharding")]
    is_uneven = any(n % sharding.size for sharding in shardings for n in sharding.sizes)
    is_partial = is_uneven and getattr(p, "partial", False)
    return getattr(p, "tied_name", None), p.dtype, p.requires_grad, is_partial


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
    group: the ranks over which state is sharded. Default: all ranks.
    accumulations: the number of gradients that a parameter receives per step, which is the number
        of microbatches m. Pass a dict {parameter: count} if it differs between parameters. A
        parameter that receives fewer is reduced in finish(), without an error.
    replicas: in hybrid sharding, the ranks that store the same shards, including this rank.
    grad_dtype: the dtype in which gradients of bf16 parameters are accumulated over microbatches.
        Default: fp32. No effect on fp32 parameters.
    reduce_dtype: the dtype in which gradients of bf16 parameters are sent. Default: bf16; fp32
        sends twice the bytes. No effect on fp32 parameters, or with one rank.
    blocks: modules whose parameters are gathered together. Default: see layers().
    overlap: False reduces all gradients in finish(). DDP in ddp.py explains when to use it. ZeRO-2
        and ZeRO-3 then store full gradients until finish(), in the dtype of the parameters.

    Raises ValueError if ranks have different parameters or values, if requires_grad changes later,
    if a call is missing or out of order, or if the optimizer holds a model parameter. If only one
    rank raises an error, the others wait in their next collective until it times out."""

    stage = 1

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
        for ranks in (group,) if replicas is None else (group, replicas):
            check_same_parameters(self.named, ranks)
        self.layers, self.modules = layers(model, blocks), {*model.modules()}
        self._make_units(grad_dtype, reduce_dtype)
        self._attach_hooks(model)

        # A round reduce-scatters every unit once. ZeRO-2 and ZeRO-3 have a round per microbatch. In
        # a pipeline, a tied matrix can receive two gradients per microbatch, so the minimum is m.
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
            # A frozen parameter has no gradient or optimizer state. Only ZeRO-3 shards it.
            sharded = [p for p in parameters if p.requires_grad or self.stage == 3]
            key_of = {p: unit_key(p, parameters) for p in sharded if p not in self.unit_of}
            for key in dict.fromkeys(key_of.values()):
                members = [(self.name_of[p], p) for p in key_of if key_of[p] == key]
                unit = Unit(members, self.group, self.stage, *dtypes)
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
        # If the optimizer holds a model parameter, check_optimizer() must raise on every rank, also
        # on one that has no piece of it. So each parameter maps to a Piece with another tensor.
        pieces = self.pieces()
        self.piece_of = {p: Piece(name, pieces[0].tensor, p, 0) for name, p in self.parameters}
        self.piece_of |= {piece.tensor: piece for piece in pieces}
        me = weakref.ref(self)
        check = register_optimizer_step_pre_hook(lambda o, *_: me() and me()._check(o))
        weakref.finalize(self, check.remove)

    def start(self) -> None:
        """Call before the first backward of a step. Until finish(), every `.grad` is None or a
        gradient of this rank.

        After an exception that all ranks raised at the same point before the optimizer update,
        start() waits for the pending collectives and discards the gradients."""
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
        # Incomplete gradients per reduce-scatter, in launch order: all units of round 0, then of 1.
        self.waiting = [len(unit.place) for unit in self.order] * self.rounds
        self.launched = 0  # reduce-scatters started in this step
        self.phase = "backward"

    def _accumulated(self, p: nn.Parameter) -> None:
        """Autograd calls this after it has stored a gradient of p in p.grad. It starts the
        reduce-scatter of each unit that is complete and next in order."""
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
        # Every count / self.rounds gradients of p complete one round.
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
        self._wait_reduce()  # so that at most one temporary buffer is in use
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
        """The flat gradients to reduce. Those of an unused parameter are -0.0, see is_unused()."""
        for p, gradient in unit.gradient_of.items():
            if self.missing[p] == self.accumulations[p]:
                gradient.fill_(-0.0)
        return unit.gradients

    def finish(self) -> None:
        """Call after the last backward of a step. On return, this rank's gradient shards are sums
        over all ranks. If a unit has an unused parameter, that unit and all later ones in launch
        order are reduced here. Until the next start(), reading a `.grad` raises ValueError."""
        if self.phase != "backward":
            raise ValueError("finish() without start(): call start() before the first backward of "
                             "a step, and finish() once after the last")  # fmt: skip
        while self.launched < len(self.waiting):
            self._launch()
        self._wait_reduce()
        for unit in self.order:
            unit.wait_reduce()
            with not_intercepted():
                for p, placeholder in unit.placeholder_of.items():
                    p.grad = placeholder
        self.phase = "finished"

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None = None) -> Tensor | None:
        """Call after finish(). Runs before_step(), clips the gradients to the global norm `clip`,
        runs optimizer.step() and after_step(). Returns the norm before clipping; None without clip.

        Raises ValueError if clip is given and a gradient is distributed over tensor-parallel ranks.
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
            if self.group.size() > 1:
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
        parameters. ZeRO-1 and ZeRO-2 also start to all-gather them. The next forward waits for them
        layer by layer."""
        for unit in self.units:
            unit.reshard()
        copied = [unit for unit in self.units if unit.master is not unit.parameter_shard]
        if copied:
            shards = [unit.parameter_shard for unit in copied]
            torch._foreach_copy_(shards, [unit.master for unit in copied])
        if self.stage < 3:
            for unit in self.units:
                unit.unshard()
        self.phase = "idle"

    def gather(self) -> None:
        """All-gather all parameters. Call on all ranks before reading a parameter outside of the
        model's forward. model.state_dict() and load_state_dict() call it, so call these on all
        ranks too. Manual writes to a bf16 parameter, or to any parameter under ZeRO-3, are lost:
        use load_state_dict(). ZeRO-3 frees the memory in the next start() at the latest."""
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

    def held(self) -> dict[str, list[Tensor]]:
        """The tensors stored between steps, for tools/counting.py. Some share memory."""
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


# accumulate(), is_unused() and the checks below are identical to those in ddp.py.
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


# Limitation: if some ranks used the parameter, but every element of the sum is -0.0, the ranks that
# did not use it skip the update of their pieces. In hybrid sharding, replicas can then diverge.
def is_unused(gradient: Tensor) -> bool:
    """Whether no rank used the parameter, given its reduced gradient.

    A rank that did not use the parameter contributes -0.0. A floating-point sum is -0.0 only if
    every term is -0.0."""
    return bool((gradient == 0).all() and gradient.signbit().all())


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
    is excluded only if torch._dynamo is already imported, which is slow and not done for others."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


class Zero2(Zero1):
    """ZeRO-2: gradients are sharded too. The full gradients of a unit are freed once reduced."""

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


class Zero3(Zero2):
    """ZeRO-3: parameters are sharded too. The all-gather of the next layer overlaps with the
    computation of this layer. All ranks must run the same layers in the same order, because
    collectives are matched by call order. Otherwise ranks hang, raise an error, or, if the units
    have equal sizes, silently use wrong parameters.

    reshard_after_forward: False keeps all parameters in memory from the first forward of a step to
        the last backward, and so needs only one all-gather per unit and step.
    starts: the first layer of each pipeline stage on this rank. Stages run independently, so the
        next layer is not gathered ahead if it is in another stage.

    A layer's forward must return every tensor that other layers or the loss use, directly or in
    tuples, lists and dicts. The all-gather for backward starts when a gradient reaches one of them.
    If a layer stores a tensor in an attribute instead, using that tensor raises ValueError.

    A layer stays gathered until the last backward of the step if it returns no such tensor, if it
    contains other layers, or if backward runs with create_graph=True."""

    stage = 3

    def __init__(
        self, model: nn.Module, *args, reshard_after_forward: bool = True,
        starts: Collection[nn.Module] = (), **kwargs,
    ):  # fmt: skip
        super().__init__(model, *args, **kwargs)
        self.reshard_after_forward = reshard_after_forward
        self.starts = {i for i, layer in enumerate(self.layers) if layer in starts}
        self.starts |= {0, len(self.layers)}
        copy_out = weak(self._copy_out)
        model.register_state_dict_post_hook(lambda _, *args: copy_out(*args))
        # By layer. is_outer: whether it contains other layers. is_table: whether it is an embedding
        # table, whose backward does not read the weight. _after_forward() updates is_table.
        self.is_outer = [len(self.layers.keys() & {*layer.modules()}) > 1 for layer in self.layers]
        self.is_table = [type(layer) is nn.Embedding for layer in self.layers]
        # Parameters that must be gathered when their gradient is computed. Exceptions are linear
        # layers whose weight gradient pipeline.py defers, and tables, see _after_forward().
        deferred = {module.weight for module in self.modules
                    if getattr(module, "weight_grad_queue", None) is not None}  # fmt: skip
        self.must_be_gathered = self.accumulations.keys() - deferred
        for i, layer in enumerate(self.layers):
            hook = not_compiled(weak(self._after_forward, i))
            layer.register_forward_hook(hook, with_kwargs=True)

    def start(self) -> None:
        super().start()
        self.create_graph = False  # whether a backward of this step has create_graph=True
        self.kept: set[int] = set()  # layers that _reshard_layer() skips
        for unit in self.units:
            unit.reshard()

    def _gather_layer(self, i: int, ahead: int | None) -> None:
        """Wait for the parameters of layer i, and start to gather those of layer `ahead`."""
        for layer in (i,) if ahead is None else (i, ahead):
            for unit in self.needs[layer]:
                unit.unshard()
        for unit in self.needs[i]:
            unit.wait()

    def _reshard_layer(self, i: int) -> None:
        if i not in self.kept and not self.create_graph:
            for unit in self.needs[i]:
                unit.reshard()

    def _before_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Gather layer i, and start to gather layer i + 1."""
        if layer not in self.modules:  # a deep copy of the model, which keeps these hooks
            return
        # A recomputation runs in backward, where _before_backward() prefetches layer i - 1.
        no_prefetch = i + 1 in self.starts or in_backward()
        self._gather_layer(i, ahead=None if no_prefetch else i + 1)
        if torch.is_grad_enabled() and not in_backward() and not self.is_outer[i]:
            self._hook_inputs(i, [x for x in tensors_in((args, kwargs)) if x.requires_grad])

    def _hook_inputs(self, i: int, inputs: list[Tensor]) -> None:
        """Reshard layer i after its backward, when the gradient of an input is complete. The hooks
        are registered before the forward, which may modify an input in place. Without inputs that
        require a gradient, the next forward or _accumulated() reshards the layer."""
        # Autograd runs nodes in reverse order of their creation. When it reaches the node that
        # computed an input, all nodes of this layer have run.
        computed = [x for x in inputs if not x.is_leaf]
        for x in computed:
            x.register_hook(weak(self._after_backward, i))
        # The gradient of a leaf can be complete before the nodes of this layer have run. If all
        # inputs are leaves, reshard at the end of the whole backward.
        if inputs and not computed:
            after_backward = weak(self._after_backward, i)

            def leaf_complete(_) -> None:
                handle.remove()
                torch.autograd.Variable._execution_engine.queue_callback(after_backward)

            handle = inputs[0].register_hook(leaf_complete)

    def _after_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Hook the outputs of layer i, and reshard it unless its backward is next."""
        if layer not in self.modules or in_backward():  # a deep copy, or recomputation
            return
        inputs, parameters = [*tensors_in((args, kwargs))], self.layers[layer]
        outputs = [y for y in tensors_in(output) if y.requires_grad]
        if self.is_outer[i]:
            if not outputs and self.phase != "backward":
                self._reshard_layer(i)
            return
        # A layer is a table if it has one parameter and takes only token ids. A module with a tied
        # matrix can be called as a table and as an output head.
        ids = (torch.int32, torch.int64)
        takes_ids = len(inputs) > 0 and all(x.dtype in ids for x in inputs)
        self.is_table[i] = takes_ids and len(parameters) == 1
        if self.is_table[i]:
            self.must_be_gathered -= {*parameters}
        else:
            self._hook_outputs(i, inputs, outputs)
        # A backward will follow, but forward returned no tensor to hook: keep the layer gathered.
        needs_backward = any(x.requires_grad for x in (*inputs, *parameters))
        if needs_backward and not outputs and torch.is_grad_enabled():
            self.kept.add(i)
        storages = {unit.parameters.untyped_storage()._cdata for unit in self.needs[i]}
        # Resharding would free the values of an output that is a view of a parameter.
        is_view = any(y.untyped_storage()._cdata in storages for y in outputs)
        # Keep the last layer of a stage: in the last stage, its backward comes next.
        keep_gathered = i + 1 in self.starts or not self.reshard_after_forward
        if not is_view and not (outputs and keep_gathered):
            self._reshard_layer(i)

    def _hook_outputs(self, i: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Gather layer i before its backward, when a gradient reaches an output."""
        for y in outputs:
            # Hook the node that computed y, because its pre-hook runs after all hooks on y. If a
            # layer is called twice in a row, y is also the input of the second call, whose hook on
            # y reshards the layer and must run first. If y is a view, hook the node of its base,
            # because an in-place operation on y replaces y.grad_fn.
            node = (y._base if y._is_view() else y).grad_fn
            if node is not None and not any(y is x for x in inputs):
                node.register_prehook(weak(self._before_backward, i))

    def _before_backward(self, i: int, _) -> None:
        """Gather layer i, and start to gather layer i - 1."""
        # Gradients are enabled if create_graph=True. The new graph may read the parameters later.
        self.create_graph |= torch.is_grad_enabled()
        no_prefetch = i in self.starts or self.is_table[i - 1]
        self._gather_layer(i, ahead=None if no_prefetch else i - 1)

    def _after_backward(self, i: int, *_) -> None:
        if self.reshard_after_forward:
            self._reshard_layer(i)

    def _accumulated(self, p: nn.Parameter) -> None:
        super()._accumulated(p)
        unit = self.unit_of[p]
        if p in self.must_be_gathered and (not unit.gathered or unit.gathering is not None):
            raise ValueError(f"the gradient of {self.name_of[p]} is wrong, because its layer was "
                             "not gathered: the layer's forward must return every tensor "
                             "that other layers or the loss use")  # fmt: skip
        if not self.create_graph and all(self.missing[q] == 0 for q in unit.place):
            unit.reshard()  # the last use in this step

    def finish(self) -> None:
        super().finish()
        for unit in self.units:
            unit.reshard()

    def _copy_out(self, state: dict, prefix: str, _) -> None:
        """Replace the tensors in model.state_dict() by copies, and free the full parameters."""
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, Tensor):
                state[name] = value.clone()
        for unit in self.units:
            unit.reshard()


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)


STAGES = {1: Zero1, 2: Zero2, 3: Zero3}  # used by train_3d.py

# --- checks ---------------------------------------------------------------------------------------
# Most of the mistakes that these checks catch would otherwise produce a wrong model and no error.


def check_same_parameters(
    parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raise ValueError on every rank unless all ranks of `group` have the same parameters, in the
    same order and with equal values. The message names the first difference.

    Values are compared by checksum. A permutation of the elements is not detected."""
    if group.size() == 1:
        return
    mine = [f"{name} {tuple(p.shape)} {p.dtype} with checksum {checksum(p)}"
            for name, p in parameters]  # fmt: skip
    by_rank: list = [None] * group.size()
    dist.all_gather_object(by_rank, mine, group=group)
    for rank, theirs in enumerate(by_rank):
        for i, (a, b) in enumerate(itertools.zip_longest(by_rank[0], theirs, fillvalue="missing")):
            if a != b:
                raise ValueError(f"parameter {i} is {a} on rank 0 of the group and {b} on rank "
                                 f"{rank}: build the same model on every rank, with the same seed "
                                 "or from the same checkpoint")  # fmt: skip


def checksum(p: Tensor) -> int:
    """The sum of the elements' bit patterns as integers. It does not depend on the order of
    summation, so equal tensors always have equal checksums."""
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
    """Raise ValueError if the gradient norm depends on other tensor-parallel ranks."""
    for name, p in parameters:  # tensor_parallel.py sets p.sharding and p.partial
        sharded = hasattr(p, "sharding") and p.sharding.size > 1
        if sharded or getattr(p, "partial", False):
            raise ValueError(f"clip: the gradient of {name} is distributed over tensor-parallel "
                             "ranks, so one rank cannot compute the norm: call before_step(), "
                             "clip by the gradient norm of the full model, then call "
                             "optimizer.step() and after_step()")  # fmt: skip


# --- parameters and gradients that must not be read -----------------------------------------------

not_intercepted = torch._C.DisableTorchFunctionSubclass  # disables __torch_function__


class ShardedParameter(nn.Parameter):
    """The class of a parameter while its memory is freed or being filled. Reading its values raises
    ValueError. Its shape, gradient and other metadata can be read."""

    TENSORS = ("data", "T", "mT", "H", "mH", "real", "imag")  # attributes that return values
    METHODS = ("size", "numel", "nelement", "dim", "stride", "storage_offset", "element_size",
               "is_contiguous", "get_device", "is_floating_point", "is_complex",
               "untyped_storage", "requires_grad_", "register_hook",
               "register_post_accumulate_grad_hook", "backward")  # fmt: skip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        is_attribute = function.__name__ in ("__get__", "__set__")
        name = function.__self__.__name__ if is_attribute else function.__name__
        is_metadata = name not in cls.TENSORS if is_attribute else name in cls.METHODS
        if is_metadata:
            with not_intercepted():
                return function(*args, **(kwargs or {}))
        raise ValueError(
            f"{name}: ZeRO has not gathered this parameter. Outside of the model's forward, call "
            "sync.gather() on all ranks before you read it. If the forward of another layer reads "
            "it, pass blocks= with a module that contains both layers"
        )


class ReducedGradient(Tensor):
    """The class of every `.grad` after finish(). Reading it or adding to it raises ValueError."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def like(cls, p: nn.Parameter) -> "ReducedGradient":
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
    sizes: list[int], d: int, stage: int = 1, m: int = 1, replicas: int = 1,
    reshard: bool = True, skipped: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Payload per step, as defined in the module docstring. sizes: padded sizes of the units.
    skipped: elements that ZeRO-3 does not gather for backward. Default: the last unit."""
    psi, gathered = sum(sizes), sum(sizes)
    if stage == 3 and reshard:
        gathered = m * (2 * psi - (sizes[-1] if skipped is None else skipped))
    return {
        "reduce_scatter": (d > 1) * (psi if stage == 1 else m * psi),
        "all_gather": (d > 1) * gathered,
        "all_reduce": (replicas > 1) * psi // d,
    }


def predicted_bytes(
    units: list[list[int]], d: int, rank: int, stage: int = 1,
    dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes stored per rank after the last backward, with AdamW. units: per unit, the sizes of its
    parameters. Padding has no moments. Used by tools/cost.py and the tests."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    psi = owned = 0
    for numels in units:
        size, start = padded(numels, d), 0
        shard = range(rank * size // d, (rank + 1) * size // d)
        for numel in numels:
            owned += max(0, min(start + numel, shard.stop) - max(start, shard.start))
            start += aligned(numel)
        psi += size
    masters = 4 * psi // d if dtype.itemsize < 4 else 0
    return {
        "parameters": psi // (d if stage == 3 else 1) * dtype.itemsize,
        "gradients": psi // (d if stage >= 2 else 1) * grad_dtype.itemsize,
        "optimizer": 2 * owned * max(4, dtype.itemsize) + masters,
    }


# --- demo -----------------------------------------------------------------------------------------


def train(rows: range, world: dist.ProcessGroup, m: int, kind: type | None = None, **options):
    """Train on `rows` of each batch, in float64. A batch has 4 rows per rank of `world`. m: the
    number of microbatches. kind: the class to use, with `options`. None: one process."""
    import data
    import gpt
    import measure

    config, steps, tokens = gpt.GPTConfig(3, 2, 32, 251, 32, tied=False), 3, data.example()
    model = gpt.build(config, seed=0, dtype=torch.float64)
    tensors, sync = [*model.parameters()], None
    if kind is MinimalZero1:
        sync = MinimalZero1(model.parameters(), world)
        tensors = [sync.shard]
    elif kind is not None:
        sync = kind(model, accumulations=m, **options)
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
    return losses, dict(model.named_parameters()), sync, seen


def main() -> None:
    """Compare each version with one process that has all rows."""
    import measure

    with measure.Report("zero.py") as report:
        group, world, m = report.group, report.group.size(), 2
        # Ranks per hybrid group. It is 1, so nothing is sharded, if the number of ranks is prime.
        k = max(k for k in range(1, max(2, world)) if world % k == 0)
        mesh = dist.init_device_mesh("cpu", (world // k, k), mesh_dim_names=("replicas", "group"))
        hybrid = {name: mesh[name].get_group() for name in mesh.mesh_dim_names}
        expected_losses, expected, _, _ = train(range(4 * world), group, m)
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        for name, kind, options in (
            ("version 1", MinimalZero1, {}), ("ZeRO-1", Zero1, {}), ("ZeRO-2", Zero2, {}),
            ("ZeRO-3", Zero3, {}), ("ZeRO-3 kept", Zero3, {"reshard_after_forward": False}),
            (f"ZeRO-3 hybrid {world // k} x {k}", Zero3, hybrid),
        ):  # fmt: skip
            losses, parameters, sync, seen = train(rows, group, m, kind, **options)
            dist.all_reduce(losses)
            report.losses(name, [*losses], [*expected_losses])
            report.close(f"{name} max |d parameter|", parameters, expected)
            if kind is MinimalZero1:
                n = sync.parameters.numel()
                predicted = {"reduce_scatter": n, "all_gather": n, "all_reduce": 0}
            else:
                gradients, true = {}, {}
                for name_, tensor, _, start in sync.pieces():
                    gradients[name_] = tensor.grad
                    true[name_] = expected[name_].grad.flatten()[start : start + tensor.numel()]
                report.close(f"{name} max |d gradient|", gradients, true)
                d, reshard = sync.group.size(), options.get("reshard_after_forward", True)
                sizes = [padded([p.numel() for p in unit.place], d) for unit in sync.units]
                skipped = sizes[0] + sizes[-1]  # the token table and the last layer
                predicted = predicted_payload(sizes, d, kind.stage, m, world // d, reshard, skipped)
            for operation, payload in predicted.items():
                measured = seen.total(None, operation).payload // len(losses)  # per step
                report.equal(f"{name} {operation} payload", payload, measured)


if __name__ == "__main__":
    main()
