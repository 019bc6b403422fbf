"""The options of train_3d.py: their names, old and new, their help, and signals."""

import argparse
import ctypes
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.run

import checkpoint
import gpt
import options
import train_3d
from logger import Logger
from tests.commands import ROOT, TINY, Forked, environment, until
from tests.test_train_3d import text  # noqa: F401
from tools.plan import dry_run
from tools.verify import fuzz
from tools.verify.oracle import FIELDS, OTHERS

# --- help -----------------------------------------------------------------------------------------


def helped(capsys, flag: str, parser=options.parser) -> str:
    with pytest.raises(SystemExit) as end:
        parser().parse_args([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def shown(text: str) -> set[str]:  # noqa: F811
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))


def test_help_lists_at_most_44_options_in_groups(capsys):
    text, everything = (helped(capsys, flag) for flag in ("--help", "--help-all"))  # noqa: F811
    names, all_names = shown(text), shown(everything)
    assert 40 < len(names) <= 44
    groups = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    for word in ("model", "data", "layout", "schedule", "optimizer", "memory", "logging", "check"):
        assert any(word in group for group in groups), groups
    left_out = set(re.findall(r"--[\w-]+", re.sub(r"-\n", "-", text.split("--help-all also")[1])))
    assert names | left_out == all_names and not names & left_out
    renamed = {old.split()[0] for old, _, _ in OLD_AND_NEW} - {"--recompute"}
    accepted = {*options.parser()._option_string_actions} - {"-h", "--help-all"}
    assert accepted - renamed == all_names
    plain = " ".join(text.split())
    for default in ("rows per step (default: 32)", "a tenth of --steps, at least 10)",
                    "number of checkpoints to keep (default: 2)", "(default: 1f1b)"):  # fmt: skip
        assert default in plain
    assert "every local rank has its own GPU, else cpu (default: auto)" in plain
    assert "after each forward (default" not in plain  # a switch


def test_a_dry_run_has_the_same_options_and_three_more(capsys):
    here, there = (shown(helped(capsys, "--help", p)) for p in (options.parser, dry_run.parser))
    assert there - here == {"--world-size", "--rank", "--all-ranks"} and here <= there


def test_help_imports_nothing_slow():
    """Each of these takes 0.3 to 2 CPU seconds on each rank."""
    code = ("import sys, torch; before = {*sys.modules}; sys.argv = ['train_3d.py', '--help']\n"
            "import train_3d\ntry:\n    train_3d.main()\nexcept SystemExit:\n"
            "    print('NEW', *sorted({*sys.modules} - before))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(),
                          capture_output=True, text=True, check=True)  # fmt: skip
    new = done.stdout.split("NEW")[1].split()
    slow = (
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
        "torch._inductor",
        "torch.testing",
        "sympy",
        "checkpoint_dcp",
    )
    assert "train_3d" in new and not [name for name in new if name.startswith(slow)]


# --- names ----------------------------------------------------------------------------------------

OLD_AND_NEW = [
    ("--log f", "--metrics f", {"log": "f"}),
    ("--print-every 3", "--log-interval 3", {"print_every": 3}),
    ("--val-every 0", "--eval-interval 0", {"val_every": 0}),
    ("--val-batches 9", "--eval-iters 9", {"val_batches": 9}),
    ("--save-every 7", "--save-interval 7", {"save_every": 7}),
    ("--keep 5", "--keep-latest 5", {"keep": 5}),
    ("--clip 0.5", "--grad-clip 0.5", {"clip": 0.5}),
    ("--chunks 3", "--virtual-stages 3", {"chunks": 3}),
    ("--zero-reshard-after-forward 0", "--no-reshard-after-forward",
     {"zero_reshard_after_forward": 0}),
    ("--zero-reshard-after-forward 1", "", {}),
    ("--recompute full --recompute-every 3", "--recompute full:3",
     {"recompute": "full", "recompute_every": 3}),
    ("--recompute-every 2 --recompute selective", "--recompute=selective:2",
     {"recompute": "selective", "recompute_every": 2}),
    ("--recompute full", "--recompute full:1", {"recompute": "full"}),
]  # fmt: skip


@pytest.mark.parametrize("old, new, values", OLD_AND_NEW)
def test_old_names_are_accepted(old, new, values):
    default, a, b = (vars(options.parser().parse_args(x.split())) for x in ("", old, new))
    assert a == b == default | values


def test_torchrun_takes_no_option_for_its_own():
    """torchrun also reads the options after the script. It refuses an option that abbreviates
    several of its options, such as --log."""
    for action in options.parser()._actions:
        name = action.option_strings[-1]
        if name != "--log":
            args = torch.distributed.run.parse_args(["--standalone", "train_3d.py", name])
            assert args.training_script_args == [name]


# The entries of checkpoint.json that describe the run, written before the options were renamed,
# by:  --n-layer 2 --steps 50 --clip 0.5 --dtype float64
BEFORE = {
    "sizes": {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 256, "seq_len": 128},
    "arguments": {
        "untied": False, "attention": "sdpa", "dropout": 0.0, "data": None,
        "global_batch_size": 32, "steps": 50, "lr": 0.002, "warmup_steps": None,
        "optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5, "seed": 0, "dtype": "float64",
        "grad_dtype": None, "reduce_dtype": None,
    },
    "corpus": 1, "optimizer": {}, "step": 7, "files": {}, "format": 1,
}  # fmt: skip


def test_an_old_checkpoint_resumes_unchanged(tmp_path):
    """Its recorded options compare equal, and its default warm-up stays a tenth of the steps."""
    (tmp_path / "step-7").mkdir()
    about = BEFORE | {"crc": checkpoint._crc_of(BEFORE)}
    (tmp_path / "step-7" / "checkpoint.json").write_text(json.dumps(about))
    flags = ["--resume", "--checkpoint-dir", str(tmp_path)]
    args, found, wrong = options.parse_args(flags)
    config = options.check(args, 1)
    assert not wrong and options.compare(options.run_of(args, config), found[0].about) == []
    assert {*options.RUN} >= {*BEFORE["arguments"]} and [*options.SIZES] == [*BEFORE["sizes"]]
    expected = BEFORE["arguments"] | {"warmup_steps": 5}
    assert {name: getattr(args, name) for name in expected} == expected
    args, found, _ = options.parse_args([*flags, "--clip", "2"])
    (line,) = options.compare(options.run_of(args, config), found[0].about)
    assert line == "--resume: changed options: --grad-clip 0.5 -> 2.0"


def test_a_checkpoint_records_the_default_warmup():
    for steps, expected in ((20, 10), (300, 30)):
        args, _, _ = options.parse_args(["--steps", str(steps)])
        assert options.run_of(args, gpt.GPTConfig())["arguments"]["warmup_steps"] == expected


# --- what is derived from the entries -------------------------------------------------------------


def test_a_random_case_sets_every_option():
    """Each field arrives in args, and no option is drawn without what it needs. All options vary,
    except those that take any text, and --compile."""
    rng = random.Random(0)
    cases = [fuzz.draw_case(rng) for _ in range(100)]
    seen = {field: set() for field in FIELDS}
    for case in cases:
        args = options.parser().parse_args(case.arguments())
        for field, option in FIELDS.items():
            assert getattr(args, option.dest) == getattr(case, field), (field, case)
            seen[field].add(getattr(case, field))
        unmet = options.unmet(args)
        assert all(getattr(args, name) == options.OPTIONS[name].default for name in unmet), case
        assert case.resume is None or {*fuzz.LAYOUT} <= {*case.resume}
    texts = {f for f, o in FIELDS.items() if not (o.choices or o.type or o.nargs == 0)}
    assert {field for field, values in seen.items() if len(values) == 1} <= texts | {"compile"}
    assert seen["reduce_dtype"] == seen["grad_dtype"] == {None, "float32", "bf16"}
    kinds = {option.kind for option in options.OPTIONS.values()}
    assert kinds == {"size", "run", "layout", None}
    named = {option.dest for option in FIELDS.values()} | {*OTHERS}
    assert named == {name for name, option in options.OPTIONS.items() if option.kind}


def test_values_are_drawn_from_what_an_entry_says():
    add, rng = argparse.ArgumentParser().add_argument, random.Random(0)
    for option, expected in (
        (add("--switch", action="store_true"), {False, True}),
        (add("--no-x", action="store_const", const=0, default=1), {0, 1}),
        (add("--choice", choices=("a", "b")), {None, "a", "b"}),
        (add("--stage", choices=(0, 1, 2), type=int, default=0), {0, 1, 2}),
        (add("--count", type=options.at_least(1), default=7), {7, 1, 2}),
        (add("--text", default="x"), {"x"}),
    ):
        assert {fuzz.draw_option(rng, option) for _ in range(99)} == expected


# --- rows -----------------------------------------------------------------------------------------


def test_a_row_has_the_number_and_the_throughput_of_its_step(tmp_path, monkeypatch, capsys):
    """Steps of 1, 2 and 3 seconds, the last after a validation of 100."""
    times = itertools.chain([0, 1, 3, 5, 105, 108], itertools.count(200))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    path = tmp_path / "log"
    flags = ["--metrics", str(path), "--steps", "3", "--log-interval", "3"]
    logger = Logger(options.parser().parse_args(flags), gpt.MODELS["nano"])
    logger.start()
    for step in range(2):
        logger.step(step, torch.tensor([2.0, 1.0, 0.0]), lr=0.1)
    logger.flush()
    logger.validation(1, torch.tensor(4.0))
    logger.step(2, torch.tensor([2.0, 1.0, 0.0]), lr=0.1)
    logger.file.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    tokens = 32 * 128
    assert [row["tokens"] for row in rows] == [n * tokens for n in (1, 2, 2, 3)]
    speeds = [row.get("tokens_per_s") for row in rows]
    assert speeds == pytest.approx([tokens, tokens / 2, None, tokens / 3])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/3", "2/3", "3/3"]
    assert f" {tokens / 1.5:,.0f} tokens/s " in lines[0]


# --- signals --------------------------------------------------------------------------------------


def blocked_in_a_kernel(folder) -> None:
    """From step 2 on, the main thread waits in C for a mutex that it holds: like a kernel of
    minutes, this runs no signal handler."""
    plain = train_3d.Trainer.step

    def step(trainer, number: int):
        if number == 2:
            (folder / f"in-{os.environ.get('RANK', 0)}").touch()
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            while True:
                libc.pthread_mutex_lock(mutex)
        return plain(trainer, number)

    train_3d.Trainer.step = step


STOPPING = "stopping after this step; again to quit now\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_step_of_minutes(number, text, tmp_path):  # noqa: F811
    flags = [*TINY, "--data", text, "--eval-interval", 0]
    with Forked(0, train_3d.main, *flags, before=lambda: blocked_in_a_kernel(tmp_path)) as job:
        until((tmp_path / "in-0").exists)
        os.kill(job.pids[0], number)
        job.until(STOPPING)
        os.kill(job.pids[0], number)
        assert job.wait(20) == [128 + number]
        assert job.read("errors") == "" and job.read("out").count(STOPPING) == 1


def test_what_torchrun_passes_on_is_not_a_second_signal(text, tmp_path):  # noqa: F811
    """A terminal signals the ranks, and torchrun signals them again."""
    flags = [*TINY, "--data", text, "--eval-interval", 0]
    with Forked(2, train_3d.main, *flags, before=lambda: blocked_in_a_kernel(tmp_path)) as job:
        until(lambda: len(os.listdir(tmp_path)) == 3)  # both, and the text
        for _ in range(2):
            for pid in job.pids:
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)
        job.until(STOPPING)
        time.sleep(1.1)
        assert all(process.is_alive() for process in job.processes)
        for pid in job.pids:
            os.kill(pid, signal.SIGINT)
        assert job.wait(20) == [130, 130] and job.read("out").count(STOPPING) == 1


def test_the_step_with_the_signal_is_the_last(text, tmp_path):  # noqa: F811
    def before() -> None:
        plain = train_3d.Trainer.step

        def step(trainer, number: int):
            if number == 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: trainer.stop_requested)
            return plain(trainer, number)

        train_3d.Trainer.step = step

    flags = [*TINY, "--data", text, "--eval-interval", 0, "--steps", 1000]
    with Forked(2, train_3d.main, *flags, before=before) as job:
        assert job.wait() == [0, 0], job.read("errors")
        assert job.read("out").endswith("\nstopped by a signal after step 2\n"), job.read("out")
