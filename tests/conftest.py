"""Several pytest processes can share one run: each test is run by the process that claims it first.
tests/run.py starts them."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.addoption
    add("--claims", type=Path, help="a folder that the processes share, empty at first")
    add("--start", type=float, default=0.0, help="where in the list to start, as a fraction of it")


def claim(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """The items that this process is the first to claim."""
    for item in items:
        name = hashlib.sha1(item.nodeid.encode()).hexdigest()
        try:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield item


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Like pytest's own loop, over the tests that this process claims."""
    option = session.config.option
    if option.claims is None or option.collectonly or session.testsfailed:
        return None
    first = int(option.start * len(session.items))
    mine = claim(session.items[first:] + session.items[:first], option.claims)
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)  # claimed early: pytest keeps the fixtures that it needs
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.claims:
        counts = {kind: len(reports) for kind, reports in terminalreporter.stats.items()}
        (config.option.claims / f"counts-{os.getpid()}").write_text(json.dumps(counts))
