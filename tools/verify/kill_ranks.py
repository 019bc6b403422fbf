"""Kills ranks of a run at random moments and compares its losses with those of an undisturbed run.

    make drill DRILLS=20 NPROC=4 ARGS="-- --tp 2 --zero 1"
    python -m tools.verify.kill_ranks --drills 20 --nproc 4 -- --tp 2 --zero 1

Flags after -- are passed to train_3d.py. After each SIGKILL torchrun restarts all ranks
(`--max-restarts`), and they resume from the newest complete checkpoint (`--resume`). The layout
does not change, so all losses and gradient norms must be equal bit by bit to those of the
undisturbed run, including steps that were run twice. It prints each kill and each resume, then how
many losses are equal. The exit code is 1 if one differs. The ranks are found in /proc, so this
needs Linux.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--n-layer 4 --n-head 2 --n-embd 64 --seq-len 64 --global-batch-size 8 --micro-batch-size 2 "
    "--device cpu --eval-interval 0 --log-interval 1 --save-interval 5 --data train_3d.py"
).split()


def launch(nproc: int, restarts: int, folder: str, flags: list[str]) -> subprocess.Popen:
    line = [
        sys.executable,
        *"-m torch.distributed.run --standalone".split(),
        f"--nproc-per-node={nproc}",
        f"--max-restarts={restarts + 1}",
        "train_3d.py",
        *flags,
        "--resume",
        "--checkpoint-dir",
        f"{folder}/saves",
        "--metrics",
        f"{folder}/log",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{folder}/errors", "w") as errors:
        return subprocess.Popen(line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                stderr=errors)  # fmt: skip


def ranks_of(job: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # the process has just ended
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if rank := re.search(rb"\0RANK=(\d+)\0", environment):
                found[int(rank[1])] = int(pid)
    return found


def rows(folder: str) -> dict[int, set]:
    """Step -> set of its (loss, norm). A step that was run twice with equal results has one."""
    found: dict[int, set] = {}
    for line in Path(folder, "log").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found.setdefault(row["step"], set()).add((row["loss"], row["grad_norm"]))
    return found


def drill(nproc: int, drills: int, folder: str, flags: list[str], rng: random.Random) -> int:
    """Trains, kills a random rank `drills` times, and returns the number of kills."""
    # Kill after `after` more printed steps. killed: the processes of the last killed run.
    kills, lines, after, killed = 0, 0, rng.randint(1, 12), set()
    with launch(nproc, drills, folder, flags) as job:
        for line in job.stdout:
            if line.startswith("--resume"):
                print(f"  {line.strip()}", flush=True)
            if not re.match(r"step .* loss", line):
                continue
            lines += 1
            if lines >= after and kills < drills:
                time.sleep(rng.uniform(0, 0.3))  # a random moment in a step or a save
                ranks = ranks_of(job)
                if len(ranks) < nproc or killed & {*ranks.values()}:
                    continue  # this line was printed by ranks that no longer run
                rank = rng.choice(sorted(ranks))
                os.kill(ranks[rank], signal.SIGKILL)
                kills, lines, after = kills + 1, 0, rng.randint(1, 12)
                killed = {*ranks.values()}
                print(f"drill {kills}: rank {rank} killed after step {line.split()[1]}", flush=True)
    if job.returncode:
        print(Path(folder, "errors").read_text()[-3000:])
        raise SystemExit(f"the run failed with exit code {job.returncode} after {kills} kills")
    return kills


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--drills", type=int, default=20, help="number of kills")
    arguments.add_argument("--nproc", type=int, default=4, help="ranks")
    arguments.add_argument("--seed", type=int, default=0, help="of the random moments and ranks")
    arguments.add_argument("flags", nargs="*", help="after --: flags of train_3d.py")
    args = arguments.parse_args()
    flags = [*SMALL, f"--steps={20 + 8 * args.drills}", *args.flags]
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as undisturbed, tempfile.TemporaryDirectory() as disturbed:
        drill(args.nproc, 0, undisturbed, flags, random.Random(args.seed))
        kills = drill(args.nproc, args.drills, disturbed, flags, random.Random(args.seed))
        expected, seen = rows(undisturbed), rows(disturbed)
    different = [step for step in expected if seen.get(step) != expected[step]]
    print(f"{kills} kills; {len(expected) - len(different)} of {len(expected)} losses and norms "
          "equal those of the undisturbed run, bit by bit; "
          f"{time.monotonic() - since:.0f} s")  # fmt: skip
    sys.exit(1 if different or kills < args.drills or expected.keys() != seen.keys() else 0)


if __name__ == "__main__":
    main()
