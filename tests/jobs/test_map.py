"""frazil map: what each action does to a map with a known answer."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.steps.map_transform import crop, mirror, resample

BOX, PIXEL = 32, 3.0


def gaussian(centre: tuple[float, ...] = (0.0, 0.0, 0.0), box: int = BOX, pixel: float = PIXEL, sigma: float = 9.0) -> torch.Tensor:
    """(box, box, box) float32 Gaussian, centre xyz and sigma in Å."""
    line = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) / (2 * sigma**2)).float()


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_mirror_turns_x_about_the_centre(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian((12, 6, -9)), PIXEL)
    assert run("map", "mirror", tmp_path / "a.mrc", "--output", tmp_path / "b.mrc") == 0
    found = read_map(tmp_path / "b.mrc").data
    assert torch.allclose(found[..., 1:], gaussian((-12, 6, -9))[..., 1:], atol=1e-6)  # the plane at -N/2 has no mate
    noise = torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(mirror(mirror(noise)), noise)


@pytest.mark.parametrize("box", [20, 32, 44])
def test_crop_keeps_the_centre(box: int) -> None:
    assert torch.equal(crop(gaussian(sigma=3.0), box).nonzero(), crop(gaussian(sigma=3.0), box).nonzero())
    found, truth = crop(gaussian(sigma=4.0), box), gaussian(box=box, sigma=4.0)
    assert torch.allclose(found, truth, atol=1e-6)


def test_crop_mends_odd_and_unequal_sides(tmp_path: Path) -> None:
    odd = crop(gaussian((3, 0, 0)), 32)[:31, :, 1:]  # centre of 31 px is 15, of 32 px 16
    write_mrc(tmp_path / "odd.mrc", odd, PIXEL)
    assert run("map", "crop", tmp_path / "odd.mrc", "--box", 28, "--output", tmp_path / "even.mrc") == 0
    assert read_map(tmp_path / "even.mrc").data.shape == (28, 28, 28)


@pytest.mark.parametrize("wanted, box", [(2.0, None), (4.5, None), (3.54, 36), (2.77, 40)])
def test_resample_keeps_the_object(wanted: float, box: int | None) -> None:
    found, pixel = resample(gaussian((6, -3, 0)), PIXEL, wanted, box)
    assert pixel == pytest.approx(wanted, rel=2e-3)
    assert box is None or found.shape[-1] == box
    truth = gaussian((6, -3, 0), found.shape[-1], pixel)
    assert (found - truth).abs().max() < 5e-3


def test_resample_writes_the_pixel_size_and_can_correct_it(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian(), PIXEL)
    assert run("map", "resample", tmp_path / "a.mrc", "--pixel-size", 4, "--box", 24, "--output", tmp_path / "b.mrc") == 0
    assert read_map(tmp_path / "b.mrc").pixel_size == pytest.approx(4)
    assert run("map", "resample", tmp_path / "a.mrc", "--force-pixel-size", 3.1, "--output", tmp_path / "c.mrc") == 0
    volume = read_map(tmp_path / "c.mrc")
    assert volume.pixel_size == pytest.approx(3.1) and torch.equal(volume.data, gaussian())


def test_lowpass_leaves_what_is_coarse_and_removes_what_is_fine(tmp_path: Path) -> None:
    x = torch.arange(BOX, dtype=torch.float64)
    wave = {shell: torch.cos(2 * math.pi * shell * x / BOX).expand(BOX, BOX, BOX) for shell in (3, 9)}
    write_mrc(tmp_path / "a.mrc", wave[3] + wave[9], PIXEL)
    assert run("map", "lowpass", tmp_path / "a.mrc", "--resolution", BOX * PIXEL / 6, "--output", tmp_path / "b.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "b.mrc").data, wave[3].float(), atol=1e-5)


def test_sphere_is_a_mask_of_the_diameter(tmp_path: Path) -> None:
    assert run("map", "sphere", "--box", BOX, "--pixel-size", PIXEL, "--diameter", 60, "--edge", 3, "--output", tmp_path / "s.mrc") == 0
    data = read_map(tmp_path / "s.mrc").data
    assert data.min() == 0 and data.max() == 1
    line = data[BOX // 2, BOX // 2]
    assert bool((line[BOX // 2 - 10 : BOX // 2 + 11] == 1).all()) and float(line[BOX // 2 + 13]) == 0


def test_info_prints_a_line_a_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian((9, -6, 3)), PIXEL)
    assert run("map", "info", tmp_path / "a.mrc", tmp_path / "a.mrc") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and "32 x 32 x 32" in shown[1] and "3.0, -2.0, 1.0" in shown[1]


def test_density_of_a_model_has_its_shape(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gemmi", reason="gemmi is not installed")
    model = shared_data / "betagal_10204" / "5a1a.cif.gz"
    out = tmp_path / "m.mrc"
    assert run("map", "from-model", model, "--pixel-size", 5, "--box", 48, "--resolution", 15, "--output", out) == 0
    data = read_map(out).data
    spread = [float(data.clamp(min=0).sum(tuple(a for a in range(3) if a != axis)).double() @ (torch.arange(48.0) - 24).double() ** 2)
              for axis in (2, 1, 0)]  # fmt: skip
    assert spread[0] > spread[1] > spread[2]  # 5A1A is longest along x, flattest along z
    turned = data.flip(1, 2).roll((1, 1), (1, 2))  # its twofold axis along z
    assert (turned - data).norm() / data.norm() < 1e-3


@pytest.mark.parametrize("arguments, told", [
    (["crop", "a.mrc", "--box", "31"], "--box: should be a multiple of 2"),
    (["resample", "a.mrc"], "give --pixel-size, --box or both"),
    (["lowpass", "a.mrc", "--resolution", "-1"], "--resolution: should be greater than 0"),
    (["lowpass", "odd.mrc", "--resolution", "9"], "odd.mrc: box of 15 px is odd"),
    (["lowpass", "flat.mrc", "--resolution", "9"], "expected a cube"),
    (["lowpass", "nothing.mrc", "--resolution", "9"], "nothing.mrc"),
    (["sphere", "--box", "32", "--pixel-size", "1", "--diameter", "40"], "more than the box"),
    (["from-model", "a.mrc", "--box", "32", "--pixel-size", "3", "--resolution", "4"], "nothing finer than 6 Å"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_mrc("a.mrc", gaussian(), PIXEL)
    write_mrc("odd.mrc", torch.rand(15, 15, 15), PIXEL)
    write_mrc("flat.mrc", torch.rand(16, 16, 8), PIXEL)
    assert run("map", *arguments, "--output", "out.mrc") == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1
    assert not Path("out.mrc").exists()
