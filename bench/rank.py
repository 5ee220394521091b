"""Fit and judge the class ranker: `PYTHONPATH=src python bench/rank.py --folder /tmp/rank [--make] [--real NAME=RUN,MODEL,SYMMETRY …]`.

--make: simulated micrographs with junk, ice and a carbon edge (frazil simulate-micrographs), picked as blobs, with places at random
added, extracted and classified; each set another phantom, symmetry and noise. --real: class2d runs of known structures (here two of
β-galactosidase, EMPIAR-10204, by expectation maximisation and by gradient steps). Truth of a class: the highest correlation of its
average with a projection of the structure, turned and moved, both low-passed to 17 Å: good from 0.85 (those of the real set that a
person would keep have 0.88 and more).

Prints, for each set, the area under the curve of scores fitted to the *other* structures (runs of one structure leave together), and at
0.5 the share of good classes (and of particles in them) kept and of bad ones let in; the same for the weights in steps/rank.py
("shipped"); then weights fitted to all but the sets that stay out of every fit (s5, s6).
"""
from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from frazil.io.coordinates import X, Y, read_coordinates  # noqa: E402
from frazil.io.mrc import read_map  # noqa: E402
from frazil.jobs.select_classes import class_numbers, find_classification, rank_classes  # noqa: E402
from frazil.maths.filters import lowpass_map  # noqa: E402
from frazil.maths.fourier import image_from_ft, padded_ft  # noqa: E402
from frazil.maths.gridding import sinc2  # noqa: E402
from frazil.maths.masks import soft_circle  # noqa: E402
from frazil.maths.rotation import euler_to_matrix  # noqa: E402
from frazil.ops.project import project  # noqa: E402
from frazil.refine.sampling import Sampling, make_grid  # noqa: E402
from frazil.steps.rank import Weights, area_under_curve, fit, rank  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "rank.jsonl"
SIMULATED = ((1, "C1", 0.4, 24), (2, "D2", 0.25, 24), (3, "O", 0.6, 14), (4, "C3", 0.5, 20), (5, "D7", 0.3, 20), (6, "C1", 0.2, 16))
LOWPASS, GOOD, NEAR, PENALTY = 17.0, 0.85, 5, 3.0
HELD = ("s5", "s6")  # never fitted to


@dataclass(frozen=True)
class Set:
    """Classes of one run whose truth is known."""

    name: str
    structure: str  # runs of one structure are left out together
    features: Tensor  # (K, F), live classes only
    likeness: Tensor  # (K,)
    share: Tensor  # (K,)


def make(folder: Path, seed: int, symmetry: str, snr: float, classes: int) -> None:
    """One simulated set: micrographs, picks and random places, particles, classes. What is there already stays."""
    here = folder / f"s{seed}"
    if (here / "c2d" / "RELION_JOB_EXIT_SUCCESS").exists():
        return

    def frazil(*words: object) -> None:
        subprocess.run([sys.executable, "-m", "frazil", *map(str, words), "--threads", "1", "--quiet"], check=True)

    frazil("simulate-micrographs", "--output", here / "sim", "--micrographs", 7, "--size", 900, 900, "--pixel-size", 3.5, "--box", 64,
           "--particles", 110, "--symmetry", symmetry, "--snr", snr, "--views", 0, "--junk", 10, "--ice", 3, "--seed", seed)  # fmt: skip
    frazil("pick", here / "sim" / "micrographs.star", "--log-diameter", 100, 170, "--output", here / "pick", "--no-pictures")
    rng = np.random.default_rng(seed)
    with open(here / "coords.csv", "w") as file:
        out = csv.writer(file)
        out.writerow(["micrograph", "x", "y"])
        for name, table in read_coordinates(here / "pick" / "autopick.star").items():
            out.writerows([name, x, y] for x, y in [*table[[X, Y]].to_numpy(float), *rng.uniform(0, 899, (50, 2))])
    frazil("extract", here / "sim" / "micrographs.star", "--coordinates", here / "coords.csv", "--box", 64, "--output", here / "ex")
    frazil("class2d", here / "ex" / "particles.star", "--classes", classes, "--iterations", 18, "--diameter", 180, "--no-center-classes",
           "--output", here / "c2d", "--seed", seed)  # fmt: skip


def unit(images: Tensor) -> Tensor:
    """Images of mean 0 and norm 1."""
    images = images - images.mean((-2, -1), keepdim=True)
    return images / images.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-9)


def likeness(averages: Tensor, model: Path, group: str, radius: float) -> Tensor:
    """(K,) highest correlation of each average with a projection of the map (15° apart), turned by 5° and moved by up to NEAR px."""
    volume = read_map(model)
    box, pixel = averages.shape[-1], volume.pixel_size
    mask = soft_circle(box, radius, 4)
    half = padded_ft(lowpass_map(volume.data, pixel, LOWPASS) / sinc2(box, 2.0), 2.0, box // 2 - 1)
    grid = make_grid(Sampling(order=2, offset_range=1, offset_step=1, group=group))
    turns = euler_to_matrix(torch.tensor([[0.0, 0.0, psi] for psi in (0, 5, 10)], dtype=torch.float64))
    rotations = (turns[:, None] @ grid.coarse_rotations(torch.arange(grid.orientations))).flatten(0, 1).float()
    ky, kx = torch.meshgrid(torch.fft.fftfreq(box, 1 / box), torch.arange(box // 2 + 1.0), indexing="ij")
    inside = torch.nonzero((kx**2 + ky**2 <= (box // 2 - 1) ** 2).reshape(-1))[:, 0]
    k = torch.stack([kx, ky], -1).reshape(-1, 2)[inside]
    wanted = torch.fft.rfft2(unit(lowpass_map(averages, pixel, LOWPASS, dims=2) * mask))
    best, near = torch.zeros(len(averages)), torch.arange(-NEAR, NEAR + 1) % box
    for part in rotations.split(300):
        ft = torch.zeros(len(part), box * (box // 2 + 1), dtype=torch.complex64)
        ft[:, inside] = project(half, part, k, 2.0)
        views = torch.fft.rfft2(unit(image_from_ft(ft.view(-1, box, box // 2 + 1), box) * mask)).conj()
        for i, each in enumerate(wanted):
            best[i] = torch.maximum(best[i], torch.fft.irfft2(each * views)[:, near][:, :, near].max())
    return best


def load(folder: Path, name: str, run: Path, model: Path, group: str) -> Set:
    """A set; likenesses are kept in the folder."""
    files = find_classification(run)
    assert files is not None
    ranked = rank_classes(files, run, None)
    kept = folder / f"{name}.json"
    if not kept.exists():
        radius = 0.5 * ranked.diameter / ranked.pixel_size
        kept.write_text(json.dumps(likeness(ranked.averages, model, group, radius).tolist()))
    live = torch.isfinite(ranked.features).all(-1)
    share = torch.from_numpy(class_numbers(ranked.star, run)["rlnClassDistribution"].to_numpy(float).copy())
    return Set(name, name.split("-")[0], ranked.features[live], torch.tensor(json.loads(kept.read_text()))[live], share[live])


def judge(sets: list[Set]) -> list[dict[str, object]]:
    """What a fit to all other structures does on each set."""
    rows = []
    for held in sets:
        others = [s for s in sets if s.structure != held.structure and s.name not in HELD]
        shipped = area_under_curve(rank(held.features)[0], held.likeness >= GOOD)
        score, _ = rank(held.features, weights_of(others))
        good = held.likeness >= GOOD
        kept = score >= 0.5
        fraction = lambda a, b: float(a.sum() / b.sum()) if float(b.sum()) else float("nan")  # noqa: E731
        rows.append({"bench": "rank", "held_out": held.name, "classes": len(score), "good": int(good.sum()),
                     "auc": area_under_curve(score, good), "auc_shipped": shipped,
                     "good_kept": fraction((kept & good).double(), good.double()),
                     "particles_of_good_kept": fraction(held.share * (kept & good), held.share * good),
                     "bad_kept": fraction((kept & ~good).double(), (~good).double()),
                     "particles_of_bad_kept": fraction(held.share * (kept & ~good), held.share * ~good)})  # fmt: skip
    return rows


def weights_of(sets: list[Set]) -> Weights:
    """The fit to sets, each of the same weight."""
    importance = torch.cat([torch.full((len(s.likeness),), 20.0 / len(s.likeness)) for s in sets])
    return fit(torch.cat([s.features for s in sets]), torch.cat([s.likeness >= GOOD for s in sets]), importance, PENALTY)


def main() -> None:
    """Make what is missing, judge, print the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/rank"))
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--real", nargs="*", default=[], help="NAME=RUN,MODEL,SYMMETRY: finished class2d runs of a known structure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = []
    for seed, symmetry, snr, classes in SIMULATED:
        if args.make:
            make(args.folder, seed, symmetry, snr, classes)
        run = args.folder / f"s{seed}" / "c2d"
        if (run / "RELION_JOB_EXIT_SUCCESS").exists():
            sets.append(load(args.folder, f"s{seed}", run, args.folder / f"s{seed}" / "sim" / "reference.mrc", symmetry))
    for item in args.real:
        name, rest = item.split("=")
        run, model, symmetry = rest.split(",")
        sets.append(load(args.folder, name, Path(run), Path(model), symmetry))
    rows = judge(sets)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(weights_of([s for s in sets if s.name not in HELD]))
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
