"""What 2D classes of real β-galactosidase show: python bench/class2d_views.py [--explore 0] [--method vdam] [--seeds 1 2 3] [--write].

An average is a view where it correlates above 0.93 with a projection of 5A1A (216 directions, 7.5° apart, all in-plane angles by 5°, shifts
up to 7 px), both low-passed to 17 Å and masked as the averages are. --simulated takes ten known views of 5A1A and pure noise instead and
counts what is in which class. The model is read with gemmi. --write appends a JSON line a run to bench/results/class2d_views.jsonl;
--sheets FOLDER draws the averages by falling number of particles.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.data import Images, Optics, Particles  # noqa: E402
from frazil.io.models import density_from_model  # noqa: E402
from frazil.io.particles import open_images, read_particles  # noqa: E402
from frazil.jobs.record import source_commit  # noqa: E402
from frazil.maths.fourier import image_from_ft  # noqa: E402
from frazil.maths.masks import soft_circle  # noqa: E402
from frazil.maths.rotation import euler_to_matrix  # noqa: E402
from frazil.ops import dispatch  # noqa: E402
from frazil.refine.classes import class_shells  # noqa: E402
from frazil.refine.residence import Stored, resident  # noqa: E402
from frazil.simulate.averages import particles_of  # noqa: E402
from frazil.simulate.particles import project_volume  # noqa: E402
from frazil.steps.class2d import FORM, Class2dParams, class2d, initial_state, resolved  # noqa: E402
from frazil.steps.classify import ClassifyJob, ClassifyState, make_engine  # noqa: E402

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "betagal_10204"
RESULTS = Path(__file__).parent / "results" / "class2d_views.jsonl"
DIAMETER, FINEST, SMALL = 200.0, 17.0, 32  # Å, Å, px of the averages compared
VIEW = 0.93
KNOWN, EACH, NOISE, BOX, PIXEL = 10, 60, 150, 48, 4.72  # of the simulated set


def projections(directions: Tensor, box: int, pixel_size: float) -> Tensor:
    """(n, N, N) projections of 5A1A at rot, tilt (n, 2) in degrees."""
    volume = density_from_model(DATA / "5a1a.cif.gz", box, pixel_size)
    rotation = euler_to_matrix(torch.cat([directions, torch.zeros(len(directions), 1, dtype=torch.float64)], 1))
    return image_from_ft(project_volume(volume, rotation, Optics(pixel_size, box)), box).float()


def all_directions() -> Tensor:
    """(216, 2) rot and tilt, degrees: HEALPix order 3 in the quarter of the sphere that is unique in D2."""
    import healpix

    tilt, rot = (np.degrees(x) for x in healpix.pix2ang(8, np.arange(768)))
    keep = (tilt <= 90 + 1e-6) & (rot < 180)
    return torch.stack([torch.from_numpy(rot[keep]), torch.from_numpy(tilt[keep])], 1)


def coarse(images: Tensor, pixel_size: float) -> Tensor:
    """(…, 32, 32) float32 images low-passed to 17 Å and cropped in Fourier space."""
    n = images.shape[-1]
    part = slice(n // 2 - SMALL // 2, n // 2 + SMALL // 2)
    ft = torch.fft.fftshift(torch.fft.fft2(images.double()), dim=(-2, -1))[..., part, part]
    line = torch.arange(-SMALL // 2, SMALL // 2, dtype=torch.float64)
    depth = (n * pixel_size / FINEST + 2 - (line[:, None] ** 2 + line**2).sqrt()) / 4
    weight = 0.5 - 0.5 * torch.cos(math.pi * depth.clamp(0, 1))
    return torch.fft.ifft2(torch.fft.ifftshift(ft * weight, dim=(-2, -1))).real.float()


def normal(images: Tensor) -> Tensor:
    """Images of mean 0 and norm 1."""
    images = images - images.mean((-2, -1), keepdim=True)
    return images / images.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)


def best_views(averages: Tensor, pixel_size: float) -> tuple[Tensor, Tensor]:
    """((K,) highest correlation of each average with a projection, (K,) number of its direction)."""
    n = averages.shape[-1]
    seen = torch.fft.rfft2(normal(coarse(projections(all_directions(), n, pixel_size), pixel_size)))
    shown = coarse(averages.cpu() * soft_circle(n, DIAMETER / 2 / pixel_size, 5), pixel_size)
    a = torch.deg2rad(torch.arange(0, 360, 5.0))
    none = torch.zeros_like(a)
    turn = torch.stack([torch.stack([a.cos(), a.sin(), none], -1), torch.stack([-a.sin(), a.cos(), none], -1)], 1)
    grid = torch.nn.functional.affine_grid(turn, [len(a), 1, SMALL, SMALL], align_corners=False)
    middle, score, view = slice(SMALL // 2 - 4, SMALL // 2 + 5), [], []
    for image in shown:
        turned = torch.nn.functional.grid_sample(image.expand(len(a), 1, SMALL, SMALL), grid, mode="bicubic", align_corners=False)[:, 0]
        ft = torch.fft.rfft2(normal(turned))[:, None]
        best = torch.cat([
            torch.fft.fftshift(torch.fft.irfft2(ft * some.conj(), s=(SMALL, SMALL)), dim=(-2, -1))[..., middle, middle].amax((0, 2, 3))
            for some in seen.split(64)
        ])  # fmt: skip
        score.append(best.max())
        view.append(best.argmax())
    return torch.stack(score), torch.stack(view)


def known_set(snr: float) -> tuple[Tensor, Particles, Tensor]:
    """(images, particles without poses, true view (n,), the last number noise): views of 5A1A as many each, and images of white noise."""
    generator, i = torch.Generator().manual_seed(5), torch.arange(KNOWN, dtype=torch.float64)
    directions = torch.stack([(i * 137.508) % 360, torch.rad2deg(torch.acos(1 - (i + 0.5) / KNOWN))], 1)
    views = projections(directions, BOX, PIXEL)
    line = torch.arange(BOX) - BOX // 2
    inside = (line[:, None] ** 2 + line**2).float().sqrt() < 0.3 * BOX
    views = views / views[:, inside].std(1).mean()
    images, particles, truth = particles_of(views, KNOWN * EACH + NOISE, PIXEL, snr, 1.5, generator)
    images[KNOWN * EACH :] = torch.randn(NOISE, BOX, BOX, generator=generator)
    truth = torch.cat([truth[: KNOWN * EACH], torch.full((NOISE,), KNOWN)])
    n, order = len(truth), torch.randperm(len(truth), generator=generator)
    blind = replace(particles, rotation=torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), shift=torch.zeros(n, 2, dtype=torch.float64))
    return images[order], replace(blind[order], micrograph=torch.arange(n) // 100), truth[order]


def against_truth(found: Tensor, truth: Tensor, classes: int) -> dict[str, object]:
    """Share of particles in a class whose commonest view is theirs; views that own a class; noise in classes that are mostly noise."""
    table = torch.zeros(classes, KNOWN + 1, dtype=torch.int64)
    table.view(-1).index_add_(0, found * (KNOWN + 1) + truth, torch.ones_like(found))
    commonest, size = table.argmax(1), table.sum(1)
    pure = (table.amax(1) > 0.8 * size) & (size > 10) & (commonest < KNOWN)
    return {
        "purity": round(float(table.amax(1).sum()) / len(found), 3), "views_with_a_pure_class": len(set(commonest[pure].tolist())),
        "noise_apart": round(float(table[commonest == KNOWN, KNOWN].sum() / table[:, KNOWN].sum()), 3),
        "particles_among_noise": round(float(table[commonest == KNOWN, :KNOWN].sum() / table[:, :KNOWN].sum()), 3),
    }  # fmt: skip


def draw(state: ClassifyState, score: Tensor | None, path: Path) -> None:
    """The averages by falling number of particles, with that number and the score."""
    from matplotlib.figure import Figure

    counts = torch.bincount(state.poses.klass, minlength=state.model.classes)
    maps = state.model.maps if state.unmasked is None else state.unmasked
    figure = Figure(figsize=(13, 1.5 * math.ceil(len(counts) / 10)))
    for place, k in enumerate(counts.argsort(descending=True).tolist()):
        axes = figure.add_subplot(math.ceil(len(counts) / 10), 10, place + 1)
        axes.imshow(maps[k].cpu().numpy(), cmap="gray")
        axes.set_title(f"{int(counts[k])}" + ("" if score is None else f"  {float(score[k]):.2f}"), fontsize=8, pad=1)
        axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=80)


def classified(images: Images, particles: Particles, params: Class2dParams, engine) -> ClassifyState:
    """The last state of a run."""
    images, engine = resident(images, particles, engine)
    job = ClassifyJob(images, params, engine, FORM)
    *_, state = class2d(job, initial_state(job, particles, particles.optics[0].pixel_size))
    return state


def judged(state: ClassifyState) -> tuple[dict[str, object], Tensor]:
    """What the classes of the real set are worth, and the correlation of each."""
    counts = torch.bincount(state.poses.klass, minlength=state.model.classes).double()
    maps = state.model.maps if state.unmasked is None else state.unmasked
    score, view = best_views(maps, state.model.pixel_size)
    good = (score > VIEW) & (counts > 0)
    finest = class_shells(state.model.data_vs_prior)[good].double()
    side = state.model.box * state.model.pixel_size
    return {
        "views": int(good.sum()), "directions": len(set(view[good].tolist())),
        "in_views": round(float(counts[good].sum() / counts.sum()), 3),
        "median_resolution": round(float(side / finest.median()), 1) if len(finest) else None,
    }, score  # fmt: skip


def main() -> None:
    """Classify with each seed, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--classes", type=int, help="50, or 20 of the simulated set")
    parser.add_argument("--method", choices=["em", "vdam"], default="em")
    parser.add_argument("--explore", type=float, default=Class2dParams().explore)
    parser.add_argument("--every", type=int, default=1, help="take every so-manieth particle of the real set")
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--snr", type=float, default=2.0, help="of the simulated set")
    parser.add_argument("--sheets", type=Path, help="folder for pictures of the averages")
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS}")
    args = parser.parse_args()
    dispatch.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    truth, classes = None, args.classes or (20 if args.simulated else 50)
    if args.simulated:
        pixels, particles, truth = known_set(args.snr)
        images: Images = Stored(pixels)
    else:
        table = read_particles(DATA / "particles.star")
        table = table[torch.arange(0, len(table), args.every)]
        particles, images = table.particles, open_images(table, memory_budget=4 << 30, threads=args.threads)
    pixel_size = particles.optics[0].pixel_size
    params = resolved(
        Class2dParams(classes=classes, diameter=DIAMETER, method=args.method, explore=args.explore, scale=truth is None), pixel_size
    )
    for seed in args.seeds:
        begin = time.perf_counter()
        state = classified(images, particles, params, make_engine(params, device=args.device, budget=4 << 30, seed=seed))
        seconds, score = time.perf_counter() - begin, None
        counts, fair = torch.bincount(state.poses.klass, minlength=classes), len(particles) / classes
        row: dict[str, object] = {
            "bench": "class2d_views", "commit": source_commit(), "device": args.device, "set": "simulated" if args.simulated else "betagal",
            "particles": len(particles), "classes": classes, "method": args.method, "explore": args.explore, "seed": seed,
            "below_0.01_of_a_fair_share": int((counts < 0.01 * fair).sum()), "below_0.2": int((counts < 0.2 * fair).sum()),
            "largest": round(float(counts.max()) / len(particles), 3), "seconds": round(seconds, 1),
        }  # fmt: skip
        if truth is None:
            found, score = judged(state)
            row |= found
        else:
            row |= {"snr": args.snr, **against_truth(state.poses.klass, truth, classes)}
        print(json.dumps(row), flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            draw(state, score, args.sheets / f"{row['set']}_{args.method}_{args.explore:g}_{seed}.png")
        if args.write:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
