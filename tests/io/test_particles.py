"""Particle STAR files: what is understood, what is kept, what is refused."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from frazil.data import BadInput
from frazil.io.images import write_stack
from frazil.io.particles import (
    angles_to_matrix,
    make_particle_set,
    match_by_image_name,
    matrix_to_angles,
    open_images,
    read_particles,
    write_particles,
)
from frazil.io.star import read_star
from frazil.maths.rotation import euler_to_matrix, matrix_to_euler, random_rotations, rotation_angle

NEW = """# from somewhere
# version 50001

data_general
_rlnSomething 12

data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnBeamTiltX #8
_rlnBeamTiltY #9
_rlnOddZernike #10
_rlnEvenZernike #11
_rlnMagMat00 #12
_rlnMagMat01 #13
_rlnMagMat10 #14
_rlnMagMat11 #15
_rlnCtfDataAreCtfPremultiplied #16
_rlnNewLabel #17
first 3 300.000 2.7 0.1 1.25 64 0.5 -0.25 [0.1,-2,3e-1] [1.5] 1.01 0.02 0.03 0.99 0 x
second 7 200.0 0.01 0.07 1.5 80 0 0 [] [] 1 0 0 1 1 y

data_particles

loop_
_rlnImageName #1
_rlnMicrographName #2
_rlnOpticsGroup #3
_rlnAngleRot #4
_rlnAngleTilt #5
_rlnAnglePsi #6
_rlnOriginXAngst #7
_rlnOriginYAngst #8
_rlnDefocusU #9
_rlnDefocusV #10
_rlnDefocusAngle #11
_rlnRandomSubset #12
_rlnUnheardOf #13
_rlnPhaseShift #14
000002@a.mrcs m1 7 10.0 20.0 30.0 1.5 -2.5 10000 9000 45 1 0.10 90
000001@b.mrcs m2 3 0 0 0 0 0 12000 12000 0 2 1.00 0
000001@a.mrcs m1 7 -170 90 5 0 0 11000 10500 -30 1 2.50 0
"""

OLD = """data_

loop_
_rlnImageName #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnDetectorPixelSize #5
_rlnMagnification #6
_rlnOriginX #7
_rlnOriginY #8
_rlnDefocusU #9
_rlnGroupName #10
000001@s.mrcs 300 2.7 0.1 5 40000 1.5 -2 10000 g2
000002@s.mrcs 300 2.7 0.1 5 50000 1.0 0 11000 g1
000003@s.mrcs 300 2.7 0.1 5 40000 -1.0 0 12000 g2
"""


def read_text(tmp_path, content):
    path = tmp_path / "p.star"
    path.write_text(content)
    return read_particles(path)


def test_everything_known_is_understood(tmp_path):
    found = read_text(tmp_path, NEW)
    p = found.particles
    assert len(found) == len(p) == 3 and not found.converted and found.has_ctf
    first, second = p.optics
    assert (first.pixel_size, first.voltage, first.cs, first.amplitude_contrast, first.box, first.name) == (
        1.25,
        300,
        2.7,
        0.1,
        64,
        "first",
    )
    assert first.beam_tilt == (0.5, -0.25) and first.odd_zernike == (0.1, -2, 0.3) and first.even_zernike == (1.5,)
    assert first.magnification == (1.01, 0.02, 0.03, 0.99) and not first.ctf_premultiplied
    assert second.ctf_premultiplied and second.odd_zernike == () and second.box == 80
    assert p.group.tolist() == [1, 0, 1] and found.boxes.tolist() == [80, 64, 80]
    assert torch.allclose(p.rotation[0], euler_to_matrix(torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)))
    assert p.shift.tolist() == [[1.5, -2.5], [0, 0], [0, 0]] and p.defocus[0].tolist() == [10000, 9000, 45]
    assert p.half.tolist() == [1, 2, 1] and p.phase_shift.tolist() == [90, 0, 0]
    assert p.micrograph.tolist() == [0, 1, 0] and p.micrographs == ("m1", "m2")
    assert p.norm.tolist() == [1, 1, 1] and p.ctf_scale.tolist() == [1, 1, 1] and p.klass.tolist() == [0, 0, 0]
    assert p.b_factor.tolist() == [0, 0, 0] and p.prior_rotation is None and p.prior_shift is None
    assert found.image_names == ["000002@a.mrcs", "000001@b.mrcs", "000001@a.mrcs"] and found.comment == "# from somewhere"
    assert found.numbers("rlnUnheardOf").tolist() == [0.1, 1.0, 2.5] and found.numbers("rlnMissing", 4.0).tolist() == [4.0] * 3


def test_missing_columns_have_defaults(tmp_path):
    text = NEW[: NEW.index("data_particles")] + "data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n_rlnDefocusU\n1@a.mrcs 3 5000\n"
    p = read_text(tmp_path, text).particles
    assert torch.equal(p.rotation[0], torch.eye(3, dtype=torch.float64)) and p.shift.tolist() == [[0, 0]]
    assert p.defocus.tolist() == [[5000, 5000, 0]] and p.half.tolist() == [0] and p.micrographs == ("",)  # no astigmatism


def test_priors_are_read(tmp_path):
    text = NEW.replace("_rlnUnheardOf", "_rlnAngleTiltPrior").replace("_rlnPhaseShift", "_rlnOriginXPriorAngst")
    p = read_text(tmp_path, text).particles
    wanted = euler_to_matrix(torch.tensor([[10.0, 0.1, 30.0], [0, 1, 0], [-170, 2.5, 5]], dtype=torch.float64))
    assert torch.allclose(p.prior_rotation, wanted) and p.prior_shift.tolist() == [[90, 0], [0, 0], [0, 0]]


def test_files_of_relion_3_0_are_converted(tmp_path):
    write_stack(tmp_path / "s.mrcs", torch.ones(3, 12, 12), 1.25)
    found = read_text(tmp_path, OLD)
    p = found.particles
    assert found.converted and p.group.tolist() == [0, 1, 0]
    assert [o.pixel_size for o in p.optics] == [1.25, 1.0] and [o.box for o in p.optics] == [12, 12]
    assert [o.name for o in p.optics] == ["opticsGroup1", "opticsGroup2"]
    assert p.shift.tolist() == [[1.875, -2.5], [1.0, 0.0], [-1.25, 0.0]]  # pixels x Å
    assert p.micrographs == ("g2", "g1") and p.micrograph.tolist() == [0, 1, 0]
    write_particles(tmp_path / "out.star", found)
    again = read_particles(tmp_path / "out.star")
    assert not again.converted and "rlnOriginX" not in again.table and torch.equal(again.particles.shift, p.shift)
    assert list(again.table.columns)[:3] == ["rlnImageName", "rlnOriginXAngst", "rlnOriginYAngst"]
    assert again.particles.optics == p.optics


def test_written_files_keep_every_column_and_character(tmp_path):
    found = read_text(tmp_path, NEW)
    rotation = random_rotations(3, torch.Generator().manual_seed(0))
    shift = torch.tensor([[1.0, 2.0], [-3.25, 1 / 3], [0.0, -0.0]], dtype=torch.float64)
    from dataclasses import replace

    new = replace(
        found.particles, rotation=rotation, shift=shift, klass=torch.tensor([1, 2, 1]), norm=torch.tensor([0.9, 1.1, 1.0]).double()
    )
    before = found.table.copy()
    write_particles(
        tmp_path / "out.star", found, new, {"rlnMaxValueProbDistribution": torch.tensor([0.5, 1.0, 0.25]), "rlnNew": ["a", "b c", ""]}
    )
    pd.testing.assert_frame_equal(found.table, before)
    text = read_star(tmp_path / "out.star", text=True)
    assert (
        list(text) == ["optics", "particles", "general"]
        and text["general"] == {"rlnSomething": "12"}
        and text.comment == "# from somewhere"
    )
    pd.testing.assert_frame_equal(text["optics"], found.optics_table)
    old_columns = list(before.columns)
    new_columns = ["rlnClassNumber", "rlnNormCorrection", "rlnMaxValueProbDistribution", "rlnNew"]
    assert list(text["particles"].columns) == old_columns + new_columns
    for label in ("rlnImageName", "rlnMicrographName", "rlnDefocusU", "rlnUnheardOf", "rlnPhaseShift"):
        assert text["particles"][label].tolist() == before[label].tolist()
    assert text["particles"]["rlnClassNumber"].tolist() == ["1", "2", "1"] and text["particles"]["rlnRandomSubset"].tolist() == [
        "1",
        "2",
        "1",
    ]
    again = read_particles(tmp_path / "out.star").particles
    assert float(rotation_angle(again.rotation, rotation).max()) < 2e-6 and torch.allclose(again.shift, shift, atol=1e-9)
    assert again.norm.tolist() == [0.9, 1.1, 1.0] or torch.allclose(again.norm, new.norm)
    assert again.optics == found.particles.optics


def test_rows_can_be_chosen(tmp_path):
    found = read_text(tmp_path, NEW)
    some = found[torch.tensor([2, 0])]
    assert some.image_names == ["000001@a.mrcs", "000002@a.mrcs"] and some.particles.defocus[0, 0] == 11000
    write_particles(tmp_path / "out.star", found[torch.tensor([True, False, True])])
    assert read_particles(tmp_path / "out.star").image_names == ["000002@a.mrcs", "000001@a.mrcs"]
    with pytest.raises(ValueError, match="values for 2 particles"):
        write_particles(tmp_path / "out.star", some, found.particles)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("_rlnVoltage", "_rlnOther", "data_optics: label _rlnVoltage is missing"),
        ("_rlnSphericalAberration", "_rlnOther", "label _rlnSphericalAberration is missing"),
        ("_rlnAmplitudeContrast", "_rlnOther", "label _rlnAmplitudeContrast is missing"),
        ("_rlnImagePixelSize", "_rlnOther", "label _rlnImagePixelSize is missing"),
        ("300.000", "many", "data_optics: row 1: _rlnVoltage is 'many'; expected a finite number"),
        ("[0.1,-2,3e-1]", "[0.1,x]", r"_rlnOddZernike is '\[0.1,x\]'"),
        (" 1.25 64", " 0 64", "_rlnImagePixelSize is 0.0; expected Å per pixel"),
        ("second 7", "second 3", "_rlnOpticsGroup must differ in every row"),
        ("b.mrcs m2 3 ", "b.mrcs m2 4 ", r"row 2: _rlnOpticsGroup is 4; data_optics has \[3, 7\]"),
        ("_rlnOpticsGroup #3", "_rlnOther #3", "label _rlnOpticsGroup is missing from data_particles"),
        ("12000 0 2 ", "12000 0 0 ", r"row 2: _rlnRandomSubset is 0; expected 1 or 2 in every row, or remove the column \(1 such"),
        ("-170 90", "-170 nan", "row 3: _rlnAngleTilt is 'nan'; expected a finite number"),
        ("11000", "eleven", "row 3: _rlnDefocusU is 'eleven'"),
        ("a.mrcs m1 7 10.0", "a.mrcs m one 7 10.0", "line 47 holds more values than labels"),
        ("data_particles", "data_movies", ""),
        ("_rlnImageName", "_rlnOther", ""),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, old, new, message):
    assert old in NEW
    text = NEW.replace(old, new, 1)
    if not message:  # particles are found by rlnImageName, and images are asked for only where they are needed
        found = read_text(tmp_path, text)
        if old == "_rlnImageName":
            with pytest.raises(BadInput, match="label _rlnImageName is missing"):
                open_images(found)
        return
    with pytest.warns(UserWarning) if "more values" in message else _nothing(), pytest.raises(BadInput, match=message) as caught:
        read_text(tmp_path, text)
    assert "p.star" in str(caught.value) and "\n" not in str(caught.value)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_empty_and_foreign_files_are_told(tmp_path):
    rows = NEW.index("000002@a.mrcs")
    for text, message in (
        (NEW[:rows], "holds no particles"),
        (NEW[: NEW.index("data_particles")], "no table of particles: .* found general, optics"),
        ("", "no data_ block"),
        (OLD.replace("_rlnMagnification", "_rlnOther"), "the pixel size is missing: expected _rlnDetectorPixelSize and _rlnMagnification"),
        (OLD.replace("_rlnVoltage", "_rlnOther"), "label _rlnVoltage is missing"),
    ):
        with pytest.raises(BadInput, match=message):
            read_text(tmp_path, text)


def test_the_stray_row_of_a_published_file_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match="1 lines"):
        found = read_text(tmp_path, OLD.replace("000002@s", ":\n000002@s"))
    assert len(found) == 3 and found.skipped_rows == 1


def test_angles_agree_with_the_maths():
    rng = np.random.default_rng(5)
    angles = rng.uniform(-360, 360, (50, 3))
    matrix = angles_to_matrix(angles)
    assert torch.allclose(matrix, euler_to_matrix(torch.from_numpy(angles)), atol=1e-14)
    poles = angles_to_matrix(np.array([[30.0, 0, 12], [30, 180, 12], [180, 90, -180], [-180, 10, 180]]))
    for m in (matrix, poles):
        assert torch.allclose(matrix_to_angles(m), matrix_to_euler(m), atol=1e-12)
        assert torch.allclose(angles_to_matrix(matrix_to_angles(m).numpy()), m, atol=1e-12)
    found = matrix_to_angles(torch.cat([matrix, poles]))
    assert bool((found > -180).all()) and bool((found <= 180).all()) and bool((found[:, 1] >= 0).all())


def test_images_are_matched_by_name():
    i, j = match_by_image_name(["000001@a", "000002@a", "000001@b"], ["1@b", "000003@a", "000002@a"])
    assert i.tolist() == [1, 2] and j.tolist() == [2, 0]
    i, j = match_by_image_name(["1@a"], ["1@b"])
    assert i.shape == j.shape == (0,)
    with pytest.raises(BadInput, match="000001@a is named twice"):
        match_by_image_name(["1@a", "000001@a"], ["1@a"])


def test_images_open_beside_their_star(tmp_path):
    write_stack(tmp_path / "s.mrcs", torch.arange(3.0)[:, None, None].expand(3, 12, 12) + torch.eye(12), 1.25)
    images = open_images(read_text(tmp_path, OLD))
    assert images[torch.tensor([2, 0])][:, 0, 1].tolist() == [2.0, 0.0]


def test_names_from_here_find_the_images_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "elsewhere").mkdir()
    write_stack(tmp_path / "project" / "data" / "s.mrcs", torch.arange(3.0)[:, None, None].expand(3, 12, 12) + torch.eye(12), 1.25)
    table = read_text(tmp_path / "project" / "data", OLD)
    monkeypatch.chdir(tmp_path / "project")
    assert set(name.partition("@")[2] for name in table.from_here().image_names) == {"data/s.mrcs"}  # as RELION writes it
    write_particles(tmp_path / "project" / "elsewhere" / "out.star", table.from_here())
    open_images(read_particles(tmp_path / "project" / "elsewhere" / "out.star")).check()
    monkeypatch.chdir(tmp_path)
    open_images(read_particles(tmp_path / "project" / "elsewhere" / "out.star")).check()  # the project is above the file
    write_stack(tmp_path / "s.mrcs", torch.zeros(3, 12, 12), 1.25)  # another of that name where the command runs
    assert table.from_here().image_names[0].partition("@")[2] == "project/data/s.mrcs"
    monkeypatch.chdir(tmp_path / "project" / "elsewhere")
    assert table.from_here().image_names[0].partition("@")[2] == str(tmp_path / "project" / "data" / "s.mrcs")


def simulated(n=4):
    from frazil.data import Optics, Particles

    optics = (
        Optics(1.5, 16, odd_zernike=(0.1, 0.2), beam_tilt=(0.1, 0.0)),
        Optics(1.25, 20, voltage=200.0, name="two", ctf_premultiplied=True),
    )
    generator = torch.Generator().manual_seed(3)
    return Particles(
        optics, torch.arange(n) % 2, random_rotations(n, generator), torch.randn(n, 2, generator=generator, dtype=torch.float64),
        torch.rand(n, 3, generator=generator, dtype=torch.float64) * 1e4, torch.arange(n) % 2 + 1, torch.arange(n) // 2, ("m a", "m_b"),
        phase_shift=torch.rand(n, generator=generator, dtype=torch.float64),
    )  # fmt: skip


def test_simulated_particles_can_be_written(tmp_path):
    made = simulated()
    write_particles(tmp_path / "sim.star", make_particle_set(made, [f"{i + 1:06d}@s.mrcs" for i in range(4)]))
    again = read_particles(tmp_path / "sim.star").particles
    assert again.optics == made.optics and again.micrographs == made.micrographs
    for name in ("group", "half", "micrograph", "defocus", "phase_shift", "b_factor", "ctf_scale", "norm"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name
    assert torch.allclose(again.shift, made.shift, atol=1e-9) and torch.allclose(again.rotation, made.rotation, atol=1e-10)


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="relion_reconstruct (Debian package relion) is not installed")
def test_relion_reconstructs_from_what_is_written(tmp_path):
    from dataclasses import replace

    made = replace(simulated(), optics=simulated().optics[:1], group=torch.zeros(4, dtype=torch.int64), micrographs=("m_a", "m_b"))
    made = replace(made, optics=(replace(made.optics[0], odd_zernike=(), beam_tilt=(0.0, 0.0)),))
    write_stack(tmp_path / "s.mrcs", torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)), 1.5)
    write_particles(
        tmp_path / "sim.star", make_particle_set(made, [f"{i + 1:06d}@s.mrcs" for i in range(4)]), extra={"rlnGroupNumber": [1, 1, 2, 2]}
    )
    done = subprocess.run(
        ["relion_reconstruct", "--i", "sim.star", "--o", "map.mrc", "--ctf"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and (tmp_path / "map.mrc").exists(), done.stderr
    from frazil.io.mrc import read_map

    assert read_map(tmp_path / "map.mrc").data.shape == (16, 16, 16)


def test_real_files_are_understood(shared_data):
    found = read_particles(shared_data / "betagal_10204" / "particles.star")
    assert len(found) == 2374 and found.particles.optics[0].pixel_size == 3.54 and len(found.particles.micrographs) == 10
    images = open_images(found)
    images.check()
    assert images.half_precision and 0.8 < float(images[torch.arange(0, 2374, 100)].std()) < 1.2
    refined = read_particles(shared_data / "parity_relion5" / "refine3d" / "run_data.star")
    assert len(refined) == 755 and set(refined.particles.half.tolist()) == {1, 2}
    assert refined.particles.optics[0].box == 64 and float(refined.particles.norm.mean()) == pytest.approx(0.77, abs=0.03)
    i, j = match_by_image_name(refined, found)
    assert len(i) == 755
    assert torch.allclose(refined.particles.defocus[i], found.particles.defocus[j])
    six = read_particles(shared_data / "formats" / "relion31.6opticsgroups.star")
    assert len(six.particles.optics) == 6 and six.particles.optics[5].even_zernike[0] == 0.917037189491
    shiny = read_particles(shared_data / "relion_stars/tutorial_3.1/Refine3D/job029/run_data.star")
    assert shiny.particles.optics[0].mtf == "mtf_k2_200kV.star" and shiny.particles.optics[0].magnification[0] == 1.002162


def test_a_refined_file_round_trips(shared_data, tmp_path):
    source = shared_data / "parity_relion5" / "refine3d" / "run_data.star"
    found = read_particles(source)
    write_particles(tmp_path / "out.star", found)
    old, new = read_star(source), read_star(tmp_path / "out.star")
    assert list(new["particles"].columns) == list(old["particles"].columns)
    for label in old["particles"]:
        a, b = old["particles"][label], new["particles"][label]
        if label in ("rlnAngleRot", "rlnAnglePsi"):
            assert ((a - b + 180) % 360 - 180).abs().max() < 1e-6
        elif a.dtype.kind == "f":
            assert np.allclose(a, b, rtol=0, atol=1e-6)
        else:
            assert a.tolist() == b.tolist() and a.dtype == b.dtype
