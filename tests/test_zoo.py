"""The bug zoo: a kill counts only if the named test fails in the expected way."""

import re

import pytest

from tools.verify import mutants

HARMLESS = [("gpt.py", "# nano trains", "# Nano trains")]


def test_all_bugs_apply_and_are_told_of():
    for bug in mutants.ZOO:
        assert bug.failure and not re.search(bug.failure, bug.test), bug.name
        for file, old, _ in bug.edits:
            assert (mutants.ROOT / file).read_text().count(old) == 1, (bug.name, file, old)
    told = re.findall(r"^### (\d+)\.", (mutants.ROOT / "docs/bugs.md").read_text(), re.MULTILINE)
    assert {*map(int, told)} == {bug.number for bug in mutants.ZOO}


FAST, SLOW = ["-m", "not slow"], ["-m", "slow"]
PASSED, NONE = (0, "3 passed"), (5, "3 deselected")


@pytest.mark.parametrize(
    "fast, slow, failure, verdict",
    [
        ((1, "x.py::test - assert 3 == 4"), None, "3 == 4", "killed"),
        ((1, "x.py::test - NameError: x"), None, "3 == 4", "SURVIVED"),
        ((None, mutants.HANG), None, "3 == 4", "SURVIVED"),
        ((None, mutants.HANG), None, mutants.HANG, "killed"),
        ((1, "x.py::test - assert 3 == 4"), None, mutants.HANG, "SURVIVED"),
        (PASSED, (1, "x.py::test[2] - assert 3 == 4"), "3 == 4", "test-all"),
        (NONE, (1, "x.py::test[2] - assert 3 == 4"), "3 == 4", "test-all"),
        (PASSED, (1, "x.py::test[2] - NameError: x"), "3 == 4", "SURVIVED"),
        (PASSED, NONE, "3 == 4", "SURVIVED"),
        (PASSED, PASSED, "", "SURVIVED"),
    ],
)
def test_a_kill_is_the_expected_failure_of_the_named_test(
    fast, slow, failure, verdict, monkeypatch
):
    def run_pytest(root, arguments, timeout):
        assert "# Nano trains" in (root / "gpt.py").read_text() and arguments[0] == "x.py"
        return {tuple(FAST): fast, tuple(SLOW): slow}[tuple(arguments[1:])]

    monkeypatch.setattr(mutants, "run_pytest", run_pytest)
    assert mutants.hunt(mutants.Bug(99, "no bug", HARMLESS, "x.py", failure))[0] == verdict


@pytest.mark.parametrize("code", [-9, 2, 4])
def test_a_pytest_that_could_not_run_is_an_error(code, monkeypatch):
    monkeypatch.setattr(mutants, "run_pytest", lambda *_: (code, "assert 3 == 4"))
    with pytest.raises(ValueError, match="pytest could not run"):
        mutants.hunt(mutants.Bug(99, "no bug", HARMLESS, "x.py", "3 == 4"))


@pytest.mark.slow
def test_a_slice_of_the_zoo(capsys):
    """One that is killed, and one that is not, so that the command fails."""
    (real,) = (bug for bug in mutants.ZOO if bug.number == 22)
    harmless = mutants.Bug(99, "no bug", HARMLESS, "tests/test_gpt.py -k scales", "")
    with pytest.raises(SystemExit) as end:
        mutants.main([], [real, harmless])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "SURVIVED" in out and "1 of 2 killed" in out, out
    assert "by test_tensor_parallel.py::test_shards_are_those_of_tensor_split" in out


@pytest.mark.parametrize(
    "edit, run, message",
    [
        (("gpt.py", "no such line", ""), None, "gpt.py contains the old text 0 times, expected"),
        (HARMLESS[0], (1, "x.py::test - assert 0"), "x.py fails without a bug: x.py::test"),
        (HARMLESS[0], (4, "no such file"), "x.py fails without a bug: no such file"),
    ],
)
def test_a_zoo_that_rots_is_refused(edit, run, message, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "run_pytest", lambda *_: run)
    with pytest.raises(SystemExit) as end:
        mutants.main([], [mutants.Bug(99, "rotten", [edit], "x.py", "")])
    assert end.value.code == 2 and message in capsys.readouterr().err
