"""A comparison -> a table for people, 80 columns wide."""

from rich import box
from rich.table import Table
from rich.text import Text

from rayloop.select.candidate import Candidate, short_names
from rayloop.select.comparison import Comparison

SHOWN_ROWS = 30
"""Rows of the table; of more candidates, those off the front are left out first."""


def comparison_table(comparison: Comparison) -> Table:
    """The candidates with their figures, the fastest first; the choice is marked."""
    front = {candidate.name for candidate in comparison.front}
    chosen = comparison.chosen
    table = Table(
        title=f"{comparison.dataset}: {len(comparison.candidates)} models over "
        f"{comparison.rows:,} validation rows",
        caption=_caption(comparison),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    labels = short_names([candidate.run_id for candidate in comparison.candidates])
    table.add_column("candidate", overflow="fold", min_width=12)
    for name in ("accuracy", "ms, 1 row", "images/s", "kB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for candidate in _shown(comparison):
        is_chosen = chosen is not None and candidate.name == chosen.name
        mark = "chosen" if is_chosen else _mark(candidate, front)
        style = "bold" if is_chosen else "dim" if candidate.refused else ""
        table.add_row(
            Text(labels[candidate.run_id] + candidate.name.removeprefix(candidate.run_id)),
            f"{candidate.accuracy:.4f}",
            f"{candidate.latency_ms_b1:.3g}",
            f"{candidate.images_per_second:,.0f}",
            f"{candidate.size_bytes / 1000:,.1f}",
            mark,
            style=style,
        )
    return table


def _mark(candidate: Candidate, front: set[str]) -> str:
    if candidate.name in front:
        return "front"
    if candidate.method == "fp32":
        return "compared"
    return "refused" if candidate.refused else ""


def _shown(comparison: Comparison) -> list[Candidate]:
    names = [candidate.name for candidate in comparison.front]
    rest = [c.name for c in comparison.candidates if c.name not in names and c.method != "fp32"]
    fp32 = [c.name for c in comparison.candidates if c.method == "fp32"]
    kept = set([*names, *rest, *fp32][: max(SHOWN_ROWS, len(names))])
    return [candidate for candidate in comparison.candidates if candidate.name in kept]


def _caption(comparison: Comparison) -> str:
    lines = []
    hidden = len(comparison.candidates) - len(_shown(comparison))
    if hidden:
        lines.append(f"{hidden} more are in the record.")
    if comparison.floor is not None:
        lines.append(f"A linear model has {comparison.floor:.4f}.")
    if comparison.chosen:
        lines.append(f"Chosen: {comparison.chosen.name}, {comparison.decision.why}.")
    return " ".join(lines)
