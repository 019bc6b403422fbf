"""The Makefile and tools/launch.py: what a user types in the first hour works, and a mistake costs
one line. Copies of the repository are folders of links, so that runs do not write here."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.commands import ROOT, read_log
from tools import draw, launch, plot, sample

HELP = [line[2:] for line in (ROOT / "Makefile").read_text().splitlines() if line[:2] == "#:"]
# {target: {variable: default, or None}}, from the help
TARGETS = {
    found[1]: {
        name: default or None
        for name, _, default in (word.partition("=") for word in (found[2] or "").split())
    }
    for line in HELP
    if (found := re.match(r"  ([a-z0-9-]+) .*?(?:  \[(.*)\])?$", line))
}
OLD = {"zoo": "mutants", "drill": "kill-ranks"}
TINY = (
    "--n-layer 2 --n-head 2 --n-embd 16 --seq-len 16 --global-batch-size 8 --micro-batch-size 2 "
    "--steps 2 --sample 4 --device cpu --data README.md"
)


def make(*arguments: str, folder: Path = ROOT, python: str = sys.executable):
    return subprocess.run(
        ["make", *arguments, *([f"PYTHON={python}"] if python else [])], cwd=folder,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def recipe(*arguments: str) -> str:
    done = make("-n", *arguments, python="py")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def what_launch_changes(monkeypatch: pytest.MonkeyPatch):
    """The environment and the handler of SIGINT, restored after each test."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    for name in [name for name in os.environ if name.startswith("MAKE")]:
        monkeypatch.delenv(name)  # as from a shell, also under `make test`
    yield
    signal.signal(signal.SIGINT, on_interrupt)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of this one, but without runs. The working directory."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".md") or path.name in ("tools", "Makefile"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help and variables ---------------------------------------------------------------------------


def test_make_alone_is_help_in_five_groups():
    shown = make(python="").stdout.splitlines()
    assert shown[2:] == HELP and max(map(len, shown)) <= 100
    groups = [line.strip() for line in HELP if re.match(r" \w", line)]
    assert groups == ["Start", "Plan", "Verify", "Measure", "Develop"]
    for line in HELP:  # a target, its duration, its text
        assert not re.match("  [a-z]", line) or re.match(r"  [a-z0-9-]+ +\d+ (s|min) +\S", line)


def test_every_target_is_in_the_help_and_has_a_recipe():
    text = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z0-9][a-z0-9 -]*):(?![^:\n]*=)", text, re.MULTILINE)
    assert {*" ".join(rules).split()} == {*TARGETS, *OLD, "help"}
    for target in TARGETS.keys() - {"setup"}:
        assert (line := recipe(target)), target
        for module in re.findall(r"-m (tools[\w.]*)", line):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), line
        for file in re.findall(r"\w+\.(?:py|sh)\b", line):
            assert [*ROOT.glob(file), *ROOT.glob(f"tools/bench/{file}")], line


def test_defaults_in_the_help_are_those_of_the_recipes():
    for target, variables in TARGETS.items():
        for name, default in variables.items():
            if default:
                assert recipe(target) == recipe(target, f"{name}={default}"), (target, name)
            assert recipe(target) != recipe(target, f"{name}=7"), (target, name)


def test_old_names_work():
    for old, new in OLD.items():
        assert recipe(old, "ARGS=--x") == recipe(new, "ARGS=--x") != ""


def test_an_unused_variable_is_refused():
    for target, variables in {**TARGETS, "zoo": TARGETS["mutants"]}.items():
        unused = next(name for name in ("P", "PP", "N") if name not in variables)
        done = make("-n", target, f"{unused}=3", python="py")
        used = " ".join(variables) or "no variables"
        assert done.returncode == 2 and done.stdout == ""
        flags = '. Flags: ARGS="--flag value"' if "ARGS" in variables else ""
        expected = f"make {target} does not use {unused}. It uses: {used}{flags}.  Stop.\n"
        assert done.stderr.endswith(expected) and done.stderr.count("\n") == 1, done.stderr
    assert make("-n", "train", "NPROCS=4").returncode == 2
    assert "--p 3 " in recipe("draw", "tp", "P=3", "NPROC=2")  # each is used by one of the two


def test_an_unknown_target_is_one_line():
    near, none = "; the nearest is train", ": make lists them"
    for goals, hint in ((["tarin"], near), (["qqqq", "TP=2"], none)):
        done = make(*goals)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.endswith(f"there is no target {goals[0]}{hint}.  Stop.\n"), done.stderr


# --- one line for a mistake -----------------------------------------------------------------------


def launched(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[list[str] | None, int]:
    """(the arguments of torchrun, or None if it is not started; the exit code)."""
    started = [None]

    def start(words: list[str]) -> None:
        assert words[:2] == ["--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT"]
        assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
        started[0] = words[2:]

    monkeypatch.setattr(torchrun, "main", start)
    monkeypatch.setattr("sys.argv", ["launch", *words])
    try:
        launch.main()
    except SystemExit as end:
        return started[0], end.code
    return started[0], 0


@pytest.mark.parametrize("flags, message", [
    ("--steps x", "argument --steps: invalid"),
    ("--stepz 3", "--stepz"),
    ("--tp 3", "8 ranks cannot be divided into --tp 3 x --pp 1: start a multiple of 3 (make train "
     "NPROC=9), or change --tp or --pp (TP=, PP=)"),
    ("--tp 8 --n-embd 126 --n-head 6", "--n-head 6 is not divisible by --tp 8"),
    ("--device cuda", "8 local ranks and 0 GPUs"),
    ("--data none.txt", "--data none.txt does not exist"),
    ("--resume", "checkpoints does not exist"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_starts_no_rank(flags, message, clone, monkeypatch, capsys):
    started, code = launched(monkeypatch, "--save", "8", "train_3d.py", *flags.split())
    said = capsys.readouterr()
    assert started is None and code == 2 and said.out == ""
    assert message in said.err and said.err.count("\n") == 1, said.err
    assert "LOCAL_WORLD_SIZE" not in os.environ


def test_a_wrong_flag_of_make_train_is_one_line(clone):
    done = make("train", "TP=3", folder=clone)
    line, makes = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and "Error 2" in makes
    assert line.startswith("train_3d.py: error: 8 ranks cannot be divided into --tp 3 x --pp 2")
    assert not [*clone.glob("checkpoints*"), *clone.glob("*.jsonl")]


@pytest.mark.parametrize("tool, words, message", [
    (draw, ["zbv"], "draw: error: "), (draw, ["1f1b", "--m", "x"], "draw: error: argument --m"),
    (sample, ["--n", "x"], "sample: error: argument --n"),
    (sample, ["--promt", "x"], "sample: error: unrecognized argument: --promt; did you mean --p"),
    (plot, ["README.md"], "plot: error: README.md, line 1 was not written by --metrics"),
])  # fmt: skip
def test_a_wrong_argument_of_a_tool_is_one_line(tool, words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tool", *words])
    with pytest.raises(SystemExit) as end:
        tool.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(message) and said.count("\n") == 1, said


def test_a_number_of_ranks_is_checked(monkeypatch):
    for number in ("0", "x", "-1", ""):
        started, said = launched(monkeypatch, number, "ddp.py")
        expected = f"NPROC is {number!r}: give a number of ranks, at least 1"
        assert started is None and said == expected


def test_ranks_that_end_with_one_line_are_not_reported_again(monkeypatch, capsys):
    for code, expected in ((2, 2), (1, 1), (-9, 1)):
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="<N/A>")

        def fail(_, failure=failure):
            raise ChildFailedError("ddp.py", {1: failure})

        monkeypatch.setattr(torchrun, "main", fail)
        monkeypatch.setattr("sys.argv", ["launch", "2", "ddp.py"])
        with pytest.raises(SystemExit) as end:
            launch.main()
        said = capsys.readouterr().err
        assert end.value.code == expected and ("rank      : 1" in said) == (code != 2), said


def test_a_python_without_torch_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    for target in ("draw", "tp", "train", "sample", "plan", "parity", "test"):
        done = make(target, python=str(python))
        assert done.returncode == 2
        first, *rest = done.stderr.splitlines()
        assert "has no torch: `make` without PYTHON= installs it in .venv" in first
        assert len(rest) == 1, done.stderr  # make's
    done = subprocess.run([python, "train_3d.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no torch: use .venv/bin/python" in done.stderr


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_closed_pipe_is_no_traceback(size):
    """Once when the buffered output is written at the end, and once in the middle."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    job = subprocess.Popen(
        [sys.executable, "-c", f"import tools; print({size} * 'x'); print('end')"],  # like a tool
        cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    job.stdout.close()
    with job:
        assert job.stderr.read() == ""
    assert job.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
@pytest.mark.parametrize("lines", [0, 1])
def test_ctrl_c_during_the_start_is_silent(lines, clone):
    """While the flags are checked, and while the ranks import torch."""
    arguments = ["make", "train", "NPROC=2", "PP=1", f"PYTHON={sys.executable}", f"ARGS={TINY}"]
    job = subprocess.Popen(
        arguments, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with job:
        for _ in range(lines):
            assert "torch.distributed.run" in job.stdout.readline()
        time.sleep(1)
        os.killpg(job.pid, signal.SIGINT)
        said = job.stderr.read()
    assert job.returncode == -signal.SIGINT and said.count("\n") == 1, said
    assert re.match(r"make: \*\*\* .*(Interrupt|Error 130)", said), said


@pytest.mark.slow
def test_a_run_stops_and_saves_when_its_output_is_closed(clone):
    more = f"ARGS={TINY} --steps 100000 --log-interval 1 --eval-interval 0 --save-interval 0"
    job = subprocess.Popen(
        ["make", "train", "NPROC=2", "PP=1", f"PYTHON={sys.executable}", more], cwd=clone,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with job:
        while "step " not in job.stdout.readline():
            pass
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 0
    assert [path.name[:5] for path in (clone / "checkpoints").iterdir()] == ["step-"]


# --- train, sample, plot --------------------------------------------------------------------------


def flags_of(started: list[str]) -> tuple[str | None, str | None]:
    return launch.given(started, "--checkpoint-dir"), launch.given(started, "--metrics", "--log")


def test_each_run_of_make_train_has_its_own_directory(clone, monkeypatch, capsys):
    def places(*flags: str) -> tuple[str | None, str | None]:
        words = ("--save", "2", "train_3d.py", "--tp", "2", *flags)
        started, code = launched(monkeypatch, *words)
        assert code == 0 and started[:3] == ["--standalone", "--nproc-per-node", "2"]
        assert ("--" in started) == ("--log" in flags)  # which torchrun takes for its --log-dir
        return flags_of(started)

    # A checkpoint is recognised by its name: the checks of --resume are tested elsewhere.
    monkeypatch.setattr(launch, "check", lambda *_: None)
    assert places() == ("checkpoints", "run.jsonl")
    assert "saves to checkpoints and writes its losses to run.jsonl" in capsys.readouterr().out
    assert places("--resume") == ("checkpoints", "run.jsonl")  # there is nothing to resume
    (clone / "checkpoints").mkdir()
    (clone / "run.jsonl").touch()  # of a run that has failed at its start
    assert places() == ("checkpoints", "run.jsonl")
    (clone / "run.jsonl").write_text("{}\n")  # killed before its first checkpoint
    capsys.readouterr()
    assert places() == ("checkpoints-2", "run-2.jsonl")
    assert "Earlier runs are kept: run.jsonl\n" in capsys.readouterr().out
    for number, folder in enumerate(("checkpoints", "checkpoints-2")):
        (clone / folder / "step-9").mkdir(parents=True)
        os.utime(clone / folder / "step-9", (number + 1, number + 1))
    assert places() == ("checkpoints-3", "run-3.jsonl")
    said = capsys.readouterr().out
    assert "kept: checkpoints, checkpoints-2. To continue checkpoints-2: make train ARGS=" in said
    assert "saves to checkpoints-3 and writes its losses to run-3.jsonl" in said
    assert places("--resume") == ("checkpoints-2", "run-2.jsonl")
    os.utime(clone / "checkpoints/step-9", (5, 5))
    assert places("--resume") == ("checkpoints", "run.jsonl")
    # What is given is not changed.
    assert places("--checkpoint-dir", "saves") == ("saves", "saves.jsonl")
    assert places("--checkpoint-dir=saves", "--log", "x") == ("saves", "x")
    assert places("--metrics=x") == ("checkpoints-3", "x")


def test_without_save_nothing_is_added(clone, monkeypatch):
    started, _ = launched(monkeypatch, "2", "ddp.py", "--x")
    assert started == ["--standalone", "--nproc-per-node", "2", "ddp.py", "--x"]
    started, _ = launched(monkeypatch, "2", "train_3d.py", "--tp", "2")
    assert flags_of(started) == (None, None)


def test_sample_and_plot_before_train_are_one_line(clone):
    for target, message in (
        ("sample", "there is no checkpoint: run make train first"),
        ("plot", "run.jsonl does not exist: run make train first"),
    ):
        done = make(target, folder=clone)
        assert done.returncode == 2 and done.stdout == ""
        line, makes = done.stderr.splitlines()
        assert message in line and "Error 2" in makes, done.stderr
    with pytest.raises(ValueError, match="saves has no checkpoint: run make train first"):
        sample.source_of("saves", None)
    assert sample.source_of(None, "gpt2") == ["--init-from", "gpt2"]


@pytest.mark.slow
def test_train_sample_and_plot_work_as_typed(clone):
    """Twice: the second run has a separate directory, and is what is sampled and plotted."""
    size = ("NPROC=2", "TP=1", "PP=1", f"ARGS={TINY}")
    for folder, losses in (("checkpoints", "run.jsonl"), ("checkpoints-2", "run-2.jsonl")):
        done = make("train", *size, folder=clone)
        assert done.returncode == 0, done.stderr
        assert f"saves to {folder} and writes its losses to {losses}" in done.stdout
        assert [path.name for path in (clone / folder).iterdir()] == ["step-2"]
        assert len(read_log(clone / losses)) >= 2
        assert losses in make("-n", "plot", folder=clone).stdout
        done = make("sample", "ARGS=--n 3", folder=clone)
        assert done.returncode == 0, done.stderr
        assert f"sample: from {folder}" in done.stderr
        assert ("checkpoints-2, the newest of" in done.stderr) == (folder != "checkpoints")
    before = (clone / "checkpoints-2/step-2/checkpoint.json").stat().st_mtime_ns
    done = make("train", *size[:3], f"ARGS={TINY} --steps 4 --resume", folder=clone)
    assert done.returncode == 0, done.stderr
    assert "continued from checkpoints-2/step-2" in done.stdout
    assert (clone / "checkpoints-2/step-2/checkpoint.json").stat().st_mtime_ns == before
    steps = [row["step"] for row in read_log(clone / "run-2.jsonl") if "loss" in row]
    assert len(steps) == 4 and steps == sorted(steps)


# --- what the repository says about itself --------------------------------------------------------


def test_the_pinned_torch_is_in_the_tested_range():
    range_ = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"torch==2\.(\d+)", (ROOT / "requirements.txt").read_text())
    assert int(range_[1]) <= int(pinned[1]) < int(range_[2])
    assert shutil.which("make")


def test_the_table_of_tools_is_complete():
    named = set(re.findall(r"`(?:tools\.)?([a-z_]+)`", (ROOT / "tools/README.md").read_text()))
    files = {path.stem for path in (ROOT / "tools").rglob("*.py")} - {"__init__"}
    assert files <= named and (ROOT / "tools/slurm.sh").exists(), files - named
