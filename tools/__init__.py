"""Tools around the training files: checks, benchmarks, planning and display. None is imported by
the files of the top folder.

This module is imported before each `python -m tools.X`. It reports a Python without torch, and an
output that was closed (`make draw | head -1`), without a traceback."""

import atexit
import importlib.util
import os
import sys

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"{sys.executable} has no torch: `make` without PYTHON= installs it in .venv; or run "
        f"{sys.executable} -m pip install -r requirements.txt"
    )


def _report(kind: type, error: BaseException, trace) -> None:
    if kind is not BrokenPipeError:
        sys.__excepthook__(kind, error, trace)


def _flush() -> None:
    """Writes what is still buffered. If the reader has gone, it is dropped: otherwise Python
    would fail to flush it at its exit, and print a traceback."""
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


sys.excepthook = _report
atexit.register(_flush)
