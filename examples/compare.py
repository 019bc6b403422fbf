"""Compares a train_3d.Trainer with training in one process. The other examples use it; it is not a
command."""

import functools

import torch
from torch import nn

import data
import gpt
import measure
import options
import train_3d

# Large, as in the demos: AdamW divides by the root of the mean squared gradient. Where that is
# tiny, it would amplify rounding errors.
EPS = 1e-4


def train_one_process(model: nn.Module, args, read) -> dict[str, torch.Tensor]:
    """Train without any strategy, on all rows of each batch. Returns losses and gradient norms."""
    parameters, losses, norms = [*model.parameters()], [], []
    optimizer = torch.optim.SGD(parameters)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=EPS)
    for step in range(args.steps):
        x, y = read(step, range(args.global_batch_size))
        optimizer.zero_grad()
        loss = gpt.cross_entropy(model(x), y) / y.numel()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, args.clip))
        for group in optimizer.param_groups:
            group["lr"] = gpt.learning_rate(step, args.steps, args.warmup_steps, args.lr)
            group["weight_decay"] = args.weight_decay
        optimizer.step()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), "norm": torch.stack(norms)}


def compare(report: measure.Report, name: str, trainer: train_3d.Trainer) -> None:
    """Train both and report the largest difference. The trainer must use float64, and weight decay
    0, since the trainer does not decay vectors."""
    args, config = trainer.args, trainer.config
    for group in trainer.optimizer.param_groups:
        group["eps"] = EPS  # SGD does not use it
    stats = torch.stack([trainer.step(step) for step in range(args.steps)])
    trainer.sync.gather()  # ZeRO-3 has freed the parameters
    model = gpt.build(config, args.seed, trainer.dtype)
    expected = train_one_process(model, args, trainer.read)
    report.losses(name, [*stats[:, 0]], [*expected.pop("loss")])
    full, found = dict(gpt.named_parameters(model)), {"norm": stats[:, 1]}
    for key, p in gpt.named_parameters(trainer.model):  # those of this rank
        found[key] = p
        expected[key] = p.distribution.shard(full[key])
    report.close(f"{name}: norm, parameters", found, expected)


def compare_layout(report: measure.Report, name: str, flags: list[str]) -> None:
    """Compare a trainer with these flags of train_3d.py."""
    args = options.parser().parse_args(flags)
    try:
        config = options.check(args, report.group.size())
    except ValueError as error:
        options.parser().error(str(error))
    read = functools.partial(data.batch, data.example(), seq_len=config.seq_len, seed=0)
    compare(report, name, train_3d.Trainer(args, config, read, torch.device("cpu")))
