"""ZeRO-3: data parallelism in which every rank stores only a shard of each parameter.

    computation           F0      F1      F2      B2      B1      B0
    communication     G0  G1      G2              G1      R2  G0  R1      R0

A step of Zero3 with three layers and one microbatch, in the order of execution. A layer's
parameters are all-gathered (G) before its forward (F) and again before its backward (B), and freed
after each. The last layer is kept in between, because its backward comes next. After the backward
of a layer, its gradients are reduce-scattered (R), so that each rank gets the summed gradient of
its shard. The optimizer updates the shard. PyTorch calls this fully sharded data parallelism
(FSDP). zero.py shards the optimizer state and the gradients in the same way, but stores full
parameters. Version 1 below is the whole idea, without overlap. Zero3 overlaps communication with
computation and has fp32 master copies.

Psi is the number of parameters, d the number of ranks that shard them, m the number of microbatches
per step. The payload of a collective is the number of elements of its full tensor: the input of a
reduce-scatter, the output of an all-gather.

    per rank   bytes after finish()                    payload per step
               parameters  gradients  optimizer state  reduce-scatter  all-gather
    ZeRO-2     2 Psi       4 Psi / d  12 Psi / d       m Psi           Psi
    version 1  2 Psi / d   2 Psi / d   4 Psi / d       m Psi           up to 2 m Psi
    ZeRO-3     2 Psi / d   4 Psi / d  12 Psi / d       m Psi           m (2 Psi - S)
      kept     2 Psi / d   4 Psi / d  12 Psi / d       m Psi           Psi

The bytes are for bf16 parameters and AdamW. ZeRO-2 and ZeRO-3 accumulate gradients in fp32, and
store an fp32 master copy of the shard. With fp32 parameters, all rows have the factors 4, 4 and 8.
During a step, ZeRO-3 usually also stores two gathered layers (the current and the next one), the
gradients of the current layer, and one flat buffer that is being reduce-scattered.

S counts the elements that are gathered once per microbatch instead of twice: those of the last
layer, and those of embedding tables, whose backward does not read them. "kept" is ZeRO-3 with
reshard_after_forward=False: parameters stay in memory from the first forward of a step to the last
backward (2 Psi), and are gathered once per step.

    torchrun --standalone --nproc-per-node 2 zero3.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), sections 5 and 7; Zhao et al. 2023, PyTorch FSDP
(arXiv 2304.11277), sections 3.2 (flat, padded buffers) and 3.3 (prefetching).
"""

import functools
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import zero
from ddp import all_gather, reduce_scatter
from zero import Unit, Zero1, Zero2, not_compiled, padded, weak

# --- version 1: the whole idea --------------------------------------------------------------------
# An all-gather whose backward is a reduce-scatter, inside activation checkpointing. Without
# checkpointing, autograd would keep the gathered parameters from forward to backward.


class GatherShards(torch.autograd.Function):
    """All-gathers the shards of all ranks into one buffer. Backward sums the gradient of the buffer
    over the ranks and returns this rank's shard of the sum."""

    @staticmethod
    def forward(ctx, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        flat = shard.new_empty(group.size() * shard.numel())
        all_gather(flat, shard, group=group)  # payload: the layer
        return flat

    @staticmethod
    def backward(ctx, grad: Tensor):
        shard = grad.new_empty(grad.numel() // ctx.group.size())
        reduce_scatter(shard, grad.contiguous(), group=ctx.group)  # payload: the layer
        return shard, None


def shard_of(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> Tensor:
    """This rank's shard of the flat, padded buffer that holds the tensors."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    padded_flat = nn.functional.pad(flat, (0, -flat.numel() % group.size()))
    return padded_flat.chunk(group.size())[group.rank()].clone()


class ShardedLayer(nn.Module):
    """Replaces a layer. Its only parameter is this rank's shard of the layer's parameters.

        model = nn.Sequential(*(ShardedLayer(layer, group) for layer in layers))
        optimizer = AdamW(model.parameters())

    Replace every layer that has trainable parameters: the gradients of a layer that is not replaced
    are not summed over the ranks. The loss of a rank must be the sum over its targets, divided by
    the number of targets in the global batch. Then the sum of the ranks' gradients is the gradient
    of the mean loss. The parameters of all ranks must be equal at the start. Frozen parameters of
    the layer are not sharded. Not supported: parameters that two layers share, parameters of
    several dtypes, and fp32 master copies. clip_grad_norm_() would use the norm of this rank's
    shards, so each rank would clip differently."""

    def __init__(self, layer: nn.Module, group: dist.ProcessGroup):
        super().__init__()
        # In a list, so that it is not a submodule: parameters() would return its empty parameters.
        self.layer, self.group = [layer], group
        self.shapes = {n: p.shape for n, p in layer.named_parameters() if p.requires_grad}
        full = [layer.get_parameter(name) for name in self.shapes]
        self.shard = nn.Parameter(shard_of(full, group))
        for p in full:
            p.data = p.new_empty(0)  # frees the memory

    def forward(self, *inputs):
        return checkpoint(self.run, *inputs, use_reentrant=False)

    def run(self, *inputs):  # called in forward and again in backward
        flat, parameters, start = GatherShards.apply(self.shard, self.group), {}, 0
        for name, shape in self.shapes.items():
            parameters[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return functional_call(self.layer[0], parameters, inputs)


# --- the full version -----------------------------------------------------------------------------
# Version 1 waits for each all-gather, and computes each forward twice. Zero3 attaches hooks to the
# layers and to the tensors between them. It gathers the next layer while this one computes. It
# needs no activation checkpointing: it frees the memory to which the saved tensors of autograd
# refer, and fills it again before backward. The model may still use checkpointing.
#
# Zero3 inherits from the classes of zero.py. The training loop calls start() before the first
# forward of a step and finish() after the last backward, as with Zero1 and Zero2. A layer is a
# transformer block, or a module outside the blocks that directly holds parameters. Such a module
# can contain other layers. A unit is a flat buffer with parameters of a layer, usually all of them.
# A layer has several units if, for example, some of its parameters are frozen. In each microbatch,
# Zero2 reduce-scatters the gradients of a unit as soon as all of them have been computed, and adds
# the sum to this rank's shard of the gradients. If two layers share a parameter, it is in a unit of
# the first of them, and autograd sums its two gradients before the reduce-scatter. The optimizer
# updates shards of the parameters, with fp32 master copies for bf16.
#
# weak(method, ...) is a hook that does not keep the Zero3 object alive. not_compiled(hook) keeps
# torch.compile from tracing it. The code below uses these attributes:
#
#     self.modules        {modules of the model}. A deep copy of the model keeps the hooks, but its
#                         modules are not in this set, so the hooks ignore it.
#     self.layers         {layer: its parameters}, in the order of model.modules()
#     self.units          all units
#     self.needs          by the index of the layer, the units that hold any of its parameters
#     self.unit_of        {parameter: its unit}
#     self.accumulations  {parameter: the number of gradients that it receives per step}
#     self.missing        {parameter: the number that it has not received in this step}
#     self.phase          the string "backward" from start() to finish(), although forwards also
#                         run in this time
#     unit.place          {parameter: its slice of the buffer}
#     unit.gathered       whether the buffer is filled, or an all-gather that fills it has started
#     unit.gathering      that all-gather, until unit.wait()


class ShardedUnit(Unit):
    """A unit that stores only this rank's shard of the parameters between uses."""

    def take_shard(self) -> Tensor:
        shard = super().take_shard()
        return shard.clone() if self.group.size() > 1 else shard  # reshard() frees the buffer

    def unshard(self) -> None:
        storage = self.parameters.untyped_storage()
        if not storage.nbytes():
            storage.resize_(self.parameters.numel() * self.parameters.itemsize)
        super().unshard()

    def reshard(self) -> None:
        """Free the full parameters. The storage object remains, because parameters and saved
        tensors are views of it. On a GPU, kernels that read the memory may still be queued. This is
        safe: the allocator reuses the memory only for tensors of the same stream, whose kernels run
        after them. A collective that fills such a tensor runs on another stream, but it first waits
        for the kernels that are already queued on this one."""
        super().reshard()
        if not self.gathered:  # with one rank, it stays gathered
            self.parameters.untyped_storage().resize_(0)


class Zero3(Zero2):
    """ZeRO-3: parameters are sharded too. The all-gather of the next layer overlaps with the
    computation of this layer. All ranks must run the same layers in the same order, because
    collectives are matched by call order. Otherwise ranks hang, raise an error, or, if the units
    have equal sizes, silently use wrong parameters.

    reshard_after_forward: False keeps all parameters in memory from the first forward of a step to
        the last backward, so each unit is gathered once per step.
    starts: the first layer of each pipeline stage on this rank. Stages run independently, so the
        next layer is not gathered ahead if it is in another stage.

    Every tensor that other layers or the loss use must be in the layer's return value, either
    directly or nested in tuples, lists or dicts. When a gradient reaches one of them, the layer is
    gathered, unless the backward of the next layer has prefetched it. If a layer stores a tensor in
    an attribute instead, a backward through that tensor may find the layer freed. It then fails,
    usually with a ValueError.

    Two kinds of layers stay gathered until the last backward of the step: those that contain other
    layers, and those that need a backward, but in whose return value Zero3 finds no tensor that
    requires a gradient. After a backward with create_graph=True, layers stay gathered until
    finish(). A layer that takes only integer tensors and has one parameter is treated as an
    embedding table: its backward must not read the parameter."""

    stage = 3
    unit_class = ShardedUnit

    def __init__(
        self, model: nn.Module, *args, reshard_after_forward: bool = True,
        starts: Collection[nn.Module] = (), **kwargs,
    ):  # fmt: skip
        super().__init__(model, *args, **kwargs)
        self.reshard_after_forward = reshard_after_forward
        self.stage_starts = {i for i, layer in enumerate(self.layers) if layer in starts}
        self.stage_starts |= {0, len(self.layers)}  # nothing precedes the first or follows the last
        copy_out = weak(self._copy_out)
        model.register_state_dict_post_hook(lambda _, *args: copy_out(*args))
        # By the index of the layer. is_outer: it contains other layers. is_table: it is an
        # embedding table, whose backward does not read the weight. _after_forward() updates
        # is_table.
        self.is_outer = [len(self.layers.keys() & {*layer.modules()}) > 1 for layer in self.layers]
        self.is_table = [type(layer) is nn.Embedding for layer in self.layers]
        # must_be_gathered: parameters for which _accumulated() checks that their layer is gathered
        # when they receive a gradient. Not included, because their layer may already be resharded:
        # weights whose gradient pipeline.py defers, and tables, see _after_forward().
        deferred = {module.weight for module in self.modules
                    if getattr(module, "weight_grad_queue", None) is not None}  # fmt: skip
        self.must_be_gathered = self.accumulations.keys() - deferred
        for i, layer in enumerate(self.layers):  # Zero1 has registered _before_forward()
            hook = not_compiled(weak(self._after_forward, i))
            layer.register_forward_hook(hook, with_kwargs=True)

    def start(self) -> None:
        super().start()
        self.create_graph = False  # whether a backward of this step has create_graph=True
        self.never_resharded: set[int] = set()  # layers that _reshard_layer() skips
        self.input_nodes: dict[int, list] = {}  # {layer: autograd nodes of its inputs}
        for unit in self.units:
            unit.reshard()

    def start_gathering(self) -> None:
        """No-op: _before_forward() gathers layer by layer."""

    def _gather_layer(self, i: int, ahead: int | None) -> None:
        """Wait for the parameters of layer i, and start to gather those of layer `ahead`."""
        for layer in (i,) if ahead is None else (i, ahead):
            for unit in self.needs[layer]:
                unit.unshard()
        for unit in self.needs[i]:
            unit.wait()

    def _reshard_layer(self, i: int) -> None:
        if i not in self.never_resharded and not self.create_graph:
            for unit in self.needs[i]:
                unit.reshard()

    def _before_forward(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Gather layer i, and start to gather layer i + 1."""
        if layer not in self.modules:  # a deep copy of the model, which keeps these hooks
            return
        # With activation checkpointing, this hook also runs in backward, before the layer is
        # recomputed. In that case, _before_backward() prefetches.
        no_prefetch = i + 1 in self.stage_starts or in_backward()
        self._gather_layer(i, ahead=None if no_prefetch else i + 1)
        if torch.is_grad_enabled() and not in_backward() and not self.is_outer[i]:
            inputs = [x for x in tensors_in((args, kwargs)) if x.requires_grad]
            self.input_nodes[i] = [node_of(x) for x in inputs]
            self._hook_inputs(i, inputs)

    def _hook_inputs(self, i: int, inputs: list[Tensor]) -> None:
        """Reshard layer i after its backward, when the gradient of an input is complete. The hooks
        must be registered before the forward, because a forward that modifies an input in place
        gives it a new grad_fn. If no input requires a gradient, no hook reshards the layer after
        its backward. Then its next forward or _accumulated() does."""
        # Autograd runs nodes in reverse order of their creation. When it reaches the node that
        # computed an input, all nodes of this layer have run.
        computed = [x for x in inputs if not x.is_leaf]
        for x in computed:
            x.register_hook(weak(self._after_backward, i))
        # The gradient of a leaf can be complete before all nodes of this layer have run. If all
        # inputs are leaves, reshard at the end of the whole backward. One hook is enough to queue
        # that. It is removed, because a leaf can be used again in later steps.
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
        if self.is_outer[i]:  # stays gathered in a step, but not after a forward in validation
            if not outputs and self.phase != "backward":
                self._reshard_layer(i)
            return
        # Assume that a layer is a table, whose backward does not read the parameter, if it has one
        # parameter and takes only token ids. This is decided at each call: a module with a tied
        # matrix can be a table first and then the output head.
        ids = (torch.int32, torch.int64)
        takes_ids = len(inputs) > 0 and all(x.dtype in ids for x in inputs)
        self.is_table[i] = takes_ids and len(parameters) == 1
        if self.is_table[i]:
            self.must_be_gathered -= {*parameters}
        elif torch.is_grad_enabled():
            self._hook_outputs(i, outputs)
        # A backward will follow, but forward returned no tensor to hook: keep the layer gathered.
        needs_backward = any(x.requires_grad for x in (*inputs, *parameters))
        if needs_backward and not outputs and torch.is_grad_enabled():
            self.never_resharded.add(i)
        storages = {unit.parameters.untyped_storage()._cdata for unit in self.needs[i]}
        # Resharding would free the values of an output that is a view of a parameter.
        is_view = any(y.untyped_storage()._cdata in storages for y in tensors_in(output))
        # Keep the last layer of each stage. In the last stage, its backward comes next. In other
        # stages, the backward of an earlier microbatch often comes next, and starts with this
        # layer.
        # In validation, no output requires a gradient, and every layer is resharded.
        keep_gathered = i + 1 in self.stage_starts or not self.reshard_after_forward
        if not is_view and not (outputs and keep_gathered):
            self._reshard_layer(i)

    def _hook_outputs(self, i: int, outputs: list[Tensor]) -> None:
        """Gather layer i before its backward, when a gradient reaches an output."""
        # Hook the node that computed an output y, not y. The pre-hooks of a node run after all
        # hooks on its output. This matters if the layer is called twice in a row: y is then the
        # input of the second call, whose hook on y reshards the layer.
        input_nodes = self.input_nodes.pop(i)
        for node in map(node_of, outputs):
            # An input that is returned unchanged has the node of an earlier layer.
            if node is not None and not any(node is other for other in input_nodes):
                node.register_prehook(weak(self._before_backward, i))

    def _before_backward(self, i: int, _) -> None:
        """Gather layer i, and start to gather layer i - 1."""
        # In backward, grad mode is enabled only if create_graph=True. This backward then builds
        # another graph. A later backward through that graph may read the parameters.
        self.create_graph |= torch.is_grad_enabled()
        no_prefetch = i in self.stage_starts or self.is_table[i - 1]
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
        for unit in self.units:  # those with frozen or unused parameters may still be gathered
            unit.reshard()

    def _copy_out(self, state: dict, prefix: str, _) -> None:
        """Replace the tensors of a state dict by copies, and free the full parameters, which a hook
        of Zero1 has gathered for it."""
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, Tensor):
                state[name] = value.clone()
        for unit in self.units:
            unit.reshard()


def in_backward() -> bool:
    """Whether a backward is running. A forward that runs now is a recomputation. With
    use_reentrant=False, it needs no hooks, because the tensors of the first forward have them."""
    return torch._C._current_graph_task_id() != -1


def node_of(t: Tensor) -> torch.autograd.graph.Node | None:
    """The autograd node that computed t. If t is a view, the node of its base: a later in-place
    operation on t would replace t.grad_fn, and the old t.grad_fn would never run."""
    return (t._base if t._is_view() else t).grad_fn


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v)


STAGES = {1: Zero1, 2: Zero2, 3: Zero3}  # used by train_3d.py

# --- cost -----------------------------------------------------------------------------------------


def predicted_payload(
    sizes: list[int], d: int, m: int = 1, replicas: int = 1, reshard: bool = True,
    skipped: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Payload per step, as defined in the module docstring. sizes: padded sizes of the units.
    skipped: the S of the module docstring. Default: the last unit, for a model without tables."""
    payload = zero.predicted_payload(sizes, d, stage=2, m=m, replicas=replicas)
    if reshard and d > 1:
        skipped = sizes[-1] if skipped is None else skipped
        payload["all_gather"] = m * (2 * sum(sizes) - skipped)
    return payload


# --- demo -----------------------------------------------------------------------------------------


def shard_layers(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Apply version 1 to each layer of a GPT from gpt.py."""
    for parent in (model, model.h):
        for name, layer in parent.named_children():
            if layer is not model.h and any(p.requires_grad for p in layer.parameters()):
                parent.add_module(name, ShardedLayer(layer, group))


def shards_and_expected(
    model: nn.Module, one_process: nn.Module, group: dist.ProcessGroup
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The shards of version 1 and their gradients, and the values that they should have."""
    shards, expected = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, ShardedLayer):
            full = [one_process.get_parameter(f"{name}.{n}") for n in layer.shapes]
            shards |= {name: layer.shard, f"{name}.grad": layer.shard.grad}
            expected[name] = shard_of(full, group)
            expected[f"{name}.grad"] = shard_of([p.grad for p in full], group)
    return shards, expected


def main() -> None:
    """Compare each version with one process that has all rows."""
    import measure

    with measure.Report("zero3.py") as report:
        group, d, m = report.group, report.group.size(), 2
        # Hybrid sharding: each of d / k groups of k ranks shards one copy of the parameters. k is
        # the largest proper divisor of d. If d is prime, it is 1, and nothing is sharded.
        k = max(k for k in range(1, max(2, d)) if d % k == 0)
        mesh = dist.init_device_mesh("cpu", (d // k, k), mesh_dim_names=("replicas", "group"))
        hybrid = {name: mesh[name].get_group() for name in mesh.mesh_dim_names}
        expected = zero.train(range(4 * d), group, m)
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        trained = zero.train(rows, group, m, functools.partial(shard_layers, group=group))
        model = trained[1]
        report.close("version 1 largest error", *shards_and_expected(model, expected[1], group))
        n = d * sum(p.numel() for p in model.parameters())  # with padding, since all are shards
        # wpe only adds a slice of its table to its input. This saves no tensor for backward, so
        # checkpoint() does not recompute it, and it is gathered once per microbatch.
        gathered = 2 * n - d * model.wpe.shard.numel()
        predicted = {"reduce_scatter": m * n, "all_gather": m * gathered, "all_reduce": 0}
        zero.compare(report, "version 1", trained, expected, predicted)
        for name, options in (
            ("ZeRO-3", {}),
            ("ZeRO-3 kept", {"reshard_after_forward": False}),
            (f"ZeRO-3 hybrid {d // k} x {k}", hybrid),
        ):
            attach = functools.partial(Zero3, accumulations=m, **options)
            trained = zero.train(rows, group, m, attach)
            sync, reshard = trained[2], name != "ZeRO-3 kept"
            shards = sync.group.size()
            sizes = [padded([p.numel() for p in unit.place], shards) for unit in sync.units]
            skipped = sizes[0] + sizes[-1]  # wte, and lm_head as the last layer
            predicted = predicted_payload(sizes, shards, m, d // shards, reshard, skipped)
            zero.compare(report, name, trained, expected, predicted)


if __name__ == "__main__":
    main()
