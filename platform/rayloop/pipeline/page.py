"""Pieces of text and pictures -> a web page that needs nothing outside itself."""

from collections.abc import Iterable, Sequence
from html import escape

from rayloop.drawing import Picture
from rayloop.pipeline.pictures import data_uri

STYLE = """
:root { color-scheme: light dark; --ground:#f3f5f9; --card:#ffffff; --ink:#1c2230; --soft:#5d6780;
  --line:#dde2ec; --accent:#3b7dd8; --good:#12805c; --bad:#c2352b; }
@media (prefers-color-scheme: dark) { :root { --ground:#11151d; --card:#1a1f2b; --ink:#e6eaf2;
  --soft:#98a2b8; --line:#2e3546; --accent:#6ea4f0; --good:#4cc79b; --bad:#ff8177; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:1.9rem; line-height:1.2; margin:0 0 4px; letter-spacing:-.015em; }
h2 { font-size:1.2rem; margin:0 0 4px; }
h3 { font-size:1rem; margin:20px 0 8px; }
p { margin:4px 0 14px; color:var(--soft); max-width:76ch; }
section { background:var(--card); border:1px solid var(--line); border-radius:14px;
  padding:20px 22px; margin-top:18px; }
header p { font-size:1.05rem; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(225px,1fr)); gap:12px;
  margin-top:18px; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:14px;
  padding:14px 16px; border-top:4px solid var(--line); }
.tile.good { border-top-color:var(--good); } .tile.bad { border-top-color:var(--bad); }
.tile b { display:block; font-size:1.75rem; line-height:1.25; letter-spacing:-.02em;
  font-variant-numeric:tabular-nums; }
.tile span { font-size:.86rem; font-weight:600; } .tile small { display:block; color:var(--soft); }
.tile.bad b, .bad-text { color:var(--bad); } .good-text { color:var(--good); }
.flow { display:flex; flex-wrap:wrap; gap:10px 26px; padding:0; margin:10px 0 16px;
  list-style:none; }
.flow li { position:relative; flex:1 1 100px; border:1px solid var(--line); border-radius:10px;
  padding:8px 12px; }
.flow li:not(:last-child)::after { content:"\\2192"; position:absolute; right:-21px; top:50%;
  translate:0 -50%; color:var(--soft); }
.flow b { display:block; font-variant-numeric:tabular-nums; }
.bar { display:block; height:5px; border-radius:3px; margin-top:6px; background:var(--line); }
.bar i { display:block; height:100%; min-width:2px; border-radius:3px; background:var(--accent); }
.wide { overflow-x:auto; }
.wide img { display:block; max-width:100%; height:auto; }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));
  gap:22px; }
.pair > div { min-width:0; }
.grid { display:block; width:100%; height:auto; image-rendering:pixelated; }
.mistakes { display:grid; grid-template-columns:repeat(auto-fill,minmax(112px,1fr)); gap:14px;
  margin:8px 0 0; }
figure { margin:0; } figcaption { font-size:.8rem; line-height:1.35; margin-top:5px;
  overflow-wrap:anywhere; }
.mistakes img { width:100%; border-radius:8px; image-rendering:pixelated; display:block; }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums; }
th,td { padding:7px 10px; text-align:right; border-bottom:1px solid var(--line);
  white-space:nowrap; }
th { font-weight:600; color:var(--soft); } tr:last-child td { border-bottom:0; }
th:first-child,td:first-child { text-align:left; } tr.chosen td { font-weight:600; }
.facts td { text-align:left; white-space:normal; overflow-wrap:anywhere; }
.facts td:first-child { color:var(--soft); white-space:nowrap; width:1%; padding-right:24px; }
details { margin-top:14px; } summary { cursor:pointer; color:var(--accent); }
@media (max-width:640px) { main { padding:18px 12px 40px; } section { padding:16px 14px; }
  h1 { font-size:1.5rem; } .tiles { grid-template-columns:1fr 1fr; gap:8px; }
  .tile { padding:10px 12px; } .tile b { font-size:1.4rem; }
  .curves img, .dense img { max-width:none; width:820px; }
  .dense img { width:540px; } .wide .grid { max-width:none; width:720px; }
  .facts td:first-child { white-space:normal; width:32%; padding-right:10px; }
  .flow li { flex-basis:38%; } .flow li::after { display:none; }
  .mistakes { grid-template-columns:repeat(3,1fr); gap:10px; } }
"""


def page(title: str, header: str, sections: Iterable[str]) -> str:
    """A whole HTML document.

    Args:
        title: The window's title, plain text.
        header: HTML above the sections.
        sections: HTML of each section.
    """
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n<header>{header}</header>\n{body}\n</main></body></html>\n"
    )


def section(anchor: str, title: str, intro: str, *parts: str) -> str:
    """A titled card.

    Args:
        anchor: Its id, to be linked to.
        title: Plain text.
        intro: What is to be seen, plain text; empty leaves the paragraph out.
        *parts: HTML.
    """
    lead = f"<p>{escape(intro)}</p>" if intro else ""
    content = "\n".join(parts)
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{lead}\n{content}</section>'


def tile(label: str, value: str, note: str = "", good: bool | None = None) -> str:
    """One headline figure.

    Args:
        label: What it is.
        value: The figure with its unit.
        note: What it is to be compared with.
        good: Whether it is as it should be; None where it is neither.
    """
    mood = {True: " good", False: " bad", None: ""}[good]
    return (
        f'<div class="tile{mood}"><span>{escape(label)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], chosen: int | None = None, kind: str = ""
) -> str:
    """A table that scrolls sideways where it does not fit.

    Args:
        head: Column titles; empty for a table of facts without titles.
        rows: Cells as plain text.
        chosen: Index of the row to stress.
        kind: CSS class of the table.
    """
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [f"<tr>{titles}</tr>"] if head else []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="chosen">{cells}</tr>' if index == chosen else f"<tr>{cells}</tr>")
    joined = "\n".join(lines)
    return f'<div class="wide"><table class="{escape(kind)}">{joined}</table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Named facts, one a line."""
    return table((), pairs, kind="facts")


def picture(drawn: Picture, alt: str, kind: str = "") -> str:
    """A picture in the look of the page.

    Args:
        drawn: Both looks.
        alt: What it shows, for who cannot see it.
        kind: CSS class of the frame.
    """
    return (
        f'<div class="wide {escape(kind)}"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{data_uri(drawn.dark)}"><img src="{data_uri(drawn.light)}" '
        f'alt="{escape(alt)}"></picture></div>'
    )


def image(png: bytes, alt: str, kind: str = "") -> str:
    """A photograph, the same in both looks."""
    return f'<img class="{escape(kind)}" src="{data_uri(png)}" alt="{escape(alt)}">'


def text(plain: str) -> str:
    """Plain text as HTML."""
    return escape(plain)
