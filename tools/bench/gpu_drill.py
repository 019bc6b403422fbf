"""Checks of everything that needs a GPU, on a single GPU, in parts of one or two minutes.

    make gpu-drill OUT=gpu_drill.md                   all parts, in at most ten minutes
    tools/bench/gpu_drill.sh gpu_drill.md [PART ...]        all parts, or those that are named
    python -m tools.bench.gpu_drill PART --device cuda      one part

The parts, in the order in which the script runs them:

    parity          layouts of 2 and 3 ranks agree with one process in float64
    late            the same, with delayed ranks and delayed results of collectives
    train           checkpoint, SIGTERM, resume and trace of train_3d.py on 2 ranks
    syncs           a step never makes the host wait for the GPU
    speed           step time compared with a loop without strategies
    profile         fraction of time in which the GPU is busy; kernel launches per step
    fragmentation   reserved / allocated memory
    memcheck        NVIDIA's compute-sanitizer finds no memory errors

In parity, late, train, syncs, fragmentation and memcheck, several ranks share the GPU over NCCL.
That is slow, but enough to test correctness. NCCL refuses two ranks with the same GPU and the same
host, so each rank gets a different NCCL_HOSTID.

Each part prints Markdown and exits with 0 (passed), 1 (failed) or 3 (needs a GPU, and there is
none). Without a GPU the ranks use gloo and small models.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import measure
import options
import startup
import train_3d
from tools.bench import gpu_check
from tools.verify import oracle, races
from tools.verify.oracle import Case

ROOT = Path(__file__).resolve().parents[2]
NEEDS_A_GPU = 3
SHARED_GPU = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_MAX_CTAS": "2",
              "NCCL_LAUNCH_ORDER_IMPLICIT": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
TINY = dict(n_layer=4, n_head=4, n_embd=16, vocab_size=23, seq_len=8, m=4, b=1)
CASES = {
    "DDP": Case(d=2, **TINY),
    "DDP, 3 ranks": Case(d=3, **TINY),
    "ZeRO-3": Case(d=2, zero=3, **TINY),
    "TP": Case(t=2, **TINY),
    "TP+SP": Case(t=2, sequence=True, **TINY),
    "1F1B": Case(p=2, **TINY),
    "1F1B, 3 ranks": Case(p=3, **TINY),
    "zb-v": Case(p=2, schedule="zb-v", **TINY),
}
SMALL = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 32"
CYCLES = 2_000_000  # for torch.cuda._sleep: about 1 ms


def share_gpu(rank: int) -> None:
    """Lets several ranks use one GPU. Called in each rank's process before NCCL starts."""
    os.environ.update(SHARED_GPU, NCCL_HOSTID=str(rank))


# --- correctness ----------------------------------------------------------------------------------


def parity(
    device: torch.device, failed: list[str], judge: Callable = oracle.judge
) -> Iterator[str]:  # fmt: skip
    """Compares CASES with one process on the CPU, in float64."""
    yield "| layout | ranks | largest relative difference | in | s |"
    yield "|---|---|---|---|---|"
    for name, case in CASES.items():
        start = time.monotonic()
        try:
            errors = judge(case, {"device": device}, before=share_gpu, device=device, timeout=40.0)
            found, same = f"{errors.worst:.1e} | {errors.where}", errors.within("float64")
        except (RuntimeError, AssertionError) as error:
            last = str(error).strip().splitlines()[-1]
            found, same = f"failed | {last[:200].replace('|', '/')}", False
        failed += [] if same else [f"{name}: {found}"]
        yield f"| {name} | {case.world_size} | {found} | {time.monotonic() - start:.0f} |"


def rank_1_is_late() -> None:
    if dist.get_rank() != 1:
        return
    if torch.cuda.is_initialized():
        torch.cuda._sleep(CYCLES)
    else:
        time.sleep(1e-3)


def late(device: torch.device, failed: list[str]) -> Iterator[str]:
    """parity(), but rank 1 sleeps before each collective and outputs are NaN until it runs."""
    judge = functools.partial(races.judge_late, direct=True, delay=rank_1_is_late)
    yield from parity(device, failed, judge)


class Ranks:
    """train_3d.py on two ranks that share a GPU. To each rank it looks like one rank per host."""

    def __init__(self, device: torch.device, *flags: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        line = [sys.executable, "train_3d.py", "--device", device.type, *flags]
        self.processes, self.errors = [], tempfile.TemporaryFile("w+")
        for rank in range(2):
            own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NCCL_HOSTID": rank,
                   "OMP_NUM_THREADS": 1}  # fmt: skip
            environment = os.environ | SHARED_GPU | {k: str(v) for k, v in own.items()}
            self.processes.append(subprocess.Popen(
                line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=self.errors,
            ))  # fmt: skip

    def wait(self, stop_after: str | None = None) -> str:
        """Waits for both ranks and returns the output of rank 0.

        stop_after: a regular expression. When a line matches it, rank 1 gets SIGTERM. Raises
        RuntimeError if a rank fails.
        """
        output = ""
        with self.errors:
            for line in self.processes[0].stdout:
                output += line
                if stop_after and re.match(stop_after, line):
                    self.processes[1].send_signal(signal.SIGTERM)
                    stop_after = None
            self.processes[1].communicate()
            codes = [process.wait() for process in self.processes]
            self.errors.seek(0)
            if any(codes):
                raise RuntimeError(f"exit codes {codes}: {self.errors.read()[-1000:]}")
        return output


def rows(log: str) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm)."""
    found = map(json.loads, Path(log).read_text().splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in found if "loss" in row}


def train(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Stops a run by SIGTERM and resumes it: the losses must equal those of an unbroken run.

    The unbroken run also writes a trace, which must have spans of both ranks.
    """
    flags = ("--n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --global-batch-size 8 --zero 3 "
             "--micro-batch-size 2 --steps 40 --dtype float64 --eval-interval 0 --log-interval 1 "
             "--data train_3d.py").split()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        logs = [f"{folder}/{name}" for name in ("whole", "stopped")]
        Ranks(device, *flags, "--metrics", logs[0], "--trace", f"{folder}/trace").wait()
        events = json.loads(Path(f"{folder}/trace").read_text())["traceEvents"]
        saves = ["--metrics", logs[1], "--checkpoint-dir", f"{folder}/saves"]
        stopped = Ranks(device, *flags, *saves).wait(stop_after=r"step +2/")
        resumed = Ranks(device, *flags, *saves, "--resume").wait()
        expected, found = map(rows, logs)
    spans = collections.Counter(event["pid"] for event in events if event["ph"] == "X")
    yield f"- trace: {dict(spans)} spans by rank"
    stop = re.search(r"stopped by a signal after step (\d+)", stopped)
    yield f"- SIGTERM to rank 1: {stop[0] if stop else 'did not stop the run'}"
    again = re.search(r"--resume: .* after step (\d+)", resumed)
    yield f"- resume: {'from step ' + again[1] if again else 'nothing was resumed'}"
    if len(spans) < 2 or not stop or not again or stop[1] != again[1]:
        failed += ["the run was not traced, stopped and resumed on both ranks"]
    if expected.keys() != found.keys():
        failed += [f"{len(expected)} steps were logged by one run, {len(found)} by the other"]
    pairs = [(a, b) for step in expected.keys() & found.keys()
             for a, b in zip(expected[step], found[step], strict=True)]  # fmt: skip
    worst = measure.largest(abs(a - b) / abs(a) for a, b in pairs)
    equal = "equal bit by bit" if all(a == b for a, b in pairs) else "not equal bit by bit"
    yield f"- losses and norms of {len(expected)} steps: {equal}, relative difference {worst:.1e}"
    if not worst <= measure.TOLERANCE:
        failed += ["the resumed run has other losses"]


# --- synchronisations -----------------------------------------------------------------------------


def synchronising(seen: list[warnings.WarningMessage]) -> list[str]:
    """Source locations ("file:line") of the synchronisation warnings."""
    found = [w for w in seen if "synchronizing" in str(w.message)]
    return [f"{Path(w.filename).name}:{w.lineno}" for w in found]


def most_common(places: list[str]) -> list[str]:
    return [f"{place} x {n}" for place, n in collections.Counter(places).most_common(4)]


def syncs_of_steps(steps: Iterable[Callable]) -> tuple[list[int], list[str]]:
    """(synchronisations of each step, their most common locations in the last step)."""
    counts, places = [], []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for step in steps:
            del seen[:]
            step()
            places = synchronising(seen)
            counts.append(len(places))
        torch.cuda.set_sync_debug_mode("default")
    return counts, most_common(places)


def syncs_of_layout(case: Case, device: torch.device) -> tuple[list[int], list[str]]:
    trainer = oracle.trainer_of(case, device=device)
    return syncs_of_steps([functools.partial(trainer.step, i) for i in range(6)])


def syncs_of_the_loop(device: torch.device, flags: list[str]) -> tuple[list[int], list[str]]:
    """The same for train_3d.main(), which also checks whether to stop.

    The last step is left out: printing its loss synchronises.
    """
    starts, plain = [], train_3d.Trainer.step  # starts: warnings seen before each step

    def step(trainer: train_3d.Trainer, number: int) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("warn")
        starts.append(len(synchronising(seen)))
        return plain(trainer, number)

    sys.argv = ["train_3d.py", "--device", device.type, *flags, "--steps=7", "--log-interval=7"]
    train_3d.Trainer.step = step
    with warnings.catch_warnings(record=True) as seen, contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always")
        train_3d.main()
    counts = [end - start for start, end in itertools.pairwise(starts)]
    return counts, most_common(synchronising(seen)[starts[-2] : starts[-1]])


def syncs(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Counts the warnings of torch.cuda.set_sync_debug_mode("warn") in each of six steps."""
    yield "| run | synchronisations by step (aim: 0 from the 3rd) | where, in the last step |"
    yield "|---|---|---|"
    names = ("DDP", "ZeRO-3", "TP+SP", "zb-v")
    if device.type == "cpu":
        yield from needs_a_gpu(*names, "the loop of train_3d.py, 1 rank", columns=2)
    found = {}
    for name in names:
        case = CASES[name]
        ranks = oracle.launch(case.world_size, syncs_of_layout, case, device, before=share_gpu,
                              device=device, timeout=40.0)  # fmt: skip
        found[name] = ranks[0]
        yield syncs_row(name, *ranks[0])
    # Must be last: it initialises CUDA in this process, which can no longer fork ranks.
    flags = "--n-layer 2 --n-head 2 --n-embd 64 --seq-len 64 --eval-interval 0 --dtype bf16".split()
    name = "the loop of train_3d.py, 1 rank"
    found[name] = syncs_of_the_loop(device, flags)
    yield syncs_row(name, *found[name])
    for name, (counts, _) in found.items():
        failed += [f"{name}: the host waits for the GPU"] if any(counts[2:]) else []


def syncs_row(name: str, counts: list[int], places: list[str]) -> str:
    return f"| {name} | {' '.join(map(str, counts))} | {', '.join(places) or 'none'} |"


# --- speed and memory -----------------------------------------------------------------------------


def sizes(device: torch.device, vocab_size: int) -> list[str]:
    """Flags for the model and the batch."""
    model = "--model=gpt2-medium" if device.type == "cuda" else SMALL
    return [*model.split(), f"--vocab-size={vocab_size}", "--global-batch-size=16",
            "--micro-batch-size=4"]  # fmt: skip


def speed(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Step time of the trainer / step time of gpu_check.Bare. Aim: at most 1.02."""
    steps = 10 if device.type == "cuda" else 1
    startup.join_ranks(device)
    if device.type == "cpu":  # inductor would compile C++ for 40 s
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    yield "Aim: trainer / bare at most 1.02.\n"
    yield "| vocabulary " + gpu_check.SPEED_HEAD[0]
    yield "|---" + gpu_check.SPEED_HEAD[1]
    for compiled in (False, True):  # eager first, because compiling needs a C compiler
        for vocab_size in (50257, 50304) if device.type == "cuda" else (65, 64):
            flags = sizes(device, vocab_size)
            for row in gpu_check.speed(flags, device, steps, compiled=[compiled]):
                yield f"| {vocab_size:,} {row}"
    dist.destroy_process_group()


def busy_and_launches(events: list[dict], steps: int) -> tuple[float, float]:
    """(fraction of time in which the GPU is busy, kernel launches per step), from a trace.

    events: of torch.profiler. Busy means running a kernel or a copy; the time counts from the
    start of the first one to the end of the last.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    launches = sum(e.get("cat") in ("cuda_runtime", "cuda_driver") and "LaunchKernel" in e["name"]
                   for e in events)  # fmt: skip
    return busy / (end - spans[0][0]), launches / steps


def profile(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Fraction of time in which the GPU is busy, and kernel launches per step."""
    yield "| bf16, eager | GPU busy | kernel launches per step |"
    yield "|---|---|---|"
    if device.type == "cpu":
        yield from needs_a_gpu("bare loop", "trainer", columns=2)
    startup.join_ranks(device)
    args = options.parser().parse_args([*sizes(device, 50304), "--dtype=bf16"])
    config, steps = options.check(args, 1), 3
    for name, build in (("bare loop", gpu_check.Bare), ("trainer", gpu_check.trainer_of)):
        gpu_check.free_memory()
        loop = build(args, config, device)
        for step in range(3):
            loop.step(step)
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as seen:
            for step in range(steps):
                loop.step(step)
            torch.cuda.synchronize()
        del loop
        with tempfile.TemporaryDirectory() as folder:
            seen.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        busy, launches = busy_and_launches(events, steps)
        yield f"| {name} | {100 * busy:.1f} % | {launches:,.0f} |"
    dist.destroy_process_group()


def peaks(zero: int, device: torch.device) -> tuple[int, int]:
    """Peak bytes (reserved, allocated) of CUDA's allocator in steps 3 to 5."""
    flags = [*"--model=gpt2 --global-batch-size=8 --micro-batch-size=2 --dtype=bf16".split(),
             f"--zero={zero}"]  # fmt: skip
    args = options.parser().parse_args(flags)
    trainer = gpu_check.trainer_of(args, options.check(args, 2), device)
    for step in range(5):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        trainer.step(step)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()


def fragmentation(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Reserved / allocated memory. ZeRO-3 may fragment it: it allocates parameters many times."""
    yield "| gpt2, bf16, 2 ranks | reserved GB | allocated GB | reserved / allocated |"
    yield "|---|---|---|---|"
    names = {0: "DDP", 3: "ZeRO-3"}
    if device.type == "cpu":
        yield from needs_a_gpu(*names.values(), columns=3)
    for zero, name in names.items():
        both = oracle.launch(2, peaks, zero, device, before=share_gpu, device=device, timeout=60.0)
        reserved, allocated = both[0]
        yield (f"| {name} | {reserved / 1e9:.3f} | {allocated / 1e9:.3f} | "
               f"{reserved / allocated:.3f} |")  # fmt: skip


def memcheck(device: torch.device, failed: list[str]) -> Iterator[str]:
    """Runs a tiny ZeRO-3 step (`tiny` below) under compute-sanitizer."""
    if device.type == "cpu":
        yield "ZeRO-3 under compute-sanitizer needs a GPU."
        raise SystemExit(NEEDS_A_GPU)
    if not shutil.which("compute-sanitizer"):
        yield "compute-sanitizer is not installed; it belongs to the CUDA toolkit."
        raise SystemExit(NEEDS_A_GPU)
    # --report-api-errors no: NCCL and torch make probing API calls that fail by design.
    sanitizer = "compute-sanitizer --tool memcheck --target-processes all --report-api-errors no"
    command = ["-m", "tools.bench.gpu_drill", "tiny", "--device", "cuda"]
    line = [*sanitizer.split(), sys.executable, *command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    output = [line for line in done.stdout.splitlines() if not line.startswith("=====")]
    errors = re.findall("=+ (?:Invalid|Misaligned|.*out of bounds|Program hit).*", done.stdout)
    yield f"{' '.join(output)}; exit code {done.returncode}; {len(errors)} errors of memcheck"
    yield from sorted({*errors})[:5]
    failed += ["memcheck"] if errors or done.returncode else []


def tiny(device: torch.device, failed: list[str]) -> Iterator[str]:
    """One step of ZeRO-3 on two ranks, compared with one process. Run by memcheck."""
    case = Case(d=2, zero=3, steps=1, **TINY | {"n_layer": 1, "m": 1})
    errors = oracle.judge(case, {"device": device}, before=share_gpu, device=device, timeout=80.0)
    yield f"ZeRO-3, 2 ranks, one step: largest relative difference {errors.worst:.1e}"
    failed += [] if errors.within("float64") else ["ZeRO-3"]


# --- command line ---------------------------------------------------------------------------------


def needs_a_gpu(*names: str, columns: int) -> Iterator[str]:
    for name in names:
        yield f"| {name} | needs a GPU |" + " |" * (columns - 1)
    raise SystemExit(NEEDS_A_GPU)


PARTS = {part.__name__: part for part in (parity, late, train, syncs, speed, profile, fragmentation,
                                          memcheck)}  # fmt: skip


def main() -> None:
    # torch.cuda.is_available() must not initialise CUDA here, because ranks are forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("part", choices=[*PARTS, "tiny"], help="which check to run")
    arguments.add_argument("--device", choices=("cpu", "cuda"), required=True)
    args = arguments.parse_args()
    device, failed = torch.device(args.device, 0) if args.device == "cuda" else oracle.CPU, []
    for line in (PARTS | {"tiny": tiny})[args.part](device, failed):
        print(line, flush=True)
    sys.exit("\n".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
