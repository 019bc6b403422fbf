"""Runs the tests with one pytest process per core, at most 8.

    python -m tests.run                      all of them
    python -m tests.run -m "not slow"        any arguments of pytest
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import tools  # noqa: F401 (it reports a Python without torch)


def main() -> int:
    since, linux = time.monotonic(), hasattr(os, "sched_getaffinity")
    cores = min(8, len(os.sched_getaffinity(0)) if linux else os.cpu_count())  # 0.5 GB each
    with tempfile.TemporaryDirectory() as claims:
        jobs, outputs = [], []
        for i in range(cores):
            line = [sys.executable, "-m", "pytest", "-q", f"--claims={claims}",
                    f"--start={i / cores}", *sys.argv[1:]]  # fmt: skip
            # The first process writes to the terminal. The others' output is printed at the end.
            outputs.append(tempfile.TemporaryFile("w+") if i else None)
            jobs.append(subprocess.Popen(line, stdout=outputs[i], stderr=subprocess.STDOUT))
        codes = [job.wait() for job in jobs]
        for output in outputs[1:]:
            output.seek(0)
            print(output.read(), end="", flush=True)
        found = [json.loads(path.read_text()) for path in Path(claims).glob("counts-*")]
    counts = sum(map(Counter, found), Counter())
    print(f"{cores} processes, {time.monotonic() - since:.0f} s")
    failed = counts["failed"] + counts["error"]
    print(f"{counts['passed']} passed, {failed} failed, {counts['skipped']} skipped")
    if len(found) < cores:
        print(f"A pytest process ended before it had run its tests: exit codes {codes}")
    bad = [code for code in codes if code not in (0, 5)]  # 5: the others had claimed every test
    return bad[0] if bad else int(len(found) < cores or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
