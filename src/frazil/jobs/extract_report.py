"""Pictures and report.html of `frazil extract`."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from frazil.jobs.pages import Picture, write_page
from frazil.jobs.pick_pictures import plot_counts
from frazil.jobs.plots import Array, new_figure, scale_bar, styled
from frazil.jobs.run import Run
from frazil.maths.filters import lowpass_map

COLUMNS, CELL = 12, 0.9  # of the sheet; inches
LOWPASS = 20.0  # Å, and at least three pixels


@styled
def plot_particles(images: Array, pixel_size: float, titles: Sequence[str] = ()) -> Figure:
    """A sheet of images (n, y, x), each on its own grey scale, with a scale bar on the first."""
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure, axes = new_figure(columns * CELL, rows * (CELL + (0.2 if titles else 0.02)), rows, columns)
    for k, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if k >= len(images):
            continue
        low, high = np.percentile(images[k], [1, 99])
        ax.imshow(images[k], cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower", interpolation="bicubic")
        if titles:
            ax.set_title(titles[k], fontsize=6, loc="center", weight="normal", pad=2)
        if k == 0:
            scale_bar(ax, images.shape[-1], pixel_size)
    return figure


def write_report(run: Run, shown: Sequence[Tensor], counts: Array, pixel_size: float, side: int, lines: Sequence[str]) -> None:
    """report.html: how many, from how many micrographs, some of them low-passed, particles of each micrograph."""
    numbers = [(f"{int(counts.sum()):,}", "particles"), (f"{len(counts):,}", "micrographs"), (f"{np.median(counts):.0f}", "each, median"),
               (f"{side} px", "box"), (f"{pixel_size:.4g} Å", "pixel")]  # fmt: skip
    pictures = [Picture("counts", "Particles of each micrograph", "Micrographs far from the median deserve a look.",
                        plot_counts([int(n) for n in counts]))]  # fmt: skip
    if shown:
        resolution = max(LOWPASS, 3 * pixel_size)
        images = lowpass_map(torch.stack(list(shown)), pixel_size, resolution, dims=2).numpy()
        caption = f"Every so manyth particle, low-passed to {resolution:.0f} Å: bright, in the middle, background even."
        pictures.insert(0, Picture("particles", "Particles", caption, plot_particles(images, pixel_size)))
    write_page(run, numbers, lines, pictures)
