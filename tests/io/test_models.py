"""Atomic models as density: against the analytic density of single atoms, and a real model against a map of it."""

from __future__ import annotations

import gzip
import math
import sys

import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.models import density_from_model, read_atoms

gemmi = pytest.importorskip("gemmi", reason="gemmi (extra `models`) is not installed")


def pdb_of(path, atoms):
    """A PDB file with one residue an atom: (element, (x, y, z), B, occupancy)."""
    model = gemmi.Model(1)
    chain = gemmi.Chain("A")
    for k, (element, position, b, occupancy) in enumerate(atoms):
        residue = gemmi.Residue()
        residue.name, residue.seqid = "UNK", gemmi.SeqId(k + 1, " ")
        atom = gemmi.Atom()
        atom.name, atom.element, atom.pos = element, gemmi.Element(element), gemmi.Position(*position)
        atom.b_iso, atom.occ = b, occupancy
        residue.add_atom(atom)
        chain.add_residue(residue)
    model.add_chain(chain)
    structure = gemmi.Structure()
    structure.add_model(model)
    structure.setup_entities()
    structure.write_pdb(str(path))
    return path


def gaussians(element, b, position, box, pixel_size):
    """(z, y, x) density of one atom at `position` (xyz Å from pixel box//2): the sum of its five Gaussians."""
    at = (torch.arange(box, dtype=torch.float64) - box // 2) * pixel_size
    x, y, z = (at - p for p in position)
    r2 = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
    out = torch.zeros(box, box, box, dtype=torch.float64)
    for a, width in zip(gemmi.Element(element).c4322.a, gemmi.Element(element).c4322.b, strict=True):
        out += a * (4 * math.pi / (width + b)) ** 1.5 * torch.exp(-4 * math.pi**2 * r2 / (width + b))
    return out


def fsc(a, b):
    """(N/2+1,) Fourier shell correlation."""
    n = a.shape[0]
    fa, fb = (torch.fft.fftn(v.double()) for v in (a, b))
    k = torch.fft.fftfreq(n) * n
    shell = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2).sqrt().round().long().flatten()

    def total(v):
        return torch.bincount(shell, weights=v.double().flatten())[: n // 2 + 1]

    return total((fa * fb.conj()).real) / (total(fa.abs() ** 2) * total(fb.abs() ** 2)).sqrt()


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("box", [24, 25])
def test_atoms_are_their_gaussians_at_their_places(tmp_path, box):
    atoms = [("C", (2.0, -3.5, 4.25), 40.0, 1.0), ("S", (-3.0, 1.0, 0.4), 60.0, 0.5)]
    path = pdb_of(tmp_path / "m.pdb", atoms)
    got = density_from_model(path, box, 0.7, centre="origin")
    truth = sum(occupancy * gaussians(element, b, position, box, 0.7) for element, position, b, occupancy in atoms)
    assert got.pixel_size == 0.7 and got.data.dtype == torch.float32
    assert relative(got.data, truth) < 3e-3  # the part of a B = 40 Å² atom beyond the Nyquist frequency of a 0.7 Å grid


def test_the_b_factor_can_be_given(tmp_path):
    path = pdb_of(tmp_path / "m.pdb", [("O", (0.0, 0.0, 0.0), 5.0, 1.0)])
    got = density_from_model(path, 24, 1.0, b_factor=150.0)
    assert relative(got.data, gaussians("O", 150.0, (0, 0, 0), 24, 1.0)) < 1e-3


def test_coarse_grids_do_not_alias(tmp_path):
    """At 4 Å a pixel the total of the map, and its low shells, stay those of the atom wherever it lies."""
    truth = sum(gemmi.Element("C").c4322.a)  # the integral of the density
    for shift in (0.0, 1.3, 2.0):
        path = pdb_of(tmp_path / "m.pdb", [("C", (shift, 0.0, -shift), 20.0, 1.0)])
        got = density_from_model(path, 16, 4.0, centre="origin").data.double()
        assert float(got.sum()) * 4.0**3 == pytest.approx(truth, rel=2e-4)
        ft = torch.fft.fftn(got).abs() * 4.0**3
        s2 = (torch.fft.fftfreq(16) / 4.0) ** 2
        coefficients = gemmi.Element("C").c4322
        wanted = sum(a * torch.exp(-(b + 20.0) * s2[:8] / 4) for a, b in zip(coefficients.a, coefficients.b, strict=True))
        assert torch.allclose(ft[0, 0, :8], wanted.double(), rtol=1e-3)


def test_the_centre_of_mass_lies_at_the_box_centre(tmp_path):
    path = pdb_of(tmp_path / "m.pdb", [("C", (10.0, 20.0, 30.0), 200.0, 1.0), ("C", (14.0, 22.0, 30.0), 200.0, 1.0)])
    data = density_from_model(path, 32, 1.0).data.double()
    at = torch.arange(32.0) - 16
    for dim in range(3):
        profile = data.sum([d for d in range(3) if d != dim])
        assert abs(float((profile * at).sum() / profile.sum())) < 1e-3


def test_the_resolution_limits_the_map(tmp_path):
    path = pdb_of(tmp_path / "m.pdb", [("N", (1.0, 2.0, 0.0), 20.0, 1.0)])
    whole, cut = (torch.fft.fftn(density_from_model(path, 48, 1.0, resolution).data.double()) for resolution in (None, 6.0))
    ratio = (cut / whole).real[0, 0, :24]
    assert torch.allclose(ratio[:5], torch.ones(5, dtype=torch.float64), atol=1e-3)  # 48 px / 6 Å = shell 8, edge 5.5 to 10.5
    assert float(ratio[8]) == pytest.approx(0.5, abs=1e-3) and float(ratio[11:].abs().max()) < 1e-3


def test_what_is_no_model_is_told(tmp_path, monkeypatch):
    path = pdb_of(tmp_path / "m.pdb", [("C", (0, 0, 0), 20.0, 1.0), ("C", (60.0, 0, 0), 20.0, 1.0)])
    with pytest.raises(BadInput, match=r"reaches 30 Å .* box of 16 px \(32 Å\) is too small .* at least 34 px"):
        density_from_model(path, 16, 2.0)
    density_from_model(path, 34, 2.0)
    with pytest.raises(BadInput, match="gone.cif: no such file"):
        density_from_model(tmp_path / "gone.cif", 16, 2.0)
    (tmp_path / "text.cif").write_text("hello")
    with pytest.raises(BadInput, match="text.cif: "):
        density_from_model(tmp_path / "text.cif", 16, 2.0)
    (tmp_path / "empty.pdb").write_text("END\n")
    with pytest.raises(BadInput, match="empty.pdb: holds no atoms"):
        density_from_model(tmp_path / "empty.pdb", 16, 2.0)
    (tmp_path / "m.pdb.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    with pytest.raises(BadInput, match="m.pdb.gz"):
        density_from_model(tmp_path / "m.pdb.gz", 34, 2.0)
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(BadInput, match=r"pip install 'frazil\[models\]'"):
        density_from_model(path, 34, 2.0)


def test_beta_galactosidase_is_d2_about_the_box_centre_and_the_map_it_should_be(shared_data):
    from frazil.io.mrc import read_map

    volume = density_from_model(shared_data / "betagal_10204" / "5a1a.cif.gz", 64, 3.54)
    for axes in ((0, 1), (0, 2), (1, 2)):  # a half turn about each axis takes index i to 64 - i
        turned = torch.roll(torch.flip(volume.data, axes), (1, 1), axes)
        assert float(torch.corrcoef(torch.stack([volume.data.flatten(), turned.flatten()]))[0, 1]) > 0.999
    # The map of the data set has the model turned by 90 degrees about y: its z is the model's x.
    reference = read_map(shared_data / "parity_relion5" / "ref.mrc").data
    turned = torch.roll(torch.flip(volume.data.transpose(0, 2), (0,)), 1, 0)
    curve = fsc(turned, reference)
    assert float(curve[: round(64 * 3.54 / 20) + 1].min()) > 0.99
    mirrored = torch.roll(torch.flip(turned, (0,)), 1, 0)
    assert float(fsc(mirrored, reference)[5:12].max()) < 0.9


def test_coordinates_stay_where_the_grid_says(tmp_path):
    """With grid_origin an atom at r lies at voxel (r − origin)/pixel; outside of the map it is refused with what is covered."""
    pytest.importorskip("gemmi")
    path = tmp_path / "one.pdb"
    path.write_text("ATOM      1  CA  ALA A   1      10.000  20.000  33.000  1.00 20.00           C\nEND\n")
    volume = density_from_model(path, 24, 1.5, grid_origin=(-2.0, 5.0, 12.0))
    peak = np.unravel_index(int(volume.data.argmax()), volume.data.shape)
    assert [int(i) for i in peak] == [14, 10, 8] and volume.origin == (-2.0, 5.0, 12.0)  # z, y, x
    with pytest.raises(BadInput, match=r"1 of 1 atoms lie outside the map: they reach x 10 to 10, y 20 to 20, z 43 to 43 Å .* 0 to 34 Å"):
        density_from_model(path, 24, 1.5, grid_origin=(0.0, 0.0, -10.0))


def test_atoms_and_residues_of_a_model(tmp_path):
    pytest.importorskip("gemmi")
    path = tmp_path / "two.pdb"
    path.write_text(
        "ATOM      1  CA  ALA A   1      10.000  20.000  33.000  1.00 20.00           C\n"
        "ATOM      2  H   ALA A   1      11.000  20.000  33.000  1.00 20.00           H\n"
        "HETATM    3  O   HOH B   7      12.000  21.000  34.000  0.50 40.00           O\nEND\n"
    )
    atoms = read_atoms(path)
    assert atoms.position.tolist() == [[10, 20, 33], [12, 21, 34]] and atoms.b_factor.tolist() == [20, 40]
    assert atoms.kinds == ("protein", "water") and atoms.chains == ("A", "B") and atoms.numbers == ("1", "7")
    assert atoms.residue.tolist() == [0, 1] and atoms.occupancy.tolist() == [1.0, 0.5]
