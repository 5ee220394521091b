"""`frazil extract` from files to files: what it writes, re-extraction, joined stacks, resuming, bad input of every kind."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from frazil.data import BadInput
from frazil.io.mrc import read_header, read_stack, write_mrc
from frazil.io.particles import open_images, read_particles
from frazil.io.stacks import StackWriter
from frazil.io.star import read_star, write_star
from frazil.jobs import extract, extract_work
from frazil.jobs.run import Options, execute

PLACES = {"a": [(60.3, 50.7), (120.0, 80.5), (30.25, 100.75)], "b": [(70.6, 60.2), (150.5, 40.4)]}
SIGMA = 4.0


def blobs(places: list[tuple[float, float]], shape: tuple[int, int], noise: float, seed: int) -> torch.Tensor:
    """Dark Gaussians at places that are no pixels' on a slope of counts."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    image = 1000 + 0.5 * x - 0.2 * y + noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for px, py in places:
        image -= 80 * torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * SIGMA**2))
    return image.float()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Two micrographs of different sizes with CTF, and their picks, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for k, (name, shape) in enumerate((("a", (140, 180)), ("b", (120, 200)))):
        write_mrc(f"{name}.mrc", blobs(PLACES[name], shape, 5.0, k), 2.0)
        x, y = zip(*PLACES[name], strict=True)
        scores = [0.9 - 0.1 * i for i in range(len(x))]
        table = {"rlnCoordinateX": x, "rlnCoordinateY": y, "rlnClassNumber": [1] * len(x), "rlnAutopickFigureOfMerit": scores}
        write_star(f"{name}_autopick.star", {"": pd.DataFrame(table)})
    write_micrographs()
    files = pd.DataFrame({"rlnMicrographName": ["a.mrc", "b.mrc"], "rlnMicrographCoordinates": ["a_autopick.star", "b_autopick.star"]})
    write_star("autopick.star", {"coordinate_files": files})
    return tmp_path


def write_micrographs(change=None) -> None:
    """micrographs.star, its tables changed."""
    optics = pd.DataFrame({"rlnOpticsGroupName": ["first", "second"], "rlnOpticsGroup": [3, 7], "rlnVoltage": [300.0, 300.0],
                           "rlnSphericalAberration": [2.7, 2.7], "rlnAmplitudeContrast": [0.1, 0.1],
                           "rlnMicrographPixelSize": [2.0, 2.0]})  # fmt: skip
    table = pd.DataFrame({"rlnMicrographName": ["a.mrc", "b.mrc"], "rlnOpticsGroup": [3, 7], "rlnDefocusU": [10000.0, 12000.0],
                          "rlnDefocusV": [9900.0, 11900.0], "rlnDefocusAngle": [20.0, 30.0],
                          "rlnCtfMaxResolution": [4.0, 5.0]})  # fmt: skip
    star = {"optics": optics, "micrographs": table}
    if change:
        change(star)
    write_star("micrographs.star", star)


def extracted(out: str, resume: bool = False, **changes) -> Path:
    values = {"micrographs": Path("micrographs.star"), "box": 40, "precision": "float32"}
    if "particles" not in changes:
        values["coordinates"] = "autopick.star"
    options = Options(output=Path(out), device="cpu", threads=1, quiet=True, resume=resume)
    execute("extract", extract.run, extract.Params(**(values | changes)), options)
    return Path(out)


def log_of(out: str | Path) -> str:
    return (Path(out) / "log.txt").read_text()


def centroid(image: torch.Tensor) -> torch.Tensor:
    """(2,) x, y of a bright blob from pixel N/2, its surroundings left out."""
    line = torch.arange(len(image), dtype=torch.float64) - len(image) // 2
    weight = image.double() * (line[:, None] ** 2 + line**2 < (3 * SIGMA * len(image) / 40) ** 2)
    return torch.stack([(weight.sum(0) * line).sum(), (weight.sum(1) * line).sum()]) / weight.sum()


def true_places(names: list[str]) -> np.ndarray:
    left = {f"{k}.mrc": list(v) for k, v in PLACES.items()}
    return np.array([left[name].pop(0) for name in names])


@pytest.mark.parametrize("size", [40, 20])
def test_particles_their_residuals_and_their_tables(project, size):
    found = read_particles(extracted("out", rescale=size) / "particles.star")
    assert len(found) == 5 and [o.name for o in found.particles.optics] == ["first", "second"]
    assert found.table["rlnOpticsGroup"].tolist() == ["3", "3", "3", "7", "7"]  # never renumbered
    assert {o.pixel_size for o in found.particles.optics} == {80.0 / size} and {o.box for o in found.particles.optics} == {size}
    assert found.particles.defocus[0].tolist() == [10000, 9900, 20] and found.table["rlnCtfMaxResolution"].iloc[4] == "5.0"
    place = np.stack([found.numbers("rlnCoordinateX"), found.numbers("rlnCoordinateY")], -1) - found.particles.shift.numpy() / 2.0
    assert np.abs(place - true_places(found.table["rlnMicrographName"].tolist())).max() < 1e-5
    images = open_images(found)[torch.arange(5)]
    measured = torch.stack([centroid(image) for image in images]) * (40 / size) * 2.0  # Å
    assert (measured + found.particles.shift).abs().max() < 0.35  # the particle, moved by its shift, is in the middle (noise: 0.1 Å)
    assert images[:, size // 2, size // 2].min() > 5  # bright
    report = (project / "out" / "report.html").read_text()
    assert "5" in report and (project / "out" / "plots" / "particles.png").exists()


def test_float16_and_joined_stacks_hold_the_same(project):
    one = read_particles(extracted("one") / "particles.star")
    two = read_particles(extracted("two", precision="float16", stack_size=100) / "particles.star")
    stacks = {name.split("@")[1] for name in two.image_names}
    assert len(stacks) == 2  # optics groups apart
    assert read_header(next(iter(stacks))).dtype == np.float16
    a, b = (open_images(t)[torch.arange(5)] for t in (one, two))
    assert (a - b).abs().max() < 0.01 and torch.equal(one.particles.shift, two.particles.shift)
    background = read_stack(one.image_names[0].split("@")[1])
    r = torch.hypot(*torch.meshgrid(torch.arange(40.0) - 20, torch.arange(40.0) - 20, indexing="ij"))
    outside = background[:, r > 15].double()
    assert outside.mean(1).abs().max() < 1e-5 and (outside.std(1, correction=0) - 1).abs().max() < 1e-5


def test_extracting_again_centres_drops_copies_and_keeps_what_is_known(project):
    first = extracted("first")
    star = read_star(first / "particles.star", text=True)
    table = star["particles"]
    moved = table.iloc[[0, 0, 1, 3]].reset_index(drop=True)
    moved["rlnOriginXAngst"] = ["1.3", "-0.4", "0.0", "6.6"]
    moved["rlnMaxValueProbDistribution"] = ["0.2", "0.9", "0.5", "0.4"]
    moved["rlnAngleRot"], moved["rlnAngleTilt"], moved["rlnAnglePsi"] = "0.0", "0.0", "90.0"
    moved["rlnMyOwn"] = ["p", "q", "r", "s"]
    write_star("refined.star", {"optics": star["optics"], "particles": moved})
    out = read_particles(extracted("again", particles=Path("refined.star"), box=48) / "particles.star")
    assert out.table["rlnMyOwn"].tolist() == ["q", "r", "s"]  # of the two copies the more certain one
    assert "1 particles lie within 30 Å of a better one" in log_of("again")
    before = moved.iloc[[1, 2, 3]]
    want = before["rlnCoordinateX"].astype(float) - before["rlnOriginXAngst"].astype(float) / 2.0
    got = out.numbers("rlnCoordinateX") - out.particles.shift[:, 0].numpy() / 2.0
    assert np.abs(want.to_numpy() - got).max() < 1e-4
    assert out.particles.shift.abs().max() <= 1.0 + 1e-6 and {o.box for o in out.particles.optics} == {48}
    reset = read_particles(extracted("reset", particles=Path("refined.star"), reset_offsets=True, min_distance=0) / "particles.star")
    assert len(reset) == 4 and float(reset.particles.shift.abs().max()) == 0.0
    # psi = 90: A takes the map's x to the camera's −y, its y to x; a point at (10, 4, 0) Å lies 2 px right, 5 px up of the centre
    options = {"particles": Path("refined.star"), "reset_offsets": True, "min_distance": 0}
    point = read_particles(extracted("point", **options, recentre=(10.0, 4.0, 0.0)) / "particles.star")
    assert point.numbers("rlnCoordinateX")[0] - reset.numbers("rlnCoordinateX")[0] == 2
    assert point.numbers("rlnCoordinateY")[0] - reset.numbers("rlnCoordinateY")[0] == -5


def test_micrographs_of_another_job_are_found_by_file_name_only_when_asked(project):
    first = extracted("first")
    star = read_star(first / "particles.star", text=True)
    star["particles"]["rlnMicrographName"] = ["Motion/job001/" + n for n in star["particles"]["rlnMicrographName"]]
    write_star("other.star", star)
    with pytest.raises(BadInput, match="none of its micrographs is in .*--by-file-name"):
        extracted("no", particles=Path("other.star"))
    assert len(read_particles(extracted("yes", particles=Path("other.star"), by_file_name=True) / "particles.star")) == 5


def test_an_interrupted_run_goes_on(project, monkeypatch):
    whole = extracted("whole")
    out = extracted("part")
    for name in ("RELION_JOB_EXIT_SUCCESS", "particles.star", "b_extract.star"):
        (out / name).unlink()
    (out / "b.mrcs").write_bytes(b"half a file")
    (out / "state.json").write_text('{"state": "stopped"}')
    kept = (out / "a.mrcs").stat().st_mtime_ns
    extracted("part", resume=True)
    assert (out / "a.mrcs").stat().st_mtime_ns == kept  # what was whole stays
    same = [(folder / "particles.star").read_text().replace("part/", "whole/") for folder in (whole, out)]
    assert same[0] == same[1]
    assert torch.equal(read_stack(whole / "b.mrcs"), read_stack(out / "b.mrcs"))


def made_anew(monkeypatch) -> list[str]:
    """Filled with the names of the stacks that are extracted from now on."""
    names: list[str] = []
    real = extract_work.finish
    monkeypatch.setattr(extract_work, "finish", lambda job, item, *rest: names.append(item.base) or real(job, item, *rest))
    return names


def test_a_finished_run_redoes_what_is_missing_or_cut_off(project, monkeypatch):
    with open("a_autopick.star", "a") as file:
        file.write("500 500 1 0.1\n")  # outside
    out = extracted("out", min_distance=1.0)
    done = made_anew(monkeypatch)
    star, stack = out / "a_extract.star", out / "a.mrcs"
    whole, table = {path: path.read_bytes() for path in (star, stack)}, (out / "particles.star").read_bytes()
    last_block = whole[star].index(b"\n# version", whole[star].index(b"data_particles"))
    cuts = [(star, n) for n in (last_block, int(0.6 * len(whole[star])), len(whole[star]) - 2)]
    for path, length in [*cuts, (stack, 3000), (star, None), (stack, None)]:
        path.unlink() if length is None else path.write_bytes(whole[path][:length])
        extracted("out", resume=True, min_distance=1.0)
        assert done == ["a"] and path.read_bytes() == whole[path], (path, length)
        done.clear()
    (out / "particles.star").unlink()
    extracted("out", resume=True, min_distance=1.0)
    assert not done and (out / "particles.star").read_bytes() == table
    page = (out / "report.html").read_text()  # of particles that were there before, with what was left out of them
    assert "1 positions are outside" in page and "(first: a.mrc)" in page and "Every so manyth particle" in page


def test_lists_that_grew_are_gone_on_with_and_other_picks_are_extracted_anew(project, monkeypatch):
    both = {name: Path(f"{name}.star").read_text() for name in ("micrographs", "autopick")}
    for name, text in both.items():
        Path(f"{name}.star").write_text("".join(line for line in text.splitlines(keepends=True) if "b.mrc" not in line))
    out = extracted("out")
    done = made_anew(monkeypatch)
    Path("micrographs.star").write_text(both["micrographs"])
    extracted("out", resume=True)
    assert done == []  # picks are still those of one micrograph
    Path("autopick.star").write_text(both["autopick"])
    extracted("out", resume=True)
    whole = extracted("whole")
    assert done == ["b", "a", "b"]  # a, b: of the run that began with both
    same = [(folder / "particles.star").read_text().replace("whole/", "out/") for folder in (whole, out)]
    assert same[0] == same[1]
    done.clear()
    picks = Path("b_autopick.star").read_text()
    Path("b_autopick.star").write_text(picks.replace(" 0.9", " 0.95"))  # a score, which is carried along
    extracted("out", resume=True)
    assert done == ["b"]
    write_micrographs(lambda star: star["micrographs"].__setitem__("rlnDefocusU", [10000.0, 12500.0]))
    with pytest.raises(BadInput, match=r"--micrographs, .*row 2, b.mrc: _rlnDefocusU was 12000.0 and is 12500.0; rows may only be added"):
        extracted("out", resume=True)


def test_joined_stacks_grow_at_their_end(project, monkeypatch):
    monkeypatch.setattr(extract_work, "SHOWN", 3)
    Path("all.star").write_text(Path("autopick.star").read_text())
    Path("autopick.star").write_text("".join(x for x in Path("all.star").read_text().splitlines(keepends=True) if "b.mrc" not in x))
    write_micrographs(lambda star: star["micrographs"].__setitem__("rlnOpticsGroup", 3))
    out = extracted("out", stack_size=100)
    Path("autopick.star").write_text(Path("all.star").read_text())
    extracted("out", stack_size=100, resume=True)  # one stack of both now
    whole = extracted("whole", stack_size=100)
    assert torch.equal(read_stack(whole / "stacks/000001.mrcs"), read_stack(out / "stacks/000001.mrcs"))
    assert (out / "particles.star").read_text() == (whole / "particles.star").read_text().replace("whole/", "out/")


def test_a_micrograph_that_can_be_read_again_is_extracted_on_resume(project, monkeypatch):
    write_micrographs(lambda star: star["micrographs"].__setitem__("rlnOpticsGroup", 3))
    good = (project / "a.mrc").read_bytes()
    (project / "a.mrc").write_bytes(good[:5000])
    out = extracted("out", stack_size=100)
    assert len(read_particles(out / "particles.star")) == len(PLACES["b"])
    (project / "a.mrc").write_bytes(good)
    extracted("out", stack_size=100, resume=True)
    assert len(read_particles(out / "particles.star")) == len(PLACES["a"]) + len(PLACES["b"])


def test_a_corrupt_micrograph_is_left_out_and_the_rest_goes_on(project):
    (project / "a.mrc").write_bytes((project / "a.mrc").read_bytes()[:5000])
    found = read_particles(extracted("out") / "particles.star")
    assert len(found) == 2 and "left out: " in log_of("out") and "a.mrc: truncated" in log_of("out")
    assert "1 micrographs left out" in log_of("out")


def test_coordinates_outside_and_flat_places_are_counted(project):
    table = pd.DataFrame({"rlnCoordinateX": [60.0, -300.0, 5.0, 178.0], "rlnCoordinateY": [50.0, 40.0, 70.0, 2.0]})
    write_star("a_autopick.star", {"": table})
    image = blobs(PLACES["b"], (120, 200), 5.0, 1)
    image[40:85, 45:95] = 7.0
    image[20:62, 130:172] = torch.nan
    write_mrc("b.mrc", image, 2.0)
    found = read_particles(extracted("out") / "particles.star")
    assert found.table["rlnMicrographName"].tolist() == ["a.mrc", "a.mrc"]
    assert "2 positions are outside their micrograph" in log_of("out") and "2 particles have a background without spread" in log_of("out")


def test_micrographs_without_ctf_among_others_are_left_out_said_and_all_without_go_on(project):
    def one_lacks(star):
        star["micrographs"]["rlnDefocusU"] = ["10000.0", "nan"]

    write_micrographs(one_lacks)
    found = read_particles(extracted("one") / "particles.star")
    assert len(found) == 3 and "1 micrographs have no CTF values while others have" in log_of("one")
    write_micrographs(lambda star: star.update(micrographs=star["micrographs"][["rlnMicrographName", "rlnOpticsGroup"]]))
    found = read_particles(extracted("none") / "particles.star")
    assert len(found) == 5 and not found.has_ctf and "no CTF" in log_of("none")


def test_pixel_sizes_that_differ_stay_apart_and_odd_boxes_become_even(project):
    write_micrographs(lambda star: star["optics"].update({"rlnMicrographPixelSize": pd.Series([2.0, 1.5])}))
    found = read_particles(extracted("out", box=39) / "particles.star")
    assert [o.pixel_size for o in found.particles.optics] == [2.0, 1.5] and found.particles.optics[0].box == 40
    assert "2 pixel sizes (1.5, 2 Å)" in log_of("out") and "--box 39 is odd: 40 px are used" in log_of("out")


def test_scores_choose_and_a_diameter_gives_the_box(project):
    assert len(read_particles(extracted("out", min_score=0.85) / "particles.star")) == 2
    found = read_particles(extracted("wide", box=None, diameter=40.0) / "particles.star")
    assert found.particles.optics[0].box == 30 and "box of 30 px (60 Å)" in log_of("wide")


def test_bad_input_is_one_clear_line(project):
    for changes, expected in (
        ({"rescale": 60}, "--rescale 60 is larger than the box"),
        ({"min_score": 2.0}, "no positions of score 2 or more"),
        ({"coordinates": "nowhere.star"}, "no such file"),
        ({"box": 10, "diameter": 50.0}, "less than the --diameter"),
        ({"background_diameter": 200.0}, "leaves no background"),
        ({"micrographs": Path("autopick_missing.star")}, "no such file"),
        ({"premultiply": True, "coordinates": "autopick.star", "min_score": 0.0, "box": 40, "micrographs": Path("a.mrc")}, "has no CTF"),
    ):
        with pytest.raises(BadInput, match=expected) as error:
            extracted("bad", **changes)
        assert "\n" not in str(error.value)
    write_star("other.star", {"": pd.DataFrame({"rlnMicrographName": ["z.mrc"], "rlnCoordinateX": [5.0], "rlnCoordinateY": [5.0]})})
    with pytest.raises(BadInput, match=r"none of its 1 micrographs is in micrographs.star \(first: z.mrc\)"):
        extracted("bad2", coordinates="other.star")
    with pytest.raises(ValueError, match="give one of --coordinates and --particles"):
        extract.Params(micrographs=Path("m.star"), box=40)


def test_particles_without_a_ctf_get_that_of_their_micrograph_and_old_priors_go(project):
    star = read_star(extracted("first") / "particles.star", text=True)
    table = star["particles"].drop(columns=["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]).assign(rlnOriginXPriorAngst="5.0")
    write_star("bare.star", {"optics": star["optics"], "particles": table})
    found = read_particles(extracted("again", particles=Path("bare.star")) / "particles.star")
    assert found.particles.defocus[:, 0].tolist() == [10000.0] * 3 + [12000.0] * 2 and "rlnOriginXPriorAngst" not in found.table


def test_micrographs_of_relion_3_keep_their_constants(project):
    table = pd.DataFrame({"rlnMicrographName": ["a.mrc", "b.mrc"], "rlnVoltage": [200.0, 200.0], "rlnSphericalAberration": [1.4, 1.4],
                          "rlnAmplitudeContrast": [0.07, 0.07], "rlnMagnification": [50000.0] * 2, "rlnDetectorPixelSize": [10.0] * 2,
                          "rlnDefocusU": [9000.0, 9500.0], "rlnDefocusV": [9000.0, 9500.0], "rlnDefocusAngle": [0.0, 0.0]})  # fmt: skip
    write_star("micrographs.star", {"": table})
    found = read_particles(extracted("out") / "particles.star")
    optics = found.particles.optics[0]
    assert (optics.voltage, optics.cs, optics.amplitude_contrast, optics.pixel_size) == (200.0, 1.4, 0.07, 2.0)
    assert "300 kV" not in log_of("out")


def test_premultiplied_images_are_marked(project):
    found = read_particles(extracted("out", premultiply=True) / "particles.star")
    assert all(o.ctf_premultiplied for o in found.particles.optics)
    plain = open_images(read_particles(extracted("plain") / "particles.star"))[torch.arange(5)]
    assert (open_images(found)[torch.arange(5)] - plain).abs().max() > 1


def test_boxes_that_are_all_outside_are_named_as_the_reason(project):
    with pytest.raises(BadInput, match=r"no particle could be extracted from 2 micrographs: 5 positions are outside their micrograph"):
        extracted("out", box=1000)


def test_a_full_disk_is_named(project):
    """A file whose writing the system refuses: the reason is the system's, whatever the amount written."""
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit
    from signal import SIG_IGN, SIGXFSZ, signal

    before, limits = signal(SIGXFSZ, SIG_IGN), getrlimit(RLIMIT_FSIZE)
    writers = StackWriter("big.mrcs", 64, 1.0)
    try:
        setrlimit(RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(BadInput, match="big.mrcs: cannot be written: the file is larger than this system allows"), writers as stack:
            stack.append(torch.zeros(20, 64, 64))
    finally:
        setrlimit(RLIMIT_FSIZE, limits)
        signal(SIGXFSZ, before)


def binned(folder: str, factor: int = 2) -> None:
    """The micrographs binned by averaging in Fourier space, and small.star, whose optics have their pixel size."""
    Path(folder).mkdir()
    for name in PLACES:
        image = read_stack(f"{name}.mrc")[0].double()
        ft = torch.fft.fftshift(torch.fft.fft2(image))
        h, w = (n // factor for n in image.shape)
        top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
        small = torch.fft.ifft2(torch.fft.ifftshift(ft[top : top + h, left : left + w])).real / factor**2
        write_mrc(f"{folder}/{name}.mrc", small.float(), 2.0 * factor)
    write_micrographs(lambda star: star["optics"].update({"rlnMicrographPixelSize": pd.Series([2.0 * factor] * 2)}))
    star = read_star("micrographs.star", text=True)
    star["micrographs"]["rlnMicrographName"] = [f"{folder}/{name}" for name in star["micrographs"]["rlnMicrographName"]]
    write_star("small.star", star)
    write_micrographs()


def test_positions_from_micrographs_of_another_pixel_size_are_scaled_and_it_is_said(project):
    binned("small")
    first = extracted("first")
    summary = pd.DataFrame({"rlnMicrographName": ["a.mrc", "b.mrc"], "rlnMicrographPixelSize": [2.0, 2.0]})
    write_star("summary.star", {"": summary})  # as `frazil pick` leaves it beside autopick.star
    changes = {"micrographs": Path("small.star"), "box": 20, "by_file_name": True}
    for out, source in (("picks", {}), ("refined", {"particles": first / "particles.star"}),
                        ("table", {"coordinates": str(first / "particles.star")})):  # fmt: skip
        found = read_particles(extracted(out, **changes, **source) / "particles.star")
        assert len(found) == 5 and {o.pixel_size for o in found.particles.optics} == {4.0}
        place = np.stack([found.numbers("rlnCoordinateX"), found.numbers("rlnCoordinateY")], -1) - found.particles.shift.numpy() / 4.0
        names = [Path(name).name for name in found.table["rlnMicrographName"]]
        atol = 0.3 if out == "table" else 1e-5  # there the whole px of the first extraction are the positions
        assert np.abs(place - true_places(names) / 2).max() < atol
        assert "coordinates count pixels of 2 Å, the micrographs have 4 Å: multiplied by 0.5" in log_of(out)
        images = open_images(found)[torch.arange(5)]
        if out != "table":
            assert (torch.stack([centroid(image) for image in images]) * 4.0 + found.particles.shift).abs().max() < 0.6


    kept = read_particles(extracted("kept", **changes, particles=first / "particles.star", scale_positions=False) / "particles.star")
    assert "multiplied by" not in log_of("kept") and len(kept) < 5  # taken as they are most lie outside


def test_a_calibrated_pixel_size_moves_no_position(project):
    first = extracted("first")
    extracted("again", particles=first / "particles.star", pixel_size=2.03)
    assert "taken for a better calibration of the same pixels" in log_of("again")
    a, b = (read_particles(folder / "particles.star") for folder in (first, Path("again")))
    assert np.array_equal(a.numbers("rlnCoordinateX"), b.numbers("rlnCoordinateX"))
