"""The runner: each test is run once, by one of the processes, and nothing that fails is lost."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.commands import ROOT

TESTS = """
import os
import pathlib
import pytest

LOG = pathlib.Path(__file__).parent / "log"

@pytest.fixture(scope="module", autouse=True)
def module():
    yield
    say("end of " + __name__)

def say(line):
    with LOG.open("a") as file:
        file.write(line + "\\n")

@pytest.mark.parametrize("i", range(20))
def test_one(i):
    say(f"{__name__} {i}")
"""
FAILS = "\n\ndef test_two():\n    assert 1 == 2\n\n\ndef test_three():\n    pytest.skip('no')\n"
DIES = "\n\ndef test_two():\n    os._exit(0)\n"


@pytest.mark.parametrize(
    "more, code, last",
    [("", 0, "60 passed, 0 failed, 0 skipped"), (FAILS, 1, "60 passed, 1 failed, 1 skipped"),
     (DIES, 1, "A pytest process ended before it had run its tests: exit codes [0, 0]")],
)  # fmt: skip
def test_each_test_is_run_once(more, code, last, tmp_path):
    for name, extra in (("a", ""), ("b", more), ("c", "")):
        (tmp_path / f"test_{name}.py").write_text(TESTS + extra)
    line = [sys.executable, "-m", "tests.run", "-c", os.devnull, "-p", "tests.conftest",
            "-p", "no:cacheprovider", str(tmp_path)]  # fmt: skip
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == last
    if more != DIES:
        ran = Counter((tmp_path / "log").read_text().splitlines())
        once = [f"test_{name} {i}" for name in "abc" for i in range(20)]
        assert [ran.pop(one) for one in once] == [1] * 60
        assert {*ran} == {f"end of test_{name}" for name in "abc"}
