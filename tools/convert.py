"""Converts a checkpoint of train_3d.py to a GPT-2 in Hugging Face's format.

    python -m tools.convert --checkpoint-dir checkpoints --out gpt2

The newest undamaged checkpoint is used. Any layout may have saved it. The folder can be loaded by
`transformers.GPT2LMHeadModel.from_pretrained` and by `train_3d.py --init-from`. The package
safetensors is needed.
"""

import argparse

import torch
import torch.distributed as dist

import checkpoint
import huggingface
import startup


def main() -> None:
    arguments = argparse.ArgumentParser(
        "tools.convert", usage="%(prog)s [options]", description=__doc__.splitlines()[0]
    )
    add = arguments.add_argument
    add("--checkpoint-dir", default="checkpoints", metavar="DIR",
        help="the checkpoints of a run (default: checkpoints)")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="the folder to write")
    args = arguments.parse_args()
    try:
        found, wrong = checkpoint.find(args.checkpoint_dir)
        for line in wrong:
            print(f"skipped a damaged checkpoint: {line}")
        startup.join_ranks(torch.device("cpu"))
        huggingface.export_gpt2(found, args.out, dist.group.WORLD)
    except (FileNotFoundError, ValueError) as error:
        arguments.exit(2, f"tools.convert: error: {error}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
