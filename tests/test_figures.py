"""The pictures are current and readable, and the numbers in them are checked."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import gpt
import measure
import options
import schedules
from tests.commands import ROOT
from tools import draw, figure_data, figures, plot, svg
from tools.plan import cost
from tools.verify.oracle import launch

SVG = "{http://www.w3.org/2000/svg}"
Box = tuple[str, float, float, float, float]  # text, left, top, right, bottom


def boxes(picture: str) -> list[Box]:
    """A box around each text, by an estimate of its width."""
    found = []
    for element in ElementTree.fromstring(picture).iter(f"{SVG}text"):
        x, y, size = (float(element.get(name)) for name in ("x", "y", "font-size"))
        width = svg.text_width(element.text, size) * (0.96 if element.get("font-weight") else 0.9)
        left = x - {None: 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
        if element.get("transform"):
            found.append((element.text, x - 0.8 * size, y - width / 2, x, y + width / 2))
        else:
            found.append((element.text, left, y - 0.75 * size, left + width, y + 0.1 * size))
    return found


def unreadable(picture: str) -> list[tuple[str, ...]]:
    """Texts that overlap each other or the edge of the picture."""
    root, found = ElementTree.fromstring(picture), boxes(picture)
    width, height = float(root.get("width")), float(root.get("height"))
    bad = [
        (a[0], b[0])
        for a, b in itertools.combinations(found, 2)
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]
    return bad + [
        (text,)
        for text, left, top, right, bottom in found
        if left < 4 or top < 4 or right > width - 4 or bottom > height - 4
    ]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_current_and_readable(name):
    drawn = str(figures.FIGURES[name]())
    committed = (figures.FOLDER / f"{name}.svg").read_text()
    assert drawn == committed, f"run `make figures`: docs/img/{name}.svg is not what it would draw"
    assert unreadable(drawn) == []
    root = ElementTree.fromstring(drawn)
    assert float(root.get("width")) == 880 and root.find(f"{SVG}title").text
    page = root.find(f"{SVG}rect")  # readable on a dark page
    assert page.get("fill") == "#ffffff" and float(page.get("width")) == 879


def test_what_is_unreadable_is_found():
    picture = svg.Picture(200, 100, "x")
    picture.text(20, 50, "one text")
    assert unreadable(str(picture)) == []
    picture.text(40, 55, "another")
    picture.text(150, 90, "beyond the edge")
    assert unreadable(str(picture)) == [("one text", "another"), ("beyond the edge",)]


def test_drawing_imports_the_standard_library_and_schedules_alone():
    script = (
        "import sys, importlib.util\n"
        "importlib.util.find_spec = lambda name: True  # tools asks for torch\n"
        "known = {*sys.stdlib_module_names}; import tools.figures, tools.plot\n"
        "print(*{name.split('.')[0] for name in sys.modules} - known)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert {*done.stdout.split()} == {"__main__", "schedules", "tools"}, done


def test_the_command_draws_the_named_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures", "mesh", "--out", str(tmp_path / "new")])
    figures.main()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mesh.svg"]
    for main in (figures.main, figure_data.main):
        monkeypatch.setattr("sys.argv", ["x", "mish"])
        with pytest.raises(SystemExit):
            main()
        assert "mish is not" in capsys.readouterr().err


# --- the numbers ----------------------------------------------------------------------------------


def test_memory_is_predicted_and_counted():
    data = figures.read("zero_memory")
    config = dataclasses.replace(gpt.MODELS["gpt2"], seq_len=data["seq_len"])
    assert [(row["dtype"], row["zero"]) for row in data["rows"]] == [
        *itertools.product(("float32", "bf16"), range(4))
    ]
    for row in data["rows"]:
        layout = cost.Layout(1, 1, 4, row["zero"], recompute="none")
        size = 2 if row["dtype"] == "bf16" else 4
        program = cost.Program(itemsize=size, grad_itemsize=4, reduce_itemsize=size, stat=size)
        held = cost.predicted_rank_bytes(config, layout, 0, program)
        assert row["predicted"] == row["counted"] == {kind: held[kind] for kind in figures.KINDS}


def test_the_elements_on_the_mesh_are_counted():
    recorded = figures.read("mesh")
    now = launch(8, figure_data.calls_on_rank, figure_data.MESH)
    assert [differences for _, _, differences in now] == [{}] * 8
    for rank, (counted, _, _) in enumerate(now):
        expected = recorded["ranks"][str(rank)]
        assert json.loads(json.dumps(counted)) == expected, f"rank {rank}"
        other = recorded["ranks"][str(rank ^ 3)]  # the same stage, drawn once
        assert {k: v for k, v in expected.items() if k in ("tp", "pp", "dp")} == {
            k: v for k, v in other.items() if k in ("tp", "pp", "dp")
        }


def test_losses_differ_by_rounding():
    data = figures.read("loss")
    assert len(data["layouts"]) == 8
    for name, layout in data["layouts"].items():
        assert 0 < max(map(abs, layout["float64"])) <= measure.TOLERANCE, name
        assert 1e-8 < max(map(abs, layout["float32"])) < 1e-4, name
    assert [*data["layouts"]] == [*figure_data.LAYOUTS]
    for ranks, flags in figure_data.LAYOUTS.values():
        options.check(options.parser().parse_args(f"{figure_data.LOSS} {flags}".split()), ranks)


def test_the_measured_schedule_is_one_step():
    data = figures.read("schedules")
    spans = [schedules.Span(rank, schedules.Action(*action), start, end)
             for rank, *action, start, end in data["spans"]]  # fmt: skip
    expected = schedules.SCHEDULES[data["schedule"]](data["ranks"], data["microbatches"])
    for rank, row in enumerate(expected):
        assert [span.action for span in spans if span.rank == rank] == row
    assert schedules.bubble(spans) == pytest.approx(data["bubble"], abs=2e-3)
    took = {span.action: span.end - span.start for span in spans}
    simulated = schedules.bubble(schedules.simulate(expected, lambda action: took[action]))
    assert simulated == pytest.approx(data["simulated"], abs=2e-3)
    assert 0 < simulated < data["bubble"] < 0.2


def test_the_trace_of_ddp_has_each_all_reduce(monkeypatch, tmp_path):
    monkeypatch.setattr(figure_data, "SMALL", gpt.GPTConfig(2, 2, 16, 64, 8))
    model = gpt.build(figure_data.SMALL, seed=0)
    for name, calls in (("version 1", len([*model.parameters()])), ("version 2", 1), ("DDP", 1)):
        launch(2, figure_data.overlap_on_rank, name, str(tmp_path), 5)
        steps = figure_data.steps_of(f"{tmp_path}/trace.json")
        assert len(steps) == 3
        for spans in steps:
            kinds = [kind for kind, _, _ in spans]
            assert kinds.count("all-reduce") == calls, name
            assert {*kinds} == {*figures.SPANS} and min(start for _, start, _ in spans) == 0
            backward = next(span for span in spans if span[0] == "backward")
            reduce = [span for span in spans if span[0] == "all-reduce"]
            if name == "DDP":
                assert reduce[0][1] >= backward[1]
            else:
                assert reduce[0][1] >= backward[2]


def test_a_compact_file_holds_the_same():
    value = {"a": [[1, 2.5, "x"]] * 40, "b": {"c": [*range(99)], "d": {}}, "e": []}
    text = figure_data.compact(value)
    assert json.loads(text) == value and len(text.splitlines()) == 49


# --- primitives -----------------------------------------------------------------------------------


def test_ticks_are_round_numbers_in_the_limits():
    assert svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(-0.3, 0.3) == pytest.approx([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3])
    for low, high in ((0, 1e-3), (1.7, 4.2), (3, 1e9), (-5, -4.9)):
        marks = svg.ticks(low, high)
        assert 3 <= len(marks) <= 7 and low - 1e-9 <= marks[0] and marks[-1] <= high + 1e-9
    assert svg.limits([3.0]) == pytest.approx((2.85, 3.15)) and svg.limits([0.0]) == (-1.0, 1.0)
    assert svg.limits([0.0, 10.0]) == (-0.5, 10.5)


def test_numbers_are_short():
    assert [*map(svg.number, (1.0, 2.349, -0.001, 100))] == ["1", "2.35", "0", "100"]
    assert [*map(svg.short, (12, 1234567, 131072, 0))] == ["12", "1.23 M", "131 k", "0"]


def test_axes_place_points():
    linear = svg.Axes(svg.Picture(1, 1, ""), 10, 20, 100, 50, (0, 4), (1, 3))
    assert linear.at(0, 1) == (10, 70) and linear.at(4, 3) == (110, 20)
    assert linear.at(1, 2) == (35, 45) and linear.at(9, -9) == (110, 70)
    log = svg.Axes(svg.Picture(1, 1, ""), 0, 0, 100, 100, (0, 1), (1e-4, 1), log=True)
    assert log.at(0, 1e-1) == pytest.approx((0, 25)) and log.at(0, 0) == (0, 100)


def test_text_is_escaped_and_shapes_have_their_attributes():
    picture = svg.Picture(100, 50, 'a < "b" & c')
    picture.text(1, 2, "<script>", anchor="end", vertical=True)
    picture.line((0, 1), (2, 3.456), "#abc", dash="3 2")
    root = ElementTree.fromstring(str(picture))
    assert root.find(f"{SVG}title").text == 'a < "b" & c'
    text, line = root.find(f"{SVG}text"), root.find(f"{SVG}line")
    assert text.text == "<script>" and text.get("transform") == "rotate(-90 1 2)"
    assert line.get("y2") == "3.46" and line.get("stroke-dasharray") == "3 2"


# --- make draw, make plot -------------------------------------------------------------------------


def test_a_schedule_is_drawn_as_svg(tmp_path, monkeypatch, capsys):
    out = tmp_path / "zb.svg"

    def drawn(*arguments) -> str:
        monkeypatch.setattr("sys.argv", ["draw", *map(str, arguments), "--svg", str(out)])
        draw.main()
        return out.read_text()

    picture = drawn("zb-v", "--p", 4, "--m", 8)
    assert capsys.readouterr().out.endswith(f"{out}\n")
    assert unreadable(picture) == []
    for kind, shades in svg.SHADES.items():  # one bar per action; one more in the legend
        for chunk, color in enumerate(shades):
            assert picture.count(f'fill="{color}"') == 32 + (chunk == 0), kind
    assert "bubble 0.062" in picture and "stores 4 4 4 4" in picture
    widths = {float(w) for w in re.findall(r'width="([\d.]+)" height="13" fill="#56b4e9"', picture)}
    assert len(widths) == 1  # every F takes as long
    picture = drawn("all", "--p", 2, "--m", 4)
    assert unreadable(picture) == []
    assert [name for name, *_ in boxes(picture) if name in schedules.SCHEDULES] == [
        *schedules.SCHEDULES
    ]
    picture = drawn("1f1b", "--p", 16, "--m", 128)
    assert unreadable(picture) == [] and 'width="880"' not in picture
    drawn("zb-v", "--text")
    assert str(out) not in capsys.readouterr().out.splitlines()[-1]
    out = tmp_path / "none" / "x.svg"
    with pytest.raises(SystemExit):
        drawn("1f1b")
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_a_plot_is_of_the_last_of_each_step(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.jsonl"
    rows = [(0, 16, 5.0), (1, 32, 4.0), (1, 32, 3.5), (2, 48, 3.0)]
    text = [json.dumps({"step": s, "tokens": t, "loss": x}) for s, t, x in rows]
    path.write_text("\n".join([*text, json.dumps({"step": 2, "tokens": 48, "val_loss": 2.5})]))
    assert plot.curve(str(path), "loss") == ([16, 32, 48], [5.0, 3.5, 3.0])
    assert plot.curve(str(path), "val_loss") == ([48], [2.5])
    empty, nan = tmp_path / "empty", tmp_path / "nan"
    empty.write_text("")
    nan.write_text('{"step": 0, "tokens": 16, "loss": NaN}')
    path.write_text("no JSON")
    for arguments, message in (
        ([path], "line 1 was not written by --metrics: no JSON"),
        ([tmp_path / "none"], "No such file"),
        ([empty], "there are no finite losses"),
        ([nan], "there are no finite losses"),
        ([path, "--out", "runs.png"], "runs.png is not an SVG file: give a name that ends in .svg"),
    ):
        monkeypatch.setattr("sys.argv", ["plot.py", *map(str, arguments)])
        with pytest.raises(SystemExit):
            plot.main()
        assert message in capsys.readouterr().err


def test_a_plot_is_drawn(tmp_path, capsys, monkeypatch):
    paths = [tmp_path / "a & b.jsonl", tmp_path / f"{'long' * 30}.jsonl", tmp_path / "one.jsonl"]
    for i, path in enumerate(paths):
        rows = [{"step": s, "tokens": 1000 * s, "loss": 4 - 0.01 * s + i} for s in range(1, 90)]
        rows += [{"step": s, "tokens": 1000 * s, "val_loss": 4.5 + i} for s in (30, 60, 89)]
        rows[5]["loss"] = math.nan
        path.write_text("\n".join(map(json.dumps, rows[:1] if i == 2 else rows)))
    out = tmp_path / "runs.svg"
    monkeypatch.setattr("sys.argv", ["plot.py", *map(str, paths), "--out", str(out)])
    plot.main()
    assert capsys.readouterr().out == f"{out}: {', '.join(map(str, paths))}\n"
    picture = out.read_text()
    root = ElementTree.fromstring(picture)
    lines = [line.get("points").split() for line in root.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [88, 88, 1]
    assert len([*root.iter(f"{SVG}circle")]) == 6 + 2  # three dots of two runs, and the legend
    xs, ys = zip(*(map(float, point.split(",")) for point in lines[0]), strict=True)
    assert [*xs] == sorted(xs) and [*ys] == sorted(ys)  # a falling loss goes down the page
    assert unreadable(picture) == []


def test_a_long_run_keeps_its_spikes():
    points = [(i, 1.0) for i in range(100_000)]
    points[54_321] = (54_321, 9.0)
    thin = plot.thinned(points, 500)
    assert len(thin) <= 2000 and (54_321, 9.0) in thin and thin == sorted(thin)
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert plot.thinned(points[:300], 500) == points[:300]
