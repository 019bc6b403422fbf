"""What a layout costs: bytes of each rank by kind, and seconds of a step by part.

Composed of the strategy files' `predicted_*`, of a schedule's simulation, and of the constants of
`Hardware`: of nothing else. `make plan` searches with it, `make published` holds it against
published tables, `make plan-check` against this machine.

    held = predicted_rank_bytes(config, Layout(tp=8, pp=16, dp=8, microbatches=192), 0)
    times = predicted_step(config, layout, HARDWARE["a100-80"])    times.total, times.bubble, ...

docs/recipe.md tells what it does not know.
"""

import functools
from typing import NamedTuple

import activation_ckpt
import ddp
import gpt
import options
import pipeline
import tensor_parallel
import zero

# --- hardware -------------------------------------------------------------------------------------


class Hardware(NamedTuple):
    """A GPU, its links, and what is reached of both. Bandwidths are of one direction."""

    name: str
    tflops: float  # of dense bf16 matmuls, as the maker says
    memory_gb: float  # 1e9 bytes
    memory_gb_per_s: float
    link_gb_per_s: float  # of a GPU, inside its machine
    network_gb_per_s: float  # of a GPU's share of its machine's network
    # Fitted to the published rows, see tools/published.py:
    matmul: float = 0.75  # of tflops, by a large matmul
    ramp_gflop: float = 17.0  # a matmul of this size reaches half of that
    passes: float = 2.4  # what backward needs crosses memory so often in the forward that makes it
    link: float = 0.90  # of link_gb_per_s, by a ring
    network: float = 0.78  # of network_gb_per_s
    overlap: float = 0.48  # of a collective behind compute is paid nevertheless: they share a GPU
    # Of one call; inputs of Calculon (Isaev et al. 2023), not measured:
    link_us: float = 10.0
    network_us: float = 20.0


# NVIDIA's data sheets; the network is a GPU's share of DGX machines: 8 x 100, 200, 200, 400 Gbit/s.
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
    """What a training program does that its layout does not say. The default is ours, in bf16."""

    itemsize: int = 2
    grad_itemsize: int = 4  # of gradients that are added up over microbatches
    reduce_itemsize: int = 2  # of gradients that are summed over ranks
    hides_tp: bool = True  # backward's collectives of tp run beside the weights' gradients
    hides_dp: bool = True  # gradients meet while backward goes on
    scatters: bool = False  # of a boundary each tp rank sends its part, and then they gather it
    waits: bool = False  # for its transfers, instead of computing meanwhile
    stat: int = 4  # bytes of a norm's mean and 1/std: a CPU has itemsize


OURS = Program()


class Layout(NamedTuple):
    """As the command line of train_3d.py names it; chunks: stages of a rank. The last four are not
    searched through."""

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
    shard_size: int = 0  # 0: d
    reshard: bool = True
    every: int = 1
    layers: int | None = None

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def shards(self) -> int:
        """Ranks among which ZeRO shares."""
        return (self.shard_size or self.dp) if self.zero else 1


# --- bytes ----------------------------------------------------------------------------------------


def cut(config: gpt.GPTConfig, layout: Layout) -> list[range]:
    """Blocks by stage, as the trainer cuts."""
    return _cut(config, layout.pp * layout.chunks)


@functools.lru_cache(1024)
def _cut(config: gpt.GPTConfig, n: int) -> list[range]:
    embedding, block, head = gpt.flops_per_token(config)
    return pipeline.split_layers(config.n_layer, n, embedding / block, head / block)


def stages(layout: Layout, pp_rank: int) -> list[int]:
    """The stages of a rank: in turn, or down and up again."""
    p, n = layout.pp, layout.pp * layout.chunks
    return [pp_rank, n - 1 - pp_rank] if layout.schedule == "zb-v" else [*range(pp_rank, n, p)]


def words(config: gpt.GPTConfig, t: int, tp_rank: int = 0) -> int:
    """Rows of the vocabulary on this tp rank: all but the last ranks have the most."""
    width = -(-config.vocab_size // t)
    return min(config.vocab_size, (tp_rank + 1) * width) - tp_rank * width


def units(
    config: gpt.GPTConfig, t: int, n_layer: int, first: bool, last: bool, tp_rank: int = 0
) -> list[list[int]]:
    """Per ZeRO unit of a pp rank's layers, the size of each parameter on a tp rank.
    Sharded over tp are 12 h^2 + 7 h of a block and the two tables; 6 h of a block are not."""
    h = config.n_embd
    table = [words(config, t, tp_rank) * h]
    attention = [3 * h * h // t, 3 * h // t, h * h // t, h]
    mlp = [4 * h * h // t, 4 * h // t, 4 * h * h // t, h]
    units = [[h, h, *attention, h, h, *mlp] for _ in range(n_layer)]
    if first:
        units = [table, [config.seq_len * h], *units]
    if last:
        units += [[h, h]] + [table] * (not (config.tied and first))
    return units


def sent(of_units: list[list[int]], layout: Layout) -> list[int]:
    """Elements communicated per unit, including ZeRO's padding."""
    if layout.zero:
        return [zero.padded(numels, layout.shards) for numels in of_units]
    return [*map(sum, of_units)]


@functools.lru_cache(4096)
def rows(name: str, p: int, m: int, v: int) -> pipeline.Schedule:
    return pipeline.SCHEDULES[name](p, m, v)


def enough(layout: Layout) -> int:
    """Microbatches after which a schedule only repeats itself (those of gpipe never do)."""
    p, m = layout.pp, layout.microbatches
    return m if layout.schedule == "gpipe" else min(m, 3 * p + m % p)


@functools.lru_cache(1 << 16)
def states(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, first: bool, last: bool,
    tp_rank: int = 0, shard_rank: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Parameters, gradients, optimizer, and the buffers that come with them: of ZeRO-3 two whole
    units and the gradients of one, as computed and as sent. (Of the layout what they depend on, see
    `lean`.)"""
    of_units = units(config, layout.tp, n_layer, first, last, tp_rank)
    names = {2: "bf16", 4: "float32", 8: "float64"}
    dtypes = [options.DTYPES[names[n]] for n in (program.itemsize, program.grad_itemsize)]
    if layout.zero:
        held = zero.predicted_bytes(of_units, layout.shards, shard_rank, layout.zero, *dtypes)
    else:
        held = ddp.predicted_bytes(sum(map(sum, of_units)), *dtypes)
    whole = max(map(sum, of_units)) * (3 * program.itemsize + program.reduce_itemsize)
    return held | {"buffers": whole if layout.zero == 3 and layout.shards > 1 else 0}


@functools.lru_cache(1 << 16)
def chunk_bytes(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, first: bool, last: bool,
    layers: int | None = None, tp_rank: int = 0,
) -> tuple[int, int, int]:  # fmt: skip
    """Of one microbatch of a stage: what is kept for its backward, with `layers` of its blocks
    under the policy (default: all); what waits for its W; what is alive while a block is computed
    (once more, if it is recomputed), and two transfers each way."""
    t, b, s, h = layout.tp, layout.micro_batch_size, config.seq_len, config.n_embd
    sizes = dict(b=b, s=s, h=h, itemsize=program.itemsize, t=t, sequence=layout.sequence_parallel)
    more = dict(a=config.n_head, attention=config.attention, dropout=config.dropout > 0,
                stat=program.stat)  # fmt: skip
    head = words(config, t, tp_rank)
    flying = activation_ckpt.predicted_activation_bytes(
        n_layer, v=head, policy=layout.recompute, layers=layers, first=first, last=last, **sizes,
        **more
    ) - 8 * last  # fmt: skip
    waiting = pipeline.predicted_queue_bytes(n_layer, head=head * last, **sizes)
    block = activation_ckpt.predicted_block_bytes(policy="none", **sizes, **more)
    boundary = b * s * h // (t if layout.sequence_parallel else 1) * program.itemsize
    return flying, waiting, block + 4 * boundary * (layout.pp > 1)


def lean(layout: Layout) -> tuple[Layout, Layout]:
    """What `states` and `chunk_bytes` depend on, so that layouts share them."""
    of_states = Layout(layout.tp, 1, layout.dp, layout.zero, shard_size=layout.shard_size)
    of_chunk = Layout(layout.tp, min(2, layout.pp), 1, 0, layout.micro_batch_size, 1,
                      layout.recompute, sequence_parallel=layout.sequence_parallel)  # fmt: skip
    return of_states, of_chunk


def under_policy(layout: Layout, n_layers: list[int]) -> list[int]:
    """Of a rank's stages with so many blocks: how many are recomputed, every so many of the rank's
    first so many."""
    chosen, counts, start = range(sum(n_layers))[: layout.layers : layout.every], [], 0
    for n in n_layers:
        counts.append(sum(start <= i < start + n for i in chosen))
        start += n
    return counts


def dp_itemsize(program: Program, operation: str) -> int:
    """Bytes of an element that data parallelism sends. ZeRO gathers parameters; all other
    collectives sum gradients."""
    return program.itemsize if operation == "all_gather" else program.reduce_itemsize


def tp_traffic(
    config: gpt.GPTConfig, layout: Layout, program: Program, n_layer: int, recomputed: int,
    first: bool, last: bool, m: int = 1,
) -> dict[tuple[str, str], tuple[int, int]]:  # fmt: skip
    """(phase, operation) -> (calls, bytes) over tp, of m microbatches of a stage. Phase "recompute"
    is the second forward of `recomputed` of its blocks. The loss's sums are sent in fp32 at least.
    """
    b, s, h = layout.micro_batch_size, config.seq_len, config.n_embd
    sequence, itemsize = layout.sequence_parallel, program.itemsize
    costs = tensor_parallel.predicted_collectives(n_layer, b, s, h, m, sequence, first, last)
    traffic = {key: (calls, elements * itemsize) for key, (calls, elements) in costs.items()}
    calls, nbytes = traffic["forward", "all_reduce"]
    nbytes += last * 3 * m * b * s * (max(4, itemsize) - itemsize)
    traffic["forward", "all_reduce"] = calls, nbytes
    again = recomputed_calls(layout.recompute, sequence, config.dropout > 0)
    for operation, calls in again.items():
        calls *= m * recomputed
        traffic["recompute", operation] = calls, calls * b * s * h * itemsize
    return traffic


def recomputed_calls(policy: str, sequence: bool, dropout: bool) -> dict[str, int]:
    """Collectives over tp of a block's second forward: it ends before its last matmul, and what
    comes behind that, unless a mask is to be drawn again there."""
    if policy != "full":
        return {}
    if sequence:
        return {"all_gather": 2, "reduce_scatter": 1 + dropout}
    return {"all_reduce": 1 + dropout}


def predicted_rank_bytes(
    config: gpt.GPTConfig, layout: Layout, pp_rank: int, program: Program = OURS,
    simulated: bool = True, tp_rank: int = 0, shard_rank: int = 0,
    schedule: pipeline.Schedule | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes on a GPU of this stage, by kind. Parameters, gradients, optimizer and activations are
    what measure.py counts, to the byte; buffers are an estimate. simulated: walk through the
    schedule (the layout's, unless given) for the activations; else the least that they can be."""
    of_states, of_chunk = lean(layout)
    placed = pipeline.stages_of(schedule) if schedule else None
    mine = placed[pp_rank] if placed else stages(layout, pp_rank)
    split = _cut(config, sum(map(len, placed)) if placed else layout.pp * layout.chunks)
    end, n_layers = len(split) - 1, [len(split[k]) for k in mine]
    ends = (0 in mine, end in mine)
    held = dict(states(config, of_states, program, sum(n_layers), *ends, tp_rank, shard_rank))
    chunks = {
        k: chunk_bytes(config, of_chunk, program, n, k == 0, k == end, layers, tp_rank)
        for k, n, layers in zip(mine, n_layers, under_policy(layout, n_layers), strict=True)
    }
    flying, waiting, alive = ({k: three[i] for k, three in chunks.items()} for i in range(3))
    name, p, v = layout.schedule, layout.pp, layout.chunks
    if simulated:
        schedule = schedule or rows(name, p, enough(layout), v)
        held["activations"] = pipeline.peak_held(schedule[pp_rank], flying, waiting)
    else:
        n = 1 if name == "zb-v" else pipeline.predicted_held(name, p, layout.microbatches, v, 0)
        each = [flying] + [waiting] * (name == "zb-v")
        held["activations"] = n * min(min(bytes_of.values()) for bytes_of in each)
        held["activations"] *= pp_rank == 0
    held["activations"] += 8 * ends[1]
    held["buffers"] += max(alive.values())
    return held


def worst_rank(config: gpt.GPTConfig, layout: Layout, program: Program = OURS) -> dict[str, int]:
    """Of all stages the one with most bytes."""
    ranks = (predicted_rank_bytes(config, layout, r, program) for r in range(layout.pp))
    return max(ranks, key=lambda held: sum(held.values()))


def may_fit(config: gpt.GPTConfig, layout: Layout, limit: float, program: Program = OURS) -> bool:
    """Not so: worst_rank exceeds `limit`. Cheap; that it does not, only `fits` can say."""
    ends = (0, layout.pp - 1)
    return all(sum(predicted_rank_bytes(config, layout, r, program, False).values()) <= limit
               for r in ends)  # fmt: skip


def fits(config: gpt.GPTConfig, layout: Layout, limit: float, program: Program = OURS) -> bool:
    """worst_rank is within `limit`; stops at the first that is not."""
    return all(sum(predicted_rank_bytes(config, layout, r, program).values()) <= limit
               for r in range(layout.pp))  # fmt: skip


# --- time -----------------------------------------------------------------------------------------


class Collective(NamedTuple):
    """Seconds of calls over n ranks, whose neighbours in the ring are `stride` GPUs apart."""

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
        of_payload = {"all_reduce": 2 * (n - 1) / n, "send": 1.0}.get(operation, (n - 1) / n)
        return calls * latency * 1e-6 + of_payload * payload_bytes / (share * speed * 1e9)


def beside(compute: float, collective: float, overlap: float) -> float:
    """Seconds of the two at once."""
    return max(compute, collective) + overlap * min(compute, collective)


class Times(NamedTuple):
    """Of a step, in seconds; the parts add up to `total`, but for rounding."""

    matmul: float
    memory: float  # what is bound by it: norms, gelu, softmax, residuals
    tp: float
    bubble: float  # idle, and waiting for transfers
    dp: float  # what is exposed of it
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


Parts = dict[str, tuple[float, float, float]]


@functools.lru_cache(1 << 16)
def chunk_seconds(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int, program: Program,
    n: int, first: bool, last: bool,
) -> Parts:  # fmt: skip
    """Of one microbatch of a stage with n blocks: {"F" | "B" | "W": seconds of (matmul, memory,
    tp)}; B without W's matmuls. Under ZeRO-3, tp has what its gathers and sums take beyond the
    compute beside them."""
    t, b, s, h = layout.tp, layout.micro_batch_size, config.seq_len, config.n_embd
    _, block, head = (b * s * flops / t for flops in gpt.flops_per_token(config))
    core = b * s * 4 * s * h / t  # of block's, what has no weights
    dropout, policy = config.dropout > 0, layout.recompute
    put_off = layout.schedule.startswith("zb")
    again = activation_ckpt.predicted_flops(
        1, b, s, h, policy, dropout=dropout, deferred=put_off
    ) / t - 3 * block  # fmt: skip
    sizes = (b, s, h, config.n_head, config.attention, program.itemsize)
    more = (dropout, t, layout.sequence_parallel)
    kept, left = (activation_ckpt.predicted_block_bytes(*sizes, name, *more)
                  for name in ("none", "selective"))  # fmt: skip
    anew = {"full": kept, "selective": kept - left}.get(policy, 0)
    of_head = b * s * -(-config.vocab_size // t) * (program.itemsize + 4)
    over_tp = Collective(hardware, per_node, t, 1)
    over_dp = Collective(hardware, per_node, layout.dp, t)

    def matmul(flops: float, calls: int) -> float:
        ramp = calls * hardware.ramp_gflop * 1e9
        return (flops + ramp) / (hardware.matmul * hardware.tflops * 1e12)

    def memory(nbytes: float) -> float:
        return hardware.passes * nbytes / (hardware.memory_gb_per_s * 1e9)

    def dp_seconds(operation: str, elements: int) -> float:
        nbytes = elements * dp_itemsize(program, operation)
        return over_dp.seconds(operation, n + 1, nbytes)

    comm = {"forward": 0.0, "backward": 0.0, "hidden": 0.0, "recompute": 0.0}
    traffic = tp_traffic(config, layout, program, n, n, first, last)
    for (phase, operation), (calls, nbytes) in traffic.items() if t > 1 else ():
        hidden = phase == "backward" and program.hides_tp
        comm["hidden" if hidden else phase] += over_tp.seconds(operation, calls, nbytes)
    w = n * matmul(block - core, 4) + last * matmul(head, 1)
    tp_b = comm["backward"] + comm["recompute"] + beside(w, comm["hidden"], hardware.overlap) - w
    calls_again = {"full": 6, "selective": 1}.get(policy, 0)
    ends = last * matmul(head, 1), last * memory(of_head)
    f = [n * matmul(block, 6) + ends[0], n * memory(kept) + ends[1], comm["forward"]]
    bw = [n * matmul(block + core + again, 8 + calls_again) + ends[0],
          n * memory(kept + anew) + ends[1], tp_b]  # fmt: skip
    if layout.zero == 3 and layout.dp > 1:
        psi = sum(sent(units(config, t, n, first, last), layout))
        gather = dp_seconds("all_gather", psi)
        both = gather + dp_seconds("reduce_scatter", psi)
        for part, collective, beyond in ((f, gather, 0.0), (bw, both, w)):
            compute = sum(part) + beyond
            part[2] += beside(compute, collective, hardware.overlap) - compute
    return {"F": tuple(f), "B": tuple(bw), "W": (w, 0.0, 0.0)}


def stage_seconds(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int, program: Program,
    split: list[range],
) -> list[Parts]:  # fmt: skip
    """chunk_seconds by stage."""
    shards = layout.dp if layout.zero == 3 else 1
    put_off = "zb-h1" if layout.schedule.startswith("zb") else "1f1b"
    lean = Layout(layout.tp, 1, shards, 3 if shards > 1 else 0, layout.micro_batch_size, 1,
                  layout.recompute, put_off, 1, layout.sequence_parallel)  # fmt: skip
    of, end = (config, lean, hardware, per_node, program), len(split) - 1
    return [chunk_seconds(*of, len(mine), k == 0, k == end) for k, mine in enumerate(split)]


@functools.lru_cache(1 << 14)
def makespan(
    name: str, p: int, m: int, v: int, seconds: tuple[tuple[float, float, float], ...],
    transfer: float,
) -> float:  # fmt: skip
    """Simulated, of m microbatches; (F, B, W) by stage."""
    schedule = rows(name, p, m, v)
    split_backward = any(map(pipeline.splits_backward, schedule))
    of = {"F": 0, "B": 1, "W": 2}

    def time(action: pipeline.Action) -> float:
        whole = 0.0 if split_backward or action.kind != "B" else seconds[action.stage][2]
        return seconds[action.stage][of[action.kind]] + whole

    return max(span.end for span in pipeline.simulate(schedule, time, transfer))


def pipeline_seconds(
    layout: Layout, seconds: tuple[tuple[float, float, float], ...], transfer: float
) -> float:
    """Of all microbatches: simulated until the schedule repeats itself, and p more of them for what
    each costs from there on."""
    name, p, m, v = layout.schedule, layout.pp, layout.microbatches, layout.chunks
    if p == 1 and v == 1:
        return m * sum(seconds[0])
    some = enough(layout)
    end = makespan(name, p, some, v, seconds, transfer)
    if some == m:
        return end
    before = makespan(name, p, some - p, v, seconds, transfer)
    return end + (m - some) / p * (end - before)


def least_seconds(layout: Layout, seconds: list[tuple[float, float, float]]) -> float:
    """Of all microbatches at least: each rank's work, and what comes before its first forward and,
    if weight gradients are not put off, after its last backward."""
    m, put_off = layout.microbatches, layout.schedule.startswith("zb")
    least, before = 0.0, 0.0
    for r in range(layout.pp):
        busy = m * sum(sum(seconds[k]) for k in stages(layout, r))
        least = max(least, before + busy)
        before += seconds[r][0] + (0.0 if put_off else seconds[r][1] + seconds[r][2])
    return least


def predicted_step(
    config: gpt.GPTConfig, layout: Layout, hardware: Hardware, per_node: int = 8,
    program: Program = OURS, split: list[range] | None = None, round_to: int | None = None,
    least: bool = False,
) -> Times:  # fmt: skip
    """Seconds of a step. split: blocks by stage, if not the trainer's. round_to: digits of a
    stage's times, so that layouts which are nearly alike share a simulation. least: a bound from
    below, without a simulation."""
    t, p, d, m = layout.tp, layout.pp, layout.dp, layout.microbatches
    split = split or cut(config, layout)
    parts = stage_seconds(config, layout, hardware, per_node, program, split)
    seconds = [tuple(sum(part[kind]) for kind in "FBW") for part in parts]
    boundary = layout.micro_batch_size * config.seq_len * config.n_embd * program.itemsize
    boundary /= t if layout.sequence_parallel or program.scatters else 1
    far = Collective(hardware, per_node, p, t * d)
    transfer = far.seconds("send", 1, boundary) if p > 1 else 0.0
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
        late = transfer / unit
        if round_to is not None:
            relative = [tuple(round(x, round_to) for x in three) for three in relative]
            late = round(late, round_to)
        whole = unit * pipeline_seconds(layout, tuple(relative), late)

    of_rank = [stages(layout, r) for r in range(p)]
    # The rank with most to do; the rest of the time it waits.
    mine = max(of_rank, key=lambda ks: sum(sum(seconds[k]) for k in ks))
    busy = [m * sum(parts[k][kind][i] for k in mine for kind in "FBW") for i in range(3)]

    ends = [units(config, t, sum(len(split[k]) for k in ks), 0 in ks, len(split) - 1 in ks)
            for ks in (of_rank[0], of_rank[-1])]  # fmt: skip
    numels = max((sent(of_units, layout) for of_units in ends), key=sum)
    psi, over_dp = sum(numels), Collective(hardware, per_node, d, t)
    backward = sum(sum(seconds[k][1:]) for k in of_rank[0])
    forward = sum(seconds[k][0] for k in of_rank[0])

    def met(collective: float, compute: float) -> float:
        hidden = beside(compute, collective, hardware.overlap) - compute
        return hidden if program.hides_dp else collective

    def dp_seconds(operation: str) -> float:
        nbytes = psi * dp_itemsize(program, operation)
        return over_dp.seconds(operation, len(numels), nbytes)

    if layout.zero == 0:
        dp = met(dp_seconds("all_reduce"), backward)
    else:
        times = {1: 1, 2: m, 3: 0}[layout.zero]  # ZeRO-3's are in stage_seconds
        dp = times * met(dp_seconds("reduce_scatter"), backward)
        if layout.zero < 3:
            dp += met(dp_seconds("all_gather"), forward)
    # AdamW reads and writes its states and writes the parameter; the gradient is read for the norm,
    # read and written by clipping, read by AdamW, and zeroed.
    owned, states = psi / (d if layout.zero else 1), 12 if program.itemsize < 4 else 8
    nbytes = owned * (2 * states + program.itemsize + 5 * program.grad_itemsize)
    optimizer = nbytes / hardware.memory_gb_per_s / 1e9
    idle = whole - sum(busy)
    return Times(*busy, idle if idle > 1e-9 * whole else 0.0, dp, optimizer)


# --- ZeRO: payload by collective, and what hides it -----------------------------------------------


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
