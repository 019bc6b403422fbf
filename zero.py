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

A unit is a block, or a layer outside of the blocks. Its shard is a range of a flat buffer, cut
without regard to where parameters begin: the last is padded, a matrix may lie on two ranks. The
optimizer therefore gets *pieces*, a view for each (parameter, my shard) that meet; padding belongs
to none of them and is never in a norm or a decay.

    torchrun --standalone --nproc-per-node 2 zero.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 3.1, 5 and 7; Zhao et al. 2023, PyTorch
FSDP (arXiv 2304.11277), sections 3.2 (flat, padded buffers; hybrid) and 3.3 (prefetching).
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# torch 2.13 gave the two halves of an all-reduce new names and warns at the old; 2.11 has the old.

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- strategy -------------------------------------------------------------------------------------
# The same words in the same order as in ddp.py: read them side by side. Rung 1: ZeRO-1.


class Unit:
    """Parameters that travel together: flat, padded to d shards of equal length, one of them mine.
    Without `whole_parameters` or `whole_gradients` only my shard of them is held for good."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup,
        whole_parameters: bool, whole_gradients: bool, grad_dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
    ):  # fmt: skip
        self.group, like = group, members[0][1].detach()
        for name, p in members:
            if not p.requires_grad or p.dtype != like.dtype:
                raise ValueError(f"{name} is frozen, or {p.dtype} beside {like.dtype}: what shares "
                                 "a flat buffer must be trained, in one dtype")  # fmt: skip
        grad_dtype = grad_dtype or torch.promote_types(like.dtype, torch.float32)
        self.reduce_dtype = reduce_dtype or like.dtype
        n = -(-sum(p.numel() for _, p in members) // group.size())
        mine = self.mine = slice(group.rank() * n, (group.rank() + 1) * n)
        self.parameters = like.new_zeros(n * group.size())
        self.gradients = self.parameters.to(grad_dtype, copy=True) if whole_gradients else None
        self.place: dict[nn.Parameter, slice] = {}
        end = 0
        for _, p in members:
            here = self.place[p] = slice(end, end := end + p.numel())
            self.parameters[here] = p.detach().flatten()
            p.data = self.parameters[here].view_as(p)
            if whole_gradients:
                p.grad_dtype = grad_dtype  # bf16 gradients may add up in fp32
                p.grad = self.gradients[here].view_as(p)
        shard = self.parameters[mine]
        self.parameter_shard = shard if whole_parameters else shard.clone()
        self.gradient_shard = (
            self.gradients[mine] if whole_gradients else like.new_zeros(n, dtype=grad_dtype)
        )
        # What the optimizer updates: in bf16 a small update, added to a weight, is rounded away.
        narrow = like.dtype.itemsize < 4
        self.master = self.parameter_shard.float() if narrow else self.parameter_shard
        self.pieces: list[tuple[str, Tensor, nn.Parameter, int]] = []
        for name, p in members:
            start = max(self.place[p].start, mine.start)
            stop = min(self.place[p].stop, mine.stop)
            if start < stop:
                here = slice(start - mine.start, stop - mine.start)  # in my shard
                piece = self.master[here].detach().requires_grad_()
                piece.place = here
                self.pieces.append((name, piece, p, start - self.place[p].start))
        self.whole, self.gathering, self.reducing = True, None, None

    def unshard(self) -> None:
        """Start to fill `parameters` from all shards, unless that is done; wait() before use."""
        if not self.whole:
            storage = self.parameters.untyped_storage()
            if not storage.nbytes():
                storage.resize_(self.parameters.numel() * self.parameters.itemsize)
            self.gathering = all_gather(  # payload: the unit
                self.parameters, self.parameter_shard, group=self.group, async_op=True
            )
            self.whole = True

    def wait(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def reshard(self) -> None:
        """Give the memory back, but not the storage: the parameters and what autograd has saved of
        them are views of it, and see it filled again."""
        self.wait()
        self.parameters.untyped_storage().resize_(0)
        self.whole = False

    def reduce(self, flat: Tensor, first: bool) -> None:
        """Start to sum `flat` over the group, in reduce_dtype; land() before the next."""
        flat = flat.to(self.reduce_dtype)
        self.sum, self.first = flat[self.mine], first
        self.reducing = reduce_scatter(  # payload: the unit
            self.sum, flat, group=self.group, async_op=True
        )

    def land(self, replicas: dist.ProcessGroup | None = None) -> None:
        """Add to my shard what arrived, or begin it; then, with `replicas`, start to sum the shard
        over these, which lands in its turn."""
        if self.reducing is None:
            return
        self.reducing.wait()
        (self.gradient_shard.copy_ if self.first else self.gradient_shard.add_)(self.sum)
        self.sum = self.reducing = None
        if replicas is not None:
            self.sum, self.first = self.gradient_shard.to(self.reduce_dtype), True
            self.reducing = dist.all_reduce(  # payload: my shard
                self.sum, group=replicas, async_op=True
            )


def layers(module: nn.Module) -> list[nn.Module]:
    """What is used at a time, in the order in which the model lists it: an entry of a ModuleDict or
    ModuleList (a block), and outside of these every module that has parameters of its own."""
    if next(module.parameters(recurse=False), None) is not None:
        return [module]
    blocks = isinstance(module, (nn.ModuleDict, nn.ModuleList))
    return sum(([child] if blocks else layers(child) for child in module.children()), [])


class Zero1:
    """Attaches to the model by hooks; its parameters now live in flat buffers.

    model: the same on every rank of `group`, over which state is sharded.
    accumulations: how often each gradient is accumulated to in a step, or by parameter how often.
    replicas: hybrid: the ranks that hold the same shard in other groups.
    grad_dtype: the dtype in which gradients of bf16 parameters are summed over microbatches;
        default: fp32.
    reduce_dtype: the dtype in which gradients of bf16 parameters are sent and summed over ranks;
        default: the parameters'. fp32 sends twice the bytes.

    A step: start(); forwards and backwards; finish(); before_step(); the optimizer updates
    pieces(); after_step(). Raises ValueError where a parameter is frozen, or a `.grad` is replaced
    (start() zeroes them, zero_grad() must not be called)."""

    whole_parameters = whole_gradients = True

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup,
        accumulations: int | dict[nn.Parameter, int],
        replicas: dist.ProcessGroup | None = None, grad_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.group, self.replicas = group, replicas
        if isinstance(accumulations, int):
            accumulations = dict.fromkeys(model.parameters(), accumulations)
        self.accumulations = accumulations
        self.units: list[Unit] = []  # in forward order
        self.unit_of: dict[nn.Parameter, Unit] = {}
        self.needs: list[list[Unit]] = []  # by layer
        me = weakref.ref(self)  # a hook that held self would keep it, and the group, for ever
        names = self.names = {
            p: getattr(p, "tied_name", name) for name, p in model.named_parameters()
        }
        for i, layer in enumerate(layers(model)):
            # A tied matrix is a unit: two stages that hold it cut it alike and can add their shards
            new: dict[str | None, list] = {}
            for p in layer.parameters():
                if p not in self.unit_of:
                    new.setdefault(getattr(p, "tied_name", None), []).append((names[p], p))
            for members in new.values():
                unit = Unit(
                    members, group, self.whole_parameters, self.whole_gradients, grad_dtype,
                    reduce_dtype,
                )
                self.units.append(unit)
                self.unit_of.update((p, unit) for _, p in members)
            self.needs.append(list(dict.fromkeys(self.unit_of[p] for p in layer.parameters())))
            layer.register_forward_pre_hook(lambda *_, i=i: me()._before_forward(i))
        for p in self.unit_of:
            p.register_post_accumulate_grad_hook(lambda p: me()._accumulated(p))
        # How often gradients travel in a step: once, or m times (a tied matrix may be added to 2 m
        # times). In this order and no other, though another unit may fill first on some rank:
        # collectives are matched by order, and the ranks must agree on it.
        rounds = self.rounds = 1 if self.whole_gradients else min(accumulations.values())
        self.launches = [(i + 1, unit) for i in range(rounds) for unit in reversed(self.units)]
        self.start()

    def start(self) -> None:
        """Before the first backward of a step: gradients to zero, counters too. If an exception
        interrupted the last step, at the same place on all ranks, this completes its collectives
        and drops its gradients."""
        for unit in self.units:
            unit.land()
            if unit.gradients is not None:
                unit.gradients.zero_()
            else:
                for p in unit.place:
                    p.grad = None
            for _, piece, _, _ in unit.pieces:
                piece.grad = None
        self.done = dict.fromkeys(self.unit_of, 0)  # accumulations, by parameter
        self.launched = 0

    def _before_forward(self, i: int) -> None:
        """Layer i is about to run: parameters that other ranks have updated must be here."""
        for unit in self.needs[i]:
            unit.wait()

    def _accumulated(self, p: nn.Parameter) -> None:
        self.done[p] += 1
        assert self.done[p] <= self.accumulations[p], (
            f"more than {self.accumulations[p]} accumulations in a step"
        )
        while self.launched < len(self.launches) and self._full(*self.launches[self.launched]):
            self._launch()

    def _full(self, round_: int, unit: Unit) -> bool:
        return all(
            self.done[p] * self.rounds >= round_ * self.accumulations[p] for p in unit.place
        )

    def _launch(self) -> None:
        self._land()
        round_, unit = self.launches[self.launched]
        unit.reduce(self._take_gradients(unit), first=round_ == 1)
        self.launched += 1

    def _land(self) -> None:
        """What was launched last arrives before the next: its buffer can go."""
        if self.launched:
            last_round = len(self.launches) - len(self.units) < self.launched
            self.launches[self.launched - 1][1].land(self.replicas if last_round else None)

    def _take_gradients(self, unit: Unit) -> Tensor:
        return unit.gradients

    def finish(self) -> None:
        """After the last backward: when this returns, my shards of the gradients are sums. The
        other gradients hold whatever this rank computed, and nobody reads them."""
        for p, unit in self.unit_of.items() if self.whole_gradients else ():
            here = unit.gradients[unit.place[p]]
            if p.grad is None or p.grad.data_ptr() != here.data_ptr():
                raise ValueError(f"{self.names[p]}: its .grad was replaced and is in no buffer; "
                                 "start() zeroes gradients, zero_grad() must not")  # fmt: skip
        while self.launched < len(self.launches):
            self._launch()
        self._land()
        for unit in self.units:
            unit.land()

    def pieces(self) -> list[tuple[str, Tensor, nn.Parameter, int]]:
        """What this rank's optimizer updates: (name, tensor, parameter it is of, offset in it). The
        tensor is 1-D, a range of the flattened parameter, in fp32 if that is in bf16."""
        return [piece for unit in self.units for piece in unit.pieces]

    def held(self) -> dict[str, list[Tensor]]:
        """What is kept from step to step, by kind; the optimizer has its moments besides."""
        held = {"parameters": list(self.unit_of), "gradients": [], "optimizer": []}
        for unit in self.units:
            held["parameters"].append(unit.parameter_shard)
            held["gradients"].append(unit.gradient_shard)
            if unit.master is not unit.parameter_shard:
                held["optimizer"].append(unit.master)
        return held

    def before_step(self) -> None:
        """Pieces get their `.grad`, in their own dtype: with bf16 gradients, a copy in fp32."""
        for unit in self.units:
            for _, piece, _, _ in unit.pieces:
                piece.grad = unit.gradient_shard[piece.place].to(piece.dtype)

    def after_step(self) -> None:
        """After the optimizer: everyone gets the parameters that the others have updated, while the
        next forward begins; a layer waits for its own."""
        for unit in self.units:
            unit.parameter_shard.copy_(unit.master)  # itself, unless in bf16
            unit.whole = False
            unit.unshard()

    def gather(self) -> None:
        """Every parameter whole, for who reads them outside of the model's forward."""
        for unit in self.units:
            unit.unshard()
            unit.wait()


# Rung 2: ZeRO-2. A gradient that was summed is needed on its owner only, so the buffer can go.
# Measured (`make memory`, 28.6 M parameters in fp32 on 4 ranks): 457 MB of ddp.py, 286 of ZeRO-1
# become 200.


class Zero2(Zero1):
    """ZeRO-1, and gradients are held as shards: a unit's are reduce-scattered as soon as backward
    has them, and dropped. The price is a reduce-scatter for each microbatch, where ZeRO-1 has one a
    step, and a buffer of Psi to add up in."""

    whole_gradients = False

    def _take_gradients(self, unit: Unit) -> Tensor:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit.place]
        for p in unit.place:
            p.grad = None
        padding = unit.parameters.numel() - sum(p.numel() for p in unit.place)
        return torch.cat([p.flatten() for p in parts] + [parts[0].new_zeros(padding)])


# Rung 3: ZeRO-3. The same for parameters: whole when a layer needs them, and only then.
# Measured (the same): 114 MB.


class Zero3(Zero2):
    """ZeRO-2, and parameters are held as shards: a layer is unsharded before its forward and again
    before its backward, one ahead of time, and resharded after each.

    With m microbatches that is nearly 2 m all-gathers of each layer. `reshard_after_forward=False`
    is the middle way: whole from the first forward of a step to the last backward, one all-gather,
    whatever the schedule; between steps a shard. Gathers and sums are matched by order, so ranks
    must run the same layers in the same order, and all have a gradient for each parameter. An
    nn.Embedding, and what takes token ids, must be a table: its backward gets no weight. starts:
    layers at which a chain begins that runs by itself, if the model has several (of a pipeline);
    there is nothing to be had ahead of time beyond its ends."""

    whole_parameters = False

    def __init__(
        self, model: nn.Module, *args, reshard_after_forward: bool = True,
        starts: Collection[nn.Module] = (), **kwargs,
    ):  # fmt: skip
        super().__init__(model, *args, **kwargs)
        self.reshard_after_forward = reshard_after_forward
        self.starts = {i for i, layer in enumerate(layers(model)) if layer in starts}
        self.starts |= {0, len(self.needs)}
        me = weakref.ref(self)
        self.is_table: list[bool] = []  # by layer: its backward reads no weight
        for i, layer in enumerate(layers(model)):
            self.is_table.append(isinstance(layer, nn.Embedding))
            layer.register_forward_hook(lambda _, args, y, i=i: me()._after_forward(i, args[0], y))

    def start(self) -> None:
        super().start()
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

    def _before_forward(self, i: int) -> None:
        self._use(i, following=None if i + 1 in self.starts else i + 1)

    def _after_forward(self, i: int, x: Tensor, y: Tensor) -> None:
        me = weakref.ref(self)
        self.is_table[i] |= not x.is_floating_point()
        if y.requires_grad and not self.is_table[i]:
            y.register_hook(lambda _: me()._before_backward(i))
        if x.requires_grad:
            x.register_hook(lambda _: me()._after_backward(i))
        training, last = y.requires_grad, i + 1 in self.starts
        if not training or (self.reshard_after_forward and not last):  # backward begins with it
            self._reshard(i)

    def _before_backward(self, i: int) -> None:
        first = i in self.starts or self.is_table[i - 1]  # in a backward nothing comes behind it
        self._use(i, following=None if first else i - 1)

    def _after_backward(self, i: int) -> None:
        if self.reshard_after_forward:
            self._reshard(i)

    def _reshard(self, i: int) -> None:
        for unit in self.needs[i]:
            unit.reshard()

    def _accumulated(self, p: nn.Parameter) -> None:
        super()._accumulated(p)
        unit = self.unit_of[p]
        if all(self.done[q] == self.accumulations[q] for q in unit.place):
            unit.reshard()  # the last use in this step

    def finish(self) -> None:
        super().finish()
        for unit in self.units:
            unit.reshard()

    def after_step(self) -> None:
        for unit in self.units:
            unit.parameter_shard.copy_(unit.master)
            unit.reshard()  # if somebody has gathered it since


STAGES = {1: Zero1, 2: Zero2, 3: Zero3}

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


def padded(numel: int, d: int) -> int:
    """Elements of a flat buffer that holds `numel` in d shards of equal length."""
    return -(-numel // d) * d


def predicted_payload(
    numels: list[int], d: int, uses: list[Use], stage: int = 1, m: int = 1, replicas: int = 1,
    reshard: bool = True,
) -> dict[str, Payload]:  # fmt: skip
    """Per rank and step, with the padding, by collective. numels: of the units. Time is counted in
    layers: m times forward and backward. Under another schedule nothing changes but what is hidden:
    the last layer stays whole from a forward to a backward, whichever microbatch's that is, and
    each backward consumes it, so that a naive 2 m all-gathers of it are m."""
    sizes, n = [padded(numel, d) for numel in numels], len(uses)
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
    return {
        operation: Payload(
            len(spans),
            sum(size for size, start, end in spans if not any(work[start:end])),
            sum(size for size, start, end in spans if any(work[start:end])),
        )
        for operation, spans in calls.items()
    }


def predicted_bytes(
    numels: list[int], d: int, rank: int, stage: int = 1,
    dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes held per rank after the last backward, with AdamW: two moments, and for bf16 an fp32
    master copy, for each element that this rank owns (the last ranks' padding has no moments).
    ZeRO, section 3.1."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    whole = sum(padded(n, d) for n in numels)
    shards = [(n, padded(n, d) // d) for n in numels]
    owned = sum(max(0, min(n, (rank + 1) * shard) - rank * shard) for n, shard in shards)
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
    with measure.Proof("zero.py") as proof:
        world, tokens = proof.group.size(), data.example()
        k = max(k for k in range(1, max(2, world)) if world % k == 0)  # the hybrid's shard size
        mesh = dist.init_device_mesh("cpu", (world // k, k), mesh_dim_names=("replica", "shard"))
        across, within = mesh["replica"].get_group(), mesh["shard"].get_group()

        def train(rows: range, attach: Callable | None, dtype=torch.float64, seen=None):
            """Train on `rows` of each batch, in m microbatches. One process has all of them."""
            model = gpt.build(config, seed=0, dtype=dtype)
            named = dict(gpt.named_parameters(model))
            sync = attach(model) if attach else None
            pieces = [piece for _, piece, _, _ in sync.pieces()] if sync else named.values()
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
        rows = range(4 * proof.group.rank(), 4 * proof.group.rank() + 4)
        for what, stage, d, options in (
            ("ZeRO-1", 1, world, {}), ("ZeRO-2", 2, world, {}), ("ZeRO-3", 3, world, {}),
            ("ZeRO-3 kept", 3, world, {"reshard_after_forward": False}),
            (f"ZeRO-3 {world // k} x {k}", 3, k, {"replicas": across}),
        ):  # fmt: skip
            group = within if "replicas" in options else proof.group
            attach = functools.partial(STAGES[stage], group=group, accumulations=m, **options)
            seen = measure.Collectives({"shard": group, "replica": across})
            mine, named, model, sync, held = train(rows, attach, seen=seen)
            for loss in mine:
                dist.all_reduce(loss)
            proof.losses(what, mine, losses)
            cut = {n: whole[n].grad.flatten()[at : at + t.numel()] for n, t, _, at in sync.pieces()}
            gradients = {n: t.grad for n, t, _, _ in sync.pieces()}
            proof.close(f"{what} max |d gradient|, my pieces", gradients, cut)
            proof.close(f"{what} max |d parameter|", named, whole)

            uses = [
                Use(sync.units.index(unit), "Linear" in str(layer), isinstance(layer, nn.Embedding))
                for (unit,), layer in zip(sync.needs, layers(model), strict=True)
            ]
            reshard = options.get("reshard_after_forward", True)
            numels = [sum(p.numel() for p in unit.place) for unit in sync.units]
            payload = predicted_payload(numels, d, uses, stage, m, world // d, reshard)
            for operation, predicted in payload.items():
                total, hidden = (seen.total(None, operation, hidden=h) for h in (None, True))
                measured = Payload(total.calls, total.payload - hidden.payload, hidden.payload)
                if predicted.calls or measured.calls:
                    proof.costs("a step, elements", f"{what} {operation}", predicted, measured)
            for table, *dtypes in (
                ("bytes, float64", torch.float64, None), ("bytes, bf16", torch.bfloat16, None),
                ("bytes, bf16 gradients", torch.bfloat16, torch.bfloat16),
            ):  # fmt: skip
                *_, held = train(rows, functools.partial(attach, grad_dtype=dtypes[1]), dtypes[0])
                predicted = predicted_bytes(numels, d, group.rank(), stage, *dtypes)
                proof.costs(table, what, predicted, held)


if __name__ == "__main__":
    main()
