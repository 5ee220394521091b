"""frazil class2d on real β-galactosidase, from nothing: averages that are projections of the model, junk apart from them."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from frazil.cli import main
from frazil.io.mrc import read_map, read_stack
from frazil.io.star import read_star
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import image_from_ft, padded_ft
from frazil.maths.gridding import sinc2
from frazil.maths.masks import soft_circle
from frazil.maths.rotation import euler_to_matrix
from frazil.ops.project import project
from frazil.refine.sampling import Sampling, make_grid

pytestmark = [pytest.mark.slow, pytest.mark.real]

BOX, PIXEL, LOW, CLASSES = 64, 3.54, 17.0, 20


def unit(images: Tensor) -> Tensor:
    """Images of mean 0 and norm 1."""
    images = images - images.mean((-2, -1), keepdim=True)
    return images / images.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-9)


def likeness(averages: Tensor, model: Tensor) -> Tensor:
    """(K,) highest correlation of each average with a projection of the model (15° apart, D2), turned by 5° and moved by up to 4 px."""
    mask = soft_circle(BOX, 28, 4)
    half = padded_ft(lowpass_map(model, PIXEL, LOW) / sinc2(BOX, 2.0), 2.0, BOX // 2 - 1)
    grid = make_grid(Sampling(order=2, offset_range=1, offset_step=1, group="D2"))
    turns = euler_to_matrix(torch.tensor([[0.0, 0.0, psi] for psi in (0, 5, 10)], dtype=torch.float64))
    rotations = (turns[:, None] @ grid.coarse_rotations(torch.arange(grid.orientations))).flatten(0, 1).float()
    ky, kx = torch.meshgrid(torch.fft.fftfreq(BOX, 1 / BOX), torch.arange(BOX // 2 + 1.0), indexing="ij")
    inside = torch.nonzero((kx**2 + ky**2 <= (BOX // 2 - 1) ** 2).reshape(-1))[:, 0]
    k = torch.stack([kx, ky], -1).reshape(-1, 2)[inside]
    wanted = torch.fft.rfft2(unit(lowpass_map(averages, PIXEL, LOW, dims=2) * mask))
    best = torch.zeros(len(averages))
    near = torch.arange(-4, 5) % BOX
    for part in rotations.split(300):
        ft = torch.zeros(len(part), BOX * (BOX // 2 + 1), dtype=torch.complex64)
        ft[:, inside] = project(half, part, k, 2.0)
        views = torch.fft.rfft2(unit(image_from_ft(ft.view(-1, BOX, BOX // 2 + 1), BOX) * mask))
        for i, each in enumerate(wanted):
            best[i] = max(float(best[i]), float(torch.fft.irfft2(each * views.conj())[:, near][:, :, near].max()))
    return best


@pytest.mark.parametrize(("method", "iterations"), [("em", 15), ("vdam", 60)])
def test_views_of_the_model_come_out_and_hold_most_particles(shared_data: Path, tmp_path: Path, method: str, iterations: int) -> None:
    options = ("--classes", CLASSES, "--diameter", 200, "--method", method, "--iterations", iterations, "--max-significant", 100,
               "--write-every", 0, "--device", "cpu", "--threads", 1)  # fmt: skip
    words = ["class2d", shared_data / "betagal_10204" / "particles.star", *options, "--output", tmp_path / "run", "--quiet"]
    assert main([str(word) for word in words]) == 0
    averages = read_stack(tmp_path / "run" / f"run_it{iterations:03d}_classes.mrcs")
    klass = torch.tensor(read_star(tmp_path / "run" / "run_data.star")["particles"]["rlnClassNumber"].to_numpy(dtype=int)) - 1
    counts = torch.bincount(klass, minlength=CLASSES)
    like = likeness(averages, read_map(shared_data / "parity_relion5" / "ref.mrc").data)
    good = like > 0.93
    # Measured: see docs/steps/class2d.md.
    assert int(good.sum()) >= 5
    assert int(counts[good].sum()) > 0.55 * len(klass)
    assert float(like[counts > 0].min()) < 0.9  # and not everything looks like the model: junk has classes of its own
