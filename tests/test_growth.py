"""make growth: what it measures, and the picture that is drawn from it."""

import json
from xml.etree import ElementTree

import pytest

import gpt
from tests.test_figures import SVG, unreadable
from tools import figures
from tools.bench import growth, tables

COMMITTED = figures.FOLDER.parent / "bench" / "growth.json"


def drawn(data: dict, folder, monkeypatch: pytest.MonkeyPatch) -> ElementTree.Element:
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "bench" / "growth.json").write_text(json.dumps(data))
    monkeypatch.setattr(figures, "FOLDER", folder / "img")
    picture = str(figures.draw_growth())
    assert unreadable(picture) == []
    return ElementTree.fromstring(picture)


def test_the_committed_file_has_every_point():
    data = json.loads(COMMITTED.read_text())
    assert {panel: tuple(axes) for panel, axes in data["axes"].items()} == growth.AXES
    found = [(row["panel"], row["series"], row["x"]) for row in data["points"]]
    assert found == [point[:3] for point in growth.points()]
    assert {len(row["values"]) for row in data["points"]} == {data["rounds"]}
    assert data["rounds"] == len(data["foreign_cores"]) >= growth.ROUNDS


def test_a_step_ends_with_its_slowest_rank_and_takes_the_cpu_of_all(monkeypatch):
    seconds, cpu = ([0.3, 0.1, 0.2], [0.1, 0.5, 0.1]), ([0.1, 0.1, 0.1], [0.2, 0.3, 0.4])
    monkeypatch.setattr(growth, "launch", lambda *_, **__: [*zip(seconds, cpu, strict=True)])
    assert growth.step_ms(2, "") == pytest.approx(300)  # of 300, 500 and 200
    assert growth.step_ms(2, "", cpu=True) == pytest.approx(400)  # of 300, 400 and 500
    monkeypatch.setattr(growth, "launch", lambda *_, **__: [40.0, 60.0])
    assert growth.run_us(2, 8) == 60.0


def test_the_time_per_action_is_that_of_all_ranks(monkeypatch):
    readings = iter((0.0, 1.0))
    monkeypatch.setattr(growth.time, "perf_counter", lambda: next(readings))
    assert growth.derive_us(4, 8) == pytest.approx(1e6 / (2 * 4 * 8))


@pytest.mark.slow
def test_growth_measures_and_the_figure_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "MODEL", gpt.GPTConfig(2, 2, 16, 64, 8))
    for name in ("LAYERS", "MICROBATCHES", "DEPTHS"):
        monkeypatch.setattr(growth, name, (2, 3))
    monkeypatch.setattr(growth, "RANKS", (2,))
    monkeypatch.setattr(growth, "LENGTHS", (4,))
    out = tmp_path / "growth.json"
    monkeypatch.setattr("sys.argv", ["growth", "--minutes", "0", "--out", str(out)])
    growth.main()
    data = json.loads(out.read_text())
    assert data["rounds"] == len(data["foreign_cores"]) == growth.ROUNDS
    assert data["command"] == "make growth OUT=docs/bench/growth.json"
    rows = data["points"]
    assert len(rows) == len(growth.points()) == 2 * 3 + 2 * 2 + 2 + 2 + 2
    assert all(len(row["values"]) == growth.ROUNDS and min(row["values"]) > 0 for row in rows)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == growth.ROUNDS + len(rows)
    assert shown[-1].startswith("schedule     derive, p = 3      4 ")

    root = drawn(data, tmp_path, monkeypatch)
    assert len([*root.iter(f"{SVG}circle")]) == len(rows)
    series = {(row["panel"], row["series"]) for row in rows}
    assert len([*root.iter(f"{SVG}polyline")]) == len(series)


def test_a_dot_is_the_median_and_a_bar_the_range(tmp_path, monkeypatch):
    data = json.loads(COMMITTED.read_text())
    points = [(1, [6.0, 2.0, 1.0]), (2, [3.0, 3.0, 3.0])]
    data["points"] = [
        {"panel": panel, "series": "a", "x": x, "values": values}
        for panel in growth.AXES
        for x, values in points
    ]
    root = drawn(data, tmp_path, monkeypatch)
    dots = [float(dot.get("cy")) for dot in root.iter(f"{SVG}circle")]
    lines = [line for line in root.iter(f"{SVG}line") if line.get("stroke") == figures.COLORS[0]]
    bars = [(float(bar.get("y1")), float(bar.get("y2"))) for bar in lines]
    unit = dots[0] - dots[1]  # the first is at 2, the second at 3
    assert bars[0] == pytest.approx((dots[0] + unit, dots[0] - 4 * unit), abs=0.1)
    assert bars[1] == pytest.approx((dots[1], dots[1]), abs=0.01)
    assert len(dots) == len(bars) == 2 * len(growth.AXES)


def test_the_table_has_the_ends_of_each_line(monkeypatch):
    data = json.loads(COMMITTED.read_text())
    for row in data["points"]:
        row["values"] = [row["x"] + 7, row["x"], 0.0]  # the median is x
    monkeypatch.setattr(tables, "load", lambda name: {"growth": data}[name])
    lines = tables.growth()
    assert "| 1 rank | ms per step | layers | 2: 2.0 | 32: 32.0 |" in lines
    unit = "microseconds per action"
    assert f"| derive, p = 64 | {unit} | microbatches | 16: 16.0 | 512: 512.0 |" in lines
    series = {(row["panel"], row["series"]) for row in data["points"]}
    assert sum(line.startswith("| ") for line in lines) == len(series) + 2
    assert f"takes {2 * 64 * 512 * 512 / 1e6:.2f} s" in lines[-1]  # 512 microseconds per action
    assert f"runs {1e6 / 512:,.0f} actions per second" in lines[-1]
