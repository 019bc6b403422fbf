"""Writes the tables of README.md and docs/benchmarks.md from the JSON files in docs/bench.

    make tables    python -m tools.bench.tables    [--check]

A table stands between the lines `<!-- bench: NAME -->` and `<!-- end -->`. Nothing is measured:
`make bench-dp OUT=docs/bench/dp.json`, and so on, measure. A ratio is the median over launches,
with a 95 % interval in brackets.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable

from tools.bench.stats import ROOT, interval

PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- bench: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


@functools.cache
def load(name: str) -> dict:
    return json.loads((ROOT / "docs" / "bench" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def ratio(found: dict, bounds: bool = True) -> str:
    low, high = found["interval"]
    return f"{found['ratio']:.2f}" + f" ({low:.2f} to {high:.2f})" * bounds


def source(name: str) -> str:
    """Where and when a file was measured."""
    j = load(name)
    busy = sum(f > 0.05 for f in j.get("foreign_cores", []))
    line = (f"`{j['command']}`: {j['ranks']} rank{'s' * (j['ranks'] > 1)} x 1 thread on "
            f"{j['cores']} cores ({j['cpu']}), {j['backend']}, float32, torch {j['torch']}; "
            f"{j['launches']} launches of {j['steps']} steps, on {j['date']} at commit "
            f"{j['commit']} ([data](bench/{name}.json)).")  # fmt: skip
    if busy:
        line += (f" In {busy} of {len(j['foreign_cores'])} launches, other processes used more "
                 "than 0.05 of a core.")  # fmt: skip
    return line


def rows(suite: str, **wanted) -> list[dict]:
    return [r for r in load(suite)["rows"] if all(r.get(k) == v for k, v in wanted.items())]


def axis(suite: str) -> tuple[str, list[int]]:
    name = "s" if suite == "cp" else "h"
    return name, [*dict.fromkeys(r[name] for r in load(suite)["rows"])]


def one(found: list[dict]) -> dict:
    (row,) = found
    return row


def compared(suite: str) -> list[str]:
    """Step time over that of PyTorch's fastest variant, by size."""
    name, sizes = axis(suite)
    lines = []
    for comparison in dict.fromkeys(r["comparison"] for r in rows(suite)):
        first = rows(suite, comparison=comparison, **{name: sizes[0]})
        if not any(r["best"] for r in first):
            continue
        for r in first:
            if r["side"] not in ("ours", "silent"):
                continue
            at = [one(rows(suite, comparison=comparison, variant=r["variant"], **{name: n}))
                  for n in sizes]  # fmt: skip
            best = [*dict.fromkeys(x["over"] for x in at)]
            label = f"`{r['variant']}`" if r["side"] == "ours" else "silent ranks"
            lines.append([comparison, label, " / ".join(best), *map(ratio, at)])
    head = ["", "variant", "PyTorch's fastest", *(f"{name} {n}" for n in sizes)]
    return [source(suite), "", *table(head, lines)]


def work(suite: str) -> list[str]:
    """CPU time, operators, copies and calls of the first variant and of PyTorch's fastest."""
    name, sizes = axis(suite)
    lines = []
    for comparison in dict.fromkeys(r["comparison"] for r in rows(suite, best=True)):
        for n in sizes:
            ours, *_ = rows(suite, comparison=comparison, side="ours", **{name: n})
            best = one(rows(suite, comparison=comparison, best=True, **{name: n}))
            pair = ours, best
            lines.append([
                comparison, str(n), ", ".join(f"{r['cpu_ms']:.0f}" for r in pair),
                ", ".join(f"{r['operators']:,}" for r in pair),
                ", ".join(f"{r['copied_mb']:.1f}" for r in pair),
                ", ".join(str(r["calls"]) for r in pair),
                ", ".join(f"{r['sent_mb']:.1f}" for r in pair),
            ])  # fmt: skip
    head = ["here, PyTorch", name, "CPU ms", "operators", "MB copied", "calls", "MB sent"]
    return table(head, lines)


def context_parallel() -> list[str]:
    """Step time over that of one process, and of the ring over that of gathered attention."""
    suite = "cp"
    name, sizes = axis(suite)
    found = [r for r in rows(suite) if "over_one_process" in r]
    lines = []
    for comparison, variant in dict.fromkeys((r["comparison"], r["variant"]) for r in found):
        at = [one([r for r in found if r["comparison"] == comparison and r["variant"] == variant
                   and r[name] == n]) for n in sizes]  # fmt: skip
        lines.append([variant, *(ratio(x["over_one_process"]) for x in at)])
    over = []
    for n in sizes:
        pair = [one(rows(suite, variant=v, **{name: n}))["ratios"] for v in ("ring", "gathered")]
        each = [a / b for a, b in zip(*pair, strict=True)]
        over.append(ratio({"ratio": statistics.median(each), "interval": interval(each)}))
    lines.append(["ring / gathered", *over])
    return table(["step time over that of one process", *(f"{name} {n}" for n in sizes)], lines)


def pipelines() -> list[str]:
    """The schedules of this repository, over GPipe."""
    _, sizes = axis("pp")
    found = rows("pp", comparison="schedules", side="ours")
    lines = []
    for variant in dict.fromkeys(r["variant"] for r in found):
        at = [one([r for r in found if r["variant"] == variant and r["h"] == n]) for n in sizes]
        cells = [[ratio(x["over_gpipe"]), "{:.2f}, {:.2f}".format(*x["bubble"])] for x in at]
        lines.append([f"`{variant}`", *(cell[0] for cell in cells), *(cell[1] for cell in cells)])
    return table(["", *(f"step / `gpipe`, h {n}" for n in sizes),
                  *(f"bubble, h {n}: simulated, measured" for n in sizes)], lines)  # fmt: skip


def loop() -> list[str]:
    """Efficiency of the complete loop: one process over (cores x step)."""
    _, sizes = axis("3d")
    found = [r for r in rows("3d") if "over_one_process" in r and r["side"] != "silent"]
    cores, lines = load("3d")["cores"], []
    for variant in dict.fromkeys(r["variant"] for r in found):
        at = [one([r for r in found if r["variant"] == variant and r["h"] == n]) for n in sizes]
        each = [1 / (cores * x["over_one_process"]["ratio"]) for x in at]
        lines.append([variant, *(f"{e:.2f}" for e in each)])
    return table(["efficiency", *(f"h {n}" for n in sizes)], lines)


def checkpoints() -> list[str]:
    """Saves and pauses over those of torch.save and torch.distributed.checkpoint."""
    found = rows("checkpoint")
    columns, lines = [*dict.fromkeys(r["column"] for r in found)], []
    for layout, h in dict.fromkeys((r["layout"], r["h"]) for r in found):
        at = [one(rows("checkpoint", layout=layout, h=h, column=column)) for column in columns]
        lines.append([layout, f"{at[0]['bytes'] / 1e6:.0f} MB", *map(ratio, at)])
    return [*dated("checkpoint"), *table(["layout", "state", *columns], lines)]


def lines(name: str) -> list[str]:
    """The printed lines of a tool."""
    return ["```", *load(name)["lines"], "```"]


def dated(name: str) -> list[str]:
    j = load(name)
    n = f", {j['launches']} launch{'es' * (j['launches'] > 1)} each" if "launches" in j else ""
    return [f"`{j['command']}`{n}, on {j['date']} at commit {j['commit']}: {j['cores']} cores "
            f"({j['cpu']}), torch {j['torch']} ([data](bench/{name}.json)).", ""]  # fmt: skip


def hierarchy(name: str) -> list[str]:
    """All-reduces, and step times by placement."""
    j = load(name)
    reduces = [[f"{r['bytes'] / 1e6:.2f} MB", f"{1e3 * r['flat_s']:.0f} ms",
                f"{1e3 * r['by_host_s']:.0f} ms", f"{r['by_host_s'] / r['flat_s']:.2f}",
                "{:.2f}, {:.2f}".format(*(x / 1e6 for x in r["flat_bytes"])),
                "{:.2f}, {:.2f}".format(*(x / 1e6 for x in r["by_host_bytes"]))]
               for r in j["all_reduce"]]  # fmt: skip
    steps = [[r["what"], f"{1e3 * r['step_s']:.0f} ms",
              f"{1e3 * r['predicted_s']:.0f} ms" if r["predicted_s"] else "",
              ", ".join(f"{x / 1e6:.2f}" for x in r["bytes"])] for r in j["steps"]]  # fmt: skip
    head = ["all-reduce", "flat", "by host", "ratio", "MB, flat: formula, interface",
            "MB, by host: formula, interface"]  # fmt: skip
    step = [f"at {j['mbit']} Mbit/s", "step", "predicted", "MB: counted, formula, interface"]
    return [*dated(name), *table(head, reduces), "", *table(step, steps)]


def summary() -> list[str]:
    """The table of README.md: at h 768, or the only size."""
    lines = []
    for suite, comparison, variant, label, shown in (
        ("dp", "DDP", "DDP", "`DDP`", "`DistributedDataParallel`"),
        ("dp", "ZeRO-1", "Zero1", "`Zero1`", "`ZeroRedundancyOptimizer`"),
        ("dp", "ZeRO-2", "Zero2", "`Zero2`", "`fully_shard`, not resharded"),
        ("dp", "ZeRO-3", "Zero3", "`Zero3`", "`fully_shard`"),
        ("tp", "TP", "tensor parallel", "tensor parallel", "DTensor"),
        ("pp", "1f1b", "1f1b", "1F1B, 8 microbatches", "`Schedule1F1B`"),
        ("cp", "context parallelism", "ring", "ring attention", "its ring, the CPU's kernels"),
        ("3d", "replicated parameters", "ZeRO-1", "2 x 2 x 2, ZeRO-1",
         "DTensor, `pipelining`, `replicate` or `fully_shard`"),
    ):  # fmt: skip
        name, sizes = axis(suite)
        at = [one(rows(suite, comparison=comparison, variant=variant, **{name: n})) for n in sizes]
        each = [f"{name} {n}: {ratio(x)}" for n, x in zip(sizes, at, strict=True)]
        lines.append([label, shown, str(load(suite)["ranks"]), *each, *[""] * (2 - len(each))])
    return table(["this repository", "PyTorch", "ranks", "smaller size", "larger size"], lines)


def growth() -> list[str]:
    """The first and the last point of each line of docs/img/growth.svg."""
    j, lines = load("growth"), []
    median = {
        (r["panel"], r["series"], r["x"]): statistics.median(r["values"]) for r in j["points"]
    }
    for panel, series in dict.fromkeys(key[:2] for key in median):
        over, unit = j["axes"][panel]
        xs = [x for *line, x in median if line == [panel, series]]
        ends = [f"{x}: {median[panel, series, x]:,.1f}" for x in (xs[0], xs[-1])]
        lines.append([series, unit, over, *ends])
    p, m = 64, 512
    us, n = median["schedule", f"derive, p = {p}", m], 2 * p * m
    rate = 1e6 / median["schedule", "run, 1 rank", m]
    rates = (
        f"1F1B of {p} ranks and {m} microbatches has {n:,} actions. Making it and deriving its "
        f"programs takes {us * n / 1e6:.2f} s. The executor runs {rate:,.0f} actions per second on "
        "one rank."
    )
    return [*dated("growth"), *table(["", "unit", "over", "from", "to"], lines), "", rates]


TABLES: dict[str, Callable[[], list[str]]] = {
    "summary": summary,
    **{name: functools.partial(compared, name) for name in ("dp", "tp", "cp", "pp", "ckpt", "3d")},
    **{f"{name}-work": functools.partial(work, name) for name in ("dp", "tp", "cp", "pp", "3d")},
    "cp-one": context_parallel,
    "pp-schedules": pipelines,
    "3d-efficiency": loop,
    "checkpoint": checkpoints,
    "memory": lambda: [*dated("memory"), *lines("memory")],
    "hierarchy": functools.partial(hierarchy, "hierarchy"),
    "hierarchy-200": functools.partial(hierarchy, "hierarchy-200"),
    "growth": growth,
}


def renewed(text: str) -> str:
    """`text` with all tables written anew."""

    def block(match: re.Match) -> str:
        start, name, _, end = match.groups()
        return start + "\n".join(TABLES[name]()) + "\n" + end

    return BLOCK.sub(block, text)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    args, stale = arguments.parse_args(), []
    for page in PAGES:
        text = (ROOT / page).read_text()
        if (new := renewed(text)) != text:
            stale.append(page)
            if not args.check:
                (ROOT / page).write_text(new)
    print(f"{'stale' if args.check else 'written'}: {', '.join(stale) or 'nothing'}")
    sys.exit(bool(args.check and stale))


if __name__ == "__main__":
    main()
