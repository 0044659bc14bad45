"""Building blocks of the HTML reports: one file each with everything inside, readable from a laptop, a KFP artifact tab or an e-mail.

Nothing is loaded from elsewhere, and every text that comes from data or models is escaped.
"""

from __future__ import annotations

import base64
import io
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6875; --line: #dfe4ea; --good: #1c7c4a; --bad: #b3372f; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
p { margin: 0 0 .75rem; } .soft { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1.5rem; margin-top: 1.25rem; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); padding: .4rem .75rem .4rem 0; }
td { border-bottom: 1px solid var(--line); padding: .45rem .75rem .45rem 0; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; white-space: nowrap; }
td:first-child { white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 14rem; max-width: 24rem; }
.text.short { min-width: 5rem; max-width: 13rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .mark { font-weight: 700; margin-right: .3rem; }
.banner { border-left: 5px solid; } .banner p, .banner td { color: var(--ink); }
details summary { cursor: pointer; font-weight: 600; } details[open] summary { margin-bottom: .75rem; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
"""


def page(title: str, sections: list[str]) -> str:
    """The whole file: `sections` are HTML already."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    body = f"<body><main>\n{''.join(sections)}</main></body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n{body}</html>\n'


def section(title: str, body: str, note: str = "") -> str:
    """A titled box around `body`, which is HTML already; `note` is plain text."""
    lead = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>\n"


def image(figure, alternative: str) -> str:
    """A matplotlib figure as an SVG inside the page; the same numbers give the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dfpo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    width = 1.15 * figure.get_figwidth()  # a small figure is not blown up to the width of the page
    return f'<figure><img alt="{escape(alternative)}" style="max-width: {width:.1f}in" src="{source}"></figure>'


def table(head: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """A table of cells that are HTML already; columns from `numbers_from` on are aligned right."""

    def line(tag: str, cells: list[str]) -> str:
        kind = [' class="number"' if index >= numbers_from else "" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kind, cells, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", [escape(name) for name in head])}</thead><tbody>{body}</tbody></table></div>'


def text_cell(text: str, length: int, kind: str = "", mark: str = "") -> str:
    return f'<div class="text {kind}">{mark}{escape(shortened(text, length))}</div>'


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
