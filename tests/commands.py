"""Runs commands under test. `run` starts torchrun as a user does (6 to 11 s, mostly imports).
`Forked` calls main() in forked ranks, which have imported everything, with the environment that
torchrun gives them."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: each child makes its own

ROOT = Path(__file__).parent.parent
TINY = (
    "--n-layer 2 --n-head 2 --n-embd 16 --seq-len 16 --global-batch-size 8 --micro-batch-size 2 "
    "--steps 4 --dtype float64 --eval-iters 2 --device cpu"
).split()


def command_line(ranks: int, *script) -> list[str]:
    """0 ranks: plain."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node".split()
    return [sys.executable, *((*launcher, str(ranks)) if ranks else ()), *map(str, script)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(ranks: int, *script) -> subprocess.CompletedProcess:
    return subprocess.run(
        command_line(ranks, *script), cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def read_log(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(condition: Callable[[], bool], seen: Callable = lambda: None) -> None:
    """Waits for an event, at most a minute. seen: what to report if it does not come."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, seen()
        time.sleep(0.01)


class Forked:
    """main() on forked ranks, with these arguments. 0 ranks: one process without torchrun's
    environment. before: called first in each process, to break something. port: rank 0
    opens the store on it. Without it, this process opens the store, as torchrun does. Use as a
    context, which kills the processes that are left."""

    def __init__(
        self, ranks: int, main: Callable, *argv, threads: int = 1,
        before: Callable = lambda: None, port: int | None = None,
    ):  # fmt: skip
        self.folder, self.processes, self.store = tempfile.TemporaryDirectory(), [], None
        context, shared = multiprocessing.get_context("fork"), {}
        if ranks:
            shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1,
                      "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
            if port is None:  # the store binds a free port
                self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            shared["MASTER_PORT"] = port or self.store.port
        # The children start when the last of them is forked: until then no client keeps the store's
        # thread busy, so that no child is forked while that thread holds a lock.
        gate, self.opener = os.pipe()
        for rank in range(max(1, ranks)):
            own = shared | ({"RANK": rank, "LOCAL_RANK": rank} if shared else {})
            file = Path(sys.modules[main.__module__].__file__).name
            process = context.Process(
                target=self._child,
                args=(own, main, [file, *map(str, argv)], threads, before, gate),
            )
            process.start()
            self.processes.append(process)
        os.close(self.opener)
        os.close(gate)

    def _child(
        self, own: dict, main: Callable, argv: list[str], threads: int, before: Callable, gate: int
    ) -> None:
        code = 1
        try:
            os.close(self.opener)
            os.read(gate, 1)  # returns when no process holds the other end
            for number, name in ((1, "out"), (2, "errors")):
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                os.dup2(os.open(Path(self.folder.name) / name, flags), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            faulthandler.register(signal.SIGUSR1)  # prints the stacks of a rank that hangs
            os.chdir(ROOT)
            os.environ.update({name: str(value) for name, value in own.items()})
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            sys.argv = argv
            torch.set_num_threads(threads)
            before()
            main()
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.store = None  # destroyed here: the destructor joins a thread that no child has
        self.folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def read(self, name: str) -> str:
        path = Path(self.folder.name) / name
        return path.read_text() if path.exists() else ""

    def until(self, text: str) -> None:
        """Waits until `text` is in the output."""
        until(lambda: text in self.read("out"), lambda: self.read("out") + self.read("errors"))

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes by rank."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if hanging := [p.pid for p in self.processes if p.exitcode is None]:
            for pid in hanging:
                os.kill(pid, signal.SIGUSR1)
            time.sleep(1)  # let them print their stacks
            raise AssertionError(f"{len(hanging)} ranks hang: " + self.read("errors"))
        return [process.exitcode for process in self.processes]


def forked(ranks: int, main: Callable, *argv, **how) -> subprocess.CompletedProcess:
    """Like run(), by Forked(..., **how); returncode is the largest of the processes'."""
    with Forked(ranks, main, *argv, **how) as job:
        codes = job.wait()
        return subprocess.CompletedProcess(
            [main.__module__, *argv], max(codes, key=abs), job.read("out"), job.read("errors")
        )
