"""The benchmarks: statistics, what is compared with what, and the tables made from the results."""

import contextlib
import functools
import itertools
import json
import re
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import context_parallel
import gpt
from tools.bench import compare, stats, tables, variants
from tools.bench.variants import ONE, SILENT, SUITES, Comparison
from tools.verify.oracle import launch

TINY = gpt.GPTConfig(2, 2, 16, 256, 8)


# --- statistics -----------------------------------------------------------------------------------


def test_a_slow_drift_of_the_machine_does_not_change_the_ratio_of_a_launch():
    """Turns A B B A, each step taking longer than the one before it."""
    assert stats.launch_ratio([1.0, 4.0], [2.0, 3.0]) == 1.0
    assert stats.launch_ratio([1.0, 4.0, 9.0, 12.0], [2.0, 3.0, 10.0, 11.0]) == 1.0
    assert stats.launch_ratio([2.0, 2.0, 2.0, 2.0, 9.0, 9.0], [1.0] * 6) == 2.0  # a median


def test_the_interval_covers_the_median_in_19_of_20_samples():
    draw = torch.Generator().manual_seed(0)
    samples = [(1 + 0.1 * torch.randn(15, generator=draw)).tolist() for _ in range(200)]
    bounds = [stats.interval(sample) for sample in samples]
    covered = sum(low <= 1.0 <= high for low, high in bounds) / len(samples)
    assert 0.9 < covered < 0.99
    assert all(low <= statistics.median(s) <= high
               for s, (low, high) in zip(samples, bounds, strict=True))  # fmt: skip
    assert stats.interval([1.5] * 10) == (1.5, 1.5)


def test_a_launch_is_repeated_while_other_processes_use_the_cores(monkeypatch):
    busy, now = iter([3.0, 1.0, 0.01, 2.0]), itertools.count()
    clock = {"used": 0.0}

    def run():
        clock["used"] += 10.0 * next(busy)  # CPU seconds of others, in a launch of 10 s
        return clock["used"]

    class Times(tuple):
        elapsed = property(lambda self: 10.0 * next(now))

    monkeypatch.setattr(stats, "machine_cpu_seconds", lambda: clock["used"])
    monkeypatch.setattr(stats.os, "times", lambda: Times((0.0, 0.0, 0.0, 0.0)))
    result, foreign = stats.undisturbed(run)
    assert (result, foreign) == (pytest.approx(40.1), pytest.approx(0.01))
    assert next(busy) == 2.0  # the fourth launch did not run
    busy = iter([3.0, 1.0, 2.0, 2.0])
    assert stats.undisturbed(run, tries=3)[1] == pytest.approx(1.0)  # the least disturbed


def cores_of_threads():
    """The cores of all threads of this process, among them gloo's."""
    tasks = stats.Path("/proc/self/task").iterdir()
    lines = [line for task in tasks for line in (task / "status").read_text().splitlines()
             if line.startswith("Cpus_allowed_list")]  # fmt: skip
    return {line.split()[1] for line in lines}


@pytest.mark.skipif(len(stats.cores()) < 2, reason="needs two cores")
def test_all_threads_of_a_rank_are_bound_to_its_core():
    bind = functools.partial(stats.bind, ranks=2)
    assert launch(2, cores_of_threads, before=bind) == [{str(core)} for core in stats.cores()[:2]]


def test_provenance_names_commit_date_and_machine(tmp_path):
    found = stats.provenance("make x")
    assert {"command", "commit", "date", "cpu", "cores", "torch", "backend"} == {*found}
    stats.write(tmp_path / "x.json", found | {"rows": [{"a": 1 / 3}, {3: None}]})
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"a": 0.33333}, {"3": None}]


# --- one launch -----------------------------------------------------------------------------------


class Clock:
    """In place of the module `time`: it stands still, except when `now` is set."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


def test_ratios_are_those_of_the_slowest_rank_over_the_fastest_of_pytorch(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(compare, "time", clock)

    def taking(seconds, model, group):
        seconds *= 10 if dist.get_backend(group) == "fake" else 1

        def step(batch, valid):
            clock.now += seconds * (1 + dist.get_rank()) / 2  # rank 1 takes longer
            return torch.zeros(()) + 1.0

        return step

    def build(seconds):
        return functools.partial(taking, seconds)

    both = Comparison({"a": build(3.0), "b": build(5.0)}, {"x": build(4.0), "y": build(2.0)})
    suite = variants.Suite({"both": both}, d=2)
    monkeypatch.setattr(variants, "SIZES", {256: TINY})
    launches = [compare.run(suite, both, 256, 2, i == 0, 1) for i in range(2)]
    rows = {row["variant"]: row for row in compare.rows_of(suite, 256, "both", launches)}
    assert {name: row["ms"] for name, row in rows.items()} == {
        "a": 3e3, "b": 5e3, "x": 4e3, "y": 2e3, SILENT: 30e3
    }  # fmt: skip
    assert {name: row.get("ratio") for name, row in rows.items()} == {
        "a": 1.5, "b": 2.5, "x": 2.0, "y": None, SILENT: 15.0
    }  # fmt: skip
    assert rows["y"]["best"] and rows["a"]["over"] == "y" and rows["a"]["ratios"] == [1.5, 1.5]
    assert "| both | b | 256 | 5000.0 ms | 2.500 (2.500 to 2.500) | 2 |" in compare.markdown(
        [*rows.values()]
    )


def test_variants_take_turns_forwards_and_backwards(monkeypatch):
    """Each step takes longer than the one before it."""
    clock, steps = Clock(), itertools.count(1)
    monkeypatch.setattr(compare, "time", clock)

    def build(model, group):
        def step(batch, valid):
            clock.now += next(steps)
            return torch.zeros(()) + 1.0

        return step

    both = Comparison({"a": build, "b": build}, {"x": build})
    monkeypatch.setattr(variants, "SIZES", {256: TINY})
    suite = variants.Suite({"both": both})
    rows = compare.rows_of(suite, 256, "both", [compare.run(suite, both, 256, 2, True, 1)])
    assert [row.get("ratio", 1.0) for row in rows] == [1.0] * 3


def test_variants_that_train_different_models_end_the_benchmark(monkeypatch):
    def slower(model, group):
        monkeypatch.setattr(
            variants, "adamw", functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)
        )
        return variants.plain_step(model, group)

    two = Comparison({"ours": variants.plain_step}, {"theirs": slower})
    monkeypatch.setattr(variants, "SIZES", {256: TINY})
    with pytest.raises(SystemExit, match="losses of 'theirs' and 'ours' differ by"):
        compare.run(variants.Suite({"two": two}), two, 256, 1, False, 1)


def run_suite(name, tmp_path, monkeypatch, *more) -> dict:
    for sizes in ("SIZES", "LONG"):
        monkeypatch.setattr(variants, sizes, {256: TINY})
    out = tmp_path / "bench.json"
    monkeypatch.setattr(
        "sys.argv",
        f"bench {name} --launches 1 --pairs 1 --tries 1 --out {out}".split() + [*more],
    )
    compare.main()
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.slow
def test_all_variants_of_a_suite_train_alike(name, tmp_path, monkeypatch, capsys):
    suite, more = SUITES[name], []
    if name == "3d":  # 8 ranks: only one comparison
        more = ["--only", "replicated parameters"]
        readings = itertools.count()  # thread_time is a second more at each reading
        clock = SimpleNamespace(**vars(time) | {"thread_time": lambda: next(readings)})
        monkeypatch.setattr(compare, "time", clock)
    written = run_suite(name, tmp_path, monkeypatch, *more)
    rows = written["rows"]
    shown = more[1:] or suite.comparisons
    assert [(r["comparison"], r["variant"]) for r in rows] == [
        (c, v) for c in shown for v in suite.comparisons[c].variants(suite.ranks)
    ]
    assert all(r["loss_difference"] < 1e-5 for r in rows)
    for r in rows:
        assert ("ratio" in r) == (not r["best"] and r["comparison"] != "schedules"), r
        assert r["side"] == SILENT or (r["calls"] > 0) == (r["side"] != ONE and suite.ranks > 1), r
    found = {(r["comparison"], r["variant"]): r for r in rows}
    psi = sum(p.numel() for p in gpt.GPT(TINY).parameters())
    if name == "dp":  # 2 (d-1)/d Psi for an all-reduce, (d-1)/d Psi for each of the others
        for variant in suite.comparisons["DDP"].ours | variants.TORCH_DDP:
            assert found["DDP", variant]["sent_mb"] == pytest.approx(4e-6 * psi, 1e-3), variant
        assert found["ZeRO-1", "Zero1"]["sent_mb"] == pytest.approx(4e-6 * psi, 0.01)
        for variant in ("Zero3", "fully_shard"):
            assert 5e-6 * psi < found["ZeRO-3", variant]["sent_mb"] < 6.1e-6 * psi
    if name == "tp":  # the same all-reduces; DTensor's are functional collectives
        ours, theirs = (found["TP", v]["sent_mb"] for v in ("tensor parallel", "DTensor"))
        assert ours == pytest.approx(theirs, 0.01)
    if name == "pp":
        assert all(len(r.get("bubble", ())) == 2 * (r["comparison"] == "schedules")
                   for r in rows if r["side"] == "ours")  # fmt: skip
    if name == "cp":  # of the gradients 2 (c-1)/c, of 2 layers
        for method in context_parallel.METHODS:
            costs = context_parallel.predicted_payload(method, 1, 8, 2, 2, 8, 2)
            of_sends = 1 if method == "ring" else 1 / 2  # (c-1)/c of a collective
            sent = psi + 2 * of_sends * sum(elements for _, elements in costs.values())
            row = found["context parallelism", method]
            assert row["sent_mb"] == pytest.approx(4e-6 * sent, 1e-3) and row["s"] == 256
    # Each takes one of seven seconds.
    share = r"h 256: data, norm and log take 42.86% of .*: data 14.29%, norm 14.29%, log 14.29%"
    assert len(re.findall(share, capsys.readouterr().out)) == (name == "3d")


def silent_step(build):
    """Whether a step over the fake backend calls gloo."""
    with contextlib.suppress(ValueError):
        dist.init_device_mesh("cpu", (2,))
    fake = dist.new_group(backend="fake")
    step = build(gpt.build(TINY, seed=0), fake)
    if dist.get_rank() == 1:
        return True  # rank 0 does not wait for it
    x = torch.zeros(2, 8, dtype=torch.long)
    step([(x, x)], 16)
    return True


@pytest.mark.parametrize("suite, comparison", [("dp", "ZeRO-3"), ("tp", "TP+SP")])
def test_silent_ranks_do_not_wait_for_each_other(suite, comparison):
    build = next(iter(SUITES[suite].comparisons[comparison].ours.values()))
    assert launch(2, silent_step, build, timeout=60) == [True, True]


# --- tables ---------------------------------------------------------------------------------------


def test_the_tables_of_readme_and_docs_are_those_of_the_measured_files():
    """Otherwise run `python -m tools.bench.tables`."""
    for page in tables.PAGES:
        text = (stats.ROOT / page).read_text()
        assert tables.BLOCK.search(text), page
        assert tables.renewed(text) == text, f"{page} is stale: run `make tables`"


def test_every_measured_file_says_where_and_when():
    needed = {"command", "commit", "date", "cpu", "cores", "torch", "backend"}
    for path in (stats.ROOT / "docs/bench").glob("*.json"):
        assert needed <= {*json.loads(path.read_text())}, path.name


def test_a_changed_number_makes_a_page_stale(monkeypatch):
    page = stats.ROOT / "docs/benchmarks.md"
    found = json.loads(json.dumps(tables.load("dp")))
    for row in found["rows"]:
        if "ratio" in row:
            row["ratio"] += 0.5
    load = tables.load
    monkeypatch.setattr(tables, "load", lambda name: found if name == "dp" else load(name))
    assert tables.renewed(page.read_text()) != page.read_text()
