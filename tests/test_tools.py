"""The judge is judged: it must see what is wrong, and end when ranks do not."""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import checkpoint
import context_parallel
import data
import ddp
import gpt
import measure
import options
import schedules
import startup
import train_3d
import zero
from measure import TOLERANCE
from tools import draw, sample
from tools.bench import checkpoint as bench_checkpoint
from tools.bench import links, memory
from tools.plan import bubble
from tools.verify import fuzz, kill_ranks, parity, races
from tools.verify.oracle import Case, Errors, judge, launch


class Silent:
    """An all-reduce that does not happen."""

    def __init__(self, flat, group):
        pass

    def wait(self):
        pass


def test_a_missing_all_reduce_is_seen():
    sync = functools.partial(ddp.DDP, reduce=Silent)
    for optimizer in ("sgd", "adamw"):
        errors = judge(Case(d=2, optimizer=optimizer), {"sync": sync})
        assert min(errors.gradient, errors.norm, errors.parameter) > 1e-6, errors
        assert errors.worst > TOLERANCE


def test_a_rank_that_fails_dies_or_hangs_ends_the_launch():
    def fail():
        assert dist.get_rank() == 0, "on purpose"
        dist.barrier()

    def die():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    def hang():
        if dist.get_rank() == 1:
            signal.pause()

    with pytest.raises(RuntimeError, match="rank 1 failed:(.|\n)*on purpose"):
        launch(2, fail)
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9|rank 0 failed"):
        launch(2, die)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] hang: 2 s are over"):
        launch(2, hang, timeout=2)
    assert multiprocessing.active_children() == []


def test_a_rank_does_not_collect_what_was_garbage_before_it():
    """A dead process group's destructor waits for its threads, which no fork has."""

    class Group:
        def __init__(self):
            self.cycle, self.owner = self, os.getpid()

        def __del__(self):
            if os.getpid() != self.owner:
                os._exit(3)

    def collect():
        gc.collect()

    Group()
    launch(1, collect)
    gc.collect()


def test_a_case_replays_from_its_own_line():
    rng = random.Random(0)
    for _ in range(50):
        case = fuzz.draw_case(rng)
        assert Case(**json.loads(str(case))) == case


def test_fuzz_draws_valid_and_invalid_ones():
    rng = random.Random(0)
    reasons = [fuzz.refusal(fuzz.draw_case(rng)) for _ in range(200)]
    refused = [r for r in reasons if r]
    assert 5 < len(refused) < 60
    assert all("\n" not in r for r in refused) and len({r.split()[0] for r in refused}) >= 2


def test_fuzz_draws_context_parallelism():
    """Every method in valid cases, and resumed runs with another c. Few are refused: --seq-len and
    --n-head are multiples of what c and t require."""
    rng = random.Random(0)
    cases = [case for case in (fuzz.draw_case(rng) for _ in range(300)) if case.c > 1]
    valid = [case for case in cases if fuzz.refusal(case) is None]
    assert len(cases) > 90 and 0.6 * len(cases) < len(valid) < len(cases)
    methods = Counter(case.cp_attention for case in valid)
    assert {*methods} == {*context_parallel.METHODS} and min(methods.values()) > 15
    resumed = [case.resume["c"] for case in valid if case.resume]
    assert 1 in resumed and max(resumed) > 1
    assert all(case.world_size <= 8 for case in cases)


def test_fuzz_reports_a_failure_with_its_replay_line(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "judge", lambda case: judge(case)._replace(norm=1e-6))
    monkeypatch.setattr("sys.argv", ["fuzz", "--case", '{"d": 2}'])
    with pytest.raises(SystemExit) as exit_:
        fuzz.main()
    out = capsys.readouterr().out
    assert exit_.value.code == 1 and "FAIL" in out
    assert "replay: python -m tools.verify.fuzz --case '{\"d\": 2}'" in out


def test_what_fails_is_made_small(monkeypatch):
    """Here what fails has two stages, an untied head and more than two blocks."""
    def fails(case: Case) -> tuple[bool, str]:
        return not (case.p > 1 and not case.tied and case.n_layer > 2), ""

    monkeypatch.setattr(fuzz, "verdict", fails)
    large = Case(t=2, p=4, d=1, m=5, zero=0, schedule="zb-h1", recompute="full", tied=False,
                 n_layer=7, resume=dict(at=1, m=5, b=2, t=1, p=1, d=1))  # fmt: skip
    small = fuzz.shrink(dataclasses.replace(large, resume=None))
    assert (small.t, small.p, small.m, small.b, small.n_layer) == (1, 2, 1, 1, 3)
    assert (small.schedule, small.recompute, small.tied) == ("1f1b", "none", False)
    assert fuzz.refusal(small) is None and large.batches == [10, 10]


def test_coverage_counts_pairs_that_met():
    case = Case(t=2, d=2, zero=3, sequence=True)
    assert fuzz.features(case)[:3] == ["tp", "sp", "zero3"]
    table = fuzz.coverage([case] * 3).splitlines()
    assert table[0] == "tp    " and table[1] == "sp       3"
    n = len(fuzz.features(case))
    met, pairs = re.match(r"(\d+) of (\d+) pairs of features were tested", table[-1]).groups()
    assert int(met) == n * (n - 1) // 2 and int(pairs) >= 405


class OneChunk(schedules.Entry):
    """A schedule whose number of chunks is wrong, as in a list that it is missing from."""

    chunks = 1


def fuzz_without_ranks(monkeypatch, capsys, n: int) -> tuple[int, list[str]]:
    """(exit code, the last lines) of fuzz, with the refusals of train_3d.py. What is not refused
    passes without being run."""
    monkeypatch.setattr(fuzz, "judge", lambda case: Errors(0.0, 0.0, 0.0, 0.0, "loss"))
    with pytest.raises(SystemExit) as exit_:
        fuzz.main(["--n", str(n)])
    out = capsys.readouterr().out.splitlines()
    (last,) = [i for i, line in enumerate(out) if "equal to one process" in line]
    return exit_.value.code, out[last + 1 :]


def test_a_feature_that_is_refused_far_more_often_than_the_others_is_a_failure(monkeypatch, capsys):
    assert fuzz_without_ranks(monkeypatch, capsys, 500) == (0, [])
    broken = schedules.SCHEDULES | {"zb-v": OneChunk(*schedules.SCHEDULES["zb-v"])}
    monkeypatch.setattr(schedules, "SCHEDULES", broken)
    code, lines = fuzz_without_ranks(monkeypatch, capsys, 500)
    assert code == 1 and len(lines) == 1 and re.match(r"zb-v: \d+ of \d+ refused, and", lines[0])


def test_a_few_refusals_are_chance():
    """All of 4 cases, or 20 % next to 10 %."""

    def lines(zb_v: int, of: int, others: int, of_others: int) -> list[str]:
        refused = [True] * zb_v + [False] * (of - zb_v)
        refused += [True] * others + [False] * (of_others - others)
        drawn = [Case(p=2, schedule="zb-v")] * of + [Case(p=2)] * of_others
        return fuzz.refused_too_often(drawn, refused)

    assert lines(4, 4, 5, 50) == lines(200, 1000, 100, 1000) == lines(1, 1, 0, 1) == []
    assert [line.split(":")[0] for line in lines(16, 20, 5, 50)] == ["zb-v"]
    assert lines(16, 20, 5, 50)[0].startswith("zb-v: 16 of 20 refused, and 5 of the other 50: ")


def test_options_without_an_effect_are_no_features():
    plain = {"m>1", "b>1", "mask", "clip"}
    for case in (Case(sequence=True), Case(schedule="zb-v"), Case(zero=3, reshard=0),
                 Case(cp_attention="ulysses")):  # fmt: skip
        assert {*fuzz.features(case)} == plain, case
    assert {*fuzz.features(Case(c=2, zero=1))} == plain | {"ring", "zero1"}
    hybrid = [Case(d=4, zero=3, shard_size=k) for k in (1, 2, 4)]
    assert ["hybrid" in fuzz.features(case) for case in hybrid] == [False, True, False]


@pytest.mark.parametrize("path", [
    "DDP, buckets", "ZeRO-1",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("zb-v", "TP and SP", "CP, ring")),
])  # fmt: skip
def test_a_slice_of_races(path, capsys, monkeypatch):
    monkeypatch.setattr(races, "PATHS", {path: races.PATHS[path]})
    with pytest.raises(SystemExit) as end:
        races.main(["--n", "1"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and out.count("equal bit by bit") == 1, out


@pytest.mark.slow
def test_parity_lists_every_layout_once_and_fails_loudly(monkeypatch, capsys):
    cases = parity.cases(8, n_head=24)
    sizes = {(c.t, c.c, c.p, c.d) for c in cases}
    assert len(sizes) == 20 and all(math.prod(size) == 8 for size in sizes)
    assert len({str(c) for c in cases}) == len(cases) >= 140
    monkeypatch.setattr("sys.argv", ["parity", "--nproc", "2"])
    with pytest.raises(SystemExit) as exit_:
        parity.main()
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "0 mismatches" in out
    assert out.count(" ok\n") == 10 + len(schedules.SCHEDULES)
    errors = Errors(float("nan"), 0.0, 0.0, 0.0, "loss")
    monkeypatch.setattr(parity, "judge", lambda case: errors)
    with pytest.raises(SystemExit) as exit_:
        parity.main()
    assert exit_.value.code == 1 and "MISMATCH" in capsys.readouterr().out


@pytest.mark.slow
def test_resident_memory_falls_as_predicted():
    said = []
    config = gpt.GPTConfig(n_layer=3, n_head=8, n_embd=512, vocab_size=256, seq_len=16)
    assert memory.table(config, 2, torch.float32, said.append), said
    assert len(said) == 4 and all("ok" in line for line in said)


@pytest.mark.slow
def test_resident_activations_fall_as_predicted(monkeypatch):
    said = []
    config = gpt.GPTConfig(3, 8, 128, 256, seq_len=512, attention="explicit")
    assert memory.activations_table(config, 2, said.append), said
    assert len(said) == 3 and all("ok" in line for line in said)
    monkeypatch.setattr("activation_ckpt.checkpoint_blocks", lambda blocks, policy: None)
    assert not memory.activations_table(config, 2, lambda line: None), "nothing was dropped"


@pytest.mark.slow
def test_a_leak_would_show_in_resident_memory(monkeypatch):
    config = gpt.GPTConfig(n_layer=3, n_head=8, n_embd=512, vocab_size=256, seq_len=16)
    monkeypatch.setattr("zero.Unit.reshard", zero.Unit.wait)  # full parameters stay
    assert not memory.table(config, 2, torch.float32, lambda line: None)


@pytest.mark.slow
def test_a_long_row_needs_several_ranks():
    said = []
    assert memory.context_table(memory.LONG, 4, memory.ALLOWED, said.append), said
    assert memory.LONG.seq_len == 32768 and len(said) == 5 and "ratio 1.00 <= 1.10  ok" in said[0]
    assert [line.endswith("ok") for line in said] == [True, False, True, True, True]  # gathered


@pytest.mark.slow
def test_too_much_memory_on_a_rank_would_show(monkeypatch):
    config, said = dataclasses.replace(memory.LONG, seq_len=4096), []
    assert not memory.context_table(config, 2, memory.ALLOWED, said.append)  # one process fits
    assert [line.endswith("MISMATCH") for line in said] == [False, False, False, True, False]
    plain = context_parallel.parallelize_attention

    def always_gathered(model, group, _):
        plain(model, group, "gathered")

    monkeypatch.setattr("context_parallel.parallelize_attention", always_gathered)
    assert not memory.context_table(config, 2, 20 * 10**6, said.append)
    assert "ring" in said[5] and said[5].endswith("<= 1.10  MISMATCH")


class Clock:
    """In place of the module `time`: each reading is `tick` seconds after the previous one."""

    def __init__(self):
        self.now, self.tick = 0.0, 1.0

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    def process_time(self) -> float:
        return 0.0


def links_table():
    """A call takes rank + 1 seconds. Also the collectives that ran, by operation."""
    said, clock = [], Clock()
    clock.tick = dist.get_rank() + 1.0
    with pytest.MonkeyPatch.context() as patch, measure.Collectives() as seen:
        patch.setattr(links, "time", clock)
        rows = links.table([1, 16], repeats=4, device=torch.device("cpu"), say=said.append)
    ran = {operation: tuple(seen.total(operation=operation))
           for operation in ("reduce_scatter", "all_gather", "send", "recv")}  # fmt: skip
    return rows, links.fit(rows), said, ran


def test_links_measures_every_operation_on_every_group():
    (rows, fits, said, ran), _, (third, _, _, _) = launch(3, links_table)
    assert third == [r for r in third if r["ranks"] == 3] and len(third) == 8
    keys = [(r["ranks"], r["operation"], r["bytes"]) for r in rows]
    sizes = {2: (1024, 16384), 3: (1020, 16380)}  # whole shards
    assert keys == [(n, op, b) for n in (2, 3) for op in links.WIRE for b in sizes[n]]
    assert all((r["ms"], r["spread_ms"]) == (1e3 * r["ranks"], 0) for r in rows)
    # 2 + 4 calls of each size on each group, and one of 1000 numbers a rank for the identity.
    numbers = 6 * (1024 + 16384 + 1020 + 16380) // 4
    assert ran["reduce_scatter"] == ran["all_gather"] == (26, numbers + 2000 + 3000)
    assert ran["send"] == (24, numbers) and ran["recv"] == (0, 0)  # rank 0 to rank 1
    by_key = dict(zip(keys, rows, strict=True))
    assert by_key[3, "all_reduce", 1020]["wire_bytes"] == pytest.approx(1360)
    assert by_key[3, "all_gather", 1020]["wire_bytes"] == pytest.approx(680)
    assert [f["latency_us"] for f in fits] == [2e6] * 4 + [3e6] * 4
    assert sum("all-reduce = reduce-scatter + all-gather within" in line for line in said) == 2


def test_a_fit_recovers_latency_and_bandwidth():
    rows = [
        {"ranks": 2, "operation": "p2p", "bytes": b, "wire_bytes": b, "ms": 0.1 + b / 2e9 * 1e3}
        for b in (0, 10**6, 10**8)
    ]
    (fit,) = links.fit(rows)
    assert fit["latency_us"] == pytest.approx(100) and fit["gb_per_s"] == pytest.approx(2.0)


def drawn(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["draw", *arguments])
    draw.main()
    return capsys.readouterr().out


def test_a_schedule_is_drawn_and_written_as_a_file(monkeypatch, capsys, tmp_path):
    out = drawn(monkeypatch, capsys, "zb-v", "--p", "8", "--m", "16")
    timeline, last = out.strip().rsplit("\n\n", 1)
    assert max(map(len, timeline.splitlines())) <= 160
    assert last.split()[:3] == ["zb-v", "bubble", "0.073"] and last.endswith(" 8" * 8)  # 7/96
    staves = [staff.splitlines() for staff in timeline.split("\n\n")]
    for rank in range(8):  # everything is there once
        words = " ".join(staff[rank].split("|")[1] for staff in staves).replace(".", "").split()
        assert sorted(words) == sorted(f"{k}{i}" for k in "FBWfbw" for i in range(16))
    path = tmp_path / "own"
    flags = "interleaved --p 2 --virtual-stages 3 --text".split()
    path.write_text(drawn(monkeypatch, capsys, *flags))
    assert schedules.read_schedule(str(path), 2, 8) == schedules.interleaved(2, 8, 3)
    path.write_text(drawn(monkeypatch, capsys, "zb-v", "--text"))
    assert schedules.read_schedule(str(path), 4, 8) == schedules.zb_v(4, 8)
    assert drawn(monkeypatch, capsys, str(path)).count("F7") == 4
    assert [line.split()[0] for line in drawn(monkeypatch, capsys, "all").splitlines()] == [
        *schedules.SCHEDULES
    ]
    with pytest.raises(SystemExit):
        drawn(monkeypatch, capsys, str(path), "--p", "2")
    assert "4 ranks: expected one line for each of --pp 2" in capsys.readouterr().err


def test_colors_stand_for_letters():
    painted = draw.in_color(schedules.draw(schedules.zb_v(2, 3)))
    plain = "".join(painted.split("\033[0m"))
    assert "F" not in plain and "\033[30;44m0" in plain and "\033[30;103m2" in plain


def test_mean_times_are_by_kind_and_stage():
    spans = schedules.simulate(schedules.zb_v(2, 3), lambda a: 1.0 + a.microbatch + 10.0 * a.stage)
    mean = bubble.mean_times(spans)
    assert mean == {(kind, k): 2.0 + 10.0 * k for kind in "FBW" for k in range(4)}


@pytest.mark.slow
def test_a_drill_of_one_kill(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["drill.py", "--drills", "1", "--nproc", "2"])
    with pytest.raises(SystemExit) as end:
        kill_ranks.main()
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    assert "1 kills; 28 of 28 losses and norms equal" in out and out.count("killed after") == 1


def test_a_drill_sees_a_loss_that_differs(tmp_path):
    rows = [{"step": 0, "loss": 1.5, "grad_norm": 1.0}, {"step": 0, "loss": 1.5 + 2**-50,
            "grad_norm": 1.0}, {"step": 1, "val_loss": 3.0}]  # fmt: skip
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    assert {step: len(seen) for step, seen in kill_ranks.rows(str(tmp_path)).items()} == {0: 2}


def sampled(folder: str, *flags: str) -> str:
    """What `make sample` prints, by one process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", ["sample.py", "--checkpoint-dir", folder, *flags])
        patch.setattr(dist, "destroy_process_group", lambda: None)  # launch does, at its end
        patch.setattr(startup, "join_ranks", lambda *_: None)
        sample.main()
    return out.getvalue()


def trained(case: Case, folder: str, text: str) -> None:
    args = options.parser().parse_args([*case.arguments(), "--data", text, "--lr", "1e-2"])
    config = options.check(args, case.world_size)
    tokens = np.frombuffer(b"abcdefgh" * 100, dtype=np.uint8)

    def read(step: int, rows: range):
        return data.batch(tokens, step, rows, config.seq_len, seed=0)

    trainer = train_3d.Trainer(args, config, read, torch.device("cpu"))
    for step in range(60):
        args.steps = 60
        trainer.step(step)
    disk = checkpoint.Checkpoints(folder, 1, dist.group.WORLD)
    mine, numbers = trainer.state_to_save()
    disk.save(60, mine, options.run_of(args, config) | {"optimizer": numbers})
    disk.wait()
    assert disk.failed is None


@pytest.mark.slow
def test_sampling_from_a_checkpoint(tmp_path):
    """An alphabet, learned by 2 x 2 ranks, said by one; cold, and of the one likeliest token."""
    case = Case(t=2, p=2, n_layer=2, n_embd=48, vocab_size=256, seq_len=8, dtype="float32",
                clip=1.0, masked=False, b=8)  # fmt: skip
    launch(4, trained, case, str(tmp_path), str(tmp_path))
    flags = ["--prompt", "abc", "--n", "9"]
    for how in (["--temperature", "0"], ["--top-k", "1", "--temperature", "9"],
                ["--temperature", "0.01"]):
        (text,) = launch(1, sampled, str(tmp_path), *flags, *how)
        assert text == "abcdefghabcd\n", how
    (hot,), (again,) = (launch(1, sampled, str(tmp_path), *flags, "--temperature", "9")
                        for _ in range(2))  # fmt: skip
    assert hot == again != "abcdefghabcd\n"


def bench_of_checkpoints(name: str, folder: str, broken: bool = False) -> dict:
    """torch.save takes 3 seconds, dcp.save 4, a step 5, async_save 6, to start a save 7, to wait
    for it 11. If `broken`, dcp.save writes zeros."""
    clock, dcp = Clock(), SimpleNamespace(**vars(bench_checkpoint.dcp))  # checkpoint.py has another
    clock.tick = 0.0

    def takes(seconds: float, function):
        def call(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return call

    def of_zeros(state: dict, plain=dcp.save, **how):
        return plain({key: torch.zeros_like(t) for key, t in state.items()}, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_checkpoint, "time", clock)
        patch.setattr(bench_checkpoint, "dcp", dcp)
        patch.setattr(bench_checkpoint, "open", takes(3, open), raising=False)  # for torch.save
        if broken:
            patch.setattr(dcp, "save", of_zeros)
        for owner, function, seconds in (
            (dcp, "save", 4), (train_3d.Trainer, "step", 5), (dcp, "async_save", 6),
            (checkpoint.Checkpoints, "save", 7), (checkpoint.Checkpoints, "wait", 11),
        ):  # fmt: skip
            patch.setattr(owner, function, takes(seconds, getattr(owner, function)))
        return bench_checkpoint.measure(name, 24, folder, 1, True)


@pytest.mark.slow
def test_a_checkpoint_bench_measures_what_it_says(monkeypatch, tmp_path):
    monkeypatch.setitem(bench_checkpoint.SIZES, 24, {"n_layer": 2, "n_head": 12})
    with torch.device("meta"):
        size = sum(p.numel() for p in gpt.GPT(gpt.GPTConfig(2, 12, 24, 256, 64)).parameters())
    save = 7 + 2 * 11  # it waits twice: for an earlier save, and for its end
    took = {"torch.save": 3, "save": save, "dcp.save": 4, "dcp.save, 2 threads": 4, "no save": 0,
            "pause": 7 + 11, "async_save": 6, "pause, step": 5, "async_save, step": 5,
            "no save, step": 5}  # fmt: skip
    for name, case in bench_checkpoint.CASES.items():
        ranks = launch(case.world_size, bench_of_checkpoints, name, str(tmp_path))
        assert not os.listdir(tmp_path), name
        for rank, found in enumerate(ranks):
            expected = took | ({"torch.save": 0} if rank > 0 else {})
            assert found["seconds"] == {what: [t, t] for what, t in expected.items()}, name
            assert found["bytes"] == 12 * size, name
        on_disk = ranks[0]["on_disk"]
        assert set(on_disk) == set(bench_checkpoint.KINDS) - {"no save"}, name
        assert min(on_disk.values()) > 12 * size, name
    with pytest.raises(RuntimeError, match="dcp.save, 2 threads: it loads other values"):
        launch(1, bench_of_checkpoints, "one rank", str(tmp_path), True)


def test_a_checkpoint_bench_compares_pairs_with_the_faster_dcp(monkeypatch):
    """Two launches of two pairs; the second launch saves in twice the time."""
    seconds = {what: [1.0] * 4 for pair in bench_checkpoint.RATIOS.values() for what in pair}
    seconds |= {"dcp.save, 2 threads": [0.5, 0.25, 1.0, 0.5], "save": [1.0, 2.0, 2.0, 4.0]}
    slower = seconds | {"save": [2.0 * t for t in seconds["save"]]}
    disk = {"save": 9, "dcp.save, 2 threads": 10}
    found = [{"bytes": 8, "on_disk": disk, "seconds": each} for each in (seconds, slower)]
    rows = {r["column"]: r for r in bench_checkpoint.rows_of("t 2", 256, found)}
    assert list(rows) == list(bench_checkpoint.RATIOS)
    row = rows["save / dcp.save"]
    assert (row["over"], row["over_ms"], row["n"]) == ("dcp.save, 2 threads", 500.0, 4)
    assert row["on_disk"] == [9, 10]
    assert row["ratios"] == [4.0, 4.0, 8.0, 8.0] and row["ratio"] == 6.0
    assert rows["save / torch.save"]["ratios"] == [1.5, 3.0, 3.0, 6.0]
    assert row["interval"] == (4.0, 8.0)

    # A launch counts the slowest rank.
    ranks = [{"bytes": 8, "seconds": {"save": times}} for times in ([1.0, 4.0], [3.0, 2.0])]
    monkeypatch.setattr(bench_checkpoint, "launch", lambda *args, **kwargs: ranks)
    monkeypatch.setattr(bench_checkpoint.stats, "undisturbed", lambda once, tries: (once(), 0.0))
    run = bench_checkpoint.run("t 2", 256, 1, False, None, 1)
    assert run["seconds"] == {"save": [3.0, 4.0]}
