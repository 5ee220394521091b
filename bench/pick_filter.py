"""Picking without and with a low-pass, the paper's Table 1: `PYTHONPATH=src python bench/pick_filter.py`.

Simulated micrographs of 720² at 3 Å with ice, junk and a carbon edge, 200 particles a set, B-factor 400 Å². Three kinds of templates:

    exact      the eight views that all particles have, to full resolution: nobody has these
    views      twelve even views of the map, particles in all orientations: a 3D reference
    averages   twelve class averages of 100 such particles each: their noise, CTF, views within about 8°, turned by 4°, shifted by 4 Å

A line a case: recall at false discovery rates of 0.2 and 0.34 (0: never reached), recall where as many are picked as there are; threshold,
recall and rate of what `frazil pick` would do by itself. `expected`
is what the filter leaves of the matched filter's signal over noise (white and coloured), sqrt(Σ P c² e b / Σ P c² N) by shells, with exact
templates. Four minutes on two cores. Lines go to bench/results/pick_filter.jsonl with --write.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Optics  # noqa: E402
from frazil.maths.fourier import image_from_ft  # noqa: E402
from frazil.maths.peaks import highest_apart, match_points, split_level  # noqa: E402
from frazil.maths.rotation import euler_to_matrix  # noqa: E402
from frazil.maths.sphere import directions  # noqa: E402
from frazil.ops.dispatch import set_threads  # noqa: E402
from frazil.simulate import micrographs as sim  # noqa: E402
from frazil.simulate.phantom import Phantom, phantom  # noqa: E402
from frazil.steps.pick import PickSettings, candidates, make_bank, match, prepare  # noqa: E402

PIXEL, BOX, SIDE, CUTOFF = 3.0, 80, 720, 62.0
OPTICS = Optics(PIXEL, BOX)
RATES = (0.2, 0.34)


def main() -> None:
    """Every kind of template, SNR and filter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["exact", "views", "averages"])
    parser.add_argument("--snr", type=float, nargs="+", default=[0.1, 0.06, 0.03])
    parser.add_argument("--lowpass", type=float, nargs="+", default=[0.0, 20.0])
    parser.add_argument("--scores", nargs="+", default=["z", "fom"])
    parser.add_argument("--theory", action="store_true", help="z at particles beside the matched filter's; --kinds exact --clean")
    parser.add_argument("--clean", action="store_true", help="no junk, ice, carbon")
    parser.add_argument("--coloured", type=float, default=0.2, help="share of the noise's variance below 20 Å")
    parser.add_argument("--sets", type=int, default=4, help="micrographs of 50 particles")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--step", type=float, default=10.0, help="in-plane angle, degrees")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    set_threads(args.threads)
    source = phantom(BOX, PIXEL, "C1", 2)
    for kind in args.kinds:
        for snr in args.snr:
            settings = sim.MicrographSettings((SIDE, SIDE), source.diameter(), 50, snr, 8 if kind == "exact" else 0, seed=args.seed,
                                              coloured=args.coloured)  # fmt: skip
            settings = replace(settings, junk=0, ice=0, carbon=False) if args.clean else settings
            made = [sim.simulate_micrograph(source, OPTICS, settings, i) for i in range(args.sets)]
            pictures = templates(kind, source, settings)
            if args.theory:
                for lowpass in args.lowpass:
                    row = against_theory(made, pictures, settings, lowpass, args)
                    print(json.dumps({"snr": snr, "lowpass": lowpass} | {key: round(value, 3) for key, value in row.items()}), flush=True)
                continue
            for score, lowpass in product(args.scores, args.lowpass):
                row = {"templates": kind, "snr": snr, "score": score, "lowpass": lowpass, "particles": sum(len(m.xy) for m in made),
                       "clean": args.clean, "coloured": args.coloured, "seed": args.seed,
                       **curve(made, pictures, settings, score, lowpass, args)}  # fmt: skip
                if kind == "exact":
                    row["expected"] = round(left_of_the_signal(pictures, settings, lowpass), 3)
                asked = ["git", "rev-parse", "--short", "HEAD"]
                line = json.dumps(row | {"commit": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()})
                print(line, flush=True)
                if args.write:
                    with open(Path(__file__).resolve().parent / "results" / "pick_filter.jsonl", "a") as file:
                        file.write(line + "\n")


def templates(kind: str, source: Phantom, settings: sim.MicrographSettings) -> Tensor:
    """(t, N, N) templates in standard deviations of the noise."""
    scale = sim.grey_scale(source, OPTICS, settings)
    if kind == "exact":
        return scale * image_from_ft(sim.slices(source, sim.view_rotations(settings), OPTICS), BOX)
    if kind == "views":
        return scale * image_from_ft(sim.slices(source, even_views(), OPTICS), BOX)
    rng = torch.Generator().manual_seed(7)
    return torch.stack([class_average(images, scale, settings, rng) for images in members(source)])


def even_views() -> Tensor:
    """(12, 3, 3) rotations whose views are spread evenly."""
    return euler_to_matrix(torch.cat([directions(0), torch.zeros(12, 1, dtype=torch.float64)], 1))


@cache
def members(source: Phantom, n: int = 100) -> list[Tensor]:
    """For each view (n, N, N) projections about it, turned by some degrees too, as 2D classification leaves them."""
    rng = torch.Generator().manual_seed(11)
    out = []
    for view in even_views():
        off = torch.deg2rad(torch.randn(n, 3, generator=rng, dtype=torch.float64) * torch.tensor([8.0, 8.0, 4.0], dtype=torch.float64))
        axis = torch.zeros(n, 3, 3, dtype=torch.float64)
        for i, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
            axis[:, a, b], axis[:, b, a] = -off[:, i], off[:, i]
        out.append(image_from_ft(sim.slices(source, torch.linalg.matrix_exp(axis) @ view, OPTICS), BOX))
    return out


def class_average(images: Tensor, scale: float, settings: sim.MicrographSettings, rng: torch.Generator) -> Tensor:
    """(N, N) Wiener average of particles (n, N, N) with noise, CTF and shifts."""
    n = len(images)
    moved = torch.randn(n, 2, generator=rng, dtype=torch.float64) * (4.0 / PIXEL)
    k = torch.fft.fftfreq(BOX, dtype=torch.float64)
    over, under = torch.zeros(BOX, BOX // 2 + 1, dtype=torch.complex64), torch.zeros(BOX, BOX // 2 + 1)
    point = torch.zeros(BOX, BOX)
    point[0, 0] = 1
    low, high = sim.DEFOCUS
    for image, (dx, dy) in zip(scale * images, moved.tolist(), strict=True):
        focus = low + (high - low) * float(torch.rand(1, generator=rng))
        defocus = torch.tensor([focus, focus, 0.0])
        ramp = -2 * np.pi * (k[:, None] * dy + k[: BOX // 2 + 1].abs() * dx)
        seen = torch.fft.rfft2(sim.multiply_ctf(image, OPTICS, defocus, settings.b_factor)) * torch.polar(torch.ones_like(ramp), ramp)
        seen = seen + torch.fft.rfft2(torch.randn(BOX, BOX, generator=rng))
        transfer = torch.fft.rfft2(sim.multiply_ctf(point, OPTICS, defocus)).real
        over += (transfer * seen).to(over.dtype)
        under += transfer.square()
    return torch.fft.irfft2(over / (under + 0.1 * n), s=(BOX, BOX))


def curve(
    made: list[sim.SimulatedMicrograph], pictures: Tensor, settings: sim.MicrographSettings, score: str, lowpass: float,
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """Recall at given false discovery rates, and with as many picks as particles."""
    device = torch.device(args.device)
    plan = PickSettings(settings.diameter, lowpass, args.step, score)
    bank = make_bank(pictures.to(device), PIXEL, settings.shape, PIXEL, plan)
    apart = 0.65 * settings.diameter
    gains, values = [], []
    for m in made:
        scores = match(prepare(m.image.to(device), bank, OPTICS, m.defocus.to(device)), bank)
        found = candidates(scores, -1e9, 20.0, 1.1, distance=apart)
        kept = highest_apart(found.xy.numpy(), found.value.double().numpy(), apart / PIXEL)
        values.append(found.value.double().numpy()[kept])
        gains.append(match_points(found.xy.numpy()[kept], values[-1], m.xy.numpy(), CUTOFF / PIXEL).gains)
    right = np.concatenate(gains)[np.argsort(-np.concatenate(values), kind="stable")].cumsum()
    false, n = 1 - right / np.arange(1, len(right) + 1), sum(len(m.xy) for m in made)
    reached = {rate: np.flatnonzero(false <= rate) for rate in RATES}
    recalls = {f"recall_at_{rate}": round(float(right[at[-1]]) / n, 3) if len(at) else 0.0 for rate, at in reached.items()}
    every = np.concatenate(values)
    level = max(split_level(every[every > 0]), 3.0) if score == "z" else 0.05  # what `frazil pick` takes
    number = int((every >= level).sum())
    own = {"threshold": round(level, 2), "recall": round(float(right[number - 1]) / n, 3), "fdr": round(float(false[number - 1]), 3)}
    return {**recalls, "recall_of_as_many": round(float(right[min(n, len(right)) - 1]) / n, 3), **own}


def against_theory(
    made: list[sim.SimulatedMicrograph], pictures: Tensor, settings: sim.MicrographSettings, lowpass: float, args: argparse.Namespace
) -> dict[str, float]:
    """z at particles of known view (not taken relative to the micrograph) beside that of the matched filter in the noise that was made.

    Expected: Σ P c² e / sqrt(Σ P c² N) of the particle's own view and the micrograph's CTF, plus a normal variable of standard deviation 1.
    Recall: at a false discovery rate of 0.34 from those values at particles and from the maxima found elsewhere.
    """
    bank = make_bank(pictures, PIXEL, settings.shape, PIXEL, PickSettings(settings.diameter, lowpass, args.step, "z"))
    k2, point = torch.fft.fftfreq(BOX).square()[:, None] + torch.fft.rfftfreq(BOX).square(), torch.zeros(BOX, BOX)
    point[0, 0] = 1
    falling = 1 / (1 + k2 / sim.KNEE**2) ** 2
    noise = 1 - settings.coloured + settings.coloured * falling / float(falling.mean())
    power = torch.fft.rfft2(pictures).abs().square() / BOX**2
    power[:, 0, 0] = 0
    power[:, :, 1:-1] *= 2
    power *= torch.ones_like(k2) if lowpass <= 2 * PIXEL else (k2 <= (PIXEL / lowpass) ** 2).to(k2)
    expected, found, elsewhere = [], [], []
    for m in made:
        with patch("frazil.steps.pick._above_usual", lambda strength: strength):
            scores = match(prepare(m.image, bank, OPTICS, m.defocus), bank)
        seen = power * torch.fft.rfft2(sim.multiply_ctf(point, OPTICS, m.defocus)).real.square()
        unit = ((seen * noise).sum((-2, -1)) / seen.sum((-2, -1))).sqrt() / m.image.std()  # sd of the noise of z, by view
        signal = (seen * torch.exp(-0.25 * settings.b_factor * k2 / PIXEL**2)).sum((-2, -1)) / (seen * noise).sum((-2, -1)).sqrt()
        for (x, y), view in zip((m.xy * bank.grid.scale[1]).long().tolist(), m.view.tolist(), strict=True):
            expected.append(float(signal[view]))
            found.append(float(scores.value[max(0, y - 1) : y + 3, max(0, x - 1) : x + 3].max() / unit[view]))
        peaks = candidates(scores, -1e9, 20.0, 1.1, distance=0.65 * settings.diameter)
        kept = highest_apart(peaks.xy.numpy(), peaks.value.double().numpy(), 0.65 * settings.diameter / PIXEL)
        far = torch.cdist(peaks.xy[kept], m.xy).amin(1) > settings.diameter / PIXEL
        elsewhere.extend((peaks.value[kept][far] / unit.mean()).tolist())
    drawn = np.add.outer(np.random.default_rng(0).standard_normal(20), np.array(expected)).ravel()

    def recall(values: np.ndarray) -> float:
        shares = [(float((values >= t).mean()), float((np.array(elsewhere) >= t).sum())) for t in np.arange(3, 9, 0.02)]
        return max((share for share, false in shares if false <= 0.34 * (false + share * len(expected))), default=0.0)

    differ = np.array(found) - np.array(expected)
    return {"z_expected": float(np.mean(expected)), "z_found": float(np.mean(found)), "sd_of_difference": float(differ.std()),
            "recall_expected": recall(drawn), "recall_found": recall(np.array(found))}  # fmt: skip


def left_of_the_signal(pictures: Tensor, settings: sim.MicrographSettings, lowpass: float) -> float:
    """Signal over noise of the matched filter up to the low-pass over that of all frequencies, at the middle defocus."""
    k2 = torch.fft.fftfreq(BOX).square()[:, None] + torch.fft.rfftfreq(BOX).square()
    power = torch.fft.rfft2(pictures).abs().square().mean(0)
    power[0, 0] = 0
    power[:, 1:-1] *= 2
    point = torch.zeros(BOX, BOX)
    point[0, 0] = 1
    power = power * torch.fft.rfft2(sim.multiply_ctf(point, OPTICS, torch.tensor([15000.0, 15000.0, 0.0]))).real.square()
    falling = 1 / (1 + k2 / sim.KNEE**2) ** 2
    noise = 1 - settings.coloured + settings.coloured * falling / float(falling.mean())
    seen = torch.exp(-0.25 * settings.b_factor * k2 / PIXEL**2)

    def ratio(use: Tensor) -> float:
        return float((power * seen * use).sum() / (power * noise * use).sum().sqrt())

    everything = torch.ones_like(k2)
    return ratio(everything if lowpass <= 2 * PIXEL else (k2 <= (PIXEL / lowpass) ** 2).to(k2)) / ratio(everything)


if __name__ == "__main__":
    main()
