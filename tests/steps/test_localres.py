"""Local resolution of maps with known zones, and its parts against plain formulas."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frazil.maths.filters import apply_to_ft, lowpass_map
from frazil.maths.fsc import fsc
from frazil.maths.masks import radii, soft_sphere
from frazil.steps.localres import (
    LocalresParams,
    Windows,
    blend,
    crossing,
    filter_locally,
    local_resolution,
    mask_shares,
    place_windows,
    whitened,
    window_curves,
)


def noise(rng: torch.Generator, box: int) -> Tensor:
    """White noise of variance 1."""
    return torch.randn(box, box, box, generator=rng)


def params(**values) -> LocalresParams:
    """Parameters, defaults but for those given."""
    return LocalresParams.model_validate(values)


def test_two_zones_have_their_resolutions(rng: torch.Generator) -> None:
    """FSC 0.143 at 5 Å where x < 0 and at 9 Å where x > 0, pixels of 2 Å: both are found away from the border."""
    box, pixel = 80, 2.0

    def signal(resolution: float) -> Tensor:
        def amplitude(r: Tensor) -> Tensor:
            return (0.143 / 0.857 * torch.exp(-(r / (box * pixel) - 1 / resolution) * resolution / 0.12)).clamp(max=400).sqrt()

        return apply_to_ft(noise(rng, box), amplitude)

    x = (torch.arange(box) - box // 2).float()
    r = radii(box, 3)
    left = torch.sigmoid(-2 * x)
    made = torch.sigmoid((32 - r) / 0.7) * (left * signal(5.0) + (1 - left) * signal(9.0))
    halves = [made + noise(rng, box) for _ in range(2)]
    found = local_resolution(*halves, soft_sphere(box, 32, 3), pixel, params())
    inside = r < 32
    medians = [float(found.resolution[inside & zone].median()) for zone in (x < 0, x > 0)]
    core = [float(found.resolution[inside & zone].median()) for zone in (x < -8, x > 8)]
    assert medians[0] == pytest.approx(5.0, abs=0.3) and core[0] == pytest.approx(5.0, abs=0.3)
    assert core[1] == pytest.approx(9.0, abs=0.6) and 7.5 < medians[1] < 9.6  # a window reaches 27 Å across the border
    assert found.random[8:].abs().max() < 0.1
    # The filtered map holds the fine detail of the fine zone only.
    detail = found.filtered - lowpass_map(found.filtered, pixel, 7.0)
    fine, coarse = (float(detail[inside & zone].square().mean()) for zone in (x < -12, x > 12))
    assert fine > 10 * coarse


def test_a_window_as_large_as_the_box_is_the_fsc_of_the_box(rng: torch.Generator) -> None:
    a, b = noise(rng, 24), noise(rng, 24)
    common = apply_to_ft(noise(rng, 24), lambda r: 5 * torch.exp(-r / 4))
    one = Windows(torch.ones(24, 24, 24), torch.tensor([[12, 12, 12]]), torch.ones(1, dtype=torch.float64), 24, 24)
    found = window_curves(a + common, b + common, one)[0]
    torch.testing.assert_close(found, fsc(a + common, b + common), atol=2e-6, rtol=0)


def test_windows_are_cut_at_their_points(rng: torch.Generator) -> None:
    """Maps that agree at one place only: the window there says 1, others nothing; windows beyond the box see zeros."""
    a, b = noise(rng, 40), noise(rng, 40)
    b[24:36, 4:16, 20:32] = a[24:36, 4:16, 20:32]
    points = torch.tensor([[30, 10, 26], [10, 30, 10], [2, 2, 2]])
    windows = Windows(soft_sphere(12, 4, 2), points, torch.ones(3, dtype=torch.float64), 12, 10)
    curves = window_curves(a, b, windows)
    assert curves[0].min() > 0.999 and curves[1:, 2:].abs().max() < 0.9 and curves[1, 2:].mean().abs() < 0.5


def test_crossing_is_between_shells() -> None:
    curves = torch.tensor([[1, 0.9, 0.243, 0.043, 0.5], [1, 0.9, 0.8, 0.7, 0.6], [1, 0.1, 0.1, 0.9, 0.9]], dtype=torch.float64)
    assert crossing(curves, 60.0, 50.0).tolist() == pytest.approx([60 / 2.5, 15.0, 50.0])


def test_blend_is_trilinear_and_weighted_by_shares() -> None:
    points = torch.tensor([[8, 8, 4], [8, 8, 12]])
    windows = Windows(soft_sphere(20, 6, 3), points, torch.tensor([1.0, 0.5], dtype=torch.float64), 20, 8)
    value, weight = blend(windows, torch.tensor([1.0, 3.0]), 16, torch.device("cpu"))
    assert value[8, 8, 4].item() == pytest.approx(1.0, abs=1e-3) and value[8, 8, 12].item() == pytest.approx(3.0, abs=1e-3)
    assert value[8, 8, 8].item() == pytest.approx((0.5 * 1 + 0.25 * 3) / 0.75, abs=1e-3)
    assert weight[0, 0, 0] == 0 or value[0, 0, 0] > 0


def test_shares_are_those_of_the_noise(rng: torch.Generator) -> None:
    mask = (torch.arange(32) < 16).float().expand(32, 32, 32).contiguous()
    window = soft_sphere(12, 3, 2)
    shares = mask_shares(mask, window)
    assert shares[16, 16, 4].item() == pytest.approx(1, abs=1e-5) and shares[16, 16, 28].item() == pytest.approx(0, abs=1e-5)
    direct = (window * mask[10:22, 10:22, 10:22]).square().sum() / window.square().sum()
    assert shares[16, 16, 16].item() == pytest.approx(float(direct), abs=1e-5)


def test_points_lie_near_the_mask(rng: torch.Generator) -> None:
    mask = soft_sphere(64, 8, 2).roll(12, 2)
    some = place_windows(64, 2.0, params(), mask)
    everything = place_windows(64, 2.0, params(), None)
    assert 0 < len(some.points) < len(everything.points) and (some.points[:, 2] > 30).all()
    assert some.side == 60 // 2 and (some.share > 0.19).all() and (everything.share == 1).all()


def test_whitening_keeps_the_fsc_and_levels_the_power(rng: torch.Generator) -> None:
    common = apply_to_ft(noise(rng, 32), lambda r: 50 * torch.exp(-r / 3))
    a, b = common + noise(rng, 32), common + noise(rng, 32)
    x, y = whitened(a, b, None)
    torch.testing.assert_close(fsc(x, y), fsc(a, b), atol=1e-4, rtol=0)
    from frazil.maths.filters import power_spectrum

    power = power_spectrum((x + y) / 2)
    assert float(power[1:].max() / power[1:].min()) < 1.01


def test_the_filter_is_a_low_pass_where_the_resolution_is_even(rng: torch.Generator) -> None:
    data = noise(rng, 32)
    made = filter_locally(data, torch.full_like(data, 1 / 6.0), 1.5, 16, 0.0)
    torch.testing.assert_close(made, lowpass_map(data, 1.5, 6.0, 2.0), atol=1e-5, rtol=0)


def test_no_window_is_an_error(rng: torch.Generator) -> None:
    mask = torch.zeros(40, 40, 40)
    mask[0, 0, 0] = 1.0
    with pytest.raises(ValueError, match="no window"):
        local_resolution(noise(rng, 40), noise(rng, 40), mask, 2.0, params())
