"""HTML pages that need no other file: style, figures, tables, pictures inside the page. Shared by the reports of all jobs."""
from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from frazil.io.files import atomic_path

STYLE = """body{font:15px/1.55 system-ui,sans-serif;color:#1f2933;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:0}h2{font-size:1.15rem;margin:2.2rem 0 .5rem;border-bottom:1px solid #e4e7eb}
.figures{display:flex;flex-wrap:wrap;gap:.8rem 2.2rem;margin:1rem 0}.figures div{min-width:8rem}.figures b{font-size:1.5rem;display:block}
.figures span,figcaption,footer{color:#52606d;font-size:.88rem}img{max-width:100%;height:auto}figure{margin:.5rem 0}
.warn{background:#fff8e6;border-left:4px solid #e09f3e;padding:.5rem .8rem;margin:.4rem 0}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .9rem .2rem 0;text-align:left;border-bottom:1px solid #e4e7eb}
footer{margin-top:2.5rem}"""


def png(figure: Figure) -> bytes:
    """A figure as a PNG picture."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def write_plots(folder: Path, figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Write `folder`/NAME.png for each figure, making the folder; returns the pictures by name."""
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, figure in figures.items():
        pictures[name] = png(figure)
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(pictures[name])
    return pictures


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """An HTML table."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def key_figures(figures: Iterable[tuple[str, str]]) -> str:
    """A row of large numbers: pairs (value, what it is)."""
    numbers = (f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in figures)
    return f'<div class="figures">{"".join(numbers)}</div>'


def warnings(lines: Iterable[str]) -> list[str]:
    """A box a warning."""
    return [f'<div class="warn">{html.escape(line)}</div>' for line in lines]


def picture(title: str, content: bytes, caption: str) -> str:
    """A section with one PNG picture and its caption (HTML)."""
    source = base64.b64encode(content).decode()
    image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{source}">'
    return f"<h2>{html.escape(title)}</h2><figure>{image}<figcaption>{caption}</figcaption></figure>"


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of such parts."""
    body = "\n".join(parts)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n")  # fmt: skip
