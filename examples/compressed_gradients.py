"""Compressed gradients: DDP(reduce=...) with a function that sends fewer bytes.

`reduce` gets a bucket of gradients, a 1-D tensor, and sums it over the ranks in place. Two of them:

    Narrow       Each rank rounds its gradients to bf16. The all-reduce sums in bf16.
    TopK(0.1)    Each rank sends the largest tenth of a bucket, as values and places. It adds the
                 rest to its next gradients: error feedback (Lin et al. 2017, arXiv 1712.01887, here
                 without momentum correction).

For d ranks, Psi fp32 gradients and a fraction f, a rank sends per step, with ring algorithms:

    all-reduce   2 (d-1)/d 4 Psi bytes
    Narrow       2 (d-1)/d 2 Psi bytes
    TopK         (d-1) 8 f Psi bytes     less than an all-reduce if f < 1/d

Neither is exact: the run is no longer equal to one process. Replicas stay equal to each other,
because all ranks apply the same sum. bf16 rounds to 8 significant bits. dtype=torch.float16 rounds
to 11, but overflows at 65504. TopK stores another fp32 copy of the gradients, which checkpoints do
not include, and waits for its collectives, so they do not overlap with backward. Its gradient of a
parameter that no rank used is 0 and not None.

    torchrun --standalone --nproc-per-node 4 -m examples.compressed_gradients

What to look at: the bytes, predicted and measured; the error of the first gradient; and the last
loss, which is far higher without error feedback.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ddp
import measure


class Narrow:
    """The handle of an all-reduce in `dtype`."""

    def __init__(self, flat: Tensor, group: dist.ProcessGroup, dtype: torch.dtype = torch.bfloat16):
        self.flat, self.sent = flat, flat.to(dtype)
        self.work = dist.all_reduce(self.sent, group=group, async_op=True)  # payload: the bucket

    def wait(self) -> None:
        self.work.wait()
        self.flat.copy_(self.sent)


class TopK:
    def __init__(self, fraction: float, feedback: bool = True):
        self.fraction, self.feedback = fraction, feedback
        self.left: list[Tensor] = []  # by bucket: what was not sent
        self.bucket = 0  # DDP reduces the buckets in the same order in every step

    def __call__(self, flat: Tensor, group: dist.ProcessGroup) -> "TopK":
        mine = flat.to(torch.promote_types(flat.dtype, torch.float32), copy=True)
        if self.bucket < len(self.left):
            mine += self.left[self.bucket]
        else:
            self.left.append(torch.zeros_like(mine))
        k = max(1, int(self.fraction * len(mine)))
        places = mine.abs().topk(k).indices
        values = mine[places].to(flat.dtype)
        if self.feedback:
            self.left[self.bucket] = mine.index_fill_(0, places, 0.0)
        self.bucket += 1
        all_values = values.new_empty(group.size() * k)
        all_places = torch.empty_like(all_values, dtype=torch.int32)
        ddp.all_gather(all_values, values, group=group)  # payload: d k
        ddp.all_gather(all_places, places.int(), group=group)  # payload: d k
        flat.zero_()
        # Rank by rank, so that the order of the additions is the same on all ranks.
        for each_values, each_places in zip(all_values.split(k), all_places.split(k), strict=True):
            flat.index_add_(0, each_places, each_values)
        return self

    def wait(self) -> None:  # DDP waits after it has reduced the last bucket
        self.bucket = 0


def train(group: dist.ProcessGroup, reduce: Callable) -> tuple[float, Tensor, list[int], int]:
    """Fit a linear function by least squares, in fp32. Returns the last loss, the first gradient,
    the sizes of the buckets, and the bytes that a rank sends per step with ring algorithms."""
    torch.manual_seed(0)
    d, truth, model = group.size(), torch.randn(101, 3), nn.Linear(101, 3)
    sync = ddp.DDP(model, group, reduce=reduce, bucket_bytes=64)  # two buckets
    optimizer = torch.optim.SGD([piece.tensor for piece in sync.pieces()], lr=0.1)
    torch.manual_seed(1 + group.rank())
    for step in range(60):
        x = torch.randn(64, 101)
        sync.start()
        loss = (model(x) - x @ truth).square().mean() / d
        with measure.Collectives() as seen:
            loss.backward()
            sync.finish()
        if step == 0:
            first = torch.cat([p.grad.flatten() for p in model.parameters()])
        sync.step(optimizer)
    ddp.check_same_parameters(sync.named, group)  # raises ValueError if replicas differ
    total = loss.detach()
    dist.all_reduce(total, group=group)
    factor = {"all_reduce": 2, "all_gather": 1}
    sent = sum(factor[call.operation] * call.payload * call.dtype.itemsize for call in seen.calls)
    return total.item(), first, [b.numel() for b in sync.buckets], round(sent * (d - 1) / d)


def main() -> None:
    with measure.Report("examples.compressed_gradients", ranks=4, dtype="float32") as report:
        d, f, losses = report.group.size(), 0.1, {}
        loss, exact, sizes, sent = train(report.group, ddp.all_reduce_bucket)
        psi, k = sum(sizes), sum(max(1, int(f * size)) for size in sizes)
        report.rows.append(f"  no compression: last loss {loss:.1e}, {sent} bytes sent")
        for name, reduce, predicted, bound in (
            ("bf16", Narrow, 4 * psi * (d - 1) / d, 2**-8),
            ("top 10 %", TopK(f), 8 * k * (d - 1), None),
            ("top 10 %, no feedback", TopK(f, feedback=False), 8 * k * (d - 1), None),
        ):
            losses[name], gradient, _, sent = train(report.group, reduce)
            error = ((gradient - exact).norm() / exact.norm()).item()
            row = f"last loss {losses[name]:.1e}, relative error of the first gradient {error:.1e}"
            report.rows.append(f"  {name}: {row}")
            if bound:  # that of rounding to the number format
                report.equal(f"{name}: error in (0, {bound:.1e}]", True, 0 < error <= bound)
            report.equal(f"{name}: bytes sent", round(predicted), sent)
        lower = losses["top 10 %"] < losses["top 10 %, no feedback"]
        report.equal("error feedback lowers the loss", True, lower)


if __name__ == "__main__":
    main()
