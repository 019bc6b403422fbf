"""Faults around a run: it ends soon, and every remaining rank prints the reason in one line.

torchrun ends all ranks when the first one ends. These tests start the ranks without torchrun, so
that each rank has to detect the fault.
"""

import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

import checkpoint_dcp
import gpt
import options
import pipeline
import startup
import train_3d
import zero
from tests.commands import ROOT, TINY, Forked, command_line, environment, free_port, until
from tools.bench import hosts

ENDLESS = [*TINY, "--steps", 100_000, "--eval-interval", 0, "--log-interval", 1, "--timeout", 30]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "text"
    path.write_text("all ranks are equal, but some leave early. " * 40)
    return path


def rank() -> int:
    return int(os.environ["RANK"])


def lines(errors: str) -> list[str]:
    """Without torch's own warnings, which begin with [W or with [rank0]:[W."""
    return [line for line in errors.splitlines() if not re.match(r"(\[rank\d+\]:)?\[W", line)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(module, name: str, nth: int, after: bool = False) -> Callable:
    """Rank 1 dies at its nth call of module.name, before it or after it, once rank 0 has begun its
    own nth call: rank 0 has then completed all that precedes it."""

    def before(begun: Path) -> None:
        real, calls = getattr(module, name), itertools.count(1)

        def call(*args, **kwargs):
            if next(calls) != nth or rank() > 1:
                return real(*args, **kwargs)
            if rank() == 0:
                begun.touch()
                return real(*args, **kwargs)
            until(begun.exists)
            if after:
                real(*args, **kwargs)
            die()

        setattr(module, name, call)

    return before


def lost(operation: str, group: str, file: str, function: str) -> str:
    said = rf"{operation} over {re.escape(group)} failed because a rank exited or did not respond"
    return rf"{said}: {file}:\d+, {function}: .*"


COUNT = lost("all_reduce", "all ranks", "ddp.py", "global_count")
BUCKET = lost("all_reduce", "all ranks", "ddp.py", "finish")
STATS = lost("all_reduce", "all ranks", "train_3d.py", "_global_stats")
GATHER = lost("all_gather", "all ranks", "zero.py", "wait")
SCATTER = lost("reduce_scatter", "all ranks", "zero.py", "wait_reduce")
SEND = lost("send", "all ranks", "pipeline.py", "_post")
RECEIVE = lost("recv", "all ranks", "pipeline.py", "_take")


# Two ranks of 1F1B, 4 microbatches: rank 1 is the last stage. With --schedule gpipe it warms up.
# Where rank 0's operation may have completed before rank 1 died, the next one is listed too.
@pytest.mark.parametrize(
    "flags, before, expected",
    [
        pytest.param(
            "", die_at(gpt, "init_weights", 1),
            [lost("all_gather_object", "all ranks", "ddp.py", "check_same_parameters")],
            id="while the model is built",
        ),
        pytest.param("--pp 2 --schedule gpipe", die_at(gpt.Block, "forward", 2), [SEND, RECEIVE],
                     id="in warmup"),
        pytest.param("--pp 2", die_at(pipeline.Pipeline, "run", 20), [SEND, RECEIVE],
                     id="in the steady state"),
        pytest.param("--pp 2", die_at(gpt.Block, "forward", 22), [SEND, RECEIVE],
                     id="in the middle of a step"),
        pytest.param("", die_at(dist, "all_reduce", 29, after=True), [BUCKET, STATS],
                     id="in a collective of DDP"),
        pytest.param(
            "--tp 2", die_at(dist, "all_reduce", 99, after=True),
            [lost("all_reduce", "all ranks", "tensor_parallel.py", "(finish|forward)")],
            id="in one of TP",
        ),
        pytest.param("--zero 3", die_at(zero, "all_gather", 22, after=True), [GATHER, SCATTER],
                     id="under ZeRO-3"),
        pytest.param("--save-interval 3", die_at(checkpoint_dcp.Writer, "write_data", 2),
                     [COUNT, BUCKET, STATS], id="in a save"),
        pytest.param("--eval-interval 2", die_at(train_3d.Trainer, "validate", 2), [COUNT],
                     id="in validation"),
    ],
)  # fmt: skip
def test_a_rank_that_dies(flags, before, expected, text, tmp_path):
    flags = flags.split() + (["--checkpoint-dir", tmp_path / "saves"] if "save" in flags else [])
    before = functools.partial(before, tmp_path / "begun")
    with Forked(2, train_3d.main, *ENDLESS, "--data", text, *flags, before=before) as job:
        codes, errors = job.wait(), job.read("errors")
    assert codes == [1, -signal.SIGKILL]
    said, pattern = lines(errors), f"train_3d.py: rank 0: ({'|'.join(expected)})"
    assert len(said) == 1 and re.fullmatch(pattern, said[0]), errors


@pytest.mark.parametrize("nth", [1, 4])
def test_a_rank_that_dies_before_a_group_is_made(nth, text, tmp_path):
    """Four ranks, two groups for tp and two for dp. The other rank of the group reports it."""
    before = functools.partial(die_at(dist.distributed_c10d, "new_group", nth), tmp_path / "begun")
    flags = ["--data", text, "--tp", 2, "--timeout", 8]
    with Forked(4, train_3d.main, *ENDLESS, *flags, before=before) as job:
        codes, errors = job.wait(), job.read("errors")
    assert codes == [1, -signal.SIGKILL, 1, 1]
    pattern = lost("new_subgroups_by_enumeration", "all ranks", "train_3d.py", "_make_group")
    neighbour = {1: 0, 4: 3}[nth]
    (said,) = (x for x in lines(errors) if x.startswith(f"train_3d.py: rank {neighbour}: "))
    assert re.fullmatch(f"train_3d.py: rank {neighbour}: {pattern}", said), errors


@pytest.mark.parametrize("flags", ["--tp 2", "--zero 1", "--zero 3", "--pp 2"])
def test_a_lost_group_is_named(flags, text, tmp_path):
    """Of four ranks, rank 1 dies: the message has the axis and its ranks."""
    before = functools.partial(die_at(train_3d.Trainer, "step", 2), tmp_path / "begun")
    with Forked(4, train_3d.main, *ENDLESS, "--data", text, *flags.split(), before=before) as job:
        job.wait()
        said = lines(job.read("errors"))
    group = {"--tp 2": r"(tp|dp) \[0, [12]\]", "--pp 2": r"dp \[0, 1\]"}.get(flags, "all ranks")
    (line,) = (line for line in said if line.startswith("train_3d.py: rank 0: "))
    assert re.search(f" over {group} failed because a rank exited or", line), line


def test_a_rank_that_dies_before_it_joins(text):
    flags, port = [*TINY, "--data", text, "--timeout", 3], free_port()  # rank 0 opens the store
    with Forked(2, train_3d.main, *flags, before=lambda: rank() == 1 and die(), port=port) as job:
        assert job.wait() == [1, -signal.SIGKILL]
        (line,) = lines(job.read("errors"))
    said = f"not all ranks connected to 127.0.0.1:{port} within 3 s: .* 1/2 clients joined."
    assert re.fullmatch(f"train_3d.py: rank 0: {said}", line), line


def test_a_rank_that_comes_late(text, tmp_path):
    """Rank 1 starts when rank 0 joins."""
    joins = tmp_path / "joins"

    def before() -> None:
        real = startup.join_ranks

        def join(*args) -> None:
            joins.touch()
            real(*args)

        if rank() == 1:
            until(joins.exists)
        else:
            startup.join_ranks = join

    with Forked(2, train_3d.main, *TINY, "--data", text, before=before) as job:
        assert job.wait() == [0, 0], job.read("errors")
        assert "step     4/4" in job.read("out") and job.read("errors") == ""


def test_a_rank_that_never_comes(text):
    flags = [*TINY, "--data", text, "--timeout", 3]
    with Forked(2, train_3d.main, *flags, before=lambda: rank() == 1 and signal.pause()) as job:
        job.processes[0].join(60)
        assert job.processes[0].exitcode == 1
        said = r"train_3d.py: rank 0: not all ranks connected to 127.0.0.1:\d+ within 3 s: .*"
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
    said = f"train_3d.py: rank 0: not all ranks connected to 127.0.0.1:{port} within 3 s: .*in use"
    assert re.match(said, errors) and errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("lr", 0.5, "rank 1 has lr 0.5 and rank 0 has 0.002: start all ranks with the same co"),
        ("tp", 2, "rank 1 has tp 2 and rank 0 has 1: start"),
        ("seq_len", 8, "rank 1 has seq_len 8 and rank 0 has 16"),
        ("zero", 3, "rank 1 has zero 3 and rank 0 has 0"),
        ("data", None, r"rank 1 has data None and rank 0 has .* \(and 1 more\): start"),
    ],
)
def test_a_rank_with_another_configuration_is_named(argument, value, message, text):
    def before() -> None:
        real = options.parse_args

        def changed():
            args, found, notes = real()
            setattr(args, argument, value)
            return args, found, notes

        if rank() == 1:
            options.parse_args = changed

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


@pytest.mark.skipif(not hosts.capable("CAP_SYS_ADMIN"), reason="mount needs CAP_SYS_ADMIN")
@pytest.mark.slow
def test_a_full_shared_memory_is_no_matter(text):
    """CPU ranks communicate through sockets and do not use shared memory."""
    line = command_line(2, "train_3d.py", *TINY, "--data", text, "--tp", 2)
    line = ["unshare", "--mount", "sh", "-ec", FULL_SHM, "sh", *line]
    result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True,
                            timeout=60)  # fmt: skip
    assert result.returncode == 0 and "step     4/4" in result.stdout, result.stderr


@pytest.mark.slow
def test_torchrun_with_a_port_that_is_taken(text):
    """torchrun's own: it does not begin, and says which."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                f"--master-port={port}", "train_3d.py", *TINY, "--data", str(text)]
        result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True,
                                timeout=60)  # fmt: skip
    assert result.returncode != 0 and "in use" in result.stderr and str(port) in result.stderr
