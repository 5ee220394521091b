"""The picture of a CTF estimate: spectrum beside model, equiphase average with its fit. Drawn directly: thousands are made."""
from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from frazil.io.files import write_bytes
from frazil.steps.ctf import CtfResult

SIDE = 560  # px of the spectrum, and height of the whole
WIDE = 700  # px of the curves
FINE = 2  # drawn so many times larger, then reduced: smooth lines
AVERAGE, MODEL, CTF2, CORRELATION, LIMIT = "#1f2933", "#d1495b", "#9fb3c8", "#2a9d6f", "#e09f3e"
RESOLUTIONS = (30, 20, 15, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.8)
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 74, 44  # px around the curves
HOME = Path(str(getattr(find_spec("matplotlib"), "origin", ""))).parent  # of matplotlib, which is not imported for a font
FONT = HOME / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"  # has Å, ² and °
Place = Callable[[float, float], tuple[float, float]]


def write_picture(path: Path, name: str, result: CtfResult) -> None:
    """Write the PNG of a micrograph, atomically."""
    whole = Image.new("RGB", (SIDE + WIDE, SIDE), "white")
    whole.paste(spectrum_image(result), (0, 0))
    whole.paste(curves_image(name, result), (SIDE, 0))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", compress_level=3)
    write_bytes(path, buffer.getvalue())


def spectrum_image(result: CtfResult) -> Image.Image:
    """Left the spectrum, right the model, ky upwards, with a circle where the fit ends."""
    grey = (result.picture.numpy()[::-1].clip(0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(grey)
    half = (0, 0, image.width // 2, image.height)
    image.paste(image.crop(half).filter(ImageFilter.GaussianBlur(1.2)).point(lambda v: 2.2 * (v - 102) + 102), half)
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB")
    draw = ImageDraw.Draw(image)
    if result.found:
        radius = SIDE * result.picture_pixel / result.resolution
        middle = SIDE / 2
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], outline=LIMIT)
    font = ImageFont.truetype(FONT, 13)
    for x, text in ((6, "measured"), (SIDE - 44, "model")):
        draw.text((x, SIDE - 20), text, fill=LIMIT, font=font)
    return image


def curves_image(name: str, result: CtfResult) -> Image.Image:
    """Equiphase average, fit and local correlation against resolution. Average and fit are drawn in units of the rings' height there."""
    image = Image.new("RGB", (WIDE * FINE, SIDE * FINE), "white")
    draw = ImageDraw.Draw(image)
    c = result.curves
    k = c.k.numpy()
    k_end = float(k[-1])
    high, low = 1.6, -1.6

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDE - LEFT - RIGHT) * x / k_end
        return across * FINE, (TOP + (SIDE - TOP - BOTTOM) * (high - y) / (high - low)) * FINE

    _axes(draw, at, k_end)
    height = _height(c.model.numpy())
    line(draw, at, k, 2 * c.ctf2.numpy() - 1, CTF2, 1)
    line(draw, at, k, c.average.numpy() / height, AVERAGE, 2)
    if result.found:
        line(draw, at, k, c.model.numpy() / height, MODEL, 2)
        line(draw, at, k, c.correlation.numpy(), CORRELATION, 1)
        x = at(1 / result.resolution, 0)[0]
        draw.line([x, at(0, high)[1], x, at(0, low)[1]], fill=LIMIT, width=2 * FINE)
    _words(draw, name, result)
    return image.resize((WIDE, SIDE), Image.Resampling.BOX)


def _height(model: np.ndarray) -> np.ndarray:
    """Height of the rings around each place: largest |model| within a fortieth of the curve, made smooth."""
    values = np.abs(np.nan_to_num(model))
    reach = max(3, len(values) // 24)
    padded = np.pad(values, reach, mode="edge")
    largest = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).max(-1)
    smooth = np.convolve(np.pad(largest, reach, mode="edge"), np.full(2 * reach + 1, 1 / (2 * reach + 1)), "valid")
    return np.maximum(smooth, max(0.05 * float(smooth.max()), 1e-6))


def line(draw: ImageDraw.ImageDraw, at: Place, x: np.ndarray, y: np.ndarray, colour: str, width: int) -> None:
    """A curve, broken where it is not known, cut at the edges of the picture."""
    points: list[tuple[float, float]] = []
    for a, b in zip(x.tolist(), np.clip(y, -1.58, 1.58).tolist(), strict=True):
        if math.isfinite(b):
            points.append(at(a, b))
            continue
        if len(points) > 1:
            draw.line(points, fill=colour, width=width * FINE, joint="curve")
        points = []
    if len(points) > 1:
        draw.line(points, fill=colour, width=width * FINE, joint="curve")


def _axes(draw: ImageDraw.ImageDraw, at: Place, k_end: float) -> None:
    """Lines at 1, 0, −1 and at round resolutions."""
    font = ImageFont.truetype(FONT, 12 * FINE)
    for y in (1.0, 0.0, -1.0):
        draw.line([at(0, y), at(k_end, y)], fill="#e4e7eb", width=FINE)
        draw.text((at(0, y)[0] - 30 * FINE, at(0, y)[1] - 7 * FINE), f"{y:g}", fill="#52606d", font=font)
    before = -1.0
    for d in RESOLUTIONS:
        if 1 / d > k_end or 1 / d - before < k_end / 18:
            continue
        before = 1 / d
        x = at(1 / d, 0)[0]
        draw.line([x, at(0, -1.6)[1], x, at(0, -1.6)[1] + 5 * FINE], fill="#7b8794", width=FINE)
        draw.text((x, at(0, -1.6)[1] + 14 * FINE), f"{d:g}", fill="#3e4c59", font=font, anchor="mm")
    draw.text((at(0.5 * k_end, 0)[0], (SIDE - 9) * FINE), "resolution / Å", fill="#3e4c59", font=font, anchor="mm")
    draw.line([at(0, -1.6), at(k_end, -1.6)], fill="#7b8794", width=FINE)


def _words(draw: ImageDraw.ImageDraw, name: str, result: CtfResult) -> None:
    """Name, numbers, what the colours are, flags."""
    font, small = ImageFont.truetype(FONT, 12 * FINE), ImageFont.truetype(FONT, 10 * FINE)
    u, v, angle = result.defocus.tolist()
    numbers = f"U {u:.0f} Å   V {v:.0f} Å   angle {angle:.1f}°"
    numbers += f"   phase shift {result.phase_shift:.0f}°" if result.phase_shift else ""
    numbers += f"   rings to {result.resolution:.2f} Å   merit {result.fom:.3f}" if result.found else ""
    draw.text((LEFT * FINE, 6 * FINE), name if len(name) < 80 else "…" + name[-79:], fill=AVERAGE, font=font)
    said, colour = (numbers, AVERAGE) if result.found else ("no Thon rings found", MODEL)
    draw.text((LEFT * FINE, 24 * FINE), said, fill=colour, font=font)
    x = LEFT * FINE
    parts = (("equiphase average", AVERAGE), ("fit", MODEL), ("CTF²", CTF2), ("local correlation", CORRELATION), ("end of the fit", LIMIT))
    for text, colour in parts:
        draw.text((x, 42 * FINE), text, fill=colour, font=small)
        x += round(draw.textlength(text, font=small)) + 16 * FINE
    draw.text((LEFT * FINE, 57 * FINE), "; ".join(result.flags)[:110] if result.found else "", fill=MODEL, font=small)
