"""A figure of matplotlib -> PNG pictures in the package's style, for a light and a dark page."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")

from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

INK = {"light": ("#ffffff", "#2a3040", "#c9cfda"), "dark": ("#1a1f2b", "#d5dae5", "#414a5e")}
"""Ground, text and line colour of each look; the grounds are those of the page's cards."""

COLORS = ("#3b7dd8", "#e0823d", "#2ba37b", "#a06be0", "#d8548a")


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure as two PNG files: for a light page and for a dark one."""

    light: bytes
    dark: bytes


def in_both_looks(draw: Callable[[], bytes]) -> Picture:
    """Draw a figure twice, with the colours of a light and of a dark page.

    Args:
        draw: Gives a PNG; its matplotlib defaults are what changes.
    """
    drawn = {}
    for name in INK:
        with look(name):
            drawn[name] = draw()
    return Picture(light=drawn["light"], dark=drawn["dark"])


def plain_numbers(axis: Any) -> None:
    """Write a logarithmic axis as 0.2, 1, 5 and not as powers of ten."""
    low, high = axis.get_view_interval()
    narrow = high / low < 30
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    steps = (1, 2, 5) if narrow else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=steps))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def to_png(figure: Any) -> bytes:
    """A figure as a PNG; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


@contextmanager
def look(name: str) -> Iterator[None]:
    """Draw with the colours of a page: `light` or `dark`."""
    ground, text, line = INK[name]
    settings: dict[str, Any] = {
        "font.size": 10.5,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.edgecolor": line,
        "grid.color": line,
        "grid.alpha": 0.45,
        "legend.frameon": False,
        "lines.linewidth": 1.9,
    }
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    texts = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    settings |= dict.fromkeys(grounds, ground) | dict.fromkeys(texts, text)
    with matplotlib.rc_context():
        plt.rcParams.update(cast(Any, settings))
        yield
