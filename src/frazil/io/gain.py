"""Gain references and defects of detectors, brought to the multiplicative form and orientation of the movies (spec/processing 1.5, 1.6)."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.micrographs import read_micrograph
from frazil.io.mrc import read_labels, write_mrc

Form = Literal["factors", "counts"]
MARKS: dict[Form, str] = {"factors": "frazil gain: factors, corrected = raw x gain", "counts": "frazil gain: mean counts, to be inverted"}
OTHER_FORM: dict[Form, str] = {  # what to say where a file holds the other form than the one it is taken for
    "factors": "holds counts, not factors: `frazil import --gain` recognises and inverts it, or give its inverse (mean/reference)",
    "counts": "holds factors, not the counts that a reference of EER movies holds: `frazil import --gain` recognises and converts it",
}
TURNS = (0, 1, 2, 3)
FLIPS = {0: "none", 1: "upside down", 2: "left-right"}
SERIALEM_WORDS = ("CameraSize", "RotationAndFlip", "K2Type", "BadColumn", "BadPixels", "BadRow", "PartialBad", "UsableArea")


def gain_form(path: str | os.PathLike[str], eer: bool = False) -> Form:
    """What a gain reference holds: "factors" (corrected = raw × gain), or "counts" of an even beam, which have to be inverted.

    As a file that frazil wrote says in its header; else a `.gain` and references of other than EER movies are factors, MRC and TIFF
    references of EER movies counts, as in RELION.
    """
    path = Path(path)
    marked = marked_form(path)
    if marked is not None:
        return marked
    return "counts" if eer and path.suffix.lower() != ".gain" else "factors"


def marked_form(path: Path) -> Form | None:
    """The form that frazil wrote into the header of a gain reference; None for another's."""
    if path.suffix.lower() not in (".mrc", ".mrcs", ".map"):
        return None
    try:
        labels = read_labels(path)
    except BadInput:
        return None  # read_gain says what is wrong, or knows a mode that headers alone do not
    return next((form for form, mark in MARKS.items() if mark in labels), None)


def write_gain(path: str | os.PathLike[str], gain: Tensor, eer: bool = False) -> None:
    """Write a multiplicative gain (H, W) as MRC, its form marked in the header: for EER movies as counts, which RELION expects of them
    too.
    """
    form: Form = "counts" if eer else "factors"
    write_mrc(path, inverted(gain) if eer else gain, 1.0, label=MARKS[form])


def inverted(reference: Tensor) -> Tensor:
    """mean/reference, 0 where the reference is 0: factors of counts, or counts of factors."""
    good = reference > 0
    return torch.where(good, reference[good].mean() / reference.clamp(min=1e-30), torch.zeros_like(reference))


def read_gain(path: str | os.PathLike[str], eer: bool = False, turn: int = 0, flip: int = 0, form: Form | None = None) -> Tensor:
    """(H, W) float32 multiplicative gain, 0 where a pixel is bad; turned by `turn` × 90° clockwise as displayed, then flipped.

    TIFF is turned upside down as movies are, but a `.gain` of the vendor (a TIFF) is not, since EER is not. Counts are inverted,
    mean/reference; form: what the file holds, if not what gain_form says. Raises BadInput naming the file.
    """
    path = Path(path)
    if path.suffix.lower() in (".dm4", ".dm3"):
        raise BadInput(f"{path}: DM files are not read; convert it with IMOD: dm2mrc {path.name} {path.stem}.mrc")
    if path.suffix.lower() == ".gain":
        data = _vendor_gain(path)
    else:
        data = read_micrograph(path).float()
    if not bool(torch.isfinite(data).all()) or float(data.max()) <= 0:
        raise BadInput(f"{path}: holds no positive finite values; expected a gain reference")
    if float(data.min()) < 0:
        raise BadInput(f"{path}: holds negative values (lowest {float(data.min()):.3g}); expected a gain reference")
    return oriented(inverted(data) if (form or gain_form(path, eer)) == "counts" else data, turn, flip)


def oriented(data: Tensor, turn: int, flip: int) -> Tensor:
    """A picture (H, W), row 0 at the bottom, turned by `turn` × 90° clockwise as displayed, then flipped (1 upside down, 2 left-right)."""
    if turn not in TURNS or flip not in FLIPS:
        raise BadInput(f"gain: rotation is 0 to 3 (times 90°), flip 0, 1 or 2; got {turn} and {flip}")
    # Clockwise on a display whose rows run upwards is the way from y to x: torch.rot90 over (0, 1) turns from the first axis to the second.
    data = torch.rot90(data, turn, (0, 1))
    return data.flip((0,) if flip == 1 else (1,) if flip == 2 else ()).contiguous()


def fit_gain(gain: Tensor, shape: tuple[int, int], path: str | os.PathLike[str], eer: bool = False) -> Tensor:
    """The gain at the size of the frames: as it is, or, for EER only, each pixel repeated 2 × 2 or averaged 2 × 2. Raises BadInput."""
    height, width = gain.shape
    if (height, width) == shape:
        return gain
    if eer and (2 * height, 2 * width) == shape:
        return gain.repeat_interleave(2, 0).repeat_interleave(2, 1)
    if eer and (height, width) == (2 * shape[0], 2 * shape[1]):
        parts = gain.reshape(shape[0], 2, shape[1], 2)
        bad = (parts == 0).any(3).any(1)
        return torch.where(bad, torch.zeros(shape), parts.mean((1, 3)))
    hint = "; it would fit turned by 90° (--gain-rotation 1)" if (width, height) == shape else ""
    raise BadInput(f"{path}: gain of {width} x {height} px, frames of {shape[1]} x {shape[0]}{hint}")


def read_defects(path: str | os.PathLike[str], shape: tuple[int, int], tiff: bool = False) -> Tensor:
    """(H, W) bool of bad pixels: rectangles `x y w h` a line (first pixel 0), or an image that is not zero there.

    `tiff`: the movies are TIFF, whose rows are counted from the top on disk; rectangles are turned upside down with them. Rectangles are
    cut at
    the border. Raises BadInput naming file and line; SerialEM's own format is refused by its keywords.
    """
    path = Path(path)
    if path.suffix.lower() in (".mrc", ".tif", ".tiff"):
        image = read_micrograph(path) != 0
        if tuple(image.shape) != shape:
            raise BadInput(f"{path}: defects of {image.shape[1]} x {image.shape[0]} px, frames of {shape[1]} x {shape[0]}")
        return image
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected a list of defects") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as text; expected lines `x y width height`") from error
    bad = torch.zeros(shape, dtype=torch.bool)
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if words[0].rstrip("s") in [word.rstrip("s") for word in SERIALEM_WORDS]:
            raise BadInput(f"{path}: line {number}: {words[0]} is SerialEM's defect format; convert it: clip defect -D {path.name} "
                f"MOVIE defects.mrc")
        try:
            x, y, w, h = (int(word) for word in words)
        except ValueError:
            raise BadInput(f"{path}: line {number}: expected four whole numbers `x y width height`, got {line.strip()[:40]!r}") from None
        if w <= 0 or h <= 0 or x < 0 or y < 0 or x >= shape[1] or y >= shape[0]:
            raise BadInput(f"{path}: line {number}: rectangle {x} {y} {w} {h} lies outside frames of {shape[1]} x {shape[0]} px")
        bad[y : y + h, x : x + w] = True
    return bad.flip(0) if tiff else bad


def _vendor_gain(path: Path) -> Tensor:
    """A `.gain` file: a TIFF by content, taken as it is stored."""
    try:
        import tifffile

        return torch.from_numpy(np.ascontiguousarray(tifffile.imread(path).astype(np.float32)))
    except ImportError:
        raise BadInput(f"{path}: needs two more packages: pip install tifffile imagecodecs") from None
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected a gain reference") from None
    except Exception as error:  # noqa: BLE001 (whatever a broken file makes tifffile raise)
        raise BadInput(f"{path}: cannot be read as the vendor's gain (a TIFF inside); convert it to MRC") from error
