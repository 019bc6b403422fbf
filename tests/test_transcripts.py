"""README.md and docs/: their transcripts are current, and what they name exists."""

import re
import textwrap

import pytest
from torch.distributed import run as torchrun

import options
import schedules
import train_3d
from measure import TOLERANCE
from tools import transcripts
from tools.transcripts import ROOT, Transcript
from tools.verify import mutants
from tools.verify.oracle import Case, judge

ALL = [t for path in transcripts.documents() for t in transcripts.transcripts(path)]
TESTED = [
    pytest.param(t, id=t.command, marks=[pytest.mark.slow] if t.kind == "slow" else [])
    for t in ALL
    if t.kind != "long"
]


@pytest.mark.parametrize("transcript", TESTED)
def test_a_transcript_is_current(transcript):
    new = transcripts.shown(transcripts.run(transcript.command), transcript.options)
    assert not transcripts.is_stale(transcript, new), f"run `make transcripts`; it prints:\n{new}"


def test_lines_are_selected():
    output = "\n".join(f"line {i}" for i in range(1, 10))

    def shown(*options: str) -> str:
        return transcripts.shown(output, options).replace("line ", "").replace("\n", " ").strip()

    assert shown() == "1 2 3 4 5 6 7 8 9"
    assert shown("slow", "lines 1-2 4 -1") == "1 2 ... 4 ... 9"
    assert shown("lines 1 -3-") == "1 ... 7 8 9"
    assert shown("lines 3-") == "... 3 4 5 6 7 8 9"
    assert shown("match [35]$", "first 1") == "3" and shown("match [35]$") == "3 5"
    assert transcripts.shown("x" * 30, ("width 10",)) == "xxxxxx ...\n"
    assert transcripts.shown("words and words", ("width 10",)) == "words ...\n"
    for wrong in ("lines x", "slowly"):
        with pytest.raises(ValueError, match=wrong):
            shown(wrong)


@pytest.mark.parametrize(
    "options, old, new, stale",
    [
        ((), "loss 5.5586514906", "loss 5.5586514907", False),
        ((), "loss 5.55865", "loss 5.55866", True),
        ((), "2.1e-16 relative", "3.4e-14   relative", False),  # rounding, and width of a column
        ((), "2.1e-16 relative", "3.4e-04 relative", True),
        ((), "3,003 tokens/s in 0.30 s", "5 tokens/s in 1.2e-02 s", False),
        ((), "2 sends", "3 sends", True),
        ((), "predicted (15, 103680)", "predicted (15, 103681)", True),
        ((), "a\nb", "a", True),
        (("numbers vary",), "loss 4.1722  norm 4", "loss 2.1  norm 3.5", False),
        (("numbers vary",), "loss 4.1722", "val loss 4.1722", True),
        (("text varies",), "import os", "def f", False),
    ],
)
def test_what_makes_a_transcript_stale(options, old, new, stale):
    transcript = Transcript(ROOT / "README.md", "make draw", options, old)
    assert transcripts.is_stale(transcript, new) == stale


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with two transcripts, of which the second is out of date."""
    monkeypatch.setattr(transcripts, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(
        textwrap.dedent("""\
        Some text
        <!-- transcript: python -c "print(1)" -->
        ```
        1
        ```
        <!-- transcript: python -c "print(2)"; slow -->
        ```
        3
        ```
        """)
    )
    return path


def run_tool(capsys, page, *flags: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as end:
        transcripts.main([*flags], [page])
    return end.value.code, [line.split('"')[-1] for line in capsys.readouterr().out.splitlines()]


def test_the_tool_lists_and_updates_what_is_stale(page, capsys):
    before = page.read_text()
    assert run_tool(capsys, page, "--check") == (1, [": up to date", ": OUT OF DATE"])
    assert page.read_text() == before
    assert run_tool(capsys, page, "--kind", "fast") == (0, [": up to date"])
    assert run_tool(capsys, page, "print(1)") == (0, [": up to date"])
    assert run_tool(capsys, page) == (0, [": up to date", ": updated"])
    assert page.read_text() == before.replace("3\n```", "2\n```")
    assert run_tool(capsys, page, "--check") == (0, [": up to date"] * 2)
    page.write_text(before.replace("; slow", "; numbers vary"))
    assert run_tool(capsys, page, "--check") == (0, [": up to date"] * 2)
    assert "3\n```" in page.read_text()
    assert run_tool(capsys, page) == (0, [": up to date"] * 2)
    assert "3\n```" not in page.read_text()


def test_a_command_that_fails_changes_nothing(page, capsys):
    page.write_text(page.read_text().replace("print(2)", "exit('no disk')"))
    before = page.read_text()
    code, lines = run_tool(capsys, page)
    assert code == 1 and lines[1] == ": FAILED, block not changed: exit code 1: no disk"
    assert page.read_text() == before


def test_a_comment_without_a_block_is_refused(page, capsys):
    page.write_text(page.read_text().replace("```\n3", "3"))
    code, _ = run_tool(capsys, page)
    assert code == 2


# --- what the pages name --------------------------------------------------------------------------


def pages() -> list:
    return [pytest.param(path, id=path.name) for path in transcripts.documents()]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", pages())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("path", pages())
def test_files_and_targets_exist(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = " ".join(re.findall(r"`([^`]+)`", text))
    if path.name != "bugs.md":  # it names files of other projects
        for file in {*re.findall(r"\b(?:(?:tools|tests|examples)/[\w/]*)?\w+\.py\b", code)}:
            assert (ROOT / file).exists() or file == "waves.py", file
    for module in {*re.findall(r"python -m (tools[\w.]+)", path.read_text())}:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {name for rule in rules for name in rule.split()}
    for names in re.findall(r"`make ([a-z0-9 -]+)", text):
        assert {*names.split()} <= targets, f"make {names}"


@pytest.mark.parametrize("path", pages())
def test_flags_exist(path):
    """Those of train_3d.py without former names, those of tools, and those of other programs."""
    actions = [*options.OPTIONS.values(), *torchrun.get_args_parser()._actions]
    known = {flag for action in actions for flag in action.option_strings} | {"--help-all"}
    for tool in (ROOT / "tools").rglob("*.py"):
        known |= {*re.findall(r'add(?:_argument)?\(\s*"(--[\w-]+)"', tool.read_text())}
    known |= {
        "--extra-index-url",
        "--nodes",
        "--dependency",
        "--prefix",
    }  # pip, sbatch, torchfrtrace
    text = re.sub(r"<!--.*?-->", "", path.read_text())
    assert {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} <= known


def test_names_in_the_table_of_topics_exist():
    """`file.py`: `Name`, `name` in docs/cs336.md."""
    for row in (ROOT / "docs/cs336.md").read_text().splitlines():
        cells = row.split("|")
        for part in cells[2].split(";") if len(cells) > 3 else ():
            file, _, names = part.partition(":")
            if (match := re.match(r"\s*`([\w/]+\.py)`", file)) and names:
                source = (ROOT / match[1]).read_text()
                for name in re.findall(r"`(\w+)`", names.replace("argument `replicas`", "")):
                    assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), (
                        row,
                        name,
                    )


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_bugs_have_an_index():
    text = (ROOT / "docs/bugs.md").read_text()
    headings = [(int(n), title) for n, title in re.findall(r"^### (\d+)\. (.*)$", text, re.M)]
    index = [(int(n), title) for n, title in re.findall(r"\[(\d+)\. (.*?)\]\(#", text)]
    assert sorted(index) == sorted(headings)


# --- the example of the README --------------------------------------------------------------------


def test_the_example_of_the_readme_trains_like_one_process(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 15
    calls = []
    monkeypatch.setattr(train_3d, "main", lambda: calls.append(True))
    monkeypatch.setattr(schedules, "SCHEDULES", dict(schedules.SCHEDULES))
    exec(compile(code, "waves.py", "exec"), {})
    assert calls == [True]
    waves = schedules.SCHEDULES["waves"]
    for p, m in ((2, 3), (3, 5)):
        schedules.check(waves(p, m), m)
        assert judge(Case(p=p, m=m, schedule="waves")).worst <= TOLERANCE
    assert schedules.draw(waves(2, 3)).splitlines() == [
        "rank 0 |F0 F1 .  .  .  B1--- B0--- F2 .  .  .  B2---",
        "rank 1 |.  F0 F1 B1--- B0--- .  .  .  F2 B2--- .  .",
    ]


def test_the_pages_have_current_counts():
    readme, testing = ((ROOT / name).read_text() for name in ("README.md", "docs/testing.md"))
    patches, bugs = len(mutants.ZOO), len({bug.number for bug in mutants.ZOO})
    assert f"{patches} known bugs" in readme
    assert f"{patches} patches, forms of {bugs} bugs" in " ".join(testing.split())
    _, section = (ROOT / "docs/cs336.md").read_text().split("## Topics")
    topics = section.partition("\n## ")[0].count("\n| ") - 1
    assert f"all {topics}]" in readme
