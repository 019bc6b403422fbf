"""An optimizer of your own: Lion, which works with DDP and with every stage of ZeRO.

Lion (Chen et al. 2023, arXiv 2302.06675) updates with the sign of a momentum. It stores one number
per parameter; AdamW stores two.

ZeRO gives the optimizer pieces: the ranges of the flattened parameters that are in this rank's
shards. So the update must be element-wise: that of an element may depend on the value, gradient and
state of this element only. SGD, AdamW and Lion are element-wise. Muon and Shampoo need full
matrices, LAMB and Adafactor need sums over a matrix. These work with DDP, but not with ZeRO.

    torchrun --standalone --nproc-per-node 2 -m examples.optimizer

What to look at: train(). The optimizer gets the tensors of sync.pieces(), and four calls differ
from training in one process. With DDP each of d ranks stores Psi numbers of momentum, for Psi
parameters. With ZeRO all ranks together store Psi.

With train_3d.Trainer, set trainer.optimizer after construction, with the same tensors. Checkpoints
include every tensor of the optimizer's state.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import data
import ddp
import gpt
import measure
import zero3

SYNCS = {"DDP": ddp.DDP} | {f"ZeRO-{stage}": attach for stage, attach in zero3.STAGES.items()}


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-4, betas=(0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:  # no rank used the parameter
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                update = torch.lerp(p.grad, state["momentum"], beta_1).sign_()
                state["momentum"].lerp_(p.grad, 1 - beta_2)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def train(rows: range, world: dist.ProcessGroup, attach: Callable | None = None) -> tuple:
    """Train on `rows` of each batch, in float64, in 2 microbatches. A batch has 4 rows per rank.
    attach(model) makes a DDP or ZeRO object. Returns the losses, {"norm": gradient norms, name:
    parameter}, and the number of elements of this rank's optimizer state."""
    torch.manual_seed(0)
    v, s, m, steps = 251, 16, 2, 3
    model = nn.Sequential(nn.Embedding(v, 31), nn.Linear(31, 57), nn.GELU(), nn.Linear(57, v))
    model.double()
    sync = attach(model, accumulations=m) if attach else None
    tensors = [piece.tensor for piece in sync.pieces()] if sync else [*model.parameters()]
    optimizer = Lion(tensors, lr=1e-2, weight_decay=0.1)
    losses, norms = torch.zeros(steps, dtype=torch.float64), []
    for step in range(steps):
        if sync:
            sync.start()
        else:
            optimizer.zero_grad()
        x, y = data.batch(data.example(), step, rows, s, seed=0)
        for xs, ys in zip(x.chunk(m), y.chunk(m), strict=True):
            loss = gpt.cross_entropy(model(xs), ys) / (4 * world.size() * s)
            loss.backward()
            losses[step] += loss.detach()
        if sync:
            sync.finish()
            norms.append(sync.step(optimizer, clip=0.1))
        else:
            norms.append(nn.utils.clip_grad_norm_(tensors, 0.1))
            optimizer.step()
    if sync:
        sync.gather()  # ZeRO-3 has freed the parameters
    state = sum(t.numel() for state in optimizer.state.values() for t in state.values())
    return losses, {"norm": torch.stack(norms), **dict(model.named_parameters())}, state


def main() -> None:
    with measure.Report("examples.optimizer") as report:
        group, d = report.group, report.group.size()
        expected_losses, expected, psi = train(range(4 * d), group)
        rows = range(4 * group.rank(), 4 * group.rank() + 4)
        for name, attach in SYNCS.items():
            losses, found, state = train(rows, group, attach)
            total = torch.tensor(state)
            dist.all_reduce(total)
            dist.all_reduce(losses)
            report.losses(name, [*losses], [*expected_losses])
            report.close(f"{name}: norm, parameters", found, expected)
            report.equal(
                f"{name}: state of all ranks", d * psi if name == "DDP" else psi, total.item()
            )


if __name__ == "__main__":
    main()
