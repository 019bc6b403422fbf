"""Tools around the training files: checks, benchmarks, planning and display. None is imported by
the files of the top folder.

This module is imported before each `python -m tools.X`. A Python without torch costs one line.
Ctrl-C and an output that was closed (`make draw | head -1`) end the tool silently."""

import atexit
import gc
import importlib.util
import os
import signal
import sys

if importlib.util.find_spec("torch") is None:
    sys.exit(
        f"{sys.executable} has no torch: `make` without PYTHON= installs it in .venv; or run "
        f"{sys.executable} -m pip install -r requirements.txt"
    )


def _report(kind: type, error: BaseException, trace) -> None:
    if kind is BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)
    if kind is not KeyboardInterrupt:  # after which Python ends itself with SIGINT
        sys.__excepthook__(kind, error, trace)


def _flush() -> None:
    """Writes what is still buffered. Otherwise Python would do it later, and print a traceback if
    the reader has gone."""
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError:
        os._exit(128 + signal.SIGPIPE)


sys.excepthook = _report
atexit.register(_flush)
atexit.register(gc.freeze)  # Python's exit then scans no objects, which takes half a second
