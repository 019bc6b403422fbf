"""Data parallelism: every rank holds the whole model and trains on rows of its own; gradients meet.

      rank 0:  rows 0..3  ->  forward  ->  backward  ->  g0 --+            +--> optimizer --> same
                                                             (+) all-reduce                  weights
      rank 1:  rows 4..7  ->  forward  ->  backward  ->  g1 --+            +--> optimizer --> same

Each rank's loss is (sum over its tokens) / (tokens of the whole batch), so gradients are *summed*:
no 1/d anywhere, and ranks with fewer valid tokens weigh less, as they should. Under gradient
accumulation they meet once a step, when the last accumulation is in, whoever makes it.

Three rungs. (1) `all_reduce_gradients`: after backward, one all-reduce a parameter. The whole idea.
(2) `all_reduce_flat`: copied into one buffer, one call: latency is paid once.
(3) `DDP`: gradients live in a few flat buckets, laid out in the order in which backward fills them
(learned in the first step); a full bucket leaves at once, while backward goes on below it.

    per rank and step   bytes held (fp32, AdamW)    payload  calls        after backward (exposed)
    naive               16 Psi (4+4+4+4)            Psi      parameters   all of it
    flat                16 Psi, and 4 Psi a moment  Psi      1            all of it
    bucketed            16 Psi                      Psi      buckets      the last bucket

Memory is what it does not save: parameters, gradients and two moments on every rank. zero.py is
this file with that mended; read the two side by side.

    torchrun --standalone --nproc-per-node 2 ddp.py

Li et al. 2020, PyTorch Distributed (arXiv 2006.15704), section 3.2; Goyal et al. 2017
(arXiv 1706.02677), section 2, on summing and averaging.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# --- collectives ----------------------------------------------------------------------------------
# all-reduce only. Payload: the gradient of every parameter once, and one number.


def global_count(targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Valid targets (not -1) of the whole batch, known before the first backward: every loss is
    divided by it. The mean of each rank's mean would weigh ranks and not tokens."""
    count = (targets >= 0).sum()
    dist.all_reduce(count, group=group)  # payload: 1
    return count


def check_same_parameters(
    parameters: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raises ValueError, on every rank and naming the first difference, if the ranks do not list
    the same parameters in the same order: they would sum one's gradients with another's."""
    mine = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in parameters]
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for i, (a, b) in enumerate(itertools.zip_longest(everyone[0], theirs)):
            if a != b:
                raise ValueError(f"parameter {i} is {a} on rank 0 of the group and {b} on {rank}: "
                                 "every rank must build the model alike")  # fmt: skip


def all_reduce_bucket(flat: Tensor, group: dist.ProcessGroup):
    """The default `reduce`: starts the sum of `flat` over the group, returns what can be waited
    for. Another one (fp16 on the wire, say) has the same signature: see tests/test_forks.py."""
    return dist.all_reduce(flat, group=group, async_op=True)  # payload: the bucket


# --- strategy -------------------------------------------------------------------------------------
# Rung 1: the idea.


def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Call after the last backward of a step. Every rank must pass the same parameters in the same
    order; one that got no gradient counts as 0 (it may have one on another rank)."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad, group=group)  # payload: p.numel()


# Rung 2: the same sums in one call; the price is a copy in, a copy out, and a second Psi meanwhile.


def all_reduce_flat(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Call after the last backward of a step, like all_reduce_gradients."""
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])  # fmt: skip
    dist.all_reduce(flat, group=group)  # payload: Psi
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = summed.view_as(p)


# Rung 3: no copies, few calls, and all but the last of them hidden behind the rest of backward.


class DDP:
    """Attaches to the parameters; the model stays as it is.

    parameters: (name, parameter), the same on every rank of `group`.
    accumulations: how often each gradient is accumulated to in a step: once per microbatch and
        use. Counting them, rather than asking which microbatch is the last, holds under every
        schedule.
    bucket_bytes: a bucket is closed when it holds at least this many; the first one at a 25th of
        it, so that the link is not idle until 25 MB of gradients are there.
    reduce: (flat bucket, group) -> a handle with wait(); the seam for compression.

    A step: start(); backwards; finish(); the optimizer reads `.grad`; after_step(). Raises
    ValueError where ranks hold different parameters, a parameter is frozen between two steps, or a
    `.grad` is replaced (start() zeroes them; zero_grad() must not be called)."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        group: dist.ProcessGroup,
        accumulations: int,
        bucket_bytes: int = 25 * 2**20,
        reduce: Callable = all_reduce_bucket,
    ):
        self.parameters = list(parameters)
        self.group, self.accumulations, self.reduce = group, accumulations, reduce
        self.bucket_bytes = bucket_bytes
        check_same_parameters(self.parameters, group)
        me = weakref.ref(self)  # a hook that held self would keep it, and the group, for ever
        for _, p in self.parameters:
            p.register_post_accumulate_grad_hook(lambda p: me()._accumulated(p))
        # A guess until the first step has shown it: the last layer's gradients are ready first.
        self._lay_out([p for _, p in reversed(self.parameters)])
        self.ready: list[nn.Parameter] = []  # in the order in which gradients were complete
        self.steps, self.learned = 0, False
        self.start()

    def _lay_out(self, order: list[nn.Parameter]) -> None:
        """Make the buckets. Gradients are views of them: backward accumulates in place."""
        self.buckets: list[Tensor] = []
        self.bucket_of: dict[nn.Parameter, int] = {}
        members, size = [], 0
        for i, p in enumerate(order):
            p.grad = None  # its old bucket can go
            members.append(p)
            size += p.numel() * p.element_size()
            full = size >= (self.bucket_bytes if self.buckets else self.bucket_bytes // 25)
            if full or i + 1 == len(order):
                flat = p.new_zeros(sum(q.numel() for q in members))
                parts = flat.split([q.numel() for q in members])
                for q, part in zip(members, parts, strict=True):
                    q.grad = part.view_as(q)
                    self.bucket_of[q] = len(self.buckets)
                self.buckets.append(flat)
                members, size = [], 0

    def _learn(self) -> None:
        """After the first step: lay the buckets out anew, in the order seen on the group's first
        rank; parameters without a gradient in that step come last."""
        number = {p: i for i, (_, p) in enumerate(self.parameters)}
        order = dict.fromkeys([*self.ready, *number])
        numbers = torch.tensor([number[p] for p in order], device=self.buckets[0].device)
        dist.broadcast(numbers, group=self.group, group_src=0)  # payload: parameters, once
        self._lay_out([self.parameters[i][1] for i in numbers.tolist()])
        self.learned = True

    def start(self) -> None:
        """Before the first backward of a step: gradients to zero, counters to the full."""
        if self.steps == 1 and not self.learned:
            self._learn()
        for name, p in self.parameters:
            if not p.requires_grad:
                raise ValueError(f"{name} was frozen: its bucket would wait for it for ever; make "
                                 "a new DDP of the parameters that are left")  # fmt: skip
        for flat in self.buckets:
            flat.zero_()
        self.missing = dict.fromkeys(self.bucket_of, self.accumulations)  # by parameter
        self.waiting = [0] * len(self.buckets)  # parameters that a bucket still waits for
        for bucket in self.bucket_of.values():
            self.waiting[bucket] += 1
        self.ready = []
        self.launched: list = []  # handles, by bucket

    def _accumulated(self, p: nn.Parameter) -> None:
        """Autograd calls this each time it has added to p.grad."""
        self.missing[p] -= 1
        assert self.missing[p] >= 0, f"more than {self.accumulations} accumulations in a step"
        if self.missing[p] > 0:
            return
        self.ready.append(p)
        self.waiting[self.bucket_of[p]] -= 1
        # In bucket order and no other, though a later bucket may fill first on some rank:
        # collectives are matched by order, and the ranks must agree on it.
        while len(self.launched) < len(self.buckets) and self.waiting[len(self.launched)] == 0:
            self._launch()

    def _launch(self) -> None:
        self.launched.append(self.reduce(self.buckets[len(self.launched)], self.group))

    def finish(self) -> None:
        """After the last backward: every `.grad` is the sum over the group when this returns. A
        bucket that still waits for a parameter unused in this step goes as it is."""
        for name, p in self.parameters:
            start = self.buckets[self.bucket_of[p]].untyped_storage().data_ptr()
            if p.grad is None or p.grad.untyped_storage().data_ptr() != start:
                raise ValueError(f"{name}: its .grad was replaced and is in no bucket; start() "
                                 "zeroes gradients, zero_grad() must not")  # fmt: skip
        while len(self.launched) < len(self.buckets):
            self._launch()
        for handle in self.launched:
            handle.wait()
        self.steps += 1

    def pieces(self) -> list[tuple[str, nn.Parameter, nn.Parameter, int]]:
        """What this rank's optimizer updates: (name, tensor, parameter it is of, offset in it).
        Here whole parameters; in zero.py less."""
        return [(name, p, p, 0) for name, p in self.parameters]

    def after_step(self) -> None:
        """After the optimizer: nothing, every rank has updated everything."""


# --- cost -----------------------------------------------------------------------------------------


def predicted_payload(numel: int) -> int:
    """Elements all-reduced per rank and step, Psi = numel, under any number of microbatches."""
    return numel


def predicted_wire_bytes(numel: int, d: int, itemsize: int) -> float:
    """Bytes that a ring sends per rank and step: 2 (d-1)/d of the payload."""
    return 2 * (d - 1) / d * numel * itemsize


def predicted_bytes(numel: int, itemsize: int) -> dict[str, int]:
    """Bytes held per rank after the last backward, with AdamW: 4 x Psi, whatever d is."""
    one = numel * itemsize
    return {"parameters": one, "gradients": one, "optimizer": 2 * one}


# --- demo -----------------------------------------------------------------------------------------


def main() -> None:
    import data
    import gpt
    import measure

    config, m, steps = gpt.GPTConfig(2, 2, 32, 256, 32), 2, 3
    with measure.Proof("ddp.py") as proof:
        group, batch = proof.group, 4 * proof.group.size()
        tokens, _ = data.load(__file__, config.seq_len)

        def train(rows: range, rung: str):
            """Train on `rows` of each batch, in m microbatches. One process has all of them."""
            model = gpt.build(config, seed=0, dtype=torch.float64)
            named = dict(gpt.named_parameters(model))
            sync = DDP(named.items(), group, m, bucket_bytes=2**16) if rung == "bucketed" else None
            optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
            for step in range(steps):
                sync.start() if sync else optimizer.zero_grad()
                x, y = data.batch(tokens, step, rows, config.seq_len, seed=0)
                losses.append(torch.zeros((), dtype=torch.float64))
                for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
                    # Divided by the tokens of the whole batch, whoever has them: gradients add up.
                    loss = gpt.cross_entropy(model(xs), ys) / (batch * config.seq_len)
                    loss.backward()
                    losses[-1] += loss.detach()
                if rung == "bucketed":
                    sync.finish()
                elif rung != "one process":
                    meet = {"naive": all_reduce_gradients, "flat": all_reduce_flat}[rung]
                    meet(model.parameters(), group)
                optimizer.step()
            return losses, {n: p.grad for n, p in named.items()}, named, sync

        losses, gradients, parameters, _ = train(range(batch), "one process")
        psi = sum(p.numel() for p in parameters.values())
        for rung in ("naive", "flat", "bucketed"):
            with measure.Collectives({"dp": group}) as seen:
                mine, g, p, sync = train(range(4 * group.rank(), 4 * group.rank() + 4), rung)
            for loss in mine:
                dist.all_reduce(loss)  # its share of the batch's mean, from each rank
            proof.losses(rung, mine, losses)
            proof.close(f"{rung} max |d gradient|", g, gradients)
            proof.close(f"{rung} max |d parameter|", p, parameters)
            calls = {"naive": len(p), "flat": 1, "bucketed": sync and len(sync.buckets)}[rung]
            predicted = (steps * calls, steps * predicted_payload(psi))
            met = tuple(seen.total("dp", "all_reduce"))
            proof.equal(f"{rung} all-reduces, elements", predicted, met)
            for kind, tensors in {"parameters": p, "gradients": g}.items():
                held = measure.bytes_held(tensors.values())
                proof.equal(f"{rung} bytes of {kind}", predicted_bytes(psi, 8)[kind], held)


if __name__ == "__main__":
    main()
