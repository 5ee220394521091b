"""Pictures of a picking run: a PNG a micrograph with its picks, histograms, report.html with a gallery and a threshold slider."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from frazil.io.files import write_bytes, write_text
from frazil.jobs import html
from frazil.jobs.plots import COLOURS, LEVEL, new_figure, styled
from frazil.jobs.record import plain
from frazil.jobs.run import Run
from frazil.maths.tiling import transform
from frazil.steps.pick import RING, normalised, picking_grid, preview

Array = NDArray[np.float64]
STRETCH = (1.0, 99.0)  # percentiles that become black and white
GREYS = 255  # palette entries; the last one is the colour of the picks
COLOUR = (80, 230, 120)
RUNS = 3  # zlib's Z_RLE: noise holds no repeats to look for, and drawn circles are short; half the time for the same size
PALETTE = [v for g in range(GREYS) for v in (g, g, g)] + list(COLOUR)
SHOWN = 24  # micrographs in the gallery
SIDE = 560  # px of a picture in the gallery
BINS = 200  # of the table from which the slider counts the picks of all micrographs


@dataclass(frozen=True)
class Shown:
    """A micrograph of the gallery."""

    name: str
    picture: NDArray[np.uint8]  # (h, w)
    shape: tuple[int, int]  # px of the micrograph (y, x)
    xy: Array  # (n, 2) candidates, px of the micrograph
    value: Array  # (n,)


def stretched(preview: Tensor) -> NDArray[np.uint8]:
    """(h, w) grey values 0 … 254 of a low-passed micrograph."""
    values = preview.float()  # by torch: NumPy turns half precision into single one number at a time
    sample = values[::3, ::3].numpy()
    low, high = np.percentile(sample[np.isfinite(sample)], STRETCH) if sample.size else (0.0, 1.0)
    scaled = (values - float(low)).mul_((GREYS - 1) / max(float(high - low), 1e-6))
    return scaled.nan_to_num_().clamp_(0, GREYS - 1).to(torch.uint8).numpy()


def preview_of(pixels: Tensor, pixel_size: float, lowpass: float, diameter: float, invert: bool) -> Tensor:
    """(h, w) low-passed picture of a micrograph (y, x), the one that matching makes on the way; diameter of the particles in Å."""
    grid = picking_grid((pixels.shape[0], pixels.shape[1]), pixel_size, lowpass, 0.5 * RING * diameter)
    return preview(transform(normalised(pixels, invert), grid), grid, -1.0 if invert else 1.0)


def ring(radius: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, from the middle, of the pixels of a circle about two pixels wide."""
    turn = np.linspace(0, 2 * np.pi, max(16, int(8 * radius)), endpoint=False)
    lines = [np.rint(np.stack([r * np.sin(turn), r * np.cos(turn)], -1)) for r in (radius, radius - 0.7)]
    y, x = np.unique(np.concatenate(lines).astype(np.int64), axis=0).T
    return y, x


def write_picture(path: Path, grey: NDArray[np.uint8], xy: Array, shape: tuple[int, int], diameter_px: float) -> None:
    """A PNG of the micrograph with circles of a diameter (px of the micrograph) around picks (n, 2)."""
    scale = grey.shape[1] / shape[1]
    picture = grey.copy()
    dy, dx = ring(max(2.0, 0.5 * diameter_px * scale))
    middle = np.rint(xy * scale).astype(np.int64)
    y, x = middle[:, 1:] + dy, middle[:, :1] + dx
    inside = (x >= 0) & (x < grey.shape[1]) & (y >= 0) & (y < grey.shape[0])
    picture[y[inside], x[inside]] = GREYS
    image = Image.fromarray(picture)
    image.putpalette(PALETTE)
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1, compress_type=RUNS)
    write_bytes(path, buffer.getvalue())


@styled
def plot_scores(values: Array, threshold: float, name: str) -> Figure:
    """Histogram of the scores of all candidates with the threshold."""
    figure, axes = new_figure(6, 3.4)
    ax = axes[0, 0]
    top = float(np.percentile(values, 99.5)) if len(values) else 1.0
    ax.hist(np.minimum(values, top), bins=80, color=COLOURS[0])
    ax.axvline(threshold, **{**LEVEL, "color": COLOURS[1]})
    ax.set_xlabel(f"{name} of a candidate")
    ax.set_ylabel("number")
    return figure


@styled
def plot_counts(counts: Sequence[int]) -> Figure:
    """Picks of each micrograph, in their order."""
    figure, axes = new_figure(6, 3.4)
    ax = axes[0, 0]
    ax.plot(np.arange(1, len(counts) + 1), counts, ".", color=COLOURS[0])
    if counts:
        ax.axhline(float(np.median(counts)), **LEVEL)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("micrograph")
    ax.set_ylabel("picks")
    return figure


def write_report(
    run: Run, shown: Sequence[Shown], values: Array, counts: Mapping[str, int], threshold: float, score: str, diameter_px: float,
    lines: Sequence[str],
) -> None:  # fmt: skip
    """report.html, plots/*.png: numbers, warnings, histograms, and a gallery whose slider shows what another threshold would pick."""
    name = run.path.resolve().name
    figures = {"scores": plot_scores(values, threshold, score), "counts": plot_counts(list(counts.values()))}
    content = html.write_plots(run.path / "plots", figures)
    total = sum(counts.values())
    median = float(np.median(list(counts.values()) or [0]))
    numbers = [(f"{total:,}", "picks"), (f"{len(counts):,}", "micrographs"), (f"{median:.0f}", "picks each, median"),
               (f"{threshold:.3g}", f"threshold ({score})")]  # fmt: skip
    parts = [f"<h1>{escape(name)}</h1><span>pick</span>", html.key_figures(numbers), *html.warnings(lines)]
    parts.append(_gallery(shown, values, threshold, diameter_px, len(counts)))
    parts.append(html.picture("Scores", content["scores"], "Candidates are the peaks that keep the least distance, down to well below the "
                              "threshold (red). A good set shows two hills; the threshold belongs into the valley."))  # fmt: skip
    parts.append(html.picture("Picks of each micrograph", content["counts"], "Micrographs far from the median (dashed) deserve a look: "
                              "empty holes, carbon, thick ice."))  # fmt: skip
    rows = [(key, "–" if value is None else value) for key, value in plain(run.params.model_dump()).items()]
    parts.append("<h2>Parameters</h2>" + html.table(rows, ("parameter", "value")))
    write_text(run.path / "report.html", html.document(f"{name}: pick", parts))


def _gallery(shown: Sequence[Shown], values: Array, threshold: float, diameter_px: float, micrographs: int) -> str:
    """Pictures with picks drawn by the page itself, and the slider."""
    if not shown or not len(values):
        return "<p>No candidates to show.</p>"
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    levels = np.linspace(low, high, BINS)
    above = len(values) - np.searchsorted(np.sort(values), levels)
    items = [{"w": s.shape[1], "h": s.shape[0], "p": [[round(float(x)), round(float(y)), round(float(v), 4)]
              for (x, y), v in zip(s.xy, s.value, strict=True)]} for s in shown]  # fmt: skip
    data = json.dumps({"items": items, "levels": levels.tolist(), "above": above.tolist(), "d": diameter_px, "n": micrographs})
    cells = "".join(
        f'<figure class="shot"><div><img src="data:image/jpeg;base64,{_jpeg(s.picture)}" alt="{escape(s.name)}">'
        f'<svg viewBox="0 0 {s.shape[1]} {s.shape[0]}"></svg></div><figcaption>{escape(s.name)}: <b></b> picks</figcaption></figure>'
        for s in shown
    )
    step = (high - low) / 500 or 1e-3
    return (f'<h2>Micrographs</h2><p class="slide"><label>threshold <input id="t" type="range" min="{low:.5g}" max="{high:.5g}" '
            f'step="{step:.3g}" value="{threshold:.5g}"></label> <b id="v"></b> → about <b id="n"></b> picks of all {micrographs} '
            f'micrographs; use it with <code>--threshold</code></p><div class="gallery">{cells}</div><style>{_STYLE}</style>'
            f"<script>const D={data};{_SCRIPT}</script>")  # fmt: skip


def _jpeg(grey: NDArray[np.uint8]) -> str:
    """A smaller JPEG of a picture, base64."""
    image = Image.fromarray(grey)
    image.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


_STYLE = """.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(26rem,1fr));gap:1rem}
.shot{margin:0}.shot div{position:relative}.shot img,.shot svg{width:100%;display:block}.shot svg{position:absolute;inset:0;height:100%}
.slide{position:sticky;top:0;background:#fff;padding:.6rem 0;z-index:1}.slide input{width:24rem;max-width:60%;vertical-align:middle}
circle{fill:none;stroke:#2ee66b;stroke-width:2.2;vector-effect:non-scaling-stroke}"""
_SCRIPT = """const T=document.getElementById('t'),S=[...document.querySelectorAll('.shot')];
S.forEach((f,i)=>{const g=f.querySelector('svg');D.items[i].p.forEach(p=>{const c=document.createElementNS('http://www.w3.org/2000/svg','circle');
c.setAttribute('cx',p[0]);c.setAttribute('cy',p[1]);c.setAttribute('r',D.d/2);g.appendChild(c)})});
function show(){const t=+T.value;document.getElementById('v').textContent=t.toPrecision(3);
let k=D.levels.findIndex(l=>l>=t-1e-9);document.getElementById('n').textContent=(k<0?0:D.above[k]).toLocaleString();
S.forEach((f,i)=>{let n=0;
[...f.querySelector('svg').children].forEach((c,j)=>{const on=D.items[i].p[j][2]>=t;c.style.display=on?'':'none';n+=on});
f.querySelector('b').textContent=n})}T.oninput=show;show();"""
