"""Text from a checkpoint, or from a GPT-2 in Hugging Face's format.

    python -m tools.sample --checkpoint-dir checkpoints --n 200 --temperature 0.8 --top-k 40
    python -m tools.sample --init-from gpt2 --prompt "Machines that learn"

Prompt and text are bytes, or what the tokenizer says (a `tokenizer.json`, as such folders have one;
that takes the package tokenizers), or else token ids with a space between. Other flags are
train_3d.py's: under torchrun a model that no rank can hold is cut as there, with --tp, --pp, ...
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import data
import huggingface
import options
import startup
import train_3d


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = arguments.add_argument
    add("--n", type=int, default=200, help="tokens")
    add("--temperature", type=options.at_least(0, float), default=0.8, help="0: the likeliest")
    add("--top-k", type=options.at_least(1), metavar="K", help="of the K likeliest alone")
    add("--prompt", default="\n")
    add("--tokenizer", metavar="FILE", help="default: tokenizer.json of --init-from, if it has one")
    mine, rest = arguments.parse_known_args()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    # Of the training batch only that it must be one.
    rest += [f"--global-batch-size={world_size}", "--micro-batch-size=1"]
    rest += [] if "--init-from" in rest else ["--resume"]
    try:
        args, found, wrong = options.parse_args(rest)
        source = huggingface.GPT2Folder(args.init_from) if args.init_from else None
        config = options.check(args, world_size, source)
        encode, decode = codec(mine.tokenizer, args)
        prompt = encode(mine.prompt)
        if not prompt or max(prompt) >= config.vocab_size:
            raise ValueError(f"--prompt is {prompt}: give tokens of 0..{config.vocab_size - 1}")
        device, _ = startup.pick_device(args.device)
    except ValueError as error:
        arguments.error(str(error))
    startup.join_ranks(device, args.timeout)
    draw = source.draw if source else None
    trainer = train_3d.Trainer(args, config, None, device, draw)
    if found:
        newest, more = checkpoint.newest_complete(found, dist.group.WORLD)
        wanted = trainer.state_to_load({"moments": [], "scalars": {}})
        checkpoint.read(newest.path, wanted, dist.group.WORLD)
        trainer.loaded()
        wrong += more
    tokens = trainer.sample(torch.tensor(prompt), mine.n, mine.temperature, mine.top_k).tolist()
    if dist.get_rank() == 0:
        print(*wrong, decode(tokens), sep="\n")
    del trainer
    dist.barrier()
    dist.destroy_process_group()


def codec(tokenizer: str | None, args: argparse.Namespace) -> tuple:
    """(text -> tokens, tokens -> text)."""
    beside = Path(args.init_from or "", "tokenizer.json")
    if tokenizer or (args.init_from and beside.exists()):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("a tokenizer.json needs a package: pip install tokenizers") from None
        known = Tokenizer.from_file(str(tokenizer or beside))
        return lambda text: known.encode(text).ids, known.decode
    if (args.data or "").endswith((".npy", ".bin")) or args.init_from:
        return lambda text: [int(n) for n in text.split()], lambda ids: " ".join(map(str, ids))
    return lambda text: list(text.encode()), lambda ids: data.decode(ids, args.data)


if __name__ == "__main__":
    main()
