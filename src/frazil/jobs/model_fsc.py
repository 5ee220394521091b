"""`frazil model-fsc`: a map, and its half maps, against the atomic model: FSC, Q-scores, a report."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput, Volume
from frazil.io.files import write_text
from frazil.io.models import Atoms, check_inside, density_from_model, read_atoms
from frazil.io.mrc import read_map, write_mrc
from frazil.io.star import write_star
from frazil.jobs.html import document, key_figures, picture, table, warnings, write_plots
from frazil.jobs.inputs import PIXEL_TOLERANCE, check_same_grid
from frazil.jobs.plots import COLOURS, new_figure, plot_fsc, styled
from frazil.jobs.run import Run
from frazil.maths.fsc import NO_RESOLUTION
from frazil.maths.masks import check_mask
from frazil.steps.map_filter import b_factor_map
from frazil.steps.map_transform import spline
from frazil.steps.model_fsc import ModelFit, fit_to_model, model_mask
from frazil.steps.qscore import q_scores

POSITIONAL = ("map", "model")
HAS_RUN_DIRECTORY = True
OVERFIT = 0.05  # mean FSC-work − FSC-free from 10 Å on from which the model follows the noise of one half map
ANGSTROM: JsonDict = {"unit": "Å", "level": "expert"}
CAPTIONS = {
    "fsc": ("Map against model", "Inside a soft mask around the atoms, the same for both. FSC-work and FSC-free should run together: "
            "a gap means that the model was fitted to noise."),
    "qscore": ("Q-scores", "1: like a well-resolved atom; 0: no relation. Stretches below the rest are flexible or built wrongly."),
}  # fmt: skip
NAMES = {"map": "map", "half1": "half map 1", "half2": "half map 2"}


class Params(BaseModel):
    """Compare a map with its atomic model: FSC and its 0.5 crossing, relative B-factor, Q-scores of atoms, residues and chains.

    Give the half map the model was refined in as --half1: its curve is FSC-work, that of the other half FSC-free.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    map: Path = Field(description="the map")
    model: Path = Field(description="atomic model (mmCIF or PDB, may be gzipped), lying where the map's header puts the map")
    half1: Path | None = Field(None, description="half map the model was refined against, unfiltered: FSC-work")
    half2: Path | None = Field(None, description="the other half map: FSC-free")
    mask: Path | None = Field(None, description="compare inside this mask; else one is made around the atoms")
    radius: float = Field(3.0, gt=0, description="the mask is 1 up to this distance from an atom", json_schema_extra=ANGSTROM)
    edge: float = Field(6.0, ge=0, description="width of the mask's soft edge", json_schema_extra=ANGSTROM)
    ignore_origin: bool = Field(False, description="the first voxel is at 0, 0, 0 whatever the map's header says",
                                json_schema_extra={"level": "expert"})  # fmt: skip

    @model_validator(mode="after")
    def _both_halves(self) -> Params:
        """Both half maps or none."""
        if (self.half1 is None) != (self.half2 is None):
            raise ValueError("give both --half1 and --half2, or neither")
        return self


def cube(volume: Volume) -> Volume:
    """A map padded with zeros after its last voxels to an even cube: its first voxel, and so its origin, stays."""
    side = 2 * math.ceil(max(volume.data.shape) / 2)
    if set(volume.data.shape) == {side}:
        return volume
    out = volume.data.new_zeros(side, side, side)
    out[tuple(slice(0, n) for n in volume.data.shape)] = volume.data
    return Volume(out, volume.pixel_size, volume.origin)


def read_maps(params: Params) -> dict[str, Volume]:
    """The map and the half maps, on one grid, as even cubes; raises BadInput where they do not belong together."""
    paths = {name: getattr(params, name) for name in NAMES if getattr(params, name) is not None}
    volumes = {name: read_map(path) for name, path in paths.items()}
    if volumes["map"].pixel_size <= 0:
        raise BadInput(f"{params.map}: has no pixel size in its header; write one with `frazil map convert --pixel-size`")
    for name, volume in volumes.items():
        if not float(volume.data.std()) > 0:
            raise BadInput(f"{paths[name]}: every voxel has the same value; expected a map")
        if volume.data.shape != volumes["map"].data.shape:
            sides = [" x ".join(str(side) for side in reversed(v.data.shape)) for v in (volume, volumes["map"])]
            raise BadInput(f"{paths[name]}: {sides[0]} px, but {params.map} has {sides[1]} px; half maps and map must have one box")
        check_same_grid(volumes["map"], params.map, volume, paths[name])
    if params.half1 is not None and torch.equal(volumes["half1"].data, volumes["half2"].data):
        raise BadInput(f"{params.half2}: is the same map as {params.half1}; expected the other half map")
    origin = (0.0, 0.0, 0.0) if params.ignore_origin else volumes["map"].origin
    return {name: cube(Volume(v.data, volumes["map"].pixel_size, origin)) for name, v in volumes.items()}


def comparison_mask(params: Params, volume: Volume, atoms: Tensor) -> Tensor:
    """(N, N, N) the user's mask, or one around the atoms at (n, 3) Å from the first voxel."""
    box, pixel_size = volume.data.shape[-1], volume.pixel_size
    if params.mask is None:
        return model_mask(atoms, box, pixel_size, params.radius, params.edge)
    mask = cube(read_map(params.mask))
    if mask.data.shape != volume.data.shape or abs(mask.pixel_size - pixel_size) > PIXEL_TOLERANCE * pixel_size:
        own, wanted = f"{mask.data.shape[-1]} px of {mask.pixel_size:g} Å", f"{box} px of {pixel_size:g} Å"
        raise BadInput(f"{params.mask}: {own}, but {params.map} has {wanted}; make the mask on the map's grid")
    if fault := check_mask(mask.data, str(params.mask)):
        raise BadInput(fault)
    return mask.data.clamp(0, 1)


def residue_table(atoms: Atoms, q: Tensor) -> pd.DataFrame:
    """A row a residue: chain, number, name, kind, atoms, mean Q and mean B-factor."""
    count = torch.bincount(atoms.residue, minlength=len(atoms.names)).clamp(min=1)
    known = torch.isfinite(q)
    sums = torch.bincount(atoms.residue[known], q[known], minlength=len(atoms.names))
    having = torch.bincount(atoms.residue[known], minlength=len(atoms.names))
    mean = torch.where(having > 0, sums / having.clamp(min=1), torch.nan)
    b = torch.bincount(atoms.residue, atoms.b_factor, minlength=len(atoms.names)) / count
    labels = ("frazilChain", "frazilResidueNumber", "frazilResidueName", "frazilKind")
    columns = dict(zip(labels, (atoms.chains, atoms.numbers, atoms.names, atoms.kinds), strict=True))
    rows = pd.DataFrame({**columns, "frazilAtoms": count.numpy(), "frazilQScore": mean.numpy(), "frazilBFactor": b.numpy()})
    return rows.loc[np.bincount(atoms.residue.numpy(), minlength=len(rows)) > 0]


def chain_table(residues: pd.DataFrame) -> pd.DataFrame:
    """A row a chain: atoms, mean Q over its atoms."""
    chain, atoms, q = (residues[label].to_numpy() for label in ("frazilChain", "frazilAtoms", "frazilQScore"))
    rows = []
    for name in dict.fromkeys(chain.tolist()):
        use = (chain == name) & np.isfinite(q)
        if use.any():
            mean = float(np.average(q[use], weights=atoms[use]))
            rows.append({"frazilChain": name, "frazilAtoms": int(atoms[use].sum()), "frazilQScore": mean})
    return pd.DataFrame(rows)


def composition(atoms: Atoms) -> dict[str, Any]:
    """What journals ask for of a model: atoms, residues by kind, mean B-factors by kind."""
    kinds = np.array(atoms.kinds)[atoms.residue.numpy()]
    out: dict[str, Any] = {"atoms": len(atoms.position)}
    for kind in ("protein", "nucleic", "ligand", "water"):
        out[f"{kind}_residues"] = int(sum(k == kind for k in atoms.kinds))
        out[f"{kind}_b_factor"] = float(atoms.b_factor[torch.from_numpy(kinds == kind)].mean()) if (kinds == kind).any() else None
    return out


def find_warnings(fits: Mapping[str, ModelFit], q_mean: float, params: Params, side: float) -> list[str]:
    """What a person should know before believing the figures."""
    out = []
    curve, coarse = fits["map"].masked, max(2, int(side / 10))
    if fits["map"].crossing >= NO_RESOLUTION or float(curve[1 : coarse + 1].mean()) < 0.5:
        out.append(f"{params.model} does not fit {params.map} even at 10 Å: is it placed where the map's header puts the map "
                   "(try --ignore-origin), of the same hand, with the right pixel size?")  # fmt: skip
    if "half1" in fits:
        last = max(coarse + 2, int(side / min(fits["map"].last_shell, 50.0)))
        gap = float((fits["half1"].masked - fits["half2"].masked)[coarse : last + 1].mean())
        if gap > OVERFIT:
            out.append(f"FSC-work is {gap:.2f} above FSC-free from 10 Å on: the model follows the noise of half map 1")
    if math.isfinite(q_mean) and q_mean < 0.2:
        out.append(f"mean Q-score {q_mean:.2f}: atoms are not resolved in this map, or lie beside it")
    return out


@styled
def plot_q_scores(residues: pd.DataFrame) -> Figure:
    """Q-score along the residues of every chain (at most 12 panels)."""
    chains = list(dict.fromkeys(residues[residues["frazilKind"] != "water"]["frazilChain"]))[:12]
    figure, axes = new_figure(9, 1.2 + 1.3 * max(1, len(chains)), max(1, len(chains)), 1)
    for ax, chain, colour in zip(axes[:, 0], chains, COLOURS * 2, strict=False):
        part = residues[(residues["frazilChain"] == chain) & (residues["frazilKind"] != "water")]
        ax.plot(np.arange(len(part)), part["frazilQScore"], color=colour, linewidth=1.1)
        step = max(1, len(part) // 10)
        ax.set_xticks(np.arange(0, len(part), step), [str(n) for n in part["frazilResidueNumber"]][::step])
        ax.set_ylim(min(0.0, *np.nan_to_num(np.asarray(part["frazilQScore"], dtype=float))), 1)
        ax.set_ylabel(f"Q, chain {chain}")
        ax.set_xlim(0, max(1, len(part) - 1))
    axes[-1, 0].set_xlabel("residue")
    return figure


def fsc_table(fits: Mapping[str, ModelFit], box: int, pixel_size: float) -> pd.DataFrame:
    """Curves by shell with RELION's labels for shell and resolution."""
    shells = np.arange(box // 2 + 1)
    resolution = np.where(shells > 0, box * pixel_size / np.maximum(shells, 1), NO_RESOLUTION)
    columns = {"rlnSpectralIndex": shells, "rlnResolution": shells / (box * pixel_size), "rlnAngstromResolution": resolution}
    labels = {"map": "frazilFscModelMap", "half1": "frazilFscWork", "half2": "frazilFscFree"}
    columns |= {labels[name]: fit.masked.cpu().numpy() for name, fit in fits.items()}
    return pd.DataFrame({**columns, "frazilFscModelMapUnmasked": fits["map"].unmasked.cpu().numpy()})


def write_report(run: Run, results: dict[str, Any], figures: Mapping[str, Figure], chains: pd.DataFrame, told: list[str]) -> None:
    """report.html and plots/*.png."""
    pictures = write_plots(run.path / "plots", figures)
    shown = [(f"{results['crossing']:.2f} Å", "map-model FSC 0.5"), (f"{results['q_score']:.3f}", "mean Q-score"),
             (f"{results['correlation']:.3f}", "correlation in the mask")]  # fmt: skip
    if results["b_factor"] is not None:
        shown.append((f"{results['b_factor']:.0f} Å²", "B-factor of the map relative to the model"))
    for key, what in (("crossing_half1", "FSC-work 0.5"), ("crossing_half2", "FSC-free 0.5")):
        if key in results:
            shown.append((f"{results[key]:.2f} Å", what))
    parts = [f"<h1>{run.path.resolve().name}</h1><span>model-fsc</span>", key_figures(shown), *warnings(told)]
    parts += [picture(title, pictures[name], caption) for name, (title, caption) in CAPTIONS.items()]
    rows = [(chain, atoms, f"{q:.3f}") for chain, atoms, q in chains.itertuples(index=False)]
    parts.append("<h2>Chains</h2>" + table(rows, ("chain", "atoms", "Q-score")))
    write_text(run.path / "report.html", document(f"{run.path.resolve().name}: model-fsc", parts))


def run(params: Params, run: Run) -> None:
    """Write model_fsc.star (curves, results), qscore.star, model.mrc, mask.mrc, plots and report.html."""
    volumes, atoms = read_maps(params), read_atoms(params.model)
    volume = volumes["map"]
    box, pixel_size, device = volume.data.shape[-1], volume.pixel_size, run.device
    place = atoms.position - torch.tensor(volume.origin, dtype=torch.float64)
    check_inside(params.model, place.numpy(), box, pixel_size)
    run.progress(0, 3, "density of the model")
    model = density_from_model(params.model, box, pixel_size, grid_origin=volume.origin).data
    mask = comparison_mask(params, volume, place)
    run.progress(1, 3, "comparing")
    on = [tensor.to(device) for tensor in (model, mask)]
    fits = {name: fit_to_model(v.data.to(device), on[0], on[1], pixel_size) for name, v in volumes.items()}
    run.progress(2, 3, "Q-scores")
    run.check_stop()
    q = q_scores(spline(volume.data.to(device)), place, pixel_size)
    residues = residue_table(atoms, q)
    chains, q_mean = chain_table(residues), float(q.nanmean())
    fit = fits["map"]
    results = {**asdict(fit), "q_score": q_mean, "composition": composition(atoms)}
    results["b_factor"] = None if math.isnan(fit.b_factor) else fit.b_factor
    del results["masked"], results["unmasked"]
    results |= {f"crossing_{name}": fits[name].crossing for name in ("half1", "half2") if name in fits}
    told = find_warnings(fits, q_mean, params, box * pixel_size)
    blurred = model if math.isnan(fit.b_factor) else b_factor_map(model, pixel_size, fit.b_factor)
    write_mrc(run.file("model.mrc"), blurred, pixel_size, origin=volume.origin)
    write_mrc(run.file("mask.mrc"), mask, pixel_size, origin=volume.origin)
    general: dict[str, Any] = {
        "frazilMap": str(params.map), "frazilModel": str(params.model), "rlnUnfilteredMapHalf1": str(params.half1 or "None"),
        "rlnUnfilteredMapHalf2": str(params.half2 or "None"), "rlnPixelSize": pixel_size, "frazilModelResolution": fit.crossing,
        "frazilModelLastShell": fit.last_shell, "frazilRelativeBFactor": fit.b_factor, "frazilMaskedCorrelation": fit.correlation,
        "frazilQScore": q_mean,
    }  # fmt: skip
    write_star(run.file("model_fsc.star"), {"general": general, "fsc": fsc_table(fits, box, pixel_size)})
    write_star(run.file("qscore.star"), {"chains": chains, "residues": residues})
    curves = {"map": fits["map"].masked, "map, unmasked": fits["map"].unmasked}
    curves |= {name: fits[key].masked for key, name in (("half1", "FSC-work (half 1)"), ("half2", "FSC-free (half 2)")) if key in fits}
    mark = fit.crossing if fit.crossing < NO_RESOLUTION else None
    figures = {"fsc": plot_fsc({k: c.cpu().numpy() for k, c in curves.items()}, box, pixel_size, mark), "qscore": plot_q_scores(residues)}
    for line in told:
        run.warn(line)
    run.event("result", **results)
    write_report(run, results, figures, chains, told)
    spoken = f"{fit.crossing:.2f} Å" if mark else "nowhere above"
    by_chain = ", ".join(f"{chain} {mean:.3f}" for chain, _, mean in list(chains.itertuples(index=False))[:12])
    run.summary(f"map-model FSC 0.5 at {spoken} (last shell {fit.last_shell:.2f} Å), correlation in the mask {fit.correlation:.3f}",
                f"mean Q-score {q_mean:.3f}; by chain {by_chain}")  # fmt: skip
    if "half1" in fits:
        run.summary(f"FSC-work 0.5 at {fits['half1'].crossing:.2f} Å, FSC-free 0.5 at {fits['half2'].crossing:.2f} Å")
