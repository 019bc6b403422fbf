"""Generates text from a checkpoint of train_3d.py, or from a GPT-2 in Hugging Face's format.

    make sample                                 the newest run of make train
    make sample CHECKPOINT=checkpoints ARGS="--n 200 --top-k 40"
    python -m tools.sample --checkpoint-dir checkpoints --n 200 --temperature 0.8 --top-k 40
    python -m tools.sample --init-from gpt2 --prompt "Machines that learn"

It prints the prompt and the generated text. Which tokens these are depends on the model:
- With a `tokenizer.json` (--tokenizer, or in the folder of --init-from), text is tokenized by the
  package `tokenizers`, which must be installed.
- A model trained on a .npy or .bin file, or a GPT-2 without tokenizer.json, has no known tokenizer.
  Prompt and output are then token ids, separated by spaces.
- Otherwise tokens are bytes.

All other flags are those of train_3d.py. A model that is too large for one rank is run with
torchrun and sharded by --tp, --pp and so on.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import data
import generate
import huggingface
import options
import startup
import train_3d
from tools import launch


def main() -> None:
    description = __doc__.splitlines()[0]
    arguments = options.Parser("sample", description=description, allow_abbrev=False)
    add = arguments.add_argument
    add("--n", type=int, default=200, help="number of tokens to generate")
    add("--temperature", type=options.at_least(0, float), default=0.8,
        help="0: always the most likely token")  # fmt: skip
    add("--top-k", type=options.at_least(1), metavar="K", help="sample from the K most likely only")
    add("--prompt", default="\n")
    add("--tokenizer", metavar="FILE", help="default: tokenizer.json in the --init-from folder")
    add("--checkpoint-dir", metavar="DIR", help="default: the newest run of make train")
    add("--init-from", metavar="DIR", help="a GPT-2 in Hugging Face's format")
    mine, rest = arguments.parse_known_args()
    known = options.parser("sample")
    for word in known.parse_known_args(rest)[1]:
        names = [*arguments._option_string_actions, *known._option_string_actions]
        hint = options.did_you_mean(word.split("=")[0], names)
        arguments.error(f"unrecognized argument: {word}{hint}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    # train_3d.py's checks need a valid batch size. Sampling does not use it.
    rest += [f"--global-batch-size={world_size}", "--micro-batch-size=1"]
    try:
        rest += source_of(mine.checkpoint_dir, mine.init_from)
        args, found, wrong = options.parse_args(rest)
        source = huggingface.GPT2Folder(args.init_from) if args.init_from else None
        config = options.check(args, world_size, source)
        encode, decode = codec(mine.tokenizer, args)
        prompt = encode(mine.prompt)
        if not prompt or max(prompt) >= config.vocab_size:
            raise ValueError(
                f"--prompt has the tokens {prompt}: give at least one, from 0 to "
                f"{config.vocab_size - 1}"
            )
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
    how = (mine.n, mine.temperature, mine.top_k)
    tokens = generate.sample(trainer, torch.tensor(prompt), *how).tolist()
    if dist.get_rank() == 0:
        print(*wrong, decode(tokens), sep="\n")
    del trainer
    dist.barrier()
    dist.destroy_process_group()


def source_of(folder: str | None, init_from: str | None) -> list[str]:
    """Flags of train_3d.py that load the model. Raises ValueError if there is no checkpoint."""
    if init_from:
        return ["--init-from", init_from]
    if not folder:
        runs = launch.saved_runs()
        if not runs:
            raise ValueError(
                "there is no checkpoint: run make train first, or give CHECKPOINT=DIR "
                "(--checkpoint-dir DIR) or ARGS='--init-from DIR'"
            )
        folder = runs[-1]
        if int(os.environ.get("RANK", 0)) == 0:
            newest = f", the newest of {', '.join(runs)}" if len(runs) > 1 else ""
            print(f"sample: from {folder}{newest}", file=sys.stderr)
    elif not [*Path(folder).glob("step-*")]:
        raise ValueError(f"{folder} has no checkpoint: run make train first, or give another one")
    return ["--checkpoint-dir", folder, "--resume"]


def codec(tokenizer: str | None, args: argparse.Namespace) -> tuple:
    """Two functions: text -> tokens, tokens -> text."""
    default = Path(args.init_from or "", "tokenizer.json")
    if tokenizer or (args.init_from and default.exists()):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("tokenizer.json needs a package: pip install tokenizers") from None
        known = Tokenizer.from_file(str(tokenizer or default))
        return lambda text: known.encode(text).ids, known.decode
    if (args.data or "").endswith((".npy", ".bin")) or args.init_from:
        return lambda text: [int(n) for n in text.split()], lambda ids: " ".join(map(str, ids))
    return lambda text: list(text.encode()), lambda ids: data.decode(ids, args.data)


if __name__ == "__main__":
    main()
