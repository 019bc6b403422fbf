"""Starts the ranks of a script with torchrun. The flags of train_3d.py are checked first.

    python -m tools.launch 2 tensor_parallel.py                   starts 2 ranks
    python -m tools.launch 8 train_3d.py --tp 2 --pp 2            checks the flags, starts 8 ranks
    python -m tools.launch --save 8 train_3d.py --tp 2 --pp 2     what `make train` runs

It prints the torchrun command. The check takes one process and about two seconds, and reports a
wrong flag in one line, before any rank starts. The ranks do the checks that need communication.

Ctrl-C and SIGTERM are sent to the ranks as SIGTERM: train_3d.py finishes its step and saves, and a
rank that is still starting ends silently. torchrun kills the ranks that still run 10 minutes later
(torch 2.11: 30 s later), or after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds, if that is set.

--save adds --checkpoint-dir and --metrics, unless they are given. The first run is saved to
checkpoints and run.jsonl, the next one to checkpoints-2 and run-2.jsonl, and so on: no run
overwrites another. With --resume, the newest of these runs is continued. With a --checkpoint-dir
DIR, the losses are written to DIR.jsonl.
"""

import logging
import os
import re
import shlex
import signal
import sys
from pathlib import Path

FOLDER, LOSSES = "checkpoints", "run"  # with -2, -3, ... for later runs


def saved_runs() -> list[str]:
    """The folders checkpoints, checkpoints-2, ... that contain a checkpoint, the newest last."""

    def last_saved(folder: Path) -> float:
        return max((step.stat().st_mtime for step in folder.glob("step-*")), default=0.0)

    named = [path for path in Path().iterdir() if re.fullmatch(rf"{FOLDER}(-\d+)?", path.name)]
    return [str(folder) for folder in sorted(filter(last_saved, named), key=last_saved)]


def losses_of(folder: str) -> str:
    """The file for the losses of the run that is saved to `folder`."""
    own = re.fullmatch(rf"{FOLDER}((?:-\d+)?)", folder.rstrip("/"))
    return f"{LOSSES}{own[1]}.jsonl" if own else f"{folder.rstrip('/')}.jsonl"


def free_folder() -> str:
    """The first of checkpoints, checkpoints-2, ... that has no checkpoint and no losses."""
    number = 1
    while True:
        folder = FOLDER if number == 1 else f"{FOLDER}-{number}"
        losses = Path(losses_of(folder))
        if not [*Path(folder).glob("step-*")] and not (losses.exists() and losses.stat().st_size):
            return folder
        number += 1


def given(flags: list[str], *names: str) -> str | None:
    """The last value of a flag, one of `names`, as `--flag VALUE` or `--flag=VALUE`."""
    value = None
    for i, word in enumerate(flags):
        name, equals, after = word.partition("=")
        if name in names:
            value = after if equals else (*flags, "")[i + 1]
    return value


def places(flags: list[str]) -> tuple[list[str], list[str]]:
    """(the flags that --save adds, lines that say where the run is saved)."""
    more, lines, saved = [], [], saved_runs()
    folder, resumed = given(flags, "--checkpoint-dir"), "--resume" in flags
    if folder is None:
        folder = saved[-1] if resumed and saved else FOLDER if resumed else free_folder()
        more += ["--checkpoint-dir", folder]
    losses = given(flags, "--metrics", "--log")
    if losses is None:
        losses = losses_of(folder)
        more += ["--metrics", losses]
    if not resumed and given(flags, "--checkpoint-dir") is None and folder != FOLDER:
        if saved:
            kept = f"{', '.join(saved)}. To continue {saved[-1]}: make train ARGS=--resume"
        else:
            kept = losses_of(FOLDER)
        lines.append(f"Earlier runs are kept: {kept}")
    if more:
        how = "continues the run in" if resumed else "saves to"
        lines.append(
            f"This run {how} {folder} and writes its losses to {losses}. Afterwards: make sample, "
            "make plot"
        )
    return more, lines


def check(flags: list[str], ranks: int) -> None:
    """The checks of train_3d.py that need no communication. Raises ValueError, or SystemExit after
    an error of argparse has been printed."""
    import data
    import huggingface
    import options
    import startup

    args, found, _ = options.parse_args(flags)
    both = args.tp * args.pp
    if ranks % both:
        near = max(1, round(ranks / both)) * both
        raise ValueError(
            f"{ranks} ranks cannot be divided into --tp {args.tp} x --pp {args.pp}: start a "
            f"multiple of {both} (make train NPROC={near}), or change --tp or --pp (TP=, PP=)"
        )
    source = huggingface.GPT2Folder(args.init_from) if args.init_from else None
    config = options.check(args, ranks, source)
    if found:
        options.compare(options.run_of(args, config), found[0].about)
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    try:
        startup.pick_device(args.device)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        os.environ |= {"LOCAL_WORLD_SIZE": before} if before else {}
    if args.data:
        data.load(args.data, config.seq_len, config.vocab_size)


def python() -> str:
    """The name of this interpreter, relative to the working directory if it is inside it."""
    name = os.path.relpath(sys.executable)
    return sys.executable if name.startswith("..") else name


def main() -> None:
    words = sys.argv[1:]
    save = words[:1] == ["--save"]
    number, *command = words[save:] or [""]
    if not re.fullmatch(r"[1-9]\d*", number):
        sys.exit(f"NPROC is {number!r}: give a number of ranks, at least 1")
    if not command:
        sys.exit("usage: python -m tools.launch [--save] NPROC SCRIPT [FLAGS]")
    lines = []
    if command[0] == "train_3d.py":
        if save:
            more, lines = places(command[1:])
            command += more
        try:
            check(command[1:], int(number))
        except ValueError as error:
            print(f"train_3d.py: error: {error}", file=sys.stderr)
            sys.exit(2)
    # torchrun takes --log, the former name of --metrics, for its --log-dir, unless -- precedes it.
    separator = [] if given(command, "--log") is None else ["--"]
    start = ["--standalone", "--nproc-per-node", number, *separator, *command]
    line = shlex.join([python(), "-m", "torch.distributed.run", *start])
    print(line, *lines, sep="\n", flush=True)

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    interrupted = SignalException("Ctrl-C", signal.SIGTERM)

    def interrupt(*_) -> None:
        raise interrupted

    signal.signal(signal.SIGINT, interrupt)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    for module in ("agent.server.api", "multiprocessing.api"):
        # torchrun reports the signal that it receives, and the one that it sends to each rank.
        logging.getLogger(f"torch.distributed.elastic.{module}").addFilter(
            lambda record: not record.msg.startswith(("Received %s death", "Sending process"))
        )
    # torchrun in this process, which has imported torch already.
    try:
        run.main(["--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT", *start])
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if codes != {2}:  # code 2: the rank has printed one line that says what is wrong
            print(error, file=sys.stderr)
        sys.exit(2 if codes == {2} else 1)
    except SignalException as error:
        sys.exit(128 + (signal.SIGINT if error is interrupted else error.sigval))


if __name__ == "__main__":
    main()
