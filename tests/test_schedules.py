import ast
import doctest
import graphlib
import random
import re
import sys
from pathlib import Path

import pytest

import pipeline
import schedules
from schedules import Action, check, simulate
from tools.draw import wrap
from tools.plan import cost

MICROBATCHES = (*range(1, 21), 31, 32, 33, 48, 63, 64)
SIZES = [(p, m) for p in range(1, 17) for m in MICROBATCHES]
NAMES = [pytest.param(name, chunks, marks=pytest.mark.slow if chunks > 2 else ())
         for name, entry in schedules.SCHEDULES.items()
         for chunks in ((1, 2, 3, 4) if entry.any_chunks else (entry.chunks,))]  # fmt: skip


def test_it_imports_only_the_standard_library():
    nodes = [*ast.walk(ast.parse(Path(schedules.__file__).read_text()))]
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_timelines_in_the_docstring():
    results = doctest.testmod(schedules)
    assert results.attempted == 1 and results.failed == 0


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, chunks", NAMES)
def test_bubble_and_memory_are_as_predicted(name, chunks, every):
    entry = schedules.SCHEDULES[name]
    for p, m in SIZES[::every]:
        schedule = entry(p, m, chunks)
        if m >= entry.exact_from(p):
            predicted = entry.bubble(p, m, chunks)
            assert schedules.bubble(simulate(schedule)) == pytest.approx(predicted), (p, m)
        one = dict.fromkeys(range(chunks * p), 1)
        for rank in range(p):
            held = cost.peak_held(schedule[rank], one, one)
            assert held == entry.held(p, m, chunks, rank), (p, m)


def value(formula: str, **symbols: int) -> float:
    """Of a formula of the table, in which "6 m" and "2p" are products."""
    return eval(re.sub(r"(\w) ?([a-z])", r"\1 * \2", formula), symbols)


def test_the_table_in_the_docstring():
    """Every cell, next to the entry and the list of actions, for 4 ranks and 8 microbatches."""
    p, m = 4, 8
    table = schedules.__doc__.split("sends per microbatch\n")[1].split("\n\n")[0]
    rows = {row[0]: row[1:] for row in (re.split("  +", line[4:]) for line in table.splitlines())}
    assert [*rows] == [*schedules.SCHEDULES]
    for name, entry in schedules.SCHEDULES.items():
        chunks, bubble, exact_from, held, sends = rows[name]
        c, schedule = entry.chunks, entry(p, m)
        assert chunks == f"{'>=' * entry.any_chunks}{c}"
        assert bubble == entry.formula
        assert value(bubble, p=p, m=m, c=c) == entry.bubble(p, m, c)
        for ranks in range(1, 9):
            assert value(exact_from, p=ranks) == entry.exact_from(ranks)
        for r in range(p):
            assert value(held, p=p, m=m, c=c, r=r) == entry.held(p, m, c, r) / c
        sent = pipeline.predicted_sends(schedules.stages_of(schedule), 1, 1, 1, 1, 1)[0]
        assert value(sends, c=c) == sent


def test_a_transfer_takes_its_time():
    """2 ranks, 1 microbatch: F, over, F B, over, B: and what never leaves a rank takes none."""
    spans = simulate(schedules.gpipe(2, 1), lambda a: {"F": 1.0, "B": 2.0}[a.kind], transfer=0.25)
    assert [(s.rank, s.start, s.end) for s in spans] == [
        (0, 0.0, 1.0), (1, 1.25, 2.25), (1, 2.25, 4.25), (0, 4.5, 6.5)
    ]  # fmt: skip
    alone = simulate(schedules.zb_v(1, 3), transfer=100.0)
    assert schedules.bubble(alone) == pytest.approx(0.0)


def test_a_long_timeline_goes_on_below():
    schedule = schedules.zb_v(2, 3)
    wide = schedules.draw(schedule)
    narrow = wrap(wide, columns=38)
    assert wrap(wide, columns=200) == wide
    assert max(map(len, narrow.splitlines())) <= 38
    timelines = [lines.splitlines() for lines in narrow.split("\n\n")]
    assert [len(lines) for lines in timelines] == [2, 2]
    for rank, line in enumerate(wide.splitlines()):
        assert (timelines[0][rank] + " " + timelines[1][rank][8:]).rstrip() == line
    assert wide.splitlines()[0] == (
        "rank 0 |F0 F1 F2 f0 b0 w0 f1 b1 w1 B0 W0 f2 b2 w2 B1 W1 B2 W2 ."
    )


@pytest.mark.parametrize(
    "function, spoil, message",
    [
        ("1f1b", lambda s: s[1].remove(Action("B", 1, 1)), "B1 missing"),
        ("1f1b", lambda s: s[0].append(Action("F", 0, 0)), "F0 is a duplicate or unexpected"),
        ("1f1b", lambda s: s[0].append(Action("W", 0, 0)), "W1, W2, W3 missing"),
        ("zb-h1", lambda s: s[2].remove(Action("W", 3, 2)), "W3 missing"),
        ("zb-v", lambda s: s[2].remove(Action("W", 3, 3)), "w3 missing"),
        ("1f1b", lambda s: s[2].insert(0, s[2].pop(1)), "rank 2 cannot run B0 before .* 2 runs F0"),
        ("zb-h1", lambda s: s[0].insert(0, s[0].pop()), "rank 0 cannot run W3 before .* 0 runs B3"),
        ("1f1b", lambda s: s[1].append(Action("F", -1, 1)), "F-1 is a duplicate or unexpected"),
        (
            "1f1b",
            lambda s: s[1].append(Action("X", 1, 1)),
            "X1 .* one F and one B for each .* 0..3",
        ),
        ("1f1b", lambda s: s[0].remove(Action("F", 0, 0)), "F0 missing"),
        ("1f1b", lambda s: [row.clear() for row in s], r"are \[\[\], \[\], \[\]\]"),
        ("1f1b", lambda s: s[1].clear(), r"stages by rank are \[\[0\], \[\], \[2\]\]"),
        ("interleaved", lambda s: s[1].append(Action("F", 0, 0)), "each on exactly one rank"),
    ],
)
def test_incomplete_schedules_are_refused(function, spoil, message):
    schedule = schedules.SCHEDULES[function](3, 4)
    spoil(schedule)
    with pytest.raises(schedules.ScheduleError, match=message):
        check(schedule, 4)
    with pytest.raises(schedules.ScheduleError, match="B4, F4 missing"):
        check(schedules.gpipe(3, 4), 5)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_a_number_of_chunks_that_a_schedule_does_not_have_is_refused(name):
    entry = schedules.SCHEDULES[name]
    assert entry(2, 4) == entry(2, 4, entry.chunks)
    for chunks in {1, 2, 3, 4} - {entry.chunks}:
        if entry.any_chunks:
            assert {len(row) for row in schedules.stages_of(entry(2, 4, chunks))} == {chunks}
            continue
        expected = f"chunks = {chunks}: this schedule has {entry.chunks} per rank"
        with pytest.raises(ValueError, match=expected):
            entry(2, 4, chunks)


def test_chunks_and_splitting_are_read_off_the_actions():
    read = {name: (e.chunks, e.splits_backward) for name, e in schedules.SCHEDULES.items()}
    assert read | {"gpipe": (1, False), "1f1b": (1, False), "interleaved": (2, False),
                   "zb-h1": (1, True), "zb-v": (2, True)} == read  # fmt: skip


def test_a_cycle_is_refused_and_named():
    """Rank 0 waits for B0 before F1, and rank 1 waits for F1 before B0. Rank 2 waits too, but is
    not in the cycle."""

    def row(line: str, stage: int):
        return [Action(word[0], int(word[1]), stage) for word in line.split()]

    lines = ["F0 B0 F1 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]
    with pytest.raises(schedules.ScheduleError) as error:
        check([row(line, k) for k, line in enumerate(lines)], 2)
    assert str(error.value) == (
        "deadlock: rank 0 cannot run B0 before rank 1 runs B0; "
        "rank 1 cannot run F1 before rank 0 runs F1"
    )
    assert (error.value.rank, error.value.place) == (0, 1)


def random_schedule(rng: random.Random, p: int) -> tuple[list[list[Action]], int, int]:
    """(schedule, m, stages): any placement, uneven ones too, in any order that can be."""
    n, m = rng.randint(p, 5), rng.randint(1, 4)
    holders = [*range(p), *(rng.randrange(p) for _ in range(n - p))]
    rng.shuffle(holders)
    kinds = rng.choice(("FB", "FBW"))
    left = {Action(kind, i, k) for kind in kinds for i in range(m) for k in range(n)}
    schedule: list[list[Action]] = [[] for _ in range(p)]
    while left:
        ready = [a for a in left if schedules.dependency(a, n - 1) not in left]
        action = rng.choice(sorted(ready))
        left.remove(action)
        schedule[holders[action.stage]].append(action)
    return schedule, m, n


def can_run(schedule, n: int) -> bool:
    """Whether the dependencies have no cycle, according to graphlib."""
    graph = {a: {schedules.dependency(a, n - 1)} - {None} for row in schedule for a in row}
    for row in schedule:
        for before, after in zip(row, row[1:], strict=False):
            graph[after].add(before)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return False
    return True


def test_200_broken_schedules_are_refused_and_what_can_run_is_not():
    rng, refused, passed = random.Random(0), 0, 0
    while refused < 200:
        schedule, m, n = random_schedule(rng, rng.randint(1, 4))
        check(schedule, m)
        row = rng.choice(schedule)
        a, b = (rng.randrange(len(row)) for _ in range(2))
        how = rng.choice(("drop", "double", "swap", "swap"))
        only_w = {x.kind for x in row} | {x.kind for r in schedule for x in r if r is not row}
        if how == "drop":
            row.pop(a)
        elif how == "double":
            row.insert(b, row[a])
        else:
            row[a], row[b] = row[b], row[a]
        kinds = {x.kind for r in schedule for x in r}
        if (how == "swap" and can_run(schedule, n)) or kinds != only_w:
            passed += 1  # another valid order; or the only W was dropped, and B is not split then
            check(schedule, m)
            continue
        refused += 1
        with pytest.raises(schedules.ScheduleError):
            check(schedule, m)
    assert passed > 20
