"""Direct reconstruction from true poses gives back the map it was projected from."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frazil.data import Optics, Particles, Volume
from frazil.maths.fsc import fsc
from frazil.maths.masks import soft_sphere
from frazil.maths.rotation import random_rotations
from frazil.maths.symmetry import operators
from frazil.steps.project import prepare_map, project_particles
from frazil.steps.reconstruct import ReconstructParams, batches, make_target, reconstruct_poses

BOX, PIXEL = 24, 3.0


def blobs(rng: torch.Generator, group: str = "C1") -> Volume:
    """A few Gaussians off the centre, with the symmetry of a group."""
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    data = torch.zeros_like(x)
    for centre in torch.rand(6, 3, generator=rng, dtype=torch.float64) * 8 - 4:
        for operator in operators(group):
            cx, cy, cz = operator @ centre
            data += torch.exp(-((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2) / 2.6)
    return Volume(data.float(), PIXEL)


def particles(n: int, rng: torch.Generator, *optics: Optics) -> Particles:
    """Random poses, shifts and defocus, in turn over the optics groups."""
    zero = torch.zeros(n, dtype=torch.int64)
    defocus = torch.stack([*(8000 + 9000 * torch.rand(n, generator=rng, dtype=torch.float64) for _ in range(2)), zero.double()], -1)
    shift = 4 * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    half = torch.arange(n) % 2 + 1
    return Particles(optics, torch.arange(n) % len(optics), random_rotations(n, rng), shift, defocus, half, zero.clone())


class Projections:
    """data.Images made of projections of a map."""

    def __init__(self, volume: Volume, of: Particles) -> None:
        self.half, self.pixel_size, self.particles = prepare_map(volume), volume.pixel_size, of

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return project_particles(self.half, self.pixel_size, self.particles, index, ctf=True)


def inner_agreement(found: torch.Tensor, truth: Volume) -> tuple[torch.Tensor, float]:
    """FSC inside a sphere, and the slope of the regression on the truth there."""
    mask = soft_sphere(BOX, 0.35 * BOX, 3)
    a, b = found * mask, truth.data * mask
    return fsc(a, b), float((a * b).sum() / (b * b).sum())


@pytest.mark.parametrize("group", ["C1", "D2"])
def test_true_poses_give_the_map_back(group: str, rng: torch.Generator) -> None:
    truth, p = blobs(rng, group), particles(500 if group == "C1" else 150, rng, Optics(PIXEL, BOX))
    target = make_target(BOX, PIXEL, ReconstructParams(symmetry=group))
    curve, slope = inner_agreement(reconstruct_poses(Projections(truth, p), p, target), truth)
    assert curve[1:10].min() > 0.99
    assert slope == pytest.approx(1, abs=0.03)


def test_optics_groups_of_other_boxes_tilts_and_premultiplied_data_agree(rng: torch.Generator) -> None:
    truth = blobs(rng)
    other = Optics(2.5, 32, voltage=200.0, cs=1.4, beam_tilt=(0.4, -0.3), magnification=(1.01, 0.003, 0.003, 0.99))
    p = particles(400, rng, Optics(PIXEL, BOX), other)
    target = make_target(BOX, PIXEL, ReconstructParams())
    images = Projections(truth, p)
    curve, slope = inner_agreement(reconstruct_poses(images, p, target, torch.nonzero(p.group == 1)[:, 0]), truth)
    assert curve[1:10].min() > 0.99 and slope == pytest.approx(1, abs=0.03)

    class Premultiplied:
        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            from frazil.maths.ctf import ctf
            from frazil.maths.fourier import image_from_ft, image_ft

            x = image_ft(images[index])
            ky, kx = torch.meshgrid(torch.fft.fftfreq(BOX) * BOX, torch.arange(BOX // 2 + 1.0), indexing="ij")
            k = torch.stack([kx, ky], -1)
            some = p[index]
            c = ctf(k.reshape(-1, 2) / (BOX * PIXEL), some.defocus, some.phase_shift, some.b_factor, some.ctf_scale, p.optics[0])
            return image_from_ft(x * c.reshape(x.shape), BOX)

    first = torch.nonzero(p.group == 0)[:, 0]
    plain = reconstruct_poses(images, p, target, first)
    flagged = replace(p, optics=(replace(p.optics[0], ctf_premultiplied=True), other))
    assert torch.allclose(reconstruct_poses(Premultiplied(), flagged, target, first), plain, atol=2e-3 * float(plain.abs().max()))


def test_a_wrong_shift_or_rotation_shows(rng: torch.Generator) -> None:
    truth, p = blobs(rng), particles(200, rng, Optics(PIXEL, BOX))
    images, target = Projections(truth, p), make_target(BOX, PIXEL, ReconstructParams())
    for wrong in (replace(p, shift=-p.shift), replace(p, rotation=p.rotation.mT.contiguous())):
        curve, _ = inner_agreement(reconstruct_poses(images, wrong, target), truth)
        assert curve[5:].mean() < 0.6


def test_resolution_limit_and_batches(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_target(BOX, PIXEL, ReconstructParams(max_resolution=12.0)).size == 12
    assert make_target(BOX, PIXEL, ReconstructParams(max_resolution=1.0)).size == BOX
    p = particles(30, rng, Optics(PIXEL, BOX), Optics(2.5, 32))
    monkeypatch.setattr("frazil.steps.reconstruct.BATCH_PIXELS", 4 * BOX**2)
    made = list(batches(p, torch.arange(3, 30)))
    assert torch.equal(torch.cat(made).sort().values, torch.arange(3, 30))
    for index in made:
        assert len(p.group[index].unique()) == 1 and len(index) <= 4
