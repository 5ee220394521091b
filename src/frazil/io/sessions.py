"""What the microscope's software wrote beside the images: SerialEM's .mdoc, EPU's .xml (spec/processing 1.9)."""
from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from frazil.data import BadInput
from frazil.io.files import why

_SECTION = re.compile(r"\[(\w+)\s*=\s*(.*?)\]\s*$")


@dataclass(frozen=True)
class Acquisition:
    """One movie as the software recorded it; 0 or "" where it says nothing."""

    source: Path  # the file that says so
    movie: str = ""  # file name of the movie, without folders
    pixel_size: float = 0.0  # Å
    voltage: float = 0.0  # kV
    dose: float = 0.0  # e/Å², whole exposure
    frames: int = 0
    image_shift: tuple[float, float] | None = None  # beam or image shift, in the software's unit
    gain: str = ""  # gain reference, file name
    defects: str = ""


def read_mdoc(path: str | os.PathLike[str]) -> list[Acquisition]:
    """Movies of a SerialEM .mdoc: frame sets, or sections of a tilt series. Raises BadInput naming file and line where it is none."""
    path = Path(path)
    head, sections = _mdoc_sections(path)
    found = []
    for kind, items in sections:
        merged = {**head, **items}
        if kind not in ("FrameSet", "ZValue") or "SubFramePath" not in items:
            continue
        shift = _floats(path, merged, "ImageShift")
        exact = _floats(path, merged, "FrameDosesAndNumber")
        counted = sum(dose * number for dose, number in zip(exact[::2], exact[1::2], strict=False))
        found.append(Acquisition(
            path, re.split(r"[\\/]", items["SubFramePath"])[-1], _number(path, merged, "PixelSpacing"), _number(path, merged, "Voltage"),
            counted or _number(path, merged, "ExposureDose"), int(_number(path, merged, "NumSubFrames")),
            (shift[0], shift[1]) if len(shift) >= 2 else None, merged.get("GainReference", ""), merged.get("DefectFile", ""),
        ))  # fmt: skip
    if not found:
        raise BadInput(f"{path}: names no movie (no SubFramePath in any section); expected the .mdoc of frames")
    return found


def _mdoc_sections(path: Path) -> tuple[dict[str, str], list[tuple[str, dict[str, str]]]]:
    """(items before the first section, [(kind, items)])."""
    try:
        lines = path.read_text(encoding="utf-8", errors="strict").splitlines()
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not a text file; expected SerialEM's .mdoc") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {why(error)}") from error
    head: dict[str, str] = {}
    sections: list[tuple[str, dict[str, str]]] = []
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("﻿")
        if not text:
            continue
        if match := _SECTION.match(text):
            if match[1] != "T":
                sections.append((match[1], {}))
            continue
        key, sign, value = text.partition("=")
        if not sign:
            raise BadInput(f"{path}: line {number}: expected `key = value` or `[section = n]`, got {text[:40]!r}; is this an .mdoc?")
        (sections[-1][1] if sections else head)[key.strip()] = value.strip()
    return head, sections


def _floats(path: Path, items: dict[str, str], key: str) -> list[float]:
    try:
        return [float(word) for word in items.get(key, "").split()]
    except ValueError:
        raise BadInput(f"{path}: {key} = {items[key]!r}; expected numbers") from None


def _number(path: Path, items: dict[str, str], key: str) -> float:
    values = _floats(path, items, key)
    return values[0] if values and math.isfinite(values[0]) else 0.0


def read_epu(path: str | os.PathLike[str]) -> Acquisition:
    """The image that an EPU .xml describes; its pixel size is that of the image EPU saved, twice the movie's where that is
    super-resolution.

    Raises BadInput naming the file where it is not such a file.
    """
    path = Path(path)
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise BadInput(f"{path}: is not XML (line {error.position[0]}); copy it again") from error
    except (LookupError, ValueError) as error:
        raise BadInput(f"{path}: is not XML in an encoding that is known; copy it again") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {why(error)}") from error
    if _name(root.tag) != "MicroscopeImage":
        raise BadInput(f"{path}: is not EPU's description of an image (<MicroscopeImage>)")
    pixel = _value(root, ("pixelSize", "x", "numericValue")) * 1e10
    voltage = _value(root, ("gun", "AccelerationVoltage")) / 1000
    shift = (_value(root, ("BeamShift", "_x"), math.nan), _value(root, ("BeamShift", "_y"), math.nan))
    dose = 0.0
    for item in root.iter():
        children = list(item)
        if len(children) == 2 and children[0].text == "Dose" and children[1].text:
            try:
                dose = float(children[1].text) * 1e-20  # per m²
            except ValueError:
                dose = math.nan
            if not math.isfinite(dose):
                raise BadInput(f"{path}: Dose is {children[1].text[:40]!r}; expected a number")
    return Acquisition(path, "", pixel, voltage, dose, 0, None if any(map(math.isnan, shift)) else shift)


def _name(tag: str) -> str:
    """A tag without its namespace."""
    return tag.rpartition("}")[2]


def _value(root: ElementTree.Element, way: tuple[str, ...], default: float = 0.0) -> float:
    """Number of the first element reached by these tags, one inside the other."""
    places = [item for item in root.iter() if _name(item.tag) == way[0]]
    for tag in way[1:]:
        places = [child for item in places for child in item if _name(child.tag) == tag]
    try:
        return float(places[0].text or "") if places else default
    except ValueError:
        return default


def epu_beside(movie: Path) -> Path | None:
    """EPU's .xml of a movie: the same name without what the camera adds (_Fractions, _EER, _fractions)."""
    stem = re.sub(r"_(fractions|eer)$", "", movie.stem, flags=re.IGNORECASE)
    found = movie.with_name(stem + ".xml")
    return found if found.is_file() else None
