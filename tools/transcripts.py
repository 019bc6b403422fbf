"""Reruns the commands whose output is shown in README.md and docs/, and updates the blocks.

    make transcripts                                   reruns every command and updates the blocks
    make transcripts ARGS=--check                      lists blocks that are out of date
    python -m tools.transcripts draw plan              only commands that contain one of the words
    python -m tools.transcripts --kind fast --check    only one kind: fast, slow or long

A transcript is a fenced block after a comment that names its command:

    <!-- transcript: make tp; slow; match TP losses -->

Options after the command, separated by semicolons:

    slow          starts several processes; tested by `make test-all` only
    long          takes minutes, trains, or needs root; not tested
    lines A B-C   which lines of the output are shown; -1 is the last line, and `4-` means from line
                  4 on. `...` stands for lines that are left out.
    match REGEX   shows the lines in which REGEX is found, instead
    first N       only the first N of the lines that are left
    width N       cuts longer lines
    numbers vary  only the text between numbers is compared, for times and trained models
    text varies   the output is not compared at all, for generated text

Without the last two, numbers are compared to 6 digits. Times and rates are not compared, and all
numbers below 1e-9 are equal: they are rounding errors. A block that is equal in this sense is not
rewritten, unless its numbers or its text vary. The exit code is 1 if a command failed or, with
--check, if a block is out of date.
"""

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^<!-- transcript: (?P<command>[^;\n]+)(?P<options>(;[^;\n]+)*) -->\n```\n(?P<text>.*?)```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
RATE = re.compile(r"[\d,.]+(e[+-]?\d+)?(?= ?(s|ms|us|min|tokens/s|TFLOP/s|GB/s)\b)")
VARY = ("numbers vary", "text varies")
TINY = 1e-9  # differences from one process, in float64


class Transcript(NamedTuple):
    path: Path
    command: str
    options: tuple[str, ...]
    text: str  # the block in the file

    @property
    def kind(self) -> str:
        return next((kind for kind in ("slow", "long") if kind in self.options), "fast")

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}: {self.command}"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def transcripts(path: Path) -> Iterator[Transcript]:
    """Raises ValueError if a comment is not followed by a block."""
    text = path.read_text()
    found = [*BLOCK.finditer(text)]
    if len(found) != text.count("<!-- transcript:"):
        raise ValueError(f"{path.name}: each transcript comment must be followed by a ``` block")
    for match in found:
        options = tuple(option.strip() for option in match["options"].split(";")[1:])
        yield Transcript(path, match["command"].strip(), options, match["text"])


def run(command: str) -> str:
    """The standard output of a command, with this Python. Raises ValueError if it fails."""
    words = shlex.split(command)
    if words[0] == "make":
        words[1:1] = ["-s", "--no-print-directory", f"PYTHON={sys.executable}"]
    elif words[0] == "python":
        words[0] = sys.executable
    environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs this tool
        environment.pop(name, None)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ValueError(f"exit code {done.returncode}: {' '.join(last)}")
    return done.stdout


def shown(output: str, options: tuple[str, ...]) -> str:
    """The lines of the output that a block shows."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines()]
    for option in options:
        name, _, value = option.partition(" ")
        if name == "lines":
            keep = set().union(*(selected(part, len(lines)) for part in value.split()))
            marked = [line if i in keep else None for i, line in enumerate(lines)]
            runs = itertools.groupby(marked, key=lambda line: line is None)
            lines = [line for gap, run in runs for line in (["..."] if gap else run)]
        elif name == "match":
            lines = [line for line in lines if re.search(value, line)]
        elif name == "first":
            lines = lines[: int(value)]
        elif name == "width":
            width = int(value)
            lines = [
                line if len(line) <= width else line[: width - 4].rstrip() + " ..."
                for line in lines
            ]
        elif option not in ("slow", "long", *VARY):
            raise ValueError(f"unknown option: {option}")
    return "\n".join(lines) + "\n"


def selected(part: str, n: int) -> set[int]:
    """Indices of the lines 3, -2, 3-5, 4- or -3-, of n lines."""
    match = re.fullmatch(r"(-?\d+)(?:(-)(-?\d+)?)?", part)
    if not match:
        raise ValueError(f"lines {part}: expected a number or a range")
    first, dash, last = match.groups()

    def index(number: str) -> int:
        return int(number) - 1 if int(number) > 0 else n + int(number)

    stop = n - 1 if dash and last is None else index(last or first)
    return {i for i in range(index(first), stop + 1) if 0 <= i < n}


def normal(text: str, options: tuple[str, ...]) -> str:
    """The text without what may differ from one run to the next."""

    def number(match: re.Match) -> str:
        if "numbers vary" in options:
            return "#"
        value = float(match[0].replace(",", ""))
        return "0" if abs(value) < TINY else f"{value:.6g}"

    if "text varies" in options:
        return ""
    text = NUMBER.sub(number, RATE.sub("#", text))
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


def is_stale(transcript: Transcript, new: str) -> bool:
    return normal(transcript.text, transcript.options) != normal(new, transcript.options)


def update(transcript: Transcript, new: str) -> None:
    """Writes the new text into the block of this command."""

    def replace(match: re.Match) -> str:
        if match["command"].strip() != transcript.command or match["text"] != transcript.text:
            return match[0]
        return match[0].replace(f"```\n{match['text']}```", f"```\n{new}```")

    transcript.path.write_text(BLOCK.sub(replace, transcript.path.read_text()))


def main(argv: list[str] | None = None, files: list[Path] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = arguments.add_argument
    add("words", nargs="*", help="only commands that contain one of these words")
    add("--check", action="store_true", help="list blocks that are out of date, and write none")
    add("--kind", choices=("fast", "slow", "long"), help="only transcripts of this kind")
    args = arguments.parse_args(argv)
    try:
        found = [t for path in files or documents() for t in transcripts(path)]
    except ValueError as error:
        arguments.error(str(error))
    bad = 0
    for transcript in found:
        if args.kind and transcript.kind != args.kind:
            continue
        if args.words and not any(word in transcript.command for word in args.words):
            continue
        try:
            new = shown(run(transcript.command), transcript.options)
            stale = is_stale(transcript, new)
            verdict = ("OUT OF DATE" if args.check else "updated") if stale else "up to date"
            if not args.check and (stale or {*transcript.options} & {*VARY}):
                update(transcript, new)
            bad += stale and args.check
        except ValueError as error:
            verdict, bad = f"FAILED, block not changed: {error}", bad + 1
        print(f"{transcript}: {verdict}", flush=True)
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main()
