"""Writes SVG pictures with the standard library: shapes, text, axes, and timelines of schedules.

    picture = Picture(400, 300, "loss over tokens")
    axes = Axes(picture, 60, 20, 320, 230, (0, 1e6), (2.0, 4.0))
    axes.frame("tokens", "loss")
    axes.line([(0, 4.0), (1e6, 2.0)], COLORS[0])
    picture.save("loss.svg")

Lengths are pixels, y points down. A picture has a white background, so that it can be read on a
dark page too. tools/figures.py, tools/plot.py and tools/draw.py draw with this file.
"""

import html
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import schedules

INK, GRAY, PALE, GRID = "#24292f", "#57606a", "#eceff2", "#d8dee4"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
# Eight colors that remain distinct with the common forms of color blindness (Okabe and Ito).
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a6a00", "#24292f"]

Point = tuple[float, float]


def text_width(text: str, size: float) -> float:
    """An estimate of the width of a text, which is not less than that in the fonts of FONT."""
    return sum(0.36 if c in " .,:;|!ijl()[]'" else 0.64 for c in text) * size * 1.02


def number(x: float) -> str:
    """At most two decimals, without trailing zeros."""
    text = f"{x:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def short(x: float) -> str:
    """1234567 -> "1.23 M"."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= factor:
            return f"{x / factor:.3g}{unit}"
    return f"{x:.6g}"


class Picture:
    """Shapes in the order in which they are drawn. str(picture) is the SVG text."""

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title, self.shapes = width, height, title, []

    def _add(self, tag: str, content: str | None = None, **attributes) -> None:
        words = [tag]
        for name, value in attributes.items():
            if value is not None:
                value = number(value) if isinstance(value, int | float) else html.escape(value)
                words.append(f'{name.replace("_", "-")}="{value}"')
        end = "/>" if content is None else f">{html.escape(content)}</{tag}>"
        self.shapes.append(f"<{' '.join(words)}{end}")

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, rx: float | None = None,
        stroke: str | None = None,
    ) -> None:  # fmt: skip
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill, rx=rx, stroke=stroke)

    def line(
        self, a: Point, b: Point, color: str, width: float = 1, dash: str | None = None
    ) -> None:
        self._add("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], stroke=color, stroke_width=width,
                  stroke_dasharray=dash)  # fmt: skip

    def polyline(self, points: Iterable[Point], color: str, width: float = 1.5) -> None:
        points = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._add("polyline", points=points, fill="none", stroke=color, stroke_width=width,
                  stroke_linejoin="round")  # fmt: skip

    def polygon(self, points: Iterable[Point], fill: str) -> None:
        points = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self._add("polygon", points=points, fill=fill)

    def circle(self, at: Point, r: float, fill: str, stroke: str | None = None) -> None:
        self._add("circle", cx=at[0], cy=at[1], r=r, fill=fill, stroke=stroke)

    def text(
        self, x: float, y: float, text: str, size: float = 12, anchor: str = "start",
        color: str = INK, bold: bool = False, vertical: bool = False,
    ) -> None:  # fmt: skip
        """y: the baseline. anchor: "start", "middle" or "end". vertical: read from below."""
        turned = f"rotate(-90 {number(x)} {number(y)})" if vertical else None
        self._add("text", text, x=x, y=y, font_size=size, fill=color,
                  text_anchor=None if anchor == "start" else anchor,
                  font_weight="bold" if bold else None,
                  transform=turned)  # fmt: skip

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> float:
        """A row of squares with names, from (color, name). Returns the x after the last one."""
        for color, name in entries:
            self.rect(x, y - 10, 12, 12, color, rx=2)
            self.text(x + 17, y, name)
            x += 17 + text_width(name, 12) + 14
        return x

    def __str__(self) -> str:
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        title, box = html.escape(self.title), f"0 0 {number(self.width)} {number(self.height)}"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="{box}" role="img" '
            f'font-family="{FONT}">'
        )
        page = (
            f'<rect x="0.5" y="0.5" width="{number(self.width - 1)}" '
            f'height="{number(self.height - 1)}" rx="8" fill="#ffffff" stroke="{GRID}"/>'
        )
        return "\n".join([head, f"<title>{title}</title>", page, *self.shapes, "</svg>\n"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(str(self))


# --- axes -----------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most` + 1 of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def limits(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest value, moved apart by 5%, and apart from each other."""
    values = list(values)
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(low) or 1.0
    return low - margin, high + margin


class Axes:
    """A rectangle of a picture with data coordinates. xs, ys: the limits of the data. log: y is
    logarithmic. Values outside the limits are drawn at the edge."""

    def __init__(
        self, picture: Picture, x: float, y: float, width: float, height: float,
        xs: tuple[float, float], ys: tuple[float, float], log: bool = False,
    ):  # fmt: skip
        self.picture, self.log = picture, log
        self.left, self.top, self.width, self.height = x, y, width, height
        self.xs, self.ys = xs, ys

    def at(self, x: float, y: float) -> Point:
        """Pixels of a point of the data."""
        scale = math.log10 if self.log else float
        low, high = map(scale, self.ys)
        across = (x - self.xs[0]) / (self.xs[1] - self.xs[0])
        up = (scale(max(y, self.ys[0])) - low) / (high - low)
        return (self.left + self.width * min(1.0, max(0.0, across)),
                self.top + self.height * (1 - min(1.0, max(0.0, up))))  # fmt: skip

    def frame(self, xlabel: str, ylabel: str, xticks: bool | list[float] = True) -> None:
        """Draw the grid, the numbers at the ticks and the names of the axes. xticks: the numbers on
        the x axis, True to choose them, or False for an axis without numbers and name."""
        low, high = self.ys
        if self.log:
            every = 2 if math.log10(high / low) > 6 else 1
            powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
            marks = [(10.0**n, f"1e{n}") for n in powers if n % every == 0]
        else:
            marks = [(y, number(y)) for y in ticks(low, high, max(2, int(self.height / 32)))]
        bottom, right = self.top + self.height, self.left + self.width
        for y, name in marks:
            _, py = self.at(self.xs[0], y)
            self.picture.line((self.left, py), (right, py), GRID)
            self.picture.text(self.left - 7, py + 4, name, 11, "end", GRAY)
        chosen = ticks(*self.xs, max(2, int(self.width / 90)))
        for x in xticks if isinstance(xticks, list) else chosen:
            px, _ = self.at(x, high)
            self.picture.line((px, bottom), (px, bottom + 4), GRAY)
            if xticks:
                self.picture.text(px, bottom + 17, short(x), 11, "middle", GRAY)
        self.picture.line((self.left, bottom), (right, bottom), GRAY)
        if xticks:
            self.picture.text((self.left + right) / 2, bottom + 35, xlabel, 12, "middle")
        if ylabel:
            middle = self.top + self.height / 2
            self.picture.text(self.left - 46, middle, ylabel, 12, "middle", vertical=True)

    def line(self, points: Iterable[Point], color: str, width: float = 1.5) -> None:
        self.picture.polyline([self.at(*point) for point in points], color, width)

    def dots(self, points: Iterable[Point], color: str, r: float = 4) -> None:
        """Circles; large ones have a white edge."""
        for point in points:
            self.picture.circle(self.at(*point), r, color, "#ffffff" if r > 3 else None)


# --- timelines ------------------------------------------------------------------------------------

ACTIONS = {"F": "forward", "B": "backward", "W": "gradient of the weights"}
SHADES = {  # by chunk
    "F": ["#56b4e9", "#b5def6"],
    "B": ["#e69f00", "#f7d488"],
    "W": ["#2fb18b", "#9fdcc9"],
}
ROW = 15  # height of a row of a timeline
LEFT, RIGHT = 150, 140  # width of the columns to the left and to the right of a timeline


class Bar(NamedTuple):
    row: int
    start: float
    end: float
    color: str
    label: str = ""


def timeline(
    picture: Picture, x: float, y: float, rows: int, scale: float, bars: list[Bar]
) -> None:
    """Draw bars in rows. scale: pixels per time unit. A label that does not fit is left out. The
    idle time of a rank is gray."""
    start, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    for row in range(rows):
        picture.rect(x, y + row * ROW, (end - start) * scale, ROW - 2, PALE)
    for bar in bars:
        left, width = x + (bar.start - start) * scale, (bar.end - bar.start) * scale
        gap = min(0.8, width / 5)
        top = y + bar.row * ROW
        picture.rect(left, top, width - gap, ROW - 2, bar.color)
        if bar.label and text_width(bar.label, 9) <= width - gap:
            picture.text(left + (width - gap) / 2, top + 9.8, bar.label, 9, "middle")


def action_bars(spans: list[schedules.Span], shrink: bool = False) -> list[Bar]:
    """A bar per action, with the number of its microbatch. shrink: divide times by the number of
    stages per rank, since a rank with c stages runs 1/c of its layers in each action."""
    placed: dict[int, set[int]] = {}
    for span in spans:
        placed.setdefault(span.rank, set()).add(span.action.stage)
    bars = []
    for rank, action, start, end in spans:
        stages = sorted(placed[rank])
        parts = len(stages) if shrink else 1
        color = SHADES[action.kind][stages.index(action.stage) % 2]
        bars.append(Bar(rank, start / parts, end / parts, color, str(action.microbatch)))
    return bars


def schedules_height(ranks: Iterable[int]) -> float:
    """Height of draw_schedules() for schedules with these numbers of ranks."""
    return sum(max(n * ROW, 3 * ROW) + 20 for n in ranks)


def schedules_width(named: dict[str, schedules.Schedule], least: float = 3) -> float:
    """Width of a picture in which an action has at least `least` pixels; at least 880."""
    bars = [b for s in named.values() for b in action_bars(schedules.simulate(s), shrink=True)]
    longest, shortest = max(b.end for b in bars), min(b.end - b.start for b in bars)
    return max(880, LEFT + RIGHT + math.ceil(longest / shortest * least))


def draw_schedules(
    picture: Picture, y: float, named: dict[str, schedules.Schedule], notes: dict[str, list[str]]
) -> float:
    """Draw schedules below each other on one time scale, with their names to the left and up to
    three lines of `notes` to the right. Returns the y below the last one."""
    drawn = {name: action_bars(schedules.simulate(s), shrink=True) for name, s in named.items()}
    longest = max(bar.end for bars in drawn.values() for bar in bars)
    scale = (picture.width - LEFT - RIGHT) / longest
    for name, bars in drawn.items():
        ranks = len(named[name])
        picture.text(20, y + 12, name, 13, bold=True)
        for rank in range(ranks):
            picture.text(LEFT - 8, y + rank * ROW + 11, f"rank {rank}", 10, "end", GRAY)
        timeline(picture, LEFT, y, ranks, scale, bars)
        right = LEFT + max(bar.end for bar in bars) * scale
        for i, line in enumerate(notes.get(name, [])):
            picture.text(right + 12, y + 12 + 16 * i, line, 11 if i else 12, bold=i == 0)
        y += schedules_height([ranks])
    return y


def action_legend(picture: Picture, x: float, y: float, kinds: str = "FBW") -> float:
    entries = [(SHADES[kind][0], f"{kind} {ACTIONS[kind]}") for kind in kinds]
    return picture.legend(x, y, [*entries, (PALE, "idle")])
