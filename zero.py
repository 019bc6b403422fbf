"""ZeRO: data parallelism in which each rank updates and remembers only its share of the state.

              flat gradients of a bucket            flat parameters of the same bucket
      rank 0  [ g0 | .. | .. | .. ] --reduce-scatter--> sum in shard 0 -> optimizer -> [ w0 |    ]
      rank 1  [ .. | g1 | .. | .. ] --reduce-scatter--> sum in shard 1 -> optimizer -> [    | w1 ]
                                                           all-gather: everyone has  [ w0 | w1 ]

An all-reduce is a reduce-scatter and then an all-gather. Between the two each rank holds the sum of
one shard of the gradients; ZeRO-1 puts the optimizer there. So its moments are sharded, and the
payload is what ddp.py's was: the second half carries parameters in place of gradients.

    per rank and step   parameters  gradients  moments    reduce-scattered  all-gathered
    ddp.py              4 Psi       4 Psi      8 Psi      (Psi all-reduced: both in one)
    ZeRO-1              4 Psi       4 Psi      8 Psi / d  Psi               Psi
    ZeRO-2              4 Psi       4 Psi / d  8 Psi / d  m Psi             Psi
    (bytes after the last backward, fp32 and AdamW; m accumulations, that is microbatches)

A shard is a range of a flat buffer, cut without regard to where parameters begin: the last is
padded, one matrix may lie on two ranks. The optimizer therefore gets *pieces*, one view for each
(parameter, my shard) that meet; padding belongs to none of them and is never in a norm or a decay.
ZeRO-2 keeps of each gradient the owner's part alone. Stage 3 (parameters too) is not here yet.

    torchrun --standalone --nproc-per-node 2 zero.py

Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 5.1 and 7; Zhao et al. 2023, PyTorch FSDP
(arXiv 2304.11277), section 3.2, for the flat, padded buffer.
"""

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# torch 2.13 gave the two halves of an all-reduce new names and warns at the old; 2.11 has the old.

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# --- strategy -------------------------------------------------------------------------------------
# The same words in the same order as in ddp.py: read them side by side.


class Bucket:
    """Parameters that travel together: flat, padded to d shards of equal length. With
    `whole_gradients` this rank's gradients live here too, else only the sum of my shard does."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup,
        whole_gradients: bool,
    ):  # fmt: skip
        d, numel, like = group.size(), sum(p.numel() for _, p in members), members[0][1]
        self.shard_len = -(-numel // d)
        mine = slice(group.rank() * self.shard_len, (group.rank() + 1) * self.shard_len)
        self.parameters = like.new_zeros(self.shard_len * d)
        self.parameter_shard = self.parameters[mine]
        self.gradients = torch.zeros_like(self.parameters) if whole_gradients else None
        self.gradient_shard = (
            self.gradients[mine] if whole_gradients else like.new_zeros(self.shard_len)
        )
        self.place: dict[nn.Parameter, slice] = {}
        self.pieces: list[tuple[str, Tensor, nn.Parameter, int]] = []
        offset = 0
        for name, p in members:
            here = self.place[p] = slice(offset, offset + p.numel())
            self.parameters[here] = p.detach().flatten()
            p.data = self.parameters[here].view_as(p)
            p.grad = self.gradients[here].view_as(p) if whole_gradients else None
            self._add_piece(name, p, offset, mine)
            offset = here.stop

    def _add_piece(self, name: str, p: nn.Parameter, offset: int, mine: slice) -> None:
        """The part of p that lies in my shard, if any, as a leaf for the optimizer."""
        start, stop = max(offset, mine.start), min(offset + p.numel(), mine.stop)
        if start < stop:
            piece = self.parameters[start:stop].detach().requires_grad_()
            piece.grad = self.gradient_shard[start - mine.start : stop - mine.start]
            self.pieces.append((name, piece, p, start - offset))


class Zero1:
    """Attaches to the parameters; the model stays as it is, but they now live in flat buffers.

    parameters: (name, parameter) in forward order, the same on every rank of `group`.
    accumulations: how often each gradient is accumulated to in a step.
    bucket_bytes: a bucket is closed when it holds at least this many. A tied matrix has a bucket
        of its own, so that two stages that hold it cut it alike and may add their shards.

    A step: start(); backwards; finish(); the optimizer updates pieces(); after_step()."""

    whole_gradients = True

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        group: dist.ProcessGroup,
        accumulations: int,
        bucket_bytes: int = 25 * 2**20,
    ):
        self.parameters = list(parameters)
        self.group, self.accumulations = group, accumulations
        self.rounds = 1  # how often a bucket travels in a step
        self.buckets: list[Bucket] = []
        me = weakref.ref(self)  # a hook that held self would keep it, and the group, for ever
        self.bucket_of: dict[nn.Parameter, int] = {}
        for members in self._split(bucket_bytes):
            for _, p in members:
                self.bucket_of[p] = len(self.buckets)
                p.register_post_accumulate_grad_hook(lambda p: me()._accumulated(p))
            self.buckets.append(Bucket(members, group, self.whole_gradients))
        self.start()

    def _split(self, bucket_bytes: int) -> list[list[tuple[str, nn.Parameter]]]:
        """Backward order, approximately: the last layer's gradients are ready first."""
        buckets, size = [[]], 0
        for name, p in reversed(self.parameters):
            alone = hasattr(p, "tied_name")
            if buckets[-1] and (size >= bucket_bytes or alone):
                buckets.append([])
                size = 0
            buckets[-1].append((name, p))
            size += bucket_bytes if alone else p.numel() * p.element_size()
        return buckets

    def start(self) -> None:
        """Before the first backward of a step: gradients to zero, counters to the full."""
        for bucket in self.buckets:
            (bucket.gradients if self.whole_gradients else bucket.gradient_shard).zero_()
        self.missing = dict.fromkeys(self.bucket_of, self.accumulations)  # by parameter
        self.waiting = [len(bucket.place) for bucket in self.buckets]  # parameters, in this round
        self.launched: list = []  # handles; buckets in order, round after round

    def _accumulated(self, p: nn.Parameter) -> None:
        self.missing[p] -= 1
        assert self.missing[p] >= 0, f"more than {self.accumulations} accumulations in a step"
        bucket = self.bucket_of[p]
        if self.missing[p] == self._left_after(len(self.launched), bucket):
            self.waiting[bucket] -= 1
        while not self._all_launched() and not self.waiting[self._next()]:
            self._launch()

    def _left_after(self, launched: int, bucket: int) -> int:
        """Accumulations that a parameter of `bucket` still has to get after its coming round."""
        rounds_done = launched // len(self.buckets) + (bucket < launched % len(self.buckets))
        return self.accumulations - (rounds_done + 1) * (self.accumulations // self.rounds)

    def _next(self) -> int:
        """The bucket whose turn it is. In bucket order and no other, though a later one may fill
        first on some rank: collectives are matched by order, and the ranks must agree on it."""
        return len(self.launched) % len(self.buckets)

    def _all_launched(self) -> bool:
        return len(self.launched) == self.rounds * len(self.buckets)

    def _launch(self) -> None:
        number = self._next()
        bucket = self.buckets[number]
        self.launched.append(self._reduce(bucket))
        left = self._left_after(len(self.launched), number)
        self.waiting[number] = sum(self.missing[p] > left for p in bucket.place)

    def _reduce(self, bucket: Bucket):
        return reduce_scatter(  # payload: the bucket
            bucket.gradient_shard, bucket.gradients, group=self.group, async_op=True
        )

    def finish(self) -> None:
        """After the last backward: the gradients of my pieces are sums over the group when this
        returns. The other gradients hold whatever this rank computed, and nobody reads them."""
        while not self._all_launched():
            self._launch()
        for handle in self.launched:
            handle.wait()

    def pieces(self) -> list[tuple[str, Tensor, nn.Parameter, int]]:
        """What this rank's optimizer updates: (name, tensor, parameter it is of, offset in it). The
        tensor is 1-D, a range of the flattened parameter, and its `.grad` is the sum."""
        return [piece for bucket in self.buckets for piece in bucket.pieces]

    def after_step(self) -> None:
        """After the optimizer: everyone gets the parameters that the others have updated."""
        handles = [  # payload: the bucket
            all_gather(b.parameters, b.parameter_shard, group=self.group, async_op=True)
            for b in self.buckets
        ]
        for handle in handles:
            handle.wait()


# Rung 2: ZeRO-2. A gradient that was summed is needed on its owner only, so the buffer can go.


class Zero2(Zero1):
    """ZeRO-1, and gradients are held as shards. A bucket's buffer is made when its first gradient
    arrives and goes when it was reduce-scattered; my shard adds up what arrives. The price is one
    reduce-scatter for each microbatch, where ZeRO-1 has one a step against a buffer of Psi."""

    whole_gradients = False

    def __init__(self, parameters, group, accumulations: int, bucket_bytes: int = 25 * 2**20):
        super().__init__(parameters, group, accumulations, bucket_bytes)
        self.rounds = accumulations

    def _accumulated(self, p: nn.Parameter) -> None:
        bucket = self.buckets[self.bucket_of[p]]
        if bucket.gradients is None:
            bucket.gradients = torch.zeros_like(bucket.parameters)
        bucket.gradients[bucket.place[p]] += p.grad.flatten()
        p.grad = None
        super()._accumulated(p)

    def _reduce(self, bucket: Bucket) -> "Arrival":
        for arrival in self.launched[-1:]:  # one under way at a time: the buffers are the point
            arrival.wait()
        flat, bucket.gradients = bucket.gradients, None
        if flat is None:  # nobody used these parameters
            flat = torch.zeros_like(bucket.parameters)
        summed = torch.empty_like(bucket.gradient_shard)
        handle = reduce_scatter(summed, flat, group=self.group, async_op=True)  # the bucket
        return Arrival(handle, flat, summed, bucket.gradient_shard)


class Arrival:
    """A reduce-scatter under way, whose result is to be added to a shard, once."""

    def __init__(self, handle, flat: Tensor, summed: Tensor, shard: Tensor):
        self.handle, self.flat, self.summed, self.shard = handle, flat, summed, shard

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
            self.shard += self.summed
            self.handle = self.flat = self.summed = None


STAGES = {1: Zero1, 2: Zero2}

# --- cost -----------------------------------------------------------------------------------------


def padded(numel: int, d: int) -> int:
    """Elements of a flat buffer that holds `numel` in d shards of equal length."""
    return -(-numel // d) * d


def predicted_payload(
    bucket_numels: list[int], d: int, stage: int = 1, accumulations: int = 1
) -> dict[str, int]:
    """Elements per rank and step, with the padding, by collective."""
    total = sum(padded(n, d) for n in bucket_numels)
    return {"reduce_scatter": total * (accumulations if stage == 2 else 1), "all_gather": total}


def predicted_wire_bytes(bucket_numels: list[int], d: int, itemsize: int) -> float:
    """Bytes that a ring sends per rank and step: (d-1)/d for each half; ddp.py's, but for the
    padding."""
    return 2 * (d - 1) / d * sum(padded(n, d) for n in bucket_numels) * itemsize


def predicted_bytes(
    bucket_numels: list[int], d: int, rank: int, itemsize: int, stage: int = 1
) -> dict[str, int]:
    """Bytes held per rank after the last backward, with AdamW (two moments for each element that
    this rank owns: the last ranks' padding has none). ZeRO, section 5, in fp32: 4 + 4 + 8/d bytes
    for stage 1, 4 + 4/d + 8/d for stage 2."""
    full = sum(padded(n, d) for n in bucket_numels)
    owned = 0
    for n in bucket_numels:
        shard = -(-n // d)
        owned += max(0, min(n, (rank + 1) * shard) - rank * shard)
    return {
        "parameters": full * itemsize,
        "gradients": full * itemsize // (d if stage == 2 else 1),
        "optimizer": 2 * owned * itemsize,
    }


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, m, steps = gpt.GPTConfig(2, 2, 32, 251, 32), 2, 3  # an odd vocabulary: uneven shards
    with measure.Proof("zero.py") as proof:
        group, batch = proof.group, 4 * proof.group.size()
        tokens, _ = data.load(__file__, config.seq_len)

        def train(rows: range, stage: int):
            """Train on `rows` of each batch, in m microbatches. One process has all of them."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            named = dict(gpt.named_parameters(model))
            sync = STAGES[stage](named.items(), group, m, bucket_bytes=2**16) if stage else None
            pieces = sync.pieces() if sync else [(n, p, p, 0) for n, p in named.items()]
            optimizer = torch.optim.AdamW([tensor for _, tensor, _, _ in pieces], lr=1e-2, eps=1e-4)
            losses = []
            for step in range(steps):
                sync.start() if sync else optimizer.zero_grad()
                x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
                losses.append(torch.zeros((), dtype=torch.float64))
                for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                    loss = gpt.cross_entropy(model(xs), ys) / (batch * config.seq_len)
                    loss.backward()
                    losses[-1] += loss.detach()
                if sync:
                    sync.finish()
                optimizer.step()
                if sync:
                    sync.after_step()
            return losses, named, pieces, sync, optimizer

        losses, whole, *_ = train(range(batch), stage=0)
        rows, d = range(4 * group.rank(), 4 * group.rank() + 4), group.size()
        for stage in STAGES:
            with measure.Collectives({"dp": group}) as seen:
                mine, named, pieces, sync, optimizer = train(rows, stage)
            for loss in mine:
                dist.all_reduce(loss)
            what = f"ZeRO-{stage}"
            proof.losses(what, mine, losses)
            cut = {n: whole[n].grad.flatten()[at : at + t.numel()] for n, t, _, at in pieces}
            gradients = {n: t.grad for n, t, _, _ in pieces}
            proof.close(f"{what} max |d gradient|, my pieces", gradients, cut)
            proof.close(f"{what} max |d parameter|", named, whole)
            numels = [sum(p.numel() for p in bucket.place) for bucket in sync.buckets]
            for name, elements in predicted_payload(numels, d, stage, m).items():
                rounds = steps * (sync.rounds if name == "reduce_scatter" else 1)
                predicted = (rounds * len(numels), steps * elements)
                proof.equal(f"{what} {name}s, elements", predicted, tuple(seen.total("dp", name)))
            held = {
                "parameters": named.values(),
                "gradients": [bucket.gradient_shard for bucket in sync.buckets],
                "optimizer": [v for s in optimizer.state.values() for v in s.values() if v.dim()],
            }
            for kind, tensors in held.items():
                predicted = predicted_bytes(numels, d, group.rank(), 8, stage)[kind]
                proof.equal(f"{what} bytes of {kind}", predicted, measure.bytes_held(tensors))


if __name__ == "__main__":
    main()
