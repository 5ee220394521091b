"""`frazil fsc`: how far two maps agree, shell by shell."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from frazil.io.files import atomic_path
from frazil.io.star import write_star
from frazil.jobs.inputs import check_same_grid, read_cube, read_mask_for
from frazil.jobs.plots import plot_fsc
from frazil.jobs.run import Run
from frazil.maths.fsc import corrected_fsc, fsc, resolution_at

POSITIONAL = ("first", "second")
HAS_RUN_DIRECTORY = False
LABELS = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "randomised": "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
    "corrected": "rlnFourierShellCorrelationCorrected",
}


class Params(BaseModel):
    """Fourier shell correlation of two maps: a table, the resolutions, and with --output a plot."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    first: Path = Field(description="a map")
    second: Path = Field(description="the map to compare it with, same box and pixel size")
    mask: Path | None = Field(None, description="compare inside this mask too, and correct for what the mask itself brings")
    output: Path | None = Field(None, description="write OUTPUT.png (plot) and OUTPUT.star (table)")
    seed: int = Field(0, ge=0, description="seed of the random phases of the correction", json_schema_extra={"level": "expert"})


def compare(params: Params) -> tuple[dict[str, Tensor], int, float]:
    """(curves by name, box, pixel size) of the maps that `params` names."""
    a, b = read_cube(params.first), read_cube(params.second)
    check_same_grid(a, params.first, b, params.second)
    if params.mask is None:
        return {"unmasked": fsc(a.data, b.data)}, a.data.shape[-1], a.pixel_size
    result = corrected_fsc(a.data, b.data, read_mask_for(params.mask, a, params.first), params.seed)
    return {name: getattr(result, name) for name in LABELS}, a.data.shape[-1], a.pixel_size


def run(params: Params, run: Run | None) -> None:
    """Print the table and the resolutions at 0.5 and 0.143; write plot and table where asked for."""
    curves, box, pixel_size = compare(params)
    print(f"{'shell':>5} {'Å':>9} " + " ".join(f"{name:>10}" for name in curves))
    for shell in range(1, box // 2 + 1):
        print(f"{shell:5d} {box * pixel_size / shell:9.3f} " + " ".join(f"{float(curve[shell]):10.4f}" for curve in curves.values()))
    for name, curve in curves.items():
        if name != "randomised":
            half, gold = (resolution_at(curve, level, box, pixel_size) for level in (0.5, 0.143))
            print(f"{name}: {spoken(half)} at FSC 0.5, {spoken(gold)} at FSC 0.143, mean FSC {float(curve[1:].mean()):.4f}")
    if params.output is not None:
        print(f"written: {', '.join(str(path) for path in write(params.output, curves, box, pixel_size))}")


def spoken(resolution: float) -> str:
    """A resolution for a sentence."""
    return "no agreement" if resolution >= 999 else f"{resolution:.2f} Å"


def write(output: Path, curves: dict[str, Tensor], box: int, pixel_size: float) -> list[Path]:
    """OUTPUT.png and OUTPUT.star; returns their paths."""
    base = output.with_suffix("") if output.suffix in (".png", ".star") else output
    shells = np.arange(box // 2 + 1)
    table = {"rlnSpectralIndex": shells, "rlnResolution": shells / (box * pixel_size),
             "rlnAngstromResolution": np.where(shells > 0, box * pixel_size / np.maximum(shells, 1), 999.0)}  # fmt: skip
    table |= {LABELS[name]: curve.numpy() for name, curve in curves.items()}
    star, png = Path(f"{base}.star"), Path(f"{base}.png")
    write_star(star, {"fsc": pd.DataFrame(table)})
    mark = resolution_at(curves.get("corrected", curves["unmasked"]), 0.143, box, pixel_size)
    figure = plot_fsc({name: curve.numpy() for name, curve in curves.items()}, box, pixel_size, mark if mark < 999 else None)
    with atomic_path(png) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return [png, star]
