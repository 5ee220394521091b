"""frazil map: what each action does to a map with a known answer."""
from __future__ import annotations

import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from frazil.cli import main
from frazil.io.mrc import read_header, read_map, write_mrc
from frazil.maths.masks import radii
from frazil.maths.rotation import euler_to_matrix
from frazil.simulate.phantom import density, phantom
from frazil.steps.map_transform import crop, mirror, resample, transform

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


def test_a_hollow_shell_needs_only_its_radii(tmp_path: Path) -> None:
    assert run("map", "sphere", "--outer", 62, "--inner", 40, "--output", tmp_path / "shell.mrc") == 0
    shell = read_map(tmp_path / "shell.mrc")
    box = shell.data.shape[-1]
    r = radii(box, 3) * shell.pixel_size
    assert box * shell.pixel_size > 2 * 62 * 1.3 and box % 2 == 0
    assert float(shell.data[(r > 41) & (r < 61)].min()) == 1 and float(shell.data[r < 40 - 5 * shell.pixel_size - 1].abs().max()) == 0
    assert run("map", "sphere", "--outer", 40, "--inner", 62, "--output", tmp_path / "no.mrc") == 2


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


def test_arithmetic_with_maps_and_numbers(tmp_path: Path) -> None:
    a, b = gaussian(), gaussian((12, 0, 0)) - 0.25
    write_mrc(tmp_path / "a.mrc", a, PIXEL, origin=(3.0, 6.0, 9.0))
    write_mrc(tmp_path / "b.mrc", b, PIXEL)
    wanted = {"add": a + b, "subtract": a - b, "multiply": a * b, "divide": a / b}
    for name, truth in wanted.items():
        assert run("map", name, tmp_path / "a.mrc", tmp_path / "b.mrc", "--output", tmp_path / "c.mrc") == 0
        found = read_map(tmp_path / "c.mrc")
        assert torch.allclose(found.data, truth, rtol=1e-5) and found.origin == (3.0, 6.0, 9.0)
    assert run("map", "divide", tmp_path / "a.mrc", "--value", 4, "--output", tmp_path / "c.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "c.mrc").data, a / 4)
    write_mrc(tmp_path / "zero.mrc", torch.zeros_like(a), PIXEL)
    assert run("map", "divide", tmp_path / "a.mrc", tmp_path / "zero.mrc", "--output", tmp_path / "c.mrc") == 0
    assert float(read_map(tmp_path / "c.mrc").data.abs().max()) == 0


def test_normalise_and_threshold(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", 3 * gaussian() + 2, PIXEL)
    assert run("map", "normalise", tmp_path / "a.mrc", "--output", tmp_path / "n.mrc") == 0
    found = read_map(tmp_path / "n.mrc").data
    assert abs(float(found.mean())) < 1e-5 and float(found.std()) == pytest.approx(1, abs=1e-5)
    assert run("map", "threshold", tmp_path / "a.mrc", "--below", 2.5, "--above", 4, "--output", tmp_path / "t.mrc") == 0
    found = read_map(tmp_path / "t.mrc").data
    assert (float(found.min()), float(found.max())) == (2.5, 4.0)
    assert run("map", "threshold", tmp_path / "a.mrc", "--binary", 3.5, "--output", tmp_path / "t.mrc") == 0
    assert torch.equal(read_map(tmp_path / "t.mrc").data, (3 * gaussian() + 2 >= 3.5).float())


def test_band_pass_keeps_one_wave_of_three(tmp_path: Path) -> None:
    x = torch.arange(BOX, dtype=torch.float64)
    wave = {shell: torch.cos(2 * math.pi * shell * x / BOX).expand(BOX, BOX, BOX) for shell in (2, 6, 12)}
    write_mrc(tmp_path / "a.mrc", wave[2] + wave[6] + wave[12], PIXEL)
    side = BOX * PIXEL
    assert run("map", "bandpass", tmp_path / "a.mrc", "--coarsest", side / 4, "--finest", side / 9, "--output", tmp_path / "b.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "b.mrc").data, wave[6].float(), atol=1e-5)
    assert run("map", "highpass", tmp_path / "a.mrc", "--resolution", side / 9, "--output", tmp_path / "b.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "b.mrc").data, wave[12].float(), atol=1e-5)


def test_a_b_factor_widens_a_gaussian(tmp_path: Path) -> None:
    """exp(−2π²σ²k²)·exp(−Bk²/4): σ² grows by B/8π²."""
    b, sigma = 400.0, 7.0
    write_mrc(tmp_path / "a.mrc", gaussian(sigma=sigma), PIXEL)
    assert run("map", "b-factor", tmp_path / "a.mrc", "--b-factor", b, "--output", tmp_path / "b.mrc") == 0
    wide = math.sqrt(sigma**2 + b / (8 * math.pi**2))
    assert torch.allclose(read_map(tmp_path / "b.mrc").data, gaussian(sigma=wide) * (sigma / wide) ** 3, atol=1e-4)


def test_a_difference_shows_what_was_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = 0.2 * gaussian((15, 9, -6), sigma=5.0)
    write_mrc(tmp_path / "a.mrc", gaussian() + extra, PIXEL)
    write_mrc(tmp_path / "b.mrc", 3 * gaussian(), PIXEL)
    write_mrc(tmp_path / "m.mrc", (gaussian(sigma=12.0) > 0.5).float(), PIXEL)
    out = tmp_path / "d.mrc"
    assert run("map", "difference", tmp_path / "a.mrc", tmp_path / "b.mrc", "--scale", "factor", "--output", out) == 0
    found = read_map(out).data
    assert float(found.flatten() @ extra.flatten() / (found.norm() * extra.norm())) > 0.8
    assert run("map", "difference", tmp_path / "b.mrc", tmp_path / "b.mrc", "--mask", tmp_path / "m.mrc", "--output", out) == 0
    assert float(read_map(out).data.abs().max()) < 1e-4 and "scale of" in capsys.readouterr().out


def test_shift_rotate_and_centre(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian((9, -6, 3)), PIXEL)
    assert run("map", "shift", tmp_path / "a.mrc", "--by", 1.5, 2, -1, "--output", tmp_path / "s.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "s.mrc").data, gaussian((13.5, 0, 0)), atol=2e-3)
    assert run("map", "shift", tmp_path / "a.mrc", "--centre", "--output", tmp_path / "s.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "s.mrc").data, gaussian(), atol=3e-2)
    angles = torch.tensor([30.0, 60.0, -20.0], dtype=torch.float64)
    where = euler_to_matrix(angles) @ torch.tensor([9.0, -6, 3], dtype=torch.float64)
    assert run("map", "rotate", tmp_path / "a.mrc", "--angles", *angles.tolist(), "--output", tmp_path / "r.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "r.mrc").data, gaussian(tuple(where.tolist())), atol=2e-3)


def test_align_says_how_to_repeat_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = phantom(28, 4.0, seed=3)
    target = density(shape, 28, 4.0).data
    write_mrc(tmp_path / "t.mrc", target, 4.0, origin=(7.0, 8.0, 9.0))
    turned = transform(mirror(target), euler_to_matrix(torch.tensor([40.0, 70, 10], dtype=torch.float64)), (1, 0, -1))
    write_mrc(tmp_path / "m.mrc", turned, 4.0)
    assert run("map", "align", tmp_path / "m.mrc", tmp_path / "t.mrc", "--output", tmp_path / "a.mrc") == 0
    said = capsys.readouterr().out
    found = read_map(tmp_path / "a.mrc")
    assert float((found.data - target).norm() / target.norm()) < 0.15 and found.origin == (7.0, 8.0, 9.0)
    assert "the mirrored map fits" in said
    again = next(line for line in said.splitlines() if "frazil map rotate" in line).split("frazil map rotate ")[1].split()
    assert run("map", "rotate", tmp_path / "m.mrc", *again, "--output", tmp_path / "b.mrc") == 0
    assert torch.allclose(read_map(tmp_path / "b.mrc").data, found.data, atol=1e-3 * float(target.max()))


def test_symmetry_is_found_and_imposed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = density(phantom(32, 4.0, "D2", seed=3), 32, 4.0).data
    write_mrc(tmp_path / "a.mrc", data, 4.0)
    assert run("map", "find-symmetry", tmp_path / "a.mrc", "--max-order", 3, "--output", tmp_path / "f.mrc") == 0
    assert "point group D2" in capsys.readouterr().out
    assert run("map", "symmetrise", tmp_path / "f.mrc", "--symmetry", "D2", "--output", tmp_path / "s.mrc") == 0
    assert float(capsys.readouterr().out.split("average: ")[1].split()[0]) > 0.99


@pytest.mark.parametrize("mode", ["float16", "int8", "int16", "uint16"])
def test_modes_keep_the_shape_of_the_density(tmp_path: Path, mode: str) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian(), PIXEL, origin=(1.0, 2.0, 3.0))
    extra = [] if mode == "float16" else ["--rescale"]
    assert run("map", "convert", tmp_path / "a.mrc", "--mode", mode, *extra, "--output", tmp_path / "b.map.gz") == 0
    found = read_map(tmp_path / "b.map.gz")
    assert read_header(tmp_path / "b.map.gz").dtype.name == mode and found.origin == (1.0, 2.0, 3.0)
    scale = float(found.data.max())
    assert torch.allclose(found.data / scale, gaussian(), atol=6e-3)


def test_numpy_files_there_and_back(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian((6, 3, 0)), PIXEL)
    assert run("map", "convert", tmp_path / "a.mrc", "--output", tmp_path / "a.npy") == 0
    assert run("map", "convert", tmp_path / "a.npy", "--pixel-size", PIXEL, "--output", tmp_path / "b.mrc") == 0
    assert torch.equal(read_map(tmp_path / "b.mrc").data, gaussian((6, 3, 0))) and read_map(tmp_path / "b.mrc").pixel_size == PIXEL


def test_picture_is_a_png(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian(), PIXEL)
    assert run("map", "picture", tmp_path / "a.mrc", "--output", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Data array contains")
def test_headers_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unequal voxels, no pixel size, permuted axes with a start, NaNs: mended on request, refused otherwise."""
    z, y, x = torch.meshgrid(torch.arange(16.0) - 8, torch.arange(32.0) - 16, torch.arange(32.0) - 16, indexing="ij")
    flat = torch.exp(-((3 * x - 6) ** 2 + (3 * y) ** 2 + (6 * z + 6) ** 2) / (2 * 81)).numpy()
    with mrcfile.new(tmp_path / "flat.mrc") as file:
        file.set_data(np.ascontiguousarray(flat.transpose(2, 0, 1)))  # sections x, rows z, columns y
        file.header.mapc, file.header.mapr, file.header.maps = 2, 3, 1
        file.header.mx, file.header.my, file.header.mz = 32, 32, 16
        file.header.cella.x, file.header.cella.y, file.header.cella.z = 96.0, 96.0, 96.0
        file.header.nxstart, file.header.nystart, file.header.nzstart = -16, -8, -16  # along y, z, x
    assert run("map", "lowpass", tmp_path / "flat.mrc", "--resolution", 20, "--output", tmp_path / "o.mrc") == 2
    assert "pixel sizes differ along x, y, z: 3, 3, 6" in capsys.readouterr().err
    assert run("map", "resample", tmp_path / "flat.mrc", "--pixel-size", 3, "--output", tmp_path / "o.mrc") == 0
    found = read_map(tmp_path / "o.mrc")
    assert torch.allclose(found.data, gaussian((6, 0, -6)), atol=5e-3)
    assert found.origin == pytest.approx((-48, -48, -48))
    write_mrc(tmp_path / "none.mrc", gaussian(), 0.0)
    assert run("map", "lowpass", tmp_path / "none.mrc", "--resolution", 20, "--output", tmp_path / "o.mrc") == 2
    assert "no pixel size" in capsys.readouterr().err
    assert run("map", "convert", tmp_path / "none.mrc", "--pixel-size", 3, "--output", tmp_path / "o.mrc") == 0
    assert read_map(tmp_path / "o.mrc").pixel_size == 3
    hole = gaussian().clone()
    hole[3, 4, 5] = float("nan")
    write_mrc(tmp_path / "hole.mrc", hole, PIXEL)
    assert run("map", "add", tmp_path / "hole.mrc", "--value", 1, "--output", tmp_path / "o.mrc") == 2
    assert "not finite" in capsys.readouterr().err
    assert run("map", "convert", tmp_path / "hole.mrc", "--replace-nan", 0, "--output", tmp_path / "o.mrc") == 0
    assert float(read_map(tmp_path / "o.mrc").data[3, 4, 5]) == 0
    with mrcfile.new(tmp_path / "oblique.mrc") as file:
        file.set_data(flat)
        file.voxel_size = 3.0
        file.header.cellb.gamma = 120.0
    assert run("map", "normalise", tmp_path / "oblique.mrc", "--output", tmp_path / "o.mrc") == 2
    assert "cell angles are 90, 90, 120" in capsys.readouterr().err


def test_cropping_and_resampling_keep_the_place_in_space(tmp_path: Path) -> None:
    write_mrc(tmp_path / "a.mrc", gaussian(), PIXEL, origin=(-48.0, 0.0, 12.0))
    assert run("map", "crop", tmp_path / "a.mrc", "--box", 20, "--output", tmp_path / "b.mrc") == 0
    assert read_map(tmp_path / "b.mrc").origin == pytest.approx((-30, 18, 30))
    assert run("map", "resample", tmp_path / "a.mrc", "--pixel-size", 4, "--output", tmp_path / "b.mrc") == 0
    found = read_map(tmp_path / "b.mrc")
    centre = [o + found.data.shape[0] // 2 * found.pixel_size for o in found.origin]
    assert centre == pytest.approx([0, 48, 60])


@pytest.mark.parametrize("arguments, told", [
    (["add", "a.mrc"], "give another map or --value"),
    (["add", "a.mrc", "flat.mrc"], "flat.mrc: box 8 px, but a.mrc has 32 px"),
    (["subtract", "a.mrc", "other.mrc"], "other.mrc: pixel size 3.1 Å, but a.mrc has 3 Å"),
    (["bandpass", "a.mrc", "--coarsest", "10", "--finest", "20"], "must be a smaller number"),
    (["highpass", "a.mrc", "--resolution", "3"], "nothing finer than 6 Å"),
    (["threshold", "a.mrc"], "give --below, --above or both"),
    (["normalise", "zero.mrc"], "expected a map that varies"),
    (["convert", "a.mrc", "--mode", "int8"], "give --rescale"),
    (["shift", "a.mrc"], "give --by X Y Z or --centre"),
    (["symmetrise", "a.mrc", "--symmetry", "X3"], "--symmetry: unknown symmetry group"),
    (["align", "zero.mrc", "a.mrc"], "zero.mrc: every voxel has the same value"),
    (["align", "other.mrc", "a.mrc"], "other.mrc: pixel size 3.1 Å"),
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
    write_mrc("zero.mrc", torch.zeros(BOX, BOX, BOX), PIXEL)
    write_mrc("other.mrc", gaussian(), 3.1)
    assert run("map", *arguments, "--output", "out.mrc") == 2
    shown = capsys.readouterr().err
    assert told in shown and len(shown.splitlines()) == 1
    assert not Path("out.mrc").exists()
