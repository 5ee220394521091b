"""`frazil select` from files to files: classes, ranges, images, copies, joins, splits, and bad input of every kind."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from frazil.data import BadInput, Optics
from frazil.io.mrc import read_stack, write_mrc
from frazil.io.particles import open_images, read_particles
from frazil.io.star import read_star, write_star
from frazil.jobs import select
from frazil.jobs.run import Options, execute
from frazil.maths.filters import lowpass_map
from frazil.maths.fourier import image_from_ft
from frazil.maths.masks import soft_circle
from frazil.maths.rotation import random_rotations
from frazil.simulate.phantom import phantom, project_phantom

N = 24


def optics(number: int = 1, name: str = "g1", pixel: float = 2.0, **more) -> pd.DataFrame:
    return pd.DataFrame({"rlnOpticsGroupName": [name], "rlnOpticsGroup": [number], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
                         "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [pixel], "rlnImageSize": [16],
                         "rlnMicrographPixelSize": [pixel], **{k: [v] for k, v in more.items()}})  # fmt: skip


def rows(stack: str, group: int = 1, **more) -> pd.DataFrame:
    names = [f"{i + 1:06d}@{stack}" for i in range(N)]
    return pd.DataFrame({"rlnImageName": names, "rlnMicrographName": [f"mic{i // 6}.mrc" for i in range(N)],
                         "rlnCoordinateX": 100.0 * (np.arange(N) % 6), "rlnCoordinateY": 50.0, "rlnOpticsGroup": group,
                         "rlnDefocusU": 10000.0 + 100 * np.arange(N), "rlnDefocusV": 10000.0, "rlnDefocusAngle": 0.0,
                         "rlnClassNumber": np.arange(N) % 4 + 1, "rlnGroupNumber": 1, **more})  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch, rng) -> Path:
    """A file of 24 particles of four classes in the folder `data`, their images beside it."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write_mrc("data/images.mrcs", torch.randn(N, 16, 16, generator=rng), 2.0, stack=True)
    write_star("data/particles.star", {"optics": optics(), "particles": rows("images.mrcs")})
    return tmp_path


def selected(out: str, *files: str, **changes) -> Path:
    params = select.Params(files=tuple(map(Path, files or ("data/particles.star",))), **changes)
    execute("select", select.run, params, Options(output=Path(out), device="cpu", threads=1, quiet=True))
    return Path(out)


def log_of(out: str | Path) -> str:
    return (Path(out) / "log.txt").read_text()


def names_of(out: Path, name: str = "particles") -> list[int]:
    return [int(n.split("@")[0]) - 1 for n in read_particles(out / f"{name}.star").image_names]


def test_classes_and_ranges_choose_and_images_are_found_from_the_new_place(project):
    found = read_particles(selected("out", classes="1,3-4", range=("rlnDefocusU::11000", "rlnCoordinateX:100:")) / "particles.star")
    want = [i for i in range(N) if i % 4 != 1 and i <= 10 and i % 6 >= 1]
    assert [int(n.split("@")[0]) - 1 for n in found.image_names] == want
    assert found.table["rlnClassNumber"].astype(int).tolist() == [i % 4 + 1 for i in want]  # numbers stay
    assert torch.equal(open_images(found)[torch.arange(len(want))], read_stack("data/images.mrcs")[want])
    assert names_of(selected("drop", drop_classes="2-4")) == list(range(0, N, 4))
    assert "by class: 18 of 24" in log_of("out") and "rlnDefocusU from any to 11000: 8 of 18" in log_of("out")


def test_ranges_also_take_labels_of_the_optics(project):
    assert len(names_of(selected("out", range=("rlnVoltage:200:400",)))) == N


def test_images_with_unusual_statistics_go(project, rng):
    images = torch.randn(N, 16, 16, generator=rng)
    images[3] += 5
    images[7] *= 4
    write_mrc("data/images.mrcs", images, 2.0, stack=True)
    assert names_of(selected("out", image_sigma=5.0)) == [i for i in range(N) if i not in (3, 7)]


def test_micrographs_with_unusual_statistics_and_broken_ones_go(project, rng):
    for i in range(12):
        write_mrc(f"m{i}.mrc", (9.0 if i == 4 else 0.0) + torch.randn(40, 40, generator=rng), 1.0)
    Path("m7.mrc").write_bytes(b"nothing")
    write_star("mics.star", {"micrographs": pd.DataFrame({"rlnMicrographName": [f"m{i}.mrc" for i in range(12)]})})
    star = read_star(selected("out", "mics.star", image_sigma=6.0) / "micrographs.star")
    assert list(star["micrographs"]["rlnMicrographName"]) == [f"m{i}.mrc" for i in range(12) if i not in (4, 7)]
    assert "left out: m7.mrc" in log_of("out")


def test_the_better_of_two_copies_stays_by_place_and_shift(project):
    table = rows("images.mrcs", rlnOriginXAngst=0.0, rlnOriginYAngst=0.0, rlnMaxValueProbDistribution=0.5)
    table.loc[1, ["rlnCoordinateX", "rlnOriginXAngst", "rlnMaxValueProbDistribution"]] = [20.0, 30.0, 0.9]  # at 40 − 30 = 10 Å
    write_star("data/particles.star", {"optics": optics(), "particles": table})
    assert names_of(selected("out", min_distance=30.0)) == [i for i in range(N) if i != 0]
    assert names_of(selected("near", min_distance=8.0)) == list(range(N))


def test_splits_are_written_in_order_or_at_random(project):
    out = selected("out", split_size=10)
    assert [names_of(out, f"particles_split{k}") for k in (1, 2, 3)] == [list(range(10)), list(range(10, 20)), list(range(20, 24))]
    out = selected("random", splits=3, random_order=True)
    parts = [names_of(out, f"particles_split{k}") for k in (1, 2, 3)]
    assert sorted(sum(parts, [])) == list(range(N)) and parts[0] != list(range(8)) and [len(p) for p in parts] == [8, 8, 8]


def test_micrographs_are_grouped_by_defocus(project):
    found = read_particles(selected("out", regroup=2) / "particles.star")
    assert found.table["rlnGroupName"].tolist() == ["group_001"] * 12 + ["group_002"] * 12 and "rlnGroupNumber" not in found.table


def second_file(project, number: int, name: str, pixel: float = 2.0, **more) -> None:
    write_mrc(project / "data" / "more.mrcs", torch.ones(N, 16, 16), 2.0, stack=True)
    write_star("data/more.star", {"optics": optics(number, name, pixel), "particles": rows("more.mrcs", number, **more)})


def test_directories_are_joined_like_files(project):
    second_file(project, 4, "g4")
    classification(project, "data/c2d")
    assert len(names_of(selected("out", "data/c2d", "data/more.star"))) == 2 * N


def test_a_join_keeps_numbers_it_can_keep(project):
    second_file(project, 4, "g4")
    out = selected("out", "data/particles.star", "data/more.star")
    found = read_particles(out / "particles.star")
    assert len(found) == 2 * N and found.table["rlnOpticsGroup"].tolist() == ["1"] * N + ["4"] * N
    assert not (out / "optics_groups.star").exists() and "renumbered" not in log_of(out)


def test_a_join_that_must_renumber_says_so_in_a_file_of_its_own(project):
    second_file(project, 1, "g4", rlnExtra=3)
    out = selected("out", "data/particles.star", "data/more.star")
    found = read_particles(out / "particles.star")
    assert found.table["rlnOpticsGroup"].tolist() == ["1"] * N + ["2"] * N and "rlnExtra" not in found.table
    table = read_star(out / "optics_groups.star")["optics_groups"]
    assert table.values.tolist() == [["data/particles.star", 1, 1], ["data/more.star", 1, 2]]
    log = log_of(out)
    assert "optics group 1 (g4) is number 2" in log and "columns that not all files have are left out: rlnExtra" in log


def test_a_join_keeps_differing_groups_apart_and_rows_once(project):
    second_file(project, 1, "g1", pixel=3.0)
    out = selected("out", "data/particles.star", "data/more.star")
    assert {o.pixel_size for o in read_particles(out / "particles.star").particles.optics} == {2.0, 3.0}
    assert "other settings" in log_of(out)
    write_star("data/same.star", {"optics": optics(), "particles": rows("images.mrcs")})
    out = selected("once", "data/particles.star", "data/same.star")
    assert len(names_of(out)) == N and f"{N} rows name an image of an earlier row again" in log_of(out)


def classification(project, folder: str, empty: int | None = None) -> None:
    """A finished 2D classification of the particles: two good averages, noise, and one at the rim."""
    rng = torch.Generator().manual_seed(5)
    box, pixel, run = 48, 3.0, Path(folder)
    run.mkdir()
    views = project_phantom(phantom(box, pixel, "I", 2), random_rotations(2, rng), Optics(pixel, box))
    good = image_from_ft(views, box) / image_from_ft(views, box).std()
    line = torch.arange(box) - box / 2
    rim = torch.exp(-0.5 * (torch.hypot(line - 15.0, line[:, None] + 9.0) / 3) ** 2)
    averages = torch.stack([torch.randn(box, box, generator=rng), good[0], 5 * rim, good[1]])
    averages = averages + 0.1 * torch.randn(4, box, box, generator=rng)
    averages = lowpass_map(averages, pixel, 15.0, dims=2) * soft_circle(box, 19, 3)
    if empty is not None:
        averages[empty] = 0
    write_mrc(run / "run_it003_classes.mrcs", averages, pixel, stack=True)
    share = [0.25] * 4 if empty is None else [0.0 if k == empty else 0.3333 for k in range(4)]
    table = pd.DataFrame({"rlnReferenceImage": [f"{k + 1:06d}@{folder}/run_it003_classes.mrcs" for k in range(4)],
                          "rlnClassDistribution": share, "rlnAccuracyRotations": [3.0, 3.0, 999.0, 2.0],
                          "rlnEstimatedResolution": [15.0] * 4})  # fmt: skip
    write_star(run / "run_it003_model.star", {"model_general": {"rlnPixelSize": pixel}, "model_classes": table})
    general = {"rlnModelStarFile": f"{folder}/run_it003_model.star", "rlnExperimentalDataStarFile": f"{folder}/run_it003_data.star",
               "rlnParticleDiameter": 110.0}  # fmt: skip
    write_star(run / "run_it003_optimiser.star", {"optimiser_general": general})
    rows_of_run = rows("images.mrcs")
    if empty is not None:
        rows_of_run.loc[rows_of_run["rlnClassNumber"] == empty + 1, "rlnClassNumber"] = 2
    write_star(run / "run_it003_data.star", {"optics": optics(), "particles": rows_of_run})


@pytest.mark.parametrize("given", ["data/c2d", "data/c2d/run_it003_optimiser.star", "data/c2d/run_it003_data.star"])
def test_good_classes_are_chosen_by_score_and_explained(project, given):
    classification(project, "data/c2d")
    out = selected("out", given, min_score=0.5)
    found = read_particles(out / "particles.star")
    assert set(found.table["rlnClassNumber"]) == {"2", "4"} and len(found) == 12
    kept = read_star(out / "class_averages.star")[""]
    assert list(kept["rlnClassNumber"]) == [2, 4] and (kept["rlnClassScore"] > 0.5).all()
    assert read_stack(kept["rlnReferenceImage"].iloc[0].split("@")[1]).shape[0] == 4  # found from here, as templates
    model = read_star(out / "rank_model.star")["model_classes"]
    assert len(model) == 4 and (model["rlnClassScore"].to_numpy() > 0.5).tolist() == [False, True, False, True]
    general = read_star(out / "rank_optimiser.star")["optimiser_general"]
    assert general["rlnModelStarFile"] == "out/rank_model.star"
    why = read_star(out / "rank_features.star")["class_features"]
    assert "solvent" in why["frazilReasons"].iloc[0] and "−" in why["frazilReasons"].iloc[2]
    assert (out / "plots" / "classes.png").exists() and "Reasons" in (out / "report.html").read_text()


def test_least_numbers_take_worse_classes_and_ranking_alone_keeps_all(project):
    classification(project, "data/c2d", empty=0)
    out = selected("more", "data/c2d", min_score=0.99, min_particles=5)
    assert len(names_of(out)) >= 5 and "below --min-score are taken" in log_of(out)
    assert len(names_of(selected("all", "data/c2d", rank=True))) == N
    assert read_star(Path("all/rank_model.star"))["model_classes"]["rlnClassScore"].iloc[0] == 0  # the empty class
    with pytest.raises(BadInput, match="no class is left; the best score is 0"):
        selected("none", "data/c2d", min_score=1.0)
    (project / "data" / "c2d" / "run_it003_classes.mrcs").unlink()
    with pytest.raises(BadInput, match="its averages .* are nowhere"):
        selected("gone", "data/c2d", min_score=0.5)


def test_bad_input_is_one_clear_line(project):
    write_star("mics.star", {"micrographs": pd.DataFrame({"rlnMicrographName": ["m.mrc"]})})
    write_star("nothing.star", {"other": pd.DataFrame({"rlnVoltage": [1.0]})})
    broken = rows("images.mrcs", 9)
    write_star("data/broken.star", {"optics": optics(), "particles": broken})
    for files, changes, expected in (
        (("data/particles.star",), {"range": ("rlnDefocus:1:2",)}, "has no label _rlnDefocus; did you mean rlnDefocusU"),
        (("data/particles.star",), {"range": ("rlnDefocusU:1:2",)}, "nothing is left of 24 particles after: rlnDefocusU from 1 to 2: 0 "),
        (("data/particles.star",), {"classes": "7"}, "numbers run from 1 to 4"),
        (("data/particles.star",), {"min_score": 0.5}, "scores need a classification|model.star beside it"),
        (("data/particles.star",), {"splits": 30}, "24 rows cannot be split into 30 parts"),
        (("data/particles.star", "mics.star"), {}, "holds micrographs, but .* holds particles"),
        (("nothing.star",), {"splits": 2}, "holds no particles, micrographs or movies"),
        (("data/broken.star",), {"splits": 2}, "row 1: optics group 9 is not in data_optics"),
        (("mics.star",), {"min_distance": 30.0}, "no pixel size of the micrographs"),
        (("data",), {"classes": "1"}, "holds no run_itNNN_model.star"),
    ):
        with pytest.raises(BadInput, match=expected) as error:
            selected("bad", *files, **changes)
        assert "\n" not in str(error.value)
    for changes, expected in (({}, "nothing to select by"), ({"range": ("rlnDefocusU",)}, "LABEL:LOW:HIGH"),
                              ({"range": ("a:5:2",)}, "lower first"), ({"classes": "1", "min_score": 0.5}, "one of")):  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            select.Params(files=(Path("x.star"),), **changes)
