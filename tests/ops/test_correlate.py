"""Best correlations: by hand, against the float64 reference, in pieces, arguments untouched."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frazil.ops import dispatch
from frazil.ops.correlate import correlate_max_

IMPLEMENTATIONS = ["reference", "cpu", "triton"]


def best_of(images: Tensor, references: Tensor, width: int, implementation: str, pieces: int = 1) -> tuple[Tensor, Tensor]:
    """best and index from scratch, the references given in so many calls."""
    best = torch.full((*images.shape[:2], width), -math.inf, dtype=images.real.dtype, device=images.device)
    index = torch.zeros_like(best, dtype=torch.int16)
    first = 0
    for part in references.chunk(pieces):
        correlate_max_(images, part, width, best, index, first=first, implementation=implementation)
        first += len(part)
    return best, index


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_best_is_the_largest_of_the_sums_written_out(implementation, device, rng):
    """Odd height, even width: Σ image[y+v, x+u] reference[v, u], wrapped, by loops."""
    place = device if implementation == "triton" else "cpu"
    h, w, n = 5, 6, 3
    image = torch.randn(2, h, w, dtype=torch.float64, generator=rng)
    reference = torch.randn(n, h, w, dtype=torch.float64, generator=rng)
    sums = torch.zeros(2, n, h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            moved = image.roll((-y, -x), (-2, -1))
            sums[:, :, y, x] = torch.einsum("bvu,rvu->br", moved, reference)
    best, index = best_of(torch.fft.rfft2(image).to(place), torch.fft.rfft2(reference).to(place), w, implementation)
    assert (best.cpu() - sums.amax(1)).abs().max() < 1e-12
    assert torch.equal(index.cpu().long(), sums.argmax(1))


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("shape", [(16, 18), (15, 20)])
def test_fast_versions_agree_with_the_reference(implementation, shape, device, rng, relative_error):
    h, w = shape
    images, references = (torch.fft.rfft2(torch.randn(n, h, w, dtype=torch.float64, generator=rng)) for n in (2, 7))
    exact, where = best_of(images, references, w, "reference")
    plain, _ = best_of(images.to(torch.complex64), references.to(torch.complex64), w, "reference")
    place = device if implementation == "triton" else "cpu"
    before = images.to(torch.complex64).to(place), references.to(torch.complex64).to(place)
    given = before[0].clone(), before[1].clone()
    fast, index = best_of(*given, w, implementation, pieces=2)
    assert relative_error(fast.cpu(), exact) <= 2 * relative_error(plain, exact) + 1e-7
    assert (index.cpu() == where).float().mean() > 0.99  # float32 may turn a near tie
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_batches_smaller_than_the_references_change_nothing(rng, monkeypatch):
    from frazil.ops.correlate import cpu

    images, references = (torch.fft.rfft2(torch.randn(n, 12, 12, generator=rng)) for n in (2, 9))
    whole = best_of(images, references, 12, "cpu")
    monkeypatch.setattr(cpu, "BATCH", 144 * 2)
    dispatch.set_threads(1)
    best, index = best_of(images, references, 12, "cpu")
    assert (best - whole[0]).abs().max() < 1e-4 and (index == whole[1]).float().mean() > 0.99  # MKL's rounding depends on the batch


@pytest.mark.parametrize("width", [12, 13])
def test_equal_batches_on_a_gpu_cover_all_references(device, rng, monkeypatch, width):
    """Nine references are five pairs, one of them half empty; where three pairs fit: three and two. None twice, none left out."""
    from frazil.ops.correlate import triton

    images, references = (torch.fft.rfft2(torch.randn(n, 12, width, generator=rng)).to(device) for n in (2, 9))
    whole = best_of(images, references, width, "triton")
    exact, where = best_of(images.cpu().to(torch.complex128), references.cpu().to(torch.complex128), width, "reference")
    assert (whole[0].cpu() - exact).abs().max() < 1e-4 and (whole[1].cpu() == where).float().mean() > 0.99
    monkeypatch.setattr(triton, "BATCH", 6 * 4 * 12 * width * 3)
    counts = []
    transform = torch.fft.ifft2
    monkeypatch.setattr(torch.fft, "ifft2", lambda values, **options: counts.append(len(values)) or transform(values, **options))
    best, index = best_of(images, references, width, "triton")
    assert counts == [3, 2, 3, 2]
    assert (best - whole[0]).abs().max() < 1e-4 and (index == whole[1]).float().mean() > 0.99


def test_values_already_found_stand_unless_beaten(rng):
    images, references = (torch.fft.rfft2(torch.randn(1, 8, 8, generator=rng)) for _ in range(2))
    best, index = torch.full((1, 8, 8), 1e9), torch.full((1, 8, 8), 3, dtype=torch.int16)
    correlate_max_(images, references, 8, best, index)
    assert bool((best == 1e9).all()) and bool((index == 3).all())


@pytest.mark.parametrize("change", [
    {"width": 10}, {"references": torch.zeros(2, 7, 5, dtype=torch.complex64)}, {"index": torch.zeros(1, 8, 8, dtype=torch.int32)},
    {"references": torch.zeros(2, 8, 5, dtype=torch.complex128)}, {"best": torch.zeros(1, 8, 9)}, {"first": 2**15},
])  # fmt: skip
def test_what_does_not_fit_is_refused(change):
    given = {"images": torch.zeros(1, 8, 5, dtype=torch.complex64), "references": torch.zeros(2, 8, 5, dtype=torch.complex64), "width": 8,
             "best": torch.zeros(1, 8, 8), "index": torch.zeros(1, 8, 8, dtype=torch.int16), "first": 0} | change  # fmt: skip
    with pytest.raises(ValueError, match="correlate"):
        correlate_max_(given["images"], given["references"], given["width"], given["best"], given["index"], first=given["first"])
