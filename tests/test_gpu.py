"""What a GPU changes: chosen, named and counted, here without one; make gpu-check needs one."""

import dataclasses
import functools
import itertools
import json
import math
import time

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import gpt
import measure
import options
import startup
import train_3d
from logger import Logger
from tests.commands import TINY, forked
from tools.bench import gpu_check
from tools.verify.oracle import Case, judge, launch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch.compile looks at warns; a run shows none of it
@pytest.mark.parametrize(
    "backend, case",  # aot_eager: compiles the graphs, but generates no C++ (40 s)
    [("aot_eager", Case(t=2, sequence=True, dropout=0.2, recompute="full")),
     ("inductor", Case(d=2, zero=3, recompute="selective", attention="explicit"))],
    ids=str,
)  # fmt: skip
def test_compiled_equals_one_process(backend, case, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    case.n_layer, case.n_head, case.n_embd, case.seq_len, case.compile = 1, 4, 16, 8, True
    errors = judge(case)
    assert errors.worst <= measure.TOLERANCE, errors


class Graphs:
    """A backend of torch.compile that runs a graph unchanged. runs: for each run of a graph, the
    number of its linear layers."""

    def __init__(self, monkeypatch):
        self.runs: list[int] = []
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=self))

    def __call__(self, graph: torch.fx.GraphModule, inputs: list):
        linears = sum(node.target is torch.nn.functional.linear for node in graph.graph.nodes)

        def run(*args):
            self.runs.append(linears)
            return graph(*args)

        return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "flags, runs",
    [(["--compile"], 48), ([], 0)],
)
def test_blocks_are_compiled(flags, runs, monkeypatch):
    """Each forward of 2 blocks is one graph with 4 linear layers: in 4 steps and 2 batches of
    validation, with 4 microbatches each."""
    graphs = Graphs(monkeypatch)
    done = forked(1, lambda: (train_3d.main(), print(graphs.runs))[0], *TINY, *flags)
    assert done.stdout.endswith(f"\n{[4] * runs}\n"), done.stdout + done.stderr
    assert ("compiled" in done.stdout) == bool(flags)


def graphs_and_breaks(cases: list[str]) -> list[tuple]:
    """For each: (graphs, reasons of graph breaks) in steps, a validation and a step after it."""
    found = []
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for flags in cases:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        args = options.parser().parse_args([*TINY, *flags.split(), "--compile"])
        config = options.check(args, 2)
        trainer = gpu_check.trainer_of(args, config, torch.device("cpu"))
        trainer.step(0)
        trainer.step(1)
        trainer.validate(trainer.read)
        trainer.step(2)
        counters = torch._dynamo.utils.counters
        found.append((counters["stats"]["unique_graphs"], [*counters["graph_break"]]))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_block_is_one_graph(dtype):
    """One graph with gradients, and one without for validation."""
    cases = [f"--dtype {dtype} --zero {z}" for z in (0, 1, 3)]
    for found in launch(2, graphs_and_breaks, cases):
        assert found == [(2, [])] * len(cases)


def graphs_of_a_block(graphs: Graphs, *flags: str) -> float:
    """The number of graphs that one forward of a block runs."""
    args = options.parser().parse_args([*TINY, "--dtype", "float32", *flags])
    config = options.check(args, dist.get_world_size())
    trainer = gpu_check.trainer_of(args, config, torch.device("cpu"))
    trainer.step(0)
    return len(graphs.runs) / (2 * trainer.m)  # 2 blocks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flags, low, high", [
    ("", 1, 1), ("--tp 2", 7, 7), ("--schedule zb-h1", 9, 9),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("--tp 2 --sequence-parallel", 7, 7),
        ("--tp 2 --sequence-parallel --schedule zb-h1", 11, 11),
        ("--tp 2 --recompute selective --attention explicit", 8, math.inf))),
])  # fmt: skip
def test_the_graphs_of_a_block_are_as_many_as_docs_gpu_md_says(flags, low, high, monkeypatch):
    flags, graphs = ["--compile", *flags.split()], Graphs(monkeypatch)
    for n in launch(2 if "--tp" in flags else 1, graphs_of_a_block, graphs, *flags):
        assert low <= n <= high


class Gpus:
    """What torch says of the GPUs of this host."""

    def __init__(self, monkeypatch, *names: str):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])


def test_a_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    Gpus(monkeypatch, "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device, line = startup.pick_device("auto")
    assert device == torch.device("cuda", 1)
    assert line.endswith("NVIDIA H100 80GB HBM3; float32 matmuls without TF32")
    torch.set_float32_matmul_precision("high")
    try:
        assert startup.pick_device("cuda")[1].endswith("with TF32")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_more_local_ranks_than_gpus(monkeypatch):
    Gpus(monkeypatch, "NVIDIA A100-SXM4-80GB")
    done = forked(2, train_3d.main, *TINY, "--device", "cuda")
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    assert "error: --device cuda: 2 local ranks and 1 GPUs" in first and "start fewer" in first


def test_mixed_gpus(monkeypatch):
    """Each rank would compute, at the pace of the slowest, and none would say so."""
    kinds = {"0": "A100", "1": "H100"}
    monkeypatch.setattr(startup, "device_name", lambda device: kinds[train_3d.os.environ["RANK"]])
    done = forked(2, train_3d.main, *TINY)
    assert done.returncode == 2
    assert "error: rank 1 has device H100 and rank 0 has A100: start all" in done.stderr
    assert "files and devices" in done.stderr


def join_with_a_gpu_on_rank_1():
    kind = "cuda" if train_3d.os.environ["RANK"] == "1" else "cpu"
    startup.join_ranks(torch.device(kind), timeout=3)


def test_a_node_without_gpus_beside_one_with():
    """NCCL and gloo would wait for each other. torchrun ends rank 0 when rank 1 has spoken."""
    done = forked(2, join_with_a_gpu_on_rank_1)
    said = "rank 1 has device cuda and rank 0 has device cpu: give --device cpu, or use nodes"
    assert said in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    "name, flags, peak",
    [("NVIDIA H100 80GB HBM3", "--dtype bf16", 989), ("NVIDIA H100 PCIe", "--dtype bf16", 756),
     ("NVIDIA A100-SXM4-40GB", "--dtype bf16", 312), ("NVIDIA A100-SXM4-40GB", "", None),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "--dtype bf16", None),
     ("NVIDIA H100 NVL", "--dtype bf16", None), ("NVIDIA GB200", "--dtype bf16", None),
     ("NVIDIA TITAN V", "--dtype bf16", None), ("NVIDIA TITAN V", "--peak-tflops 110", 110),
     ("NVIDIA H200", "--dtype bf16 --peak-tflops 800", 800)],
)  # fmt: skip
def test_the_peak_is_known_or_given(name, flags, peak, monkeypatch):
    Gpus(monkeypatch, name)
    args = options.parser().parse_args(flags.split())
    assert (args.peak_tflops or startup.peak_tflops(torch.device("cuda", 0), args.dtype)) == peak


def test_the_flops_of_a_token_are_counted():
    """Of nano, by torch's counter; the embedding's h additions are no matmul."""
    config = dataclasses.replace(gpt.MODELS["nano"], attention="explicit")
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        gpt.GPT(config)(torch.zeros(3, config.seq_len, dtype=torch.int64))
    counted = flops.get_total_flops() / (3 * config.seq_len)
    assert gpt.forward_flops_per_token(config) == counted + config.n_embd


def test_mfu_of_a_run(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    path = tmp_path / "log"
    args = options.parser().parse_args(["--metrics", str(path), "--steps", "1"])
    config = gpt.MODELS["nano"]
    tokens = args.global_batch_size * config.seq_len
    tflop = 3e-12 * tokens * gpt.forward_flops_per_token(config)
    for peak, mfu in ((8 * tflop, 0.0625), (None, None)):
        logger = Logger(args, config, world_size=2, peak=peak)
        logger.start()
        logger.step(0, torch.tensor([3.0, 1.0]), 0.1)  # a second later
        logger.file.close()
        (row,) = map(json.loads, path.read_text().splitlines())
        assert (row["tokens_per_s"], row.get("mfu")) == (tokens, mfu)
        assert row["tflops_per_rank"] == pytest.approx(tflop / 2)


@pytest.mark.parametrize("axis", ["--tp", "--cp"])
def test_the_ranks_share_the_flops(axis, tmp_path):
    log = tmp_path / "log"
    done = forked(2, train_3d.main, *TINY, axis, 2, "--metrics", log, "--peak-tflops", 1)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    args = options.parser().parse_args(TINY)
    flops = 3 * gpt.forward_flops_per_token(options.check(args, 1))
    for row in rows:
        if "mfu" in row:
            each = flops * row["tokens_per_s"] / 2 / 1e12
            assert row["tflops_per_rank"] == pytest.approx(each) == row["mfu"]
    assert "TFLOP/s per rank  MFU" in done.stdout


def test_compile_with_offload_is_refused():
    args = options.parser().parse_args("--compile --recompute offload".split())
    with pytest.raises(ValueError, match="--compile with --recompute offload"):
        options.check(args, 1)


class FakeCuda:
    type = "cuda"


@pytest.mark.parametrize("name, optimizer", [("AdamW", "adamw"), ("SGD", "sgd")])
def test_the_optimizer_is_fused_where_there_are_kernels(name, optimizer, monkeypatch):
    seen = {}
    monkeypatch.setattr(torch.optim, name, lambda groups, **how: seen.update(how))
    for device, how in ((FakeCuda, "fused"), (torch.device("cpu"), "fused"),
                        (torch.device("meta"), "foreach")):  # fmt: skip
        trainer = object.__new__(train_3d.Trainer)
        trainer.args = options.parser().parse_args(["--optimizer", optimizer])
        trainer.device = device
        trainer.sync = type("Sync", (), {"pieces": staticmethod(list)})
        seen.clear()
        trainer._make_optimizer()
        assert seen[how] is True and len({"fused", "foreach"} & set(seen)) == 1


def check(monkeypatch, tmp_path) -> tuple[str, str]:
    """(what make gpu-check writes, what it complains of), on the CPU."""
    graphs, plain = Graphs(monkeypatch), gpu_check.seconds

    def watched(loops, steps, device):
        compiled = [getattr(getattr(loop, "args", None), "compile", False) for loop in loops]
        before = len(graphs.runs)
        taken = plain(loops, steps, device)
        blocks = sum(2 * 4 * (2 + steps) for one in compiled if one)
        assert graphs.runs[before:] == [4] * blocks, (compiled, graphs.runs[before:])
        return taken

    monkeypatch.setattr(gpu_check, "seconds", watched)
    done = forked(
        1, gpu_check.main, "--steps", 1, "--out", tmp_path / "md", "--vocab-size", 300
    )  # fmt: skip
    assert done.returncode == bool(done.stderr), done
    return (tmp_path / "md").read_text(), done.stderr


@pytest.mark.filterwarnings("ignore")
def test_gpu_check_without_a_gpu(monkeypatch, tmp_path):
    said, complaint = check(monkeypatch, tmp_path)
    assert not complaint and "no GPU: a small model on the CPU" in said
    for what in ("losses and norms", "gradients", "parameters", "eager", "compiled", "none", "full",
                 "offload"):  # fmt: skip
        assert said.count(f"\n| {what} |") == 1, what
    assert "--vocab-size=300 --global-batch-size=16" in said


def test_free_running_steps_are_synchronised_once_per_window(monkeypatch):
    """Three windows of three steps per loop, in turns. A step of the loop b takes 2 s."""
    events, clock = [], [0.0]

    def now(device) -> float:
        events.append("now")
        return clock[0]

    class Loop:
        def __init__(self, name: str, seconds: float):
            self.name, self.seconds = name, seconds

        def step(self, step: int) -> None:
            events.append(f"{self.name}{step}")
            clock[0] += self.seconds

    monkeypatch.setattr(gpu_check, "now", now)
    loops = [Loop("a", 1.0), Loop("b", 2.0)]
    assert gpu_check.free_running_seconds(loops, 3, torch.device("cpu")) == [1.0, 2.0]
    windows = [["now", *(f"{name}{step}" for step in range(3)), "now"] for name in "ab"]
    assert events == (windows[0] + windows[1]) * 3
    events.clear()
    assert gpu_check.seconds(loops, 1, torch.device("cpu")) == [1.0, 2.0]
    assert events[:6] == ["now", "a0", "now", "now", "b0", "now"] and events.count("now") == 12


@pytest.mark.filterwarnings("ignore")
def test_gpu_check_fails_where_the_loops_differ(monkeypatch, tmp_path):
    plain = gpu_check.Bare.step

    def with_half_a_batch(self, step):
        self.args.global_batch_size //= 1 if self.args.dtype == "bf16" else 2
        return plain(self, step)

    monkeypatch.setattr(gpu_check.Bare, "step", with_half_a_batch)
    monkeypatch.setattr(gpu_check, "STEPS", 1)
    _, complaint = check(monkeypatch, tmp_path)
    assert complaint.startswith("MISMATCH: | losses and norms |"), complaint


@pytest.mark.parametrize("how, device", [("fused", "meta"), ("foreach", "cpu")])
def test_a_resumed_step_is_where_adamw_reads_it(how, device):
    piece = torch.zeros(3, device="meta", requires_grad=True)
    optimizer = torch.optim.AdamW([piece], **{how: True})
    numbers = {"moments": ["exp_avg", "exp_avg_sq"], "scalars": {"step": 7.0}}
    checkpoint.init_state([("p", piece, piece, 0)], optimizer, numbers)
    state = optimizer.state[piece]
    assert state["step"].device.type == device and state["exp_avg"].device.type == "meta"
