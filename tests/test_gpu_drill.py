"""tools/bench/gpu_drill.sh on the CPU: it works there, and says what needs a GPU."""

import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch

import train_3d
from tests.commands import ROOT, TINY, forked
from tools.bench import gpu_drill
from tools.verify.oracle import CPU, Errors

PARTS = [*gpu_drill.PARTS]


def drill(out, python: str, *parts: str, slower: int = 1) -> tuple[int, str, dict[str, str]]:
    """The exit code, the file, and the result of each part."""
    environment = os.environ | {"PYTHON": python, "SLOWER": str(slower)}
    drill = ROOT / "tools/bench/gpu_drill.sh"
    done = subprocess.run([drill, out, *parts], env=environment, text=True,
                          capture_output=True, timeout=900)  # fmt: skip
    said = out.read_text()
    table = said[said.index("| part | result | seconds |") :]
    return done.returncode, said, dict(re.findall(r"^\| (\w+) \| ([\w ]+) \|", table, re.MULTILINE))


@pytest.mark.slow
def test_the_drill_without_a_gpu(tmp_path):
    code, said, results = drill(tmp_path / "drill.md", sys.executable, slower=5)
    need = ["syncs", "profile", "fragmentation", "memcheck"]
    assert results.pop("part") == "result" and [*results] == PARTS, said
    assert results == {p: "not run" if p in need else "passed" for p in PARTS}, said
    assert code == 0 and "## no GPU: small models on the CPU" in said
    for name in gpu_drill.CASES:
        rows = re.findall(rf"^\| {re.escape(name)} \| \d \| (\S+) \|", said, re.MULTILINE)
        assert len(rows) == 2 and max(map(float, rows)) <= 1e-12, (name, rows)
    assert "losses and norms of 40 steps: equal bit by bit" in said
    assert said.count("needs a GPU") == 10
    for vocabulary in ("65", "64"):
        for mode in ("eager", "compiled"):
            assert f"\n| {vocabulary} | {mode} | " in said


def test_the_script_reports_each_part(tmp_path):
    """With a stub in place of Python: one part fails, one needs a GPU, one takes too long."""
    stub = tmp_path / "python"
    stub.write_text("""#!/usr/bin/env bash
case "$*" in
  -c*) echo cuda; echo "## a GPU" ;;
  *" late "*) echo "rank 1 is wrong" >&2; exit 1 ;;
  *" syncs "*) exit 3 ;;
  *" speed "*) exit 124 ;;
  *) echo "$*" ;;
esac
""")
    stub.chmod(0o755)
    code, said, results = drill(tmp_path / "drill.md", str(stub))
    expected = dict.fromkeys(PARTS, "passed")
    expected |= {"late": "failed", "syncs": "not run", "speed": "out of time"}
    assert code == 1 and results == {"part": "result"} | expected
    command = "-m tools.bench.gpu_drill parity --device cuda"
    assert said.startswith(f"## a GPU\n\n### parity\n\n{command}\n")
    assert "```\nrank 1 is wrong\n```" in said


@pytest.mark.parametrize("ends, code", [("exit 3", 0), ("kill $$; sleep 60", 1)])
def test_the_exit_code_of_the_script(ends, code, tmp_path):
    """A part that was not run is no failure; a part that a signal ended is."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/usr/bin/env bash\n[ "$1" = -c ] && echo cuda && exit\n{ends}\n')
    stub.chmod(0o755)
    out = tmp_path / "drill.md"
    assert drill(out, str(stub), "late", "speed")[0] == code
    assert re.findall("^### (.*)", out.read_text(), re.MULTILINE) == ["late", "speed"]


def test_no_time_is_left(tmp_path):
    code, _, results = drill(tmp_path / "drill.md", "true", slower=0)
    assert code == 1 and {*results.values()} == {"result", "out of time"}


def test_a_part_that_does_not_exist(tmp_path):
    line = [ROOT / "tools/bench/gpu_drill.sh", tmp_path / "drill.md", "praity"]
    done = subprocess.run(line, env=os.environ | {"PYTHON": "true"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "gpu_drill.sh: there is no part named praity \n"


def test_a_layout_that_differs_or_fails_makes_parity_fail(monkeypatch):
    names = ["equal", "differs", "nan", "hangs"]
    monkeypatch.setattr(gpu_drill, "CASES", dict.fromkeys(names, gpu_drill.CASES["DDP"]))
    found = iter([1e-15, 1e-3, float("nan"), RuntimeError("ranks [1] hang: 40.0 s are over")])

    def judge(case, seams, before, device, timeout):
        x = next(found)
        if isinstance(x, RuntimeError):
            raise x
        return Errors(x, 0.0, 0.0, 0.0, "loss")

    failed: list[str] = []
    rows = [*gpu_drill.parity(CPU, failed, judge)][2:]
    assert [row.split(" | ")[2] for row in rows] == ["1.0e-15", "1.0e-03", "inf", "failed"]
    assert [why.split(":")[0] for why in failed] == names[1:]


def test_the_share_of_time_in_which_the_gpu_is_busy():
    """Kernels from 0 to 4 and from 8 to 10 of 10; one inside another counts once."""
    def event(cat: str, ts: float, dur: float, name: str = "x") -> dict:
        return {"cat": cat, "ts": ts, "dur": dur, "name": name}

    events = [event("kernel", 101, 1), event("kernel", 100, 3), event("gpu_memcpy", 102, 2),
              event("gpu_memset", 108, 2), event("gpu_user_annotation", 90, 90),
              event("cpu_op", 0, 500), event("cuda_runtime", 99, 1, "cudaLaunchKernel"),
              event("cuda_driver", 99, 1, "cuLaunchKernelEx"), {"ph": "M", "name": "process"},
              event("cuda_runtime", 99, 1, "cudaMemcpyAsync")]  # fmt: skip
    assert gpu_drill.busy_and_launches(events, steps=2) == (0.6, 1.0)


def count_syncs():
    """Each step of rank 0 synchronises twice, and the first one three times."""
    plain, torch.cuda.set_sync_debug_mode = train_3d.Trainer.step, lambda mode: None

    def step(trainer, number):
        for _ in range(3 if number == 0 else 2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return plain(trainer, number)

    train_3d.Trainer.step = step
    loop = gpu_drill.syncs_of_the_loop(CPU, TINY)
    print(json.dumps(loop))


def test_synchronisations_of_the_loop_are_counted_by_step():
    done = forked(1, count_syncs)
    counts, places = json.loads(done.stdout.splitlines()[-1])
    assert counts == [3, 2, 2, 2, 2, 2], done.stderr
    assert len(places) == 1 and re.fullmatch(r"test_gpu_drill.py:\d+ x 2", places[0])


def test_synchronisations_of_steps_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        warnings.warn("another warning", stacklevel=1)

    def waits():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    counts, places = gpu_drill.syncs_of_steps([waits, step, step, waits])
    assert counts == [1, 0, 0, 1] and len(places) == 1 and places[0].endswith("x 1")
    assert modes == ["warn", "default"]
