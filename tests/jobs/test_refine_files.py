"""RELION's files as a model: the noise of RELION 3.1, which is by micrograph; files that lie elsewhere; what is missing."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from frazil.data import BadInput, Optics, Particles
from frazil.io.mrc import write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs.refine_files import beside, groups_and_noise, read_model, rows_of_micrographs
from frazil.refine.model import Model

BOX, PIXEL = 16, 4.0
WIDE = Optics(pixel_size=PIXEL, box=BOX)
FINE = Optics(pixel_size=PIXEL / 2, box=BOX)  # half the side: every shell of its images is two of the model's


def particles_of(group: list[int], micrograph: list[int], optics: tuple[Optics, ...] = (WIDE,)) -> Particles:
    """Particles of optics groups on micrographs a, b, …"""
    n = len(group)
    names = tuple("abcdef"[: max(micrograph) + 1])
    zero = torch.zeros(n, dtype=torch.int64)
    return Particles(
        optics=optics, group=torch.tensor(group), rotation=torch.eye(3, dtype=torch.float64).expand(n, 3, 3), shift=torch.zeros(n, 2),
        defocus=torch.zeros(n, 3), half=zero, micrograph=torch.tensor(micrograph), micrographs=names,
    )  # fmt: skip


def relion31(folder: Path, spectra: list[Tensor], names: str = "abcdef", counts: list[int] | None = None) -> Path:
    """A model.star as RELION 3.1 writes it: no optics groups, a noise spectrum (9 shells) a micrograph."""
    write_mrc(folder / "map.mrc", torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(1)), PIXEL)
    shells = np.arange(BOX // 2 + 1)
    blocks = {
        "model_general": {
            "rlnPixelSize": PIXEL, "rlnNormCorrectionAverage": 0.8, "rlnSigmaOffsetsAngst": 4.0, "rlnAveragePmax": 0.5,
            "rlnLogLikelihood": 10.0, "rlnNrClasses": 1, "rlnNrGroups": len(spectra),
        },
        "model_classes": pd.DataFrame({"rlnReferenceImage": ["map.mrc"], "rlnClassDistribution": [1.0]}),
        "model_class_1": pd.DataFrame({"rlnSpectralIndex": shells, **{
            label: np.ones(len(shells)) for label in ("rlnSsnrMap", "rlnGoldStandardFsc", "rlnFourierCompleteness", "rlnReferenceSigma2",
                                                      "rlnReferenceTau2")}}),
        "model_groups": pd.DataFrame({
            "rlnGroupNumber": np.arange(len(spectra)) + 1, "rlnGroupName": list(names[: len(spectra)]),
            "rlnGroupNrParticles": counts or [1] * len(spectra), "rlnGroupScaleCorrection": np.arange(len(spectra)) + 1.0,
        }),
    }  # fmt: skip
    for m, spectrum in enumerate(spectra, 1):
        blocks[f"model_group_{m}"] = pd.DataFrame({"rlnSpectralIndex": shells, "rlnSigma2Noise": spectrum.numpy()})
    write_star(folder / "model.star", blocks)
    return folder / "model.star"


def spectrum(value: float) -> Tensor:
    return value * (1 + torch.arange(BOX // 2 + 1, dtype=torch.float64))


def test_noise_of_relion_31_is_the_mean_over_the_particles_of_each_optics_group(tmp_path):
    """Two optics groups; micrograph b has one particle of the first and two of the second, by the particles, not the groups' counts."""
    path = relion31(tmp_path, [spectrum(1), spectrum(2), spectrum(6)])
    q = particles_of([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 2], (WIDE, FINE))
    model = read_model(path, tmp_path, q)
    assert len(model.sigma2) == 2
    assert torch.allclose(model.sigma2[0], spectrum((3 * 1 + 2) / 4))
    second = spectrum((2 * 2 + 6) / 3)
    wanted = second[(2 * torch.arange(BOX // 2 + 1)).clamp(max=BOX // 2)]  # beyond the model's last shell: as there
    assert torch.allclose(model.sigma2[1], wanted)


def test_equal_noise_stays_and_unused_optics_groups_get_the_mean_of_all(tmp_path):
    path = relion31(tmp_path, [spectrum(3), spectrum(3)])
    for noise in read_model(path, tmp_path, particles_of([0, 0, 0], [0, 1, 1], (WIDE, WIDE))).sigma2:
        assert torch.allclose(noise, spectrum(3))
    other = relion31(tmp_path, [spectrum(1), spectrum(5)], counts=[3, 1])
    unused = read_model(other, tmp_path, particles_of([0, 0], [0, 1], (WIDE, WIDE))).sigma2[1]
    assert torch.allclose(unused, spectrum(2))
    assert torch.allclose(read_model(other, tmp_path).sigma2[0], spectrum(2))  # without particles


def test_groups_are_matched_by_name(tmp_path):
    path = relion31(tmp_path, [spectrum(1), spectrum(5)], names="ba")
    model = read_model(path, tmp_path, particles_of([0, 0, 0], [0, 0, 1]))
    assert torch.allclose(model.sigma2[0], spectrum((2 * 5 + 1) / 3))  # a is the second row
    groups = pd.DataFrame({"rlnGroupName": ["b", "a"]})
    assert rows_of_micrographs(groups, particles_of([0, 0], [0, 1]), path).tolist() == [1, 0]
    with pytest.raises(BadInput, match="has 2 groups, its particles 3"):
        rows_of_micrographs(pd.DataFrame({"rlnGroupName": ["x", "y"]}), particles_of([0] * 3, [0, 1, 2]), path)


def test_what_we_write_for_relion_31_is_read_back(tmp_path):
    """model_group_N is what RELION 3.1 reads of ours, and what it reads is what we mean."""
    path = relion31(tmp_path, [spectrum(1), spectrum(1)])
    q = particles_of([0, 0, 1], [0, 0, 1], (WIDE, FINE))
    model: Model = replace(read_model(path, tmp_path, q), sigma2=(spectrum(2), spectrum(4)))
    written = groups_and_noise(model, q, ["a", "b"], torch.tensor([2, 1]))
    again = relion31(tmp_path, [torch.tensor(np.array(written[f"model_group_{m}"]["rlnSigma2Noise"])) for m in (1, 2)])
    for found, wanted in zip(read_model(again, tmp_path, q).sigma2, model.sigma2, strict=True):
        assert torch.allclose(found[:5], wanted[:5], rtol=1e-4)  # shells that both have


@pytest.mark.parametrize(
    ("block", "label", "words"),
    [
        ("model_general", "rlnPixelSize", "data_model_general has no _rlnPixelSize"),
        ("model_groups", "rlnGroupScaleCorrection", "data_model_groups has no column _rlnGroupScaleCorrection"),
        ("model_class_1", "", "has no data_model_class_1"),
        ("model_group_2", "", "has no data_model_group_2"),
        ("model_classes", "rlnReferenceImage", "names no map"),
    ],
)
def test_what_is_missing_is_named(tmp_path, block, label, words):
    path = relion31(tmp_path, [spectrum(1), spectrum(2)])
    star = read_star(path, text=True)
    if label:
        del star[block][label]
    else:
        del star[block]
    write_star(path, star)
    with pytest.raises(BadInput, match=words) as caught:
        read_model(path, tmp_path, particles_of([0, 0], [0, 1]))
    assert str(path) in str(caught.value)


def test_files_are_looked_for_here_beside_the_star_file_and_above_it(tmp_path):
    job = tmp_path / "project" / "Class3D" / "job001"
    job.mkdir(parents=True)
    star, here = job / "run_it001_optimiser.star", tmp_path / "elsewhere"
    here.mkdir()
    places = (here / "m" / "x.mrc", job / "m" / "x.mrc", job / "x.mrc", tmp_path / "project" / "m" / "x.mrc")
    for place in reversed(places):  # the first of them wins
        place.parent.mkdir(exist_ok=True)
        place.touch()
        assert beside(star, here, "m/x.mrc") == place
    with pytest.raises(BadInput, match=r"the file m/gone.mrc it names \(_rlnSolventMaskName\) is neither"):
        beside(star, here, "m/gone.mrc", "rlnSolventMaskName")
