"""Predicts the memory of each rank and the time of a step, for a model, a layout and a GPU.

    layout = Layout(tp=8, pp=16, dp=8, microbatches=192)
    held = predicted_rank_bytes(config, layout, 0)                 {"parameters": bytes, ...}
    times = predicted_step(config, layout, HARDWARE["a100-80"])    times.total, times.bubble, ...

Bytes, FLOPs and payloads are closed forms. The bubble comes from a simulation of the schedule.
Seconds follow from these and from the constants of `Hardware`, six of which are fitted to published
tables. docs/recipe.md lists what the model leaves out.

This is a library without a command. `make plan` searches for layouts with it. `make dry-run`
compares its counts with those of a real rank, `make published` and `make plan-check` compare its
times with published tables and with this machine.

b, s, h: microbatch size, tokens per row on a rank, hidden size. t, c, p, d: sizes of tensor,
context, pipeline and data parallelism. m: microbatches per step. A stage is a contiguous slice of
the layers; a rank has one or more stages, its chunks. F, B, W: forward, backward for the input,
backward for the weights (part of B unless the schedule separates it).
"""

import collections
import dataclasses
import functools
import types
from typing import NamedTuple

import torch

import context_parallel
import ddp
import gpt
import options
import pipeline
import schedules
import tensor_parallel
import zero

# --- hardware -------------------------------------------------------------------------------------


class Hardware(NamedTuple):
    """A GPU and its links. Bandwidths are those of one direction."""

    name: str
    tflops: float  # peak of dense bf16 matmuls
    memory_gb: float  # in 1e9 bytes
    memory_gb_per_s: float
    link_gb_per_s: float  # per GPU, inside a machine
    network_gb_per_s: float  # per GPU, between machines
    # Fitted to published tables by tools/plan/published.py:
    matmul: float = 0.75  # fraction of tflops that a large matmul reaches
    ramp_gflop: float = 17.0  # a matmul of this size reaches half of it
    passes: float = 2.4  # memory traffic of forward / bytes saved for backward; backward likewise
    link: float = 0.90  # fraction of link_gb_per_s that a ring reaches
    network: float = 0.78  # fraction of network_gb_per_s that a ring reaches
    overlap: float = 0.48  # fraction of overlapped time that still adds to a step: they share a GPU
    # Latency per call. Taken from Calculon (Isaev et al. 2023), not measured:
    link_us: float = 10.0
    network_us: float = 20.0


# From NVIDIA's data sheets. The network is that of DGX machines, 8 x 100, 200, 200 and 400 Gbit/s,
# divided by 8 GPUs.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("v100-32", 125, 32, 900, 150, 12.5),
        Hardware("a100-40", 312, 40, 1555, 300, 25),
        Hardware("a100-80", 312, 80, 2039, 300, 25),
        Hardware("h100-80", 989, 80, 3350, 450, 50),
    )
}


class Program(NamedTuple):
    """Properties of the training program. The defaults are those of train_3d.py in bf16."""

    itemsize: int = 2  # bytes per element of parameters and activations
    grad_itemsize: int = 4  # of gradients, when accumulated over microbatches
    reduce_itemsize: int = 2  # of gradients, when reduced over ranks
    hides_tp: bool = True  # tp collectives of backward overlap with weight gradients
    hides_dp: bool = True  # gradients are reduced during backward
    scatters: bool = False  # a tp rank sends 1/t of a boundary tensor, and the receivers gather it
    waits: bool = False  # a rank computes nothing during its transfers
    stat: int = 4  # bytes of a layer norm's mean and of its 1/std; itemsize on a CPU


DEFAULT_PROGRAM = Program()


class Layout(NamedTuple):
    """The layout of a run, in the terms of train_3d.py's flags. `make plan` keeps the fields after
    `cp` at their defaults.
    """

    tp: int
    pp: int
    dp: int
    zero: int = 0
    micro_batch_size: int = 1
    microbatches: int = 1
    recompute: str = "full"
    schedule: str = "1f1b"
    chunks: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    shard_size: int = 0  # --zero-shard-size; 0: dp x cp
    reshard: bool = True  # not --no-reshard-after-forward
    every: int = 1  # K of --recompute POLICY:K
    layers: int | None = None  # --recompute-layers
    cp_attention: str = "ring"
    keep_gathered: bool = False  # --sp-keep-gathered

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.replicas

    @property
    def replicas(self) -> int:
        """Number of ranks over which gradients are summed."""
        return self.dp * self.cp

    @property
    def shards(self) -> int:
        """Number of ZeRO shards."""
        return (self.shard_size or self.replicas) if self.zero else 1


# --- bytes ----------------------------------------------------------------------------------------


def split_layers(config: gpt.GPTConfig, layout: Layout) -> list[range]:
    """The blocks of each stage, as in train_3d.py."""
    return _split_layers(config, layout.pp * layout.chunks)


@functools.lru_cache(1024)
def _split_layers(config: gpt.GPTConfig, n: int) -> list[range]:
    """The blocks of each of n stages, balanced by FLOPs."""
    embedding, block, head = gpt.module_of(config).flops_per_token(config)
    return pipeline.split_layers(config.n_layer, n, embedding / block, head / block)


def stages(layout: Layout, pp_rank: int) -> list[int]:
    """The stages of a rank."""
    return placement(layout.schedule, layout.pp, layout.chunks)[pp_rank]


@functools.lru_cache(4096)
def placement(name: str, p: int, chunks: int) -> list[list[int]]:
    """The stages of each rank."""
    return schedules.stages_of(schedules.SCHEDULES[name](p, 1, chunks))


@functools.cache
def splits_backward(name: str) -> bool:
    """Whether the schedule has W."""
    return schedules.SCHEDULES[name].splits_backward


def vocab_rows(config: gpt.GPTConfig, t: int, tp_rank: int = 0) -> int:
    """Rows of the vocabulary on this tp rank. Rank 0 has the most."""
    start, stop = tensor_parallel.bounds(config.vocab_size, tp_rank, t)
    return stop - start


class Sharded(NamedTuple):
    """A model with one block, sharded by its plan, as a tensor-parallel rank has it. A unit of ZeRO
    is given by the elements of its parameters."""

    first: list[list[int]]  # units of the embeddings
    block: list[list[int]]
    last: list[list[int]]  # final norm and head
    linears: list[tuple[int, int, bool]]  # of the block: (inputs, outputs, column-parallel)
    core_flops: int  # FLOPs per token of the attention core, in forward


@functools.lru_cache(1024)
def sharded(config: gpt.Config, t: int = 1, tp_rank: int = 0, sequence: bool = False) -> Sharded:
    arch = gpt.module_of(config)
    with torch.device("meta"):
        full, model = (arch.Model(dataclasses.replace(config, n_layer=1)) for _ in range(2))
    group = types.SimpleNamespace(size=lambda: t, rank=lambda: tp_rank)
    tensor_parallel.parallelize(model, arch.plan(config, t), group, sequence)
    layers = [*zero.layers(model)]
    block = layers.index(model.h["0"])
    parts: tuple[list[list[int]], ...] = [], [], []  # units before, in and after the block
    for i, layer in enumerate(layers):
        parameters, sizes = [*layer.parameters()], collections.defaultdict(list)
        for p in parameters:
            sizes[zero.unit_key(p, parameters)].append(p.numel())
        parts[(i >= block) + (i > block)].extend(sizes.values())
    kinds = (torch.nn.Linear, tensor_parallel.ColumnParallelLinear,
             tensor_parallel.RowParallelLinear)  # fmt: skip
    linears = [(*x.weight.shape[::-1], isinstance(x, kinds[1]))
               for x in layers[block].modules() if isinstance(x, kinds)]  # fmt: skip
    matmuls = sum(2 * p.numel() for p in full.h.parameters() if p.ndim == 2)
    core = (arch.flops_per_token(config)[1] - matmuls) // t
    return Sharded(*parts, linears, core)


def units(
    config: gpt.Config,
    t: int,
    n_layer: int,
    first: bool,
    last: bool,
    tp_rank: int = 0,
    sequence: bool = False,
) -> list[list[int]]:
    """Elements of each parameter, grouped by ZeRO unit, on a rank with n_layer blocks. first, last:
    whether the rank has the first and the last stage."""
    model = sharded(dataclasses.replace(config, n_layer=1), t, tp_rank, sequence)
    both = first and getattr(
        config, "tied", False
    )  # then the head is the token embedding, not a unit
    end = model.last[:-1] if both else model.last
    return model.first * first + model.block * n_layer + end * last


def payload_sizes(unit_sizes: list[list[int]], layout: Layout) -> list[int]:
    """Elements communicated for each unit, including ZeRO's padding."""
    if layout.zero:
        return [zero.padded(numels, layout.shards) for numels in unit_sizes]
    return [*map(sum, unit_sizes)]


@functools.lru_cache(4096)
def schedule_of(name: str, p: int, m: int, chunks: int) -> schedules.Schedule:
    return schedules.SCHEDULES[name](p, m, chunks)


def repeating_microbatches(layout: Layout) -> int:
    """Number of microbatches after which the schedule repeats a pattern. A schedule that stores
    more with more microbatches, such as GPipe, never does."""
    p, m, v = layout.pp, layout.microbatches, layout.chunks
    held, few = schedules.SCHEDULES[layout.schedule].held, min(m, 4 * p + m % p)
    return m if held is None or held(p, m, v, 0) > held(p, few, v, 0) else few


@functools.lru_cache(1 << 16)
def state_bytes(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, first: bool, last: bool,
    tp_rank: int = 0, shard_rank: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Bytes of parameters, gradients and optimizer state of a pp rank, and of ZeRO-3's buffers.

    ZeRO-3 has buffers for two gathered units and for the gradients of one, as computed and as sent.
    layout: the first result of cache_keys.
    """
    sequence = layout.sequence_parallel
    unit_sizes = units(config, layout.tp, n_layer, first, last, tp_rank, sequence)
    names = {2: "bf16", 4: "float32", 8: "float64"}
    dtypes = [options.DTYPES[names[n]] for n in (program.itemsize, program.grad_itemsize)]
    if layout.zero:
        held = predicted_zero_bytes(unit_sizes, layout.shards, shard_rank, layout.zero, *dtypes)
    else:
        held = ddp.predicted_bytes(sum(map(sum, unit_sizes)), *dtypes)
    buffers = max(map(sum, unit_sizes)) * (3 * program.itemsize + program.reduce_itemsize)
    return held | {"buffers": buffers if layout.zero == 3 and layout.shards > 1 else 0}


@functools.lru_cache(1 << 16)
def chunk_bytes(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, first: bool, last: bool,
    layers: int | None = None, tp_rank: int = 0,
) -> tuple[int, int, int]:  # fmt: skip
    """Bytes of one microbatch of a stage, as a tuple of
    - the activations saved from F to B, with the recompute policy on `layers` blocks (None: all);
    - the tensors saved from B to W, if W is separate;
    - temporaries: the activations of one block and the buffers of two transfers each way; with cp,
      in the backward of attention, two buffers of keys and values, two of their gradients, and the
      gradient of the queries.

    Activations are known for gpt.py only. For other models they are 0.

    layout: the second result of cache_keys.
    """
    t, c, b, h = layout.tp, layout.cp, layout.micro_batch_size, config.n_embd
    s = config.seq_len // c
    sizes = dict(b=b, s=s, h=h, itemsize=program.itemsize, t=t, sequence=layout.sequence_parallel,
                 keep_gathered=layout.keep_gathered)  # fmt: skip
    head = vocab_rows(config, t, tp_rank)
    waiting = predicted_queue_bytes(
        config, n_layer, b, program.itemsize, head * last, t,
        layout.sequence_parallel and not layout.keep_gathered, tp_rank
    ) // c  # fmt: skip
    boundary = b * s * h // (t if layout.sequence_parallel else 1) * program.itemsize
    if gpt.module_of(config) is not gpt:
        return 0, waiting, 4 * boundary * (layout.pp > 1)
    more = dict(a=config.n_head, attention=config.attention, dropout=config.dropout > 0,
                stat=program.stat, c=c, method=layout.cp_attention)  # fmt: skip
    flying = predicted_activation_bytes(
        n_layer, v=head, policy=layout.recompute, layers=layers, first=first, last=last, **sizes,
        **more
    ) - 8 * last  # fmt: skip
    block = predicted_block_bytes(policy="none", **sizes, **more)
    ring = b * s * h // t * (4 * program.itemsize + 5 * max(4, program.itemsize)) * (c > 1)
    return flying, waiting, block + ring + 4 * boundary * (layout.pp > 1)


def cache_keys(layout: Layout) -> tuple[Layout, Layout]:
    """Layouts for state_bytes and for chunk_bytes, which are cached.

    They keep only the fields on which the result depends, so that many layouts share a cache entry.
    """
    state_layout = Layout(layout.tp, 1, layout.replicas, layout.zero, shard_size=layout.shard_size,
                          sequence_parallel=layout.sequence_parallel)  # fmt: skip
    chunk_layout = Layout(layout.tp, min(2, layout.pp), 1, 0, layout.micro_batch_size, 1,
                          layout.recompute, sequence_parallel=layout.sequence_parallel,
                          cp=layout.cp, cp_attention=layout.cp_attention,
                          keep_gathered=layout.keep_gathered)  # fmt: skip
    return state_layout, chunk_layout


def under_policy(layout: Layout, n_layers: list[int]) -> list[int]:
    """How many blocks of each stage of a rank are recomputed.

    n_layers: blocks of each stage. The policy applies to every `layout.every`-th of the rank's
    first `layout.layers` blocks.
    """
    chosen, counts, start = range(sum(n_layers))[: layout.layers : layout.every], [], 0
    for n in n_layers:
        counts.append(sum(start <= i < start + n for i in chosen))
        start += n
    return counts


def dp_itemsize(program: Program, operation: str) -> int:
    """Bytes per element of a dp collective: all-gathers send parameters, all others gradients."""
    return program.itemsize if operation == "all_gather" else program.reduce_itemsize


def tp_traffic(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, recomputed: int,
    first: bool, last: bool, m: int = 1,
) -> dict[tuple[str, str], tuple[int, int]]:  # fmt: skip
    """(phase, operation) -> (calls, bytes) of the tp collectives of a stage, for m microbatches.

    Phases: "forward", "backward", and "recompute" for the second forward of `recomputed` blocks.
    The collectives of the loss have elements of at least 4 bytes.
    """
    b, s, h = layout.micro_batch_size, config.seq_len // layout.cp, config.n_embd
    sequence, itemsize = layout.sequence_parallel, program.itemsize
    costs = tensor_parallel.predicted_collectives(
        n_layer, b, s, h, m, sequence, first, last, layout.keep_gathered
    )
    traffic = {key: (calls, elements * itemsize) for key, (calls, elements) in costs.items()}
    calls, nbytes = traffic["forward", "all_reduce"]
    nbytes += last * 3 * m * b * s * (max(4, itemsize) - itemsize)
    traffic["forward", "all_reduce"] = calls, nbytes
    second = recomputed_calls(layout.recompute, sequence, getattr(config, "dropout", 0) > 0)
    for operation, calls in second.items():
        calls *= m * recomputed
        traffic["recompute", operation] = calls, calls * b * s * h * itemsize
    return traffic


def recomputed_calls(policy: str, sequence: bool, dropout: bool) -> dict[str, int]:
    """Calls of tp collectives in the second forward of a block.

    It stops before the last matmul and the collective after it, unless dropout follows them: its
    mask must be drawn again.
    """
    if policy != "full":
        return {}
    if sequence:
        return {"all_gather": 2, "reduce_scatter": 1 + dropout}
    return {"all_reduce": 1 + dropout}


def cp_traffic(
    config: gpt.Config, layout: Layout, program: Program, n_layer: int, recomputed: int, m: int = 1
) -> dict[tuple[str, str], tuple[int, int]]:
    """(phase, operation) -> (calls, bytes) of the cp collectives of n_layer blocks, for m
    microbatches. phase: as in tp_traffic(). Under the policies "full" and "selective", the second
    forward repeats those of the forward. With "selective", it stops before the last all-to-all of
    Ulysses.

    The ring's gradients of keys and values have elements of at least 4 bytes. Several tp ranks may
    share a key/value head, see examples/shared_kv.py."""
    b, s, c = layout.micro_batch_size, config.seq_len, layout.cp
    heads, n = config.n_head // layout.tp, config.n_embd // config.n_head
    kv_heads = -(-getattr(config, "n_kv_head", config.n_head) // layout.tp)
    method, traffic = layout.cp_attention, {}
    costs = context_parallel.predicted_payload(method, b, s, heads, kv_heads, n, c)
    for (phase, operation), (calls, elements) in costs.items():
        nbytes = elements * program.itemsize
        if (phase, operation) == ("backward", "send"):  # 2 c - 1 sends, c of them of gradients
            more = max(4, program.itemsize) - program.itemsize
            nbytes += elements // calls * c * more
        traffic[phase, operation] = m * n_layer * calls, m * n_layer * nbytes
        if phase == "forward" and layout.recompute in ("full", "selective"):
            if (layout.recompute, operation) == ("selective", "all_to_all"):
                calls, nbytes = calls - 1, nbytes - b * heads * n * s // c * program.itemsize
            traffic["recompute", operation] = m * recomputed * calls, m * recomputed * nbytes
    return traffic


def predicted_rank_bytes(
    config: gpt.GPTConfig, layout: Layout, pp_rank: int, program: Program = DEFAULT_PROGRAM,
    simulated: bool = True, tp_rank: int = 0, shard_rank: int = 0,
    schedule: schedules.Schedule | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes of a rank by kind: parameters, gradients, optimizer, activations, buffers.

    All but the buffers, which are estimated, are equal to what measure.py counts. simulated: find
    the peak of the activations by walking through the schedule; otherwise return a lower bound.
    schedule: default: the one named by the layout.
    """
    state_layout, chunk_layout = cache_keys(layout)
    placed = schedules.stages_of(schedule) if schedule else None
    own = placed[pp_rank] if placed else stages(layout, pp_rank)
    split = _split_layers(config, sum(map(len, placed)) if placed else layout.pp * layout.chunks)
    end, n_layers = len(split) - 1, [len(split[k]) for k in own]
    ends = (0 in own, end in own)
    held = dict(state_bytes(
        config, state_layout, program, sum(n_layers), *ends, tp_rank, shard_rank
    ))  # fmt: skip
    chunks = {
        k: chunk_bytes(config, chunk_layout, program, n, k == 0, k == end, layers, tp_rank)
        for k, n, layers in zip(own, n_layers, under_policy(layout, n_layers), strict=True)
    }
    flying, waiting, temporary = ({k: three[i] for k, three in chunks.items()} for i in range(3))
    name, p, v = layout.schedule, layout.pp, layout.chunks
    if simulated:
        schedule = schedule or schedule_of(name, p, repeating_microbatches(layout), v)
        held["activations"] = peak_held(schedule[pp_rank], flying, waiting)
    else:
        n = schedules.SCHEDULES[name].held(p, layout.microbatches, v, pp_rank)
        each = [flying] + [waiting] * splits_backward(name)
        held["activations"] = n * min(min(bytes_of.values()) for bytes_of in each)
    held["activations"] += 8 * ends[1]
    if layout.tp == 1:  # nn.Embedding saves views of the token ids of all microbatches
        tokens = layout.microbatches * layout.micro_batch_size * config.seq_len // layout.cp
        held["activations"] += 8 * tokens * ends[0]
    held["buffers"] += max(temporary.values())
    return held


def worst_rank(
    config: gpt.GPTConfig, layout: Layout, program: Program = DEFAULT_PROGRAM
) -> dict[str, int]:
    """Bytes by kind of the pp rank with the largest sum."""
    ranks = (predicted_rank_bytes(config, layout, r, program) for r in range(layout.pp))
    return max(ranks, key=lambda held: sum(held.values()))


def may_fit(
    config: gpt.GPTConfig, layout: Layout, limit: float, program: Program = DEFAULT_PROGRAM
) -> bool:
    """A cheap test before fits(): False if a rank certainly needs more than `limit` bytes."""
    ends = (0, layout.pp - 1)
    return all(sum(predicted_rank_bytes(config, layout, r, program, False).values()) <= limit
               for r in ends)  # fmt: skip


def fits(
    config: gpt.GPTConfig, layout: Layout, limit: float, program: Program = DEFAULT_PROGRAM
) -> bool:
    """Whether every rank needs at most `limit` bytes."""
    return all(sum(predicted_rank_bytes(config, layout, r, program).values()) <= limit
               for r in range(layout.pp))  # fmt: skip


# --- time -----------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """Predicts the time of collectives over n ranks whose global ranks are `stride` apart."""

    hardware: Hardware
    per_node: int
    ranks: int
    stride: int

    def seconds(self, operation: str, calls: float, payload_bytes: float) -> float:
        hardware, n = self.hardware, self.ranks
        if n == 1 and operation != "send":
            return 0.0
        inside = n * self.stride <= self.per_node
        share, speed = (hardware.link, hardware.link_gb_per_s) if inside else (
            hardware.network, hardware.network_gb_per_s)  # fmt: skip
        latency = hardware.link_us if inside else hardware.network_us
        wire = {"all_reduce": 2 * (n - 1) / n, "send": 1.0}.get(operation, (n - 1) / n)
        return calls * latency * 1e-6 + wire * payload_bytes / (share * speed * 1e9)


def overlapped_seconds(compute: float, collective: float, overlap: float) -> float:
    """Seconds of computation and a collective that run at the same time. See Hardware.overlap."""
    return max(compute, collective) + overlap * min(compute, collective)


class Times(NamedTuple):
    """Seconds of a step by part."""

    matmul: float
    memory: float  # operations bound by memory bandwidth: norms, GELU, softmax, residuals
    tp: float  # exposed tp collectives, and exposed sends of cp; with ZeRO-3 also its collectives
    bubble: float  # idle, including waiting for transfers
    dp: float  # exposed reductions of gradients and, for ZeRO-1 and 2, all-gathers of parameters
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


Parts = dict[str, tuple[float, float, float]]


@functools.lru_cache(1 << 16)
def chunk_seconds(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int, program: Program,
    deferred: bool, n: int, first: bool, last: bool,
) -> Parts:  # fmt: skip
    """Seconds of one microbatch of a stage with n blocks: {"F" | "B" | "W": (matmul, memory, tp)}.

    B does not include the matmuls of W. deferred: whether the schedule has W. With ZeRO-3, tp
    includes the exposed time of its collectives.

    With c > 1, a rank computes 1/c of a row, and its attention runs in the c steps of the ring. The
    scores that the ring leaves out are counted, because they are also counted for c = 1. For the
    other --cp-attention, there is no model: gathered keys need twice the time of the ring's scores.
    """
    t, c, b, h = layout.tp, layout.cp, layout.micro_batch_size, config.n_embd
    s = config.seq_len // c
    _, block, head = (b * s * flops / t for flops in gpt.flops_per_token(config))
    core = b * s * 4 * c * s * h / t  # FLOPs of a block without weights: the core of attention
    dropout, policy = config.dropout > 0, layout.recompute
    again = predicted_flops(config, 1, b, policy, deferred=deferred, t=t) / c - 3 * block
    sizes = (b, config.seq_len, h, config.n_head, config.attention, program.itemsize)
    more = (dropout, t, layout.sequence_parallel, layout.keep_gathered)
    kept, left = (predicted_block_bytes(*sizes, name, *more) / c
                  for name in ("none", "selective"))  # fmt: skip
    anew = {"full": kept, "selective": kept - left}.get(policy, 0)
    head_bytes = b * s * -(-config.vocab_size // t) * (program.itemsize + 4)
    over_tp = Collective(hardware, per_node, t, 1)
    over_dp = Collective(hardware, per_node, layout.replicas, t)
    over_cp = Collective(hardware, per_node, c, t)

    def matmul(flops: float, calls: int) -> float:
        ramp = calls * hardware.ramp_gflop * 1e9
        return (flops + ramp) / (hardware.matmul * hardware.tflops * 1e12)

    def memory(nbytes: float) -> float:
        return hardware.passes * nbytes / (hardware.memory_gb_per_s * 1e9)

    def dp_seconds(operation: str, elements: int) -> float:
        nbytes = elements * dp_itemsize(program, operation)
        return over_dp.seconds(operation, n + 1, nbytes)

    def ring(phase: str, flops: float, last: int = 0) -> float:
        """Exposed seconds. The sends of a step overlap with its attention, but for those of the
        last step. flops: of attention in all steps. last: bytes sent in the last step."""
        calls, nbytes = sends.get((phase, "send"), (0, 0))
        compute = n * matmul(flops, 4 * c if phase == "backward" else 2 * c) * (c - 1) / c
        at_the_end = over_cp.seconds("send", n, n * last) if last else 0.0
        hidden = over_cp.seconds("send", calls, nbytes) - at_the_end
        return overlapped_seconds(compute, hidden, hardware.overlap) - compute + at_the_end

    sends = cp_traffic(config, layout, program, n, n)
    comm = {"forward": 0.0, "backward": 0.0, "hidden": 0.0, "recompute": 0.0}
    traffic = tp_traffic(config, layout, program, n, n, first, last)
    for (phase, operation), (calls, nbytes) in traffic.items() if t > 1 else ():
        hidden = phase == "backward" and program.hides_tp
        comm["hidden" if hidden else phase] += over_tp.seconds(operation, calls, nbytes)
    w = n * matmul(block - core, 4) + last * matmul(head, 1)
    overlapped = overlapped_seconds(w, comm["hidden"], hardware.overlap)
    tp_b = comm["backward"] + comm["recompute"] + overlapped - w
    more_calls = 2 * (c - 1)  # matmuls of the ring's other steps
    second_calls = {"full": 6 + more_calls, "selective": c}.get(policy, 0)  # of the second forward
    ends = last * matmul(head, 1), last * memory(head_bytes)
    f = [n * matmul(block, 6 + more_calls) + ends[0], n * memory(kept) + ends[1], comm["forward"]]
    bw = [n * matmul(block + core + again, 8 + 2 * more_calls + second_calls) + ends[0],
          n * memory(kept + anew) + ends[1], tp_b]  # fmt: skip
    if c > 1:
        f[2] += ring("forward", core)
        bw[2] += ring("backward", 2 * core, 2 * b * s * h // t * max(4, program.itemsize))
        bw[2] += ring("recompute", core)
    if layout.zero == 3 and layout.replicas > 1:
        psi = sum(payload_sizes(units(config, t, n, first, last), layout))
        gather = dp_seconds("all_gather", psi)
        both = gather + dp_seconds("reduce_scatter", psi)
        for part, collective, more_compute in ((f, gather, 0.0), (bw, both, w)):
            compute = sum(part) + more_compute
            part[2] += overlapped_seconds(compute, collective, hardware.overlap) - compute
    return {"F": tuple(f), "B": tuple(bw), "W": (w, 0.0, 0.0)}


def stage_seconds(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int, program: Program,
    split: list[range],
) -> list[Parts]:  # fmt: skip
    """chunk_seconds of each stage. split: the blocks of each stage."""
    zero3 = layout.zero == 3 and layout.replicas > 1
    # Only the fields on which chunk_seconds depends, so that layouts share its cache.
    key = Layout(layout.tp, 1, layout.dp if zero3 else 1, 3 * zero3, layout.micro_batch_size,
                 1, layout.recompute, sequence_parallel=layout.sequence_parallel,
                 cp=layout.cp, keep_gathered=layout.keep_gathered)  # fmt: skip
    common = (config, key, hardware, per_node, program, splits_backward(layout.schedule))
    end = len(split) - 1
    return [chunk_seconds(*common, len(own), k == 0, k == end) for k, own in enumerate(split)]


@functools.lru_cache(1 << 14)
def makespan(
    name: str, p: int, m: int, chunks: int, seconds: tuple[tuple[float, float, float], ...],
    transfer: float,
) -> float:  # fmt: skip
    """Simulated seconds of m microbatches. seconds: (F, B, W) of each stage."""
    schedule = schedule_of(name, p, m, chunks)
    split_backward = any(map(schedules.splits_backward, schedule))
    index = {"F": 0, "B": 1, "W": 2}

    def time(action: schedules.Action) -> float:
        weights = 0.0 if split_backward or action.kind != "B" else seconds[action.stage][2]
        return seconds[action.stage][index[action.kind]] + weights

    return max(span.end for span in schedules.simulate(schedule, time, transfer))


def pipeline_seconds(
    layout: Layout, seconds: tuple[tuple[float, float, float], ...], transfer: float
) -> float:
    """Seconds of all microbatches of a step.

    A long schedule is simulated only until it repeats a pattern of p microbatches, whose duration
    is then multiplied.
    """
    name, p, m, chunks = layout.schedule, layout.pp, layout.microbatches, layout.chunks
    if p == 1 and chunks == 1:
        return m * sum(seconds[0])
    simulated = repeating_microbatches(layout)
    end = makespan(name, p, simulated, chunks, seconds, transfer)
    if simulated == m:
        return end
    p_earlier = makespan(name, p, simulated - p, chunks, seconds, transfer)
    return end + (m - simulated) / p * (end - p_earlier)


def least_seconds(layout: Layout, seconds: list[tuple[float, float, float]]) -> float:
    """A lower bound for the seconds of all microbatches of a step, without a simulation.

    A rank computes all its microbatches. Before its first forward it waits for the forwards of the
    earlier ranks. After its last backward, the earlier ranks still run their last backwards; this
    is not counted if W is separate from B, because W can fill the gap.
    """
    m, deferred = layout.microbatches, splits_backward(layout.schedule)
    least, earlier_ranks = 0.0, 0.0
    for r in range(layout.pp):
        busy = m * sum(sum(seconds[k]) for k in stages(layout, r))
        least = max(least, earlier_ranks + busy)
        earlier_ranks += seconds[r][0] + (0.0 if deferred else seconds[r][1] + seconds[r][2])
    return least


def predicted_step(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int = 8,
    program: Program = DEFAULT_PROGRAM, split: list[range] | None = None,
    round_to: int | None = None, least: bool = False,
) -> Times:  # fmt: skip
    """Seconds of a step by part.

    per_node: GPUs per machine. split: the blocks of each stage (default: split_layers). round_to:
    round the relative times of stages to so many digits, so that similar layouts share a cached
    simulation. least: return a lower bound without a simulation.
    """
    t, p, d, m = layout.tp, layout.pp, layout.replicas, layout.microbatches
    split = split or split_layers(config, layout)
    parts = stage_seconds(config, layout, hardware, per_node, program, split)
    seconds = [tuple(sum(part[kind]) for kind in "FBW") for part in parts]
    boundary = layout.micro_batch_size * config.seq_len * config.n_embd * program.itemsize
    boundary /= layout.cp
    boundary /= t if layout.sequence_parallel or program.scatters else 1
    over_pp = Collective(hardware, per_node, p, t * d)
    transfer = over_pp.seconds("send", 1, boundary) if p > 1 else 0.0
    if program.scatters:
        over_tp = Collective(hardware, per_node, t, 1)
        transfer += over_tp.seconds("all_gather", 1, boundary * t)
    if program.waits:
        seconds = [(f + transfer, b + transfer, w) for f, b, w in seconds]

    unit = max(map(sum, seconds))
    if least:
        whole = least_seconds(layout, seconds)
    else:
        relative = [tuple(x / unit for x in three) for three in seconds]
        relative_transfer = transfer / unit
        if round_to is not None:
            relative = [tuple(round(x, round_to) for x in three) for three in relative]
            relative_transfer = round(relative_transfer, round_to)
        whole = unit * pipeline_seconds(layout, tuple(relative), relative_transfer)

    of_rank = [stages(layout, r) for r in range(p)]
    # The parts are those of the busiest rank. The rest of the step is its bubble.
    busiest = max(of_rank, key=lambda ks: sum(sum(seconds[k]) for k in ks))
    busy = [m * sum(parts[k][kind][i] for k in busiest for kind in "FBW") for i in range(3)]

    ends = [units(config, t, sum(len(split[k]) for k in ks), 0 in ks, len(split) - 1 in ks)
            for ks in (of_rank[0], of_rank[-1])]  # fmt: skip
    numels = max((payload_sizes(unit_sizes, layout) for unit_sizes in ends), key=sum)
    psi, over_dp = sum(numels), Collective(hardware, per_node, d, t)
    backward = sum(sum(seconds[k][1:]) for k in of_rank[0])
    forward = sum(seconds[k][0] for k in of_rank[0])

    def exposed(collective: float, compute: float) -> float:
        rest = overlapped_seconds(compute, collective, hardware.overlap) - compute
        return rest if program.hides_dp else collective

    def dp_seconds(operation: str) -> float:
        nbytes = psi * dp_itemsize(program, operation)
        return over_dp.seconds(operation, len(numels), nbytes)

    if layout.zero == 0:
        dp = exposed(dp_seconds("all_reduce"), backward)
    else:
        times = {1: 1, 2: m, 3: 0}[layout.zero]  # stage_seconds contains those of ZeRO-3
        dp = times * exposed(dp_seconds("reduce_scatter"), backward)
        if layout.zero < 3:
            dp += exposed(dp_seconds("all_gather"), forward)
    # AdamW reads and writes its state and writes the parameter. The gradient is read for the norm,
    # read and written by clipping, read by AdamW, and set to zero.
    owned, states = psi / (d if layout.zero else 1), 12 if program.itemsize < 4 else 8
    nbytes = owned * (2 * states + program.itemsize + 5 * program.grad_itemsize)
    optimizer = nbytes / hardware.memory_gb_per_s / 1e9
    idle = whole - sum(busy)
    return Times(*busy, idle if idle > 1e-9 * whole else 0.0, dp, optimizer)


# --- bytes and FLOPs of blocks, by recompute policy -----------------------------------------------
# activation_ckpt.py has the short forms: explicit attention, no dropout, one process.


def predicted_block_bytes(
    b: int, s: int, h: int, a: int, attention: str, itemsize: int, policy: str = "none",
    dropout: bool = False, t: int = 1, sequence: bool = False, keep_gathered: bool = False,
    stat: int | None = None, c: int = 1, method: str = "ring",
) -> int:  # fmt: skip
    """Bytes that autograd saves for the backward of one GPT-2 block of gpt.py, per microbatch, on
    one of t tensor-parallel ranks. s: tokens on this rank. itemsize: bytes per element of the
    activations. sequence: sequence parallelism. keep_gathered: --sp-keep-gathered. stat: bytes per
    mean and 1/std of a layer norm (default: itemsize, which holds on a CPU; a GPU uses 4 also in
    bf16). c, method: context-parallel ranks, and --cp-attention.

    Saved on each rank, in elements unless stated otherwise:

        2 b s h      inputs of ln_1 and ln_2; 1/t of it under sequence parallelism
        2 b s h      inputs of c_attn and c_fc; 1/t likewise, but not with keep_gathered
        12 b s h/t   q, k, v (3), input of attn.c_proj (1), input (4) and output (4) of GELU
        4 b s        mean and 1/std of two layer norms; 1/t of it under sequence parallelism
        2 b s h      bytes, with dropout: masks of the two residual branches; 1/t likewise

    and in the core of attention:

        b a s/t      fused attention: log-sum-exp, in fp32 or wider
        b a s^2/t    explicit attention: softmax, in fp32 or wider
        b a s^2/t    its copy in bf16, or after dropout
        b a s^2/t    bytes, with dropout: the mask
        s^2          bytes: the causal mask, which every rank has in full

    With context parallelism, s and s^2 in the core become

        ring         s, for log-sum-exps: the scores are recomputed. With dropout, the mask of s c s
                     scores is saved, in the dtype of the activations
        gathered     s, and s c s for s^2; also k and v of all tokens, 2 b c s h/t. A fused kernel
                     saves the causal mask in the dtype of the activations
        ulysses      those of a/c heads and c s tokens; also two orders of c s tokens (8 bytes),
                     and the output of a fused kernel, b s h/t

    Korthikanti et al., section 4.1, count 34 s b h + 5 a s^2 b bytes for 16-bit elements with
    dropout. This block saves the same 34 s b h: 16 elements of 2 bytes, and 2 bytes of masks. It
    saves 7 a s^2 b: the softmax in fp32 (4 bytes, where the paper has 2), its copy after dropout
    (2) and the mask (1). They omit the layer norms and the causal mask, which are small."""
    if policy == "offload":
        return 0
    hidden = (b * s * h) // t if sequence else b * s * h  # elements of a [b, s, h] on this rank
    if policy == "full":
        return hidden * itemsize
    softmax_itemsize = max(4, itemsize)
    norms = 4 * b * s // (t if sequence else 1) * (stat or itemsize)
    core, explicit = b * a * s // t * softmax_itemsize, attention == "explicit" or dropout
    if c > 1 and method == "ring":
        core += b * a * s * c * s // t * itemsize * dropout
    elif explicit:
        copy = itemsize if dropout or itemsize < softmax_itemsize else 0
        core = b * a * s * c * s // t * (softmax_itemsize + copy + dropout)
        core += s * c * s * (c if method == "ulysses" else 1)
    if c > 1 and method == "gathered":
        # q is a view of q, k and v, unless explicit attention has copied it for a batched matmul.
        copied = explicit and b > 1 and a > t
        core += 2 * b * (c - copied) * s * h // t * itemsize
        core += 0 if explicit else s * c * s * itemsize
    if c > 1 and method == "ulysses":
        core += 16 * c * s + (0 if explicit else b * s * h // t * itemsize)
    elements = 2 * hidden + 2 * (b * s * h if keep_gathered else hidden) + 12 * b * s * h // t
    outside_core = elements * itemsize + norms + 2 * hidden * dropout
    return outside_core + (core if policy == "none" else 0)


def predicted_blocks_bytes(
    n_layer: int, policy: str, every: int = 1, layers: int | None = None, **sizes
) -> int:
    """Bytes saved by n_layer blocks, with the policy on those that checkpoint_blocks would choose.
    sizes: keyword arguments of predicted_block_bytes."""
    chosen = len(range(n_layer)[:layers:every])
    checkpointed = predicted_block_bytes(policy=policy, **sizes)
    plain = predicted_block_bytes(policy="none", **sizes)
    return chosen * checkpointed + (n_layer - chosen) * plain


def predicted_activation_bytes(
    n_layer: int, b: int, s: int, h: int, v: int, itemsize: int, first: bool, last: bool,
    in_flight: int = 1, t: int = 1, sequence: bool = False, keep_gathered: bool = False,
    dropout: bool = False, stat: int | None = None, **rest,
) -> int:  # fmt: skip
    """Bytes saved by a pipeline stage of the trainer, for in_flight microbatches on one of t
    tensor-parallel ranks. v: rows of the vocabulary on this rank. rest: policy, every, layers, a,
    attention.

    The `first` stage also saves the dropout mask of the embedding and, with t > 1, per token, a row
    number (8 bytes) and whether this rank has the row (1). The `last` stage also saves, per
    microbatch, input, mean and 1/std of the last layer norm; the input of the head; the
    probabilities [b, s, v] in fp32 or wider; and per token the target (8 bytes) and, with t > 1,
    whether this rank has the target and whether it counts (2). With t = 1 the loss is torch's,
    which saves one more scalar. The token count of the batch (8) is saved once."""
    sizes = dict(b=b, s=s, h=h, itemsize=itemsize, t=t, sequence=sequence, dropout=dropout,
                 keep_gathered=keep_gathered, stat=stat)  # fmt: skip
    loss_itemsize, sequence_shards = max(4, itemsize), t if sequence else 1
    hidden = b * s * h // sequence_shards
    microbatch = predicted_blocks_bytes(n_layer, **sizes, **rest)
    if first:
        microbatch += 9 * b * s * (t > 1) + hidden * dropout
    if last:
        microbatch += (hidden + (b * s * h if keep_gathered else hidden)) * itemsize
        microbatch += 2 * b * s // sequence_shards * (stat or itemsize)
        microbatch += b * s * v * loss_itemsize
        microbatch += 8 * b * s + loss_itemsize if t == 1 else 10 * b * s
    return in_flight * microbatch + 8 * last


def predicted_flops(
    config: gpt.Config, n_layer: int, b: int, policy: str, every: int = 1,
    layers: int | None = None, deferred: bool = False, fused: bool = False, t: int = 1,
    tp_rank: int = 0, c: int = 1, method: str = "ring",
) -> int:  # fmt: skip
    """FLOPs of the matmuls of n_layer blocks in forward, backward and second forward, 2 per
    multiply-add, on one of t tensor-parallel ranks. A forward of GPT-2 has 24 b s h^2 + 4 b s^2 h
    in all (the causal mask saves none), a backward twice as many. policy, every, layers: as in
    checkpoint_blocks.

    The second forward stops at the last saved tensor, before the last matmul: that is the last
    linear layer of a block, or the second matmul of the core of attention. It does not skip the
    linear layer with dropout, whose mask is saved after it, or if weight gradients are `deferred`,
    since such a linear layer saves its input after its matmul. A `fused` core is one operation,
    which runs again completely.

    c, method: context-parallel ranks and --cp-attention. A rank has s/c tokens, and 1/c of the
    scores. The ring computes (c + 1) / 2 c of these, because it leaves out keys that no query of
    the rank attends to. Its backward recomputes the scores, unless it is fused. The ring and
    Ulysses save tensors after their last matmul, so their core runs again completely."""
    block, dropout = sharded(config, t, tp_rank), getattr(config, "dropout", 0) > 0
    tokens, matmuls = b * config.seq_len // c, [2 * n * outputs for n, outputs, _ in block.linears]
    core, ring = tokens * block.core_flops, c > 1 and method == "ring"
    core = core * (c + 1) // (2 * c) if ring else core
    again = ring and not fused
    linear = tokens * sum(matmuls)
    full = linear + core - (0 if dropout or deferred else tokens * matmuls[-1])
    selective = core if fused or (c > 1 and method != "gathered") else core // 2
    second = {"none": 0, "offload": 0, "selective": selective, "full": full}[policy]
    all_blocks = n_layer * (3 * (linear + core) + again * core // 2)
    return all_blocks + len(range(n_layer)[:layers:every]) * second


# --- bytes of a pipeline rank ---------------------------------------------------------------------


def peak_held(
    actions: list[schedules.Action], in_flight: dict[int, int], waiting: dict[int, int]
) -> int:
    """The most bytes that the actions of one rank hold at the same time. in_flight[stage]: bytes of
    a microbatch between its F and its B. waiting[stage]: bytes of a microbatch between its B and
    its W."""
    split_backward, held, peak = schedules.splits_backward(actions), 0, 0
    for kind, _, k in actions:
        deferred = waiting[k] * split_backward
        held += {"F": in_flight[k], "B": deferred - in_flight[k], "W": -waiting[k]}[kind]
        peak = max(peak, held)
    return peak


def predicted_queue_bytes(
    config: gpt.Config, n_layer: int, b: int, itemsize: int, head: int = 0, t: int = 1,
    sequence: bool = False, tp_rank: int = 0,
) -> int:  # fmt: skip
    """Bytes of a microbatch that are stored from B to W: the inputs and the output gradients of the
    linear layers of n_layer blocks, on one of t tensor-parallel ranks. head: the number of rows of
    the output head on this rank, or 0. With `sequence`, that is sequence parallelism without
    --sp-keep-gathered, the inputs of column-parallel layers are 1/t, because W gathers them."""
    shards, tokens = t if sequence else 1, b * config.seq_len
    block = sum(tokens * inputs // (shards if column else 1) + tokens * outputs
                for inputs, outputs, column in sharded(config, t, tp_rank).linears)  # fmt: skip
    last = tokens * config.n_embd // shards + tokens * head
    return itemsize * (n_layer * block + (last if head else 0))


# --- ZeRO: bytes, payload by collective, and what hides it ----------------------------------------


def predicted_zero_bytes(
    units: list[list[int]], d: int, rank: int, stage: int = 1,
    dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes stored per rank by ZeRO after the last backward, with AdamW. units: per unit, the sizes
    of its parameters. Padding has no moments."""
    grad_dtype = grad_dtype or torch.promote_types(dtype, torch.float32)
    psi = owned = 0
    for numels in units:
        size, start = zero.padded(numels, d), 0
        shard = range(rank * size // d, (rank + 1) * size // d)
        for numel in numels:
            owned += max(0, min(start + numel, shard.stop) - max(start, shard.start))
            start += zero.aligned(numel)
        psi += size
    masters = 4 * psi // d if dtype.itemsize < 4 else 0
    return {
        "parameters": psi // (d if stage == 3 else 1) * dtype.itemsize,
        "gradients": psi // (d if stage >= 2 else 1) * grad_dtype.itemsize,
        "optimizer": 2 * owned * max(4, dtype.itemsize) + masters,
    }


class Use(NamedTuple):
    """One layer of the forward."""

    unit: int  # index of the unit that contains its parameters
    matmul: bool  # whether it runs a matrix multiplication
    table: bool = False  # an embedding table, whose backward does not read the parameter


class Payload(NamedTuple):
    """One kind of collective, per rank and step."""

    calls: int
    exposed: int  # elements in calls that complete before the next matrix multiplication starts
    hidden: int  # elements in the other calls


def predicted_zero_payload(
    sizes: list[int], d: int, uses: list[Use], stage: int = 1, m: int = 1, replicas: int = 1,
    reshard: bool = True,
) -> dict[str, Payload]:  # fmt: skip
    """The collectives of ZeRO by kind. sizes: elements of each unit's buffer, in forward order
    (zero.padded). uses: the layers in forward order.

    The timeline has one tick per layer: n ticks for a forward, n for its backward, m times. Each
    call has a start and an end, and it is hidden if a layer with a matrix multiplication runs
    between them. Other schedules change what is hidden, but not the totals."""
    n = len(uses)
    work = [use.matmul for use in (*uses, *reversed(uses))] * m
    # The first layer that uses a unit in forward is the last one in backward.
    first = {use.unit: k for k, use in reversed([*enumerate(uses)])}
    calls = {"reduce_scatter": [], "all_gather": [], "all_reduce": []}  # (elements, start, end)
    order = range(len(sizes))[::-1]
    rounds = range(1, m + 1) if stage >= 2 else [m]
    starts = [2 * n * i - first[unit] for i in rounds for unit in order]
    ends = [*starts[1:], len(work)]  # each reduce-scatter is waited for before the next one starts
    for j, (start, end) in enumerate(zip(starts, ends, strict=True)):
        unit = order[j % len(order)]
        calls["reduce_scatter"].append((sizes[unit], start, end))
        if replicas > 1 and j >= len(starts) - len(order):  # last round
            calls["all_reduce"].append((sizes[unit] // d, end, len(work)))
    if stage < 3:  # from the optimizer step until the layer runs
        calls["all_gather"] = [(sizes[unit], 0, k) for unit, k in first.items()]
    for i in range(m) if stage == 3 else ():
        for k, use in enumerate(uses):  # while the previous layer computes
            if reshard or (i == 0 and first[use.unit] == k):
                now = 2 * n * i + k
                calls["all_gather"].append((sizes[use.unit], now - (k > 0), now))
            # The last layer stays gathered between its forward and its backward.
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
