"""`frazil postprocess`: FSC corrected for the mask, resolution, sharpened map; RELION's postprocess.star, EMDB's XML, plots, warnings."""
from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from pydantic import Field
from torch import Tensor

from frazil.io.files import write_bytes, write_text
from frazil.io.mrc import write_mrc
from frazil.io.star import write_star
from frazil.jobs.fsc import LABELS, spoken
from frazil.jobs.half_maps import Halves, read_halves, read_mtf
from frazil.jobs.map_plots import plot_guinier
from frazil.jobs.pages import Picture, write_page
from frazil.jobs.plots import plot_fsc, plot_map
from frazil.jobs.refine_files import resolution_columns
from frazil.jobs.run import Run
from frazil.jobs.watching import watched
from frazil.steps.mask import MaskParams, filtered, make_mask, threshold_curve
from frazil.steps.postprocess import EXPERT, GOLD, Postprocessed, PostprocessParams, postprocess

POSITIONAL = ("half1", "half2")
HAS_RUN_DIRECTORY = True
PARTICLE = "rlnFourierShellCorrelationParticleMaskFraction"
CAPTIONS = {
    "fsc": "Agreement of the halves: whole box, inside the mask, inside the mask with random phases (what the mask alone brings), and "
           "corrected for that. The corrected curve gives the resolution. The random one should fall to 0 within a few shells.",
    "guinier": "The logarithm of the mean amplitude against the square of the frequency. Beyond 10 Å a protein gives a straight line; its "
               "slope is a quarter of the B-factor, which sharpening takes off again.",
    "map": "The sharpened map inside its mask.",
}  # fmt: skip


class Params(PostprocessParams):
    """Post-process two half maps: FSC corrected for the mask, resolution, sharpened and weighted map."""

    half1: Path = Field(description="first unfiltered half map, as run_half1_class001_unfil.mrc")
    half2: Path | None = Field(None, description="second one; if not given, the first's name with half2 for half1")
    mask: Path | None = Field(None, description="solvent mask, values 0 to 1, same box and pixel size")
    auto_mask: bool = Field(False, description="make a mask from the map, as `frazil mask --edge 6` does")
    pixel_size: float | None = Field(None, gt=0, description="pixel size, instead of that in the headers", json_schema_extra={"unit": "Å"})
    mtf: Path | None = Field(None, description="STAR file of the detector's MTF, to divide the map by")
    mtf_pixel_size: float | None = Field(None, gt=0, description="pixel size of the detector's images; that of the maps if not given",
                                         json_schema_extra={"unit": "Å"})  # fmt: skip
    half_maps: bool = Field(False, description="write the two half maps too, filtered and sharpened alike", json_schema_extra=EXPERT)


def run(params: Params, run: Run) -> None:
    """Write postprocess.mrc, postprocess_masked.mrc, postprocess.star, postprocess_fsc.xml, plots and report.html."""
    run.progress(0, 4, "reading")
    halves = read_halves(params.half1, params.half2, params.mask, params.pixel_size, run.device)
    mtf = read_mtf(params.mtf, params.mtf_pixel_size, halves.pixel_size) if params.mtf else None
    if params.auto_mask and params.mask is None:
        halves = with_mask(halves, run)
    watch = watched(run, halves.paths[1])
    found = postprocess(halves.first, halves.second, halves.mask, halves.pixel_size, params, mtf, run.seed, watch)
    watch.progress("writing", 4, 4)
    if params.half_maps:
        write_halves(run, params, halves, found, mtf)
    write_mrc(run.file("postprocess.mrc"), found.data, halves.pixel_size)
    if halves.mask is not None:
        write_mrc(run.file("postprocess_masked.mrc"), found.data * halves.mask, halves.pixel_size)
    write_star(run.file("postprocess.star"), star_blocks(params, halves, found, run))
    write_bytes(run.file("postprocess_fsc.xml"), fsc_xml(found.used, halves.box, halves.pixel_size))
    write_dat(run, halves, found)
    report(run, halves, found)


def with_mask(halves: Halves, run: Run) -> Halves:
    """The halves with a mask made from their mean, written to mask.mrc."""
    settings = MaskParams.model_validate({"edge": 6.0})
    smooth = filtered((halves.first + halves.second) / 2, halves.pixel_size, settings.lowpass)
    threshold = threshold_curve(smooth, halves.pixel_size).proposals["knee"]
    mask = make_mask(smooth >= threshold, halves.pixel_size, settings, threshold)
    for line in mask.warnings:
        run.warn(line)
    write_mrc(run.file("mask.mrc"), mask.data, halves.pixel_size)
    run.note(f"{run.file('mask.mrc')}: threshold {threshold:.4g}, {mask.volume:.0f} Å³")
    return Halves(halves.paths, halves.first, halves.second, mask.data, halves.pixel_size)


def write_halves(run: Run, params: Params, halves: Halves, found: Postprocessed, mtf) -> None:
    """Both halves, treated as their mean was."""
    from frazil.steps.postprocess import sharpen

    alike = params.model_copy(update={"b_factor": found.b_factor})
    for number, half in enumerate((halves.first, halves.second), 1):
        data = sharpen(half, halves.pixel_size, found.used, found.resolution, alike, mtf)[0]
        write_mrc(run.file(f"postprocess_half{number}.mrc"), data, halves.pixel_size)


def star_blocks(params: Params, halves: Halves, found: Postprocessed, run: Run) -> dict[str, pd.DataFrame | dict[str, object]]:
    """The blocks of RELION's postprocess.star: general, fsc, guinier."""
    box, a, g = halves.box, halves.pixel_size, found.guinier
    start = found.curves.randomise_from
    general: dict[str, object] = {
        "rlnFinalResolution": found.resolution,
        "rlnBfactorUsedForSharpening": found.b_factor,
        "rlnUnfilteredMapHalf1": str(halves.paths[0]),
        "rlnUnfilteredMapHalf2": str(halves.paths[1]),
        "rlnPostprocessedMap": str(run.file("postprocess.mrc")),
    }
    if halves.mask is not None:
        general |= {
            "rlnParticleBoxFractionSolventMask": found.fraction,
            "rlnMaskName": str(params.mask or run.file("mask.mrc")),
            "rlnRandomiseFrom": box * a / start if start else 2 * a,
            "rlnPostprocessedMapMasked": str(run.file("postprocess_masked.mrc")),
        }
    if params.b_factor is None:
        general |= {
            "rlnFittedSlopeGuinierPlot": g.slope,
            "rlnFittedInterceptGuinierPlot": g.intercept,
            "rlnCorrelationFitGuinierPlot": g.correlation,
        }
    table = resolution_columns(box // 2 + 1, box, a)
    table[LABELS["corrected"]] = found.used.cpu().numpy()
    if halves.mask is not None:
        table[PARTICLE] = found.particle.cpu().numpy()
        table |= {LABELS[name]: getattr(found.curves, name).cpu().numpy() for name in ("unmasked", "masked", "randomised")}
    else:
        table[LABELS["unmasked"]] = found.curves.unmasked.cpu().numpy()
    guinier = {"rlnResolutionSquared": g.k2, "rlnLogAmplitudesOriginal": g.original, "rlnLogAmplitudesMTFCorrected": g.mtf_corrected,
               "rlnLogAmplitudesWeighted": g.weighted, "rlnLogAmplitudesSharpened": g.sharpened}  # fmt: skip
    columns = {name: values.numpy() for name, values in guinier.items()}
    columns["rlnLogAmplitudesIntercept"] = np.full(len(g.k2), g.intercept)
    return {"general": general, "fsc": pd.DataFrame(table), "guinier": pd.DataFrame(columns)}


def fsc_xml(curve: Tensor, box: int, pixel_size: float) -> bytes:
    """The curve as EMDB takes it at deposition: frequency in 1/Å from shell 1 on, correlation."""
    root = ElementTree.Element("fsc", title="frazil FSC, corrected for the mask", xaxis="Resolution (A-1)", yaxis="Correlation Coefficient")
    for shell in range(1, len(curve)):
        point = ElementTree.SubElement(root, "coordinate")
        ElementTree.SubElement(point, "x").text = f"{shell / (box * pixel_size):.6f}"
        ElementTree.SubElement(point, "y").text = f"{float(curve[shell]):.6f}"
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def write_dat(run: Run, halves: Halves, found: Postprocessed) -> None:
    """postprocess_fsc.dat: frequency in 1/Å and the deciding FSC, two columns."""
    rows = (f"{shell / (halves.box * halves.pixel_size):.6f} {float(value):.6f}" for shell, value in enumerate(found.used))
    write_text(run.file("postprocess_fsc.dat"), "\n".join(rows) + "\n")


def report(run: Run, halves: Halves, found: Postprocessed) -> None:
    """Events, warnings, the lines a person wants, and the page."""
    for line in found.warnings:
        run.warn(line)
    curves = {name: getattr(found.curves, name).cpu() for name in LABELS} if halves.mask is not None else {"unmasked": found.used.cpu()}
    run.event("postprocess", resolution=found.resolution, resolution_half=found.resolution_half, b_factor=found.b_factor, box=halves.box,
              pixel_size=halves.pixel_size, slope=found.guinier.slope, randomise_from=found.curves.randomise_from,
              fsc=found.used, **{f"fsc_{name}": curve for name, curve in curves.items()})  # fmt: skip
    numbers = [(spoken(found.resolution), f"resolution, FSC {GOLD}"), (spoken(found.resolution_half), "FSC 0.5"),
               (f"{found.b_factor:.0f} Å²", "B-factor"), (f"{halves.box} px of {halves.pixel_size:.4g} Å", "box")]  # fmt: skip
    mark = found.resolution if found.resolution < 900 else None
    shown = {name: curve.numpy() for name, curve in curves.items()}
    pictures = [Picture("fsc", "Resolution", CAPTIONS["fsc"], plot_fsc(shown, halves.box, halves.pixel_size, mark))]
    pictures.append(Picture("guinier", "Guinier plot", CAPTIONS["guinier"], guinier_figure(found, halves.pixel_size, run.params)))
    inside = found.data if halves.mask is None else found.data * halves.mask
    pictures.append(Picture("map", "Map", CAPTIONS["map"], plot_map(inside.cpu().numpy(), halves.pixel_size)))
    write_page(run, numbers, found.warnings, pictures)
    at_half = spoken(found.resolution_half)
    run.summary(f"resolution {spoken(found.resolution)} (FSC {GOLD}), {at_half} (0.5); B-factor {found.b_factor:.1f} Å²")
    run.summary(f"map {run.file('postprocess.mrc')}, curves {run.file('postprocess.star')}, for EMDB {run.file('postprocess_fsc.xml')}")


def guinier_figure(found: Postprocessed, pixel_size: float, params):
    """The Guinier plot with its line, where one was fitted."""
    g = found.guinier
    curves = {"mean of the half maps": g.original, "divided by the MTF": g.mtf_corrected, "weighted by the FSC": g.weighted,
              "sharpened": g.sharpened}  # fmt: skip
    line = (g.slope, g.intercept) if g.fitted >= 3 else None
    kept = g.k2[g.weighted > -90]
    end = float(kept[-1]) if len(kept) else float(g.k2[-1])
    if params.fit_to > 0:
        end = min(end, params.fit_to**-2)
    fit = (params.fit_from**-2, max(end, params.fit_from**-2))
    return plot_guinier(g.k2.numpy(), {name: values.numpy() for name, values in curves.items()}, line, fit)
