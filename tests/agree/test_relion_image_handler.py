"""relion_image_handler (RELION 3.1.3) and `frazil map` make the same of the same map."""
from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frazil.cli import main
from frazil.io.mrc import read_map, write_mrc
from frazil.simulate.phantom import density, phantom

pytestmark = pytest.mark.agree
BOX, PIXEL = 48, 2.0
SIDE = BOX * PIXEL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not shutil.which("relion_image_handler"):
        pytest.skip("relion_image_handler is not on the PATH (Debian: apt install relion)")
    rng = torch.Generator().manual_seed(7)
    data = density(phantom(BOX, PIXEL, seed=3), BOX, PIXEL).data
    write_mrc(tmp_path / "a.mrc", data + 0.1 * torch.randn(data.shape, generator=rng), PIXEL)
    write_mrc(tmp_path / "b.mrc", 1 + 0.5 * torch.rand(data.shape, generator=rng), PIXEL)
    return tmp_path


def both(folder: Path, theirs: list[object], ours: list[object]) -> tuple[Tensor, Tensor, float]:
    """(RELION's map, our map, our pixel size)."""
    command = ["relion_image_handler", "--i", "a.mrc", "--o", "theirs.mrc", "--angpix", str(PIXEL), *map(str, theirs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert main(["map", str(ours[0]), str(folder / "a.mrc"), *map(str, ours[1:]), "--output", str(folder / "ours.mrc")]) == 0
    volume = read_map(folder / "ours.mrc")
    return read_map(folder / "theirs.mrc").data, volume.data, volume.pixel_size


@pytest.mark.parametrize("theirs, ours", [
    (["--lowpass", SIDE / 12], ["lowpass", "--resolution", SIDE / 12]),
    (["--lowpass", SIDE / 15, "--filter_edge_width", 6], ["lowpass", "--resolution", SIDE / 15, "--edge", 6]),
    (["--highpass", SIDE / 6], ["highpass", "--resolution", SIDE / 6]),
    (["--bfactor", -80], ["b-factor", "--b-factor", -80]),
    (["--bfactor", 120], ["b-factor", "--b-factor", 120]),
    (["--multiply_constant", 2.5], ["multiply", "--value", 2.5]),
    (["--add_constant", -0.3], ["add", "--value", -0.3]),
    (["--add", "b.mrc"], ["add", "b.mrc"]),
    (["--subtract", "b.mrc"], ["subtract", "b.mrc"]),
    (["--multiply", "b.mrc"], ["multiply", "b.mrc"]),
    (["--divide", "b.mrc"], ["divide", "b.mrc"]),
    (["--threshold_above", 0.5, "--threshold_below", 0.1], ["threshold", "--above", 0.5, "--below", 0.1]),
    (["--invert_hand"], ["mirror"]),
    (["--new_box", 32], ["crop", "--box", 32]),
    (["--new_box", 64], ["crop", "--box", 64]),
    (["--rescale_angpix", 3.0], ["resample", "--pixel-size", 3.0]),
    (["--rescale_angpix", 1.5], ["resample", "--pixel-size", 1.5]),
    (["--shift_x", 3, "--shift_y", -2, "--shift_z", 1], ["shift", "--by", 3, -2, 1]),
], ids=lambda v: str(v[0]))  # fmt: skip
def test_image_handler(folder, theirs, ours):
    ours = [folder / a if isinstance(a, str) and a.endswith(".mrc") else a for a in ours]
    rescaled = theirs[0] == "--rescale_angpix"
    if rescaled:  # RELION keeps the Nyquist plane of the smaller box, we drop it: let there be nothing on it
        assert main(["map", "lowpass", str(folder / "a.mrc"), "--resolution", "8", "--output", str(folder / "a.mrc")]) == 0
    a, b, pixel_size = both(folder, theirs, ours)
    assert a.shape == b.shape and pixel_size == pytest.approx(theirs[1] if rescaled else PIXEL)
    if rescaled:
        assert float((a - b).norm() / a.norm()) < 1e-4
    elif "--new_box" in theirs and 64 in theirs:
        inside = slice(8, 56)  # RELION pads with the mean of the border or 0; the map itself is the same
        assert torch.allclose(a[inside, inside, inside], b[inside, inside, inside], atol=1e-5)
    elif "--shift_x" in theirs:  # what wraps around is ours only
        inside = slice(4, 44)
        assert torch.allclose(a[inside, inside, inside], b[inside, inside, inside], atol=1e-4)
    else:
        assert float((a - b).norm() / a.norm()) < 2e-5


@pytest.mark.parametrize("group", ["D2", "C4", "C3", "O"])
def test_symmetrised_maps_agree(folder, group):
    """RELION interpolates linearly between voxels, so smooth first; quarter turns are exact in both."""
    assert main(["map", "lowpass", str(folder / "a.mrc"), "--resolution", "12", "--output", str(folder / "a.mrc")]) == 0
    a, b, _ = both(folder, ["--sym", group], ["symmetrise", "--symmetry", group])
    line = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    ball = (line[:, None, None] ** 2 + line[:, None] ** 2 + line**2).sqrt() < BOX // 2 - 2
    assert float((a - b)[ball].norm() / a[ball].norm()) < 0.03
