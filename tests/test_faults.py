"""What goes wrong around a run: it ends soon, and every rank that is left says why in one line.

Under torchrun the first rank that ends makes torchrun end the others; here nobody does, so that
what each of them finds out by itself is seen.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

import checkpoint
import gpt
import options
import pipeline
import train_3d
from tests.commands import ROOT, TINY, Forked, command_line, environment

ENDLESS = [*TINY, "--steps", 100_000, "--val-every", 0, "--print-every", 1, "--timeout", 3]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "text"
    path.write_text("all ranks are equal, but some leave early. " * 40)
    return path


def rank() -> int:
    return int(os.environ["RANK"])


def lines(errors: str) -> list[str]:
    """Without torch's own warnings, which begin with [rank0]:[W."""
    return [line for line in errors.splitlines() if not re.match(r"\[rank\d+\]:\[W", line)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module, name: str, nth: int, after: bool = False) -> Callable:
    """Rank 1 dies when it calls module.name for the nth time, or when that is done."""

    def before() -> None:
        real, calls = getattr(module, name), [0]

        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == nth and not after:
                die()
            result = real(*args, **kwargs)
            if calls[0] == nth:
                die()
            return result

        if rank() == 1:
            setattr(module, name, call)

    return before


# Two ranks of 1F1B, 4 microbatches: rank 1 is the last stage. With --schedule gpipe it warms up.
@pytest.mark.parametrize(
    "flags, before",
    [
        pytest.param("", lambda: rank() == 1 and die(), id="before it has met the others"),
        pytest.param("", die_at(dist, "new_group", 1), id="before the first group"),
        pytest.param("--pp 2", die_at(dist, "new_group", 5), id="between two groups"),
        pytest.param("", die_at(gpt, "init_weights", 1), id="while the model is built"),
        pytest.param("--pp 2 --schedule gpipe", die_at(gpt.Block, "forward", 2), id="in warmup"),
        pytest.param("--pp 2", die_at(pipeline.Pipeline, "run", 20), id="in the steady state"),
        pytest.param("--pp 2", die_at(gpt.Block, "forward", 22), id="in the middle of a step"),
        pytest.param("", die_at(dist, "all_reduce", 40, after=True), id="in a collective of DDP"),
        pytest.param("--tp 2", die_at(dist, "all_reduce", 99, after=True), id="in one of TP"),
        pytest.param("--zero 3", die_at(dist, "all_reduce", 9, after=True), id="under ZeRO-3"),
        pytest.param("--save-every 3", die_at(checkpoint.Writer, "write_data", 2), id="in a save"),
        pytest.param("--val-every 2", die_at(train_3d.Trainer, "validate", 2), id="in validation"),
    ],
)
def test_a_rank_that_dies(flags, before, text, tmp_path):
    flags = flags.split() + (["--checkpoint-dir", tmp_path] if "save" in flags else [])
    since = time.monotonic()
    with Forked(2, train_3d.main, *ENDLESS, "--data", text, *flags, before=before) as job:
        codes, errors = job.wait(60), job.read("errors")
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - since < 30
    assert len(lines(errors)) == 1, errors
    said = "train_3d.py: rank 0: (.* failed, since a rank did not come|the ranks did not meet at)"
    assert re.match(said, lines(errors)[0]), errors


def test_a_rank_that_comes_late(text):
    flags = [*TINY, "--data", text, "--timeout", 20]
    with Forked(2, train_3d.main, *flags, before=lambda: time.sleep(4 * rank())) as job:
        assert job.wait() == [0, 0], job.read("errors")
        assert "step     4/4" in job.read("out") and job.read("errors") == ""


def test_a_rank_that_never_comes(text):
    flags, since = [*TINY, "--data", text, "--timeout", 3], time.monotonic()
    with Forked(2, train_3d.main, *flags, before=lambda: time.sleep(600 * rank())) as job:
        job.processes[0].join(30)
        assert job.processes[0].exitcode == 1 and time.monotonic() - since < 20
        said = r"train_3d.py: rank 0: the ranks did not meet at 127.0.0.1:\d+ within 3 s: .*"
        (line,) = lines(job.read("errors"))
        assert re.fullmatch(said, line), line


def test_a_port_that_is_taken(text):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with Forked(2, train_3d.main, *TINY, "--data", text, "--timeout", 3, port=port) as job:
            job.processes[0].join(30)
            errors = job.read("errors")
    assert job.processes[0].exitcode == 1
    said = f"train_3d.py: rank 0: the ranks did not meet at 127.0.0.1:{port} within 3 s: .*in use"
    assert re.match(said, errors) and errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("lr", 0.5, "rank 1 has lr 0.5, and rank 0 0.002: start all ranks with one command line"),
        ("tp", 2, "rank 1 has tp 2, and rank 0 1: start"),
        ("seq_len", 8, "rank 1 has seq_len 8, and rank 0 16"),
        ("zero", 3, "rank 1 has zero 3, and rank 0 0"),
        ("data", None, "rank 1 has data None, and rank 0 .*; and 1 more: start"),
    ],
)
def test_a_rank_with_another_configuration_is_named(argument, value, message, text):
    def before() -> None:
        real = options.look_back

        def changed():
            args, found, notes = real()
            setattr(args, argument, value)
            return args, found, notes

        if rank() == 1:
            options.look_back = changed

    with Forked(2, train_3d.main, *TINY, "--data", text, before=before) as job:
        assert job.wait(30) == [2, 2]
        errors = job.read("errors")
    assert re.match(f"train_3d.py: error: {message}", errors) and errors.count("\n") == 1, errors


def test_a_rank_whose_files_differ_is_named(tmp_path):
    """One name, two files: as on two machines."""
    path = tmp_path / "text"

    def before() -> None:
        os.environ["HERE"] = str(tmp_path / str(rank()))
        os.makedirs(os.environ["HERE"])
        os.chdir(os.environ["HERE"])
        with open("text", "w") as file:
            file.write("abcd" * 1000 if rank() == 0 else "abce" * 1000)

    with Forked(2, train_3d.main, *TINY, "--data", path.name, before=before) as job:
        assert job.wait(30) == [2, 2]
        errors = job.read("errors")
    assert "rank 1 has corpus {'tokens': " in errors and errors.count("\n") == 1, errors


def test_a_rank_that_alone_cannot_start_says_so(tmp_path):
    """Rank 0 has the file, and waits; torchrun ends it when the other leaves."""
    (tmp_path / "text").write_text("abcd" * 1000)

    def before() -> None:
        os.chdir(tmp_path if rank() == 0 else "/")

    flags = [*TINY, "--data", "text", "--timeout", 3]
    with Forked(2, train_3d.main, *flags, before=before) as job:
        job.processes[1].join(30)
        assert job.processes[1].exitcode == 2
        errors = [line for line in job.read("errors").splitlines() if "rank 1" in line]
    assert len(errors) == 1 and re.match("train_3d.py: rank 1: error: --data text", errors[0])


FULL_SHM = """
mount -t tmpfs -o size=64k none /dev/shm && head -c 65536 /dev/zero > /dev/shm/full
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts: needs root")
def test_a_full_shared_memory_is_no_matter(text):
    """Nothing of ours is there: CPU ranks talk through sockets."""
    line = command_line(2, "train_3d.py", *TINY, "--data", text, "--tp", 2)
    line = ["unshare", "--mount", "sh", "-ec", FULL_SHM, "sh", *line]
    result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True,
                            timeout=60)  # fmt: skip
    assert result.returncode == 0 and "step     4/4" in result.stdout, result.stderr


def test_torchrun_with_a_port_that_is_taken(text):
    """torchrun's own: it does not begin, and says which."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                f"--master-port={port}", "--", "train_3d.py", *TINY, "--data", str(text)]
        result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True,
                                timeout=60)  # fmt: skip
    assert result.returncode != 0 and "in use" in result.stderr and str(port) in result.stderr
