"""Generate tokens with the model of train_3d.Trainer, in any layout.

    tokens = sample(trainer, prompt, n)         the prompt and n generated tokens
    print(sample_text(trainer, corpus))         what train_3d.py --sample prints after training

All ranks must call these functions. They return the same on every rank.
"""

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import gpt
import tensor_parallel


@torch.no_grad()
def sample(
    trainer, prompt: Tensor, n: int, temperature: float = 0.8, top_k: int | None = None
) -> Tensor:
    """The token ids `prompt`, a vector, followed by n generated ones. Each generated token takes
    one forward pass over at most s tokens. temperature 0: take the most likely token. top_k: sample
    from the top_k most likely tokens only."""
    v, s = trainer.config.vocab_size, trainer.config.seq_len
    generator = torch.Generator().manual_seed(trainer.args.seed)
    tokens = prompt.to(trainer.device)
    trainer.model.eval()
    for _ in range(n):
        logits = next_logits(trainer, tokens[-s:])
        values, indices = logits.double().cpu().topk(min(top_k or v, v))
        p = torch.softmax((values - values[0]) / max(temperature, 1e-9), dim=0)
        token = indices[torch.multinomial(p, 1, generator=generator)]
        tokens = torch.cat([tokens, token.to(trainer.device)])
    trainer.model.train()
    return tokens


def next_logits(trainer, tokens: Tensor) -> Tensor:
    """The logits [v] of the token after `tokens`, on every rank."""
    logits = torch.zeros(trainer.config.vocab_size, dtype=trainer.dtype, device=trainer.device)
    # The length must be divisible by the number of chunks of a row. Attention is causal, so padding
    # after the last token does not change its logits.
    shards = trainer.tp_group.size() if trainer.args.sequence_parallel else 1
    chunks = trainer.tokens.chunk(0, shards).count
    full = nn.functional.pad(tokens[None], (0, -len(tokens) % chunks))
    trainer.draws.at(0, (), gpt.document_starts(full, trainer.args.document_mask))
    x = trainer.tokens.take(full, 1)
    is_last = trainer.tokens.positions(x.size(1), x.device) == len(tokens) - 1

    def store(output: Tensor, _: int) -> Tensor:  # [1, s, v/t]
        """On the last stage of one replica: store this tp rank's shard of the logits."""
        if trainer.dp_group.rank() == 0 and is_last.any():
            tp_rank, t = trainer.tp_group.rank(), trainer.tp_group.size()
            start, stop = tensor_parallel.bounds(len(logits), tp_rank, t)
            logits[start:stop] = output[0, is_last][0]
        return output.new_zeros(())  # in place of a loss

    trainer.pipe.run(trainer.forward_program(1), [x], store, trainer.boundary_shape(*x.shape))
    dist.all_reduce(logits)  # payload: v, over the world
    return logits


def sample_text(trainer, corpus: numpy.ndarray) -> str:
    """The first 16 tokens of `corpus`, and --sample tokens that the model generates after them."""
    prompt = torch.from_numpy(corpus[:16].astype("int64"))
    ids = sample(trainer, prompt, trainer.args.sample).tolist()
    before, after = (data.decode(part, trainer.args.data) for part in (ids[:16], ids[16:]))
    return f"--- sample after {before!r} ---\n{after}\n--------------"
