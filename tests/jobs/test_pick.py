"""`frazil pick` from files to files on a small simulated set: what it writes, bad input of every kind, resuming, re-thresholding."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.coordinates import SCORE, X, Y, read_coordinates
from frazil.io.mrc import read_stack, write_mrc
from frazil.io.star import read_star, write_star
from frazil.jobs import pick, pick_evaluate, simulate_micrographs
from frazil.jobs.run import Options, execute


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two micrographs of 400 px at 5 Å, 20 particles each, SNR 0.3, clean."""
    folder = tmp_path_factory.mktemp("sim") / "sim"
    params = simulate_micrographs.Params(micrographs=2, size=(400, 360), pixel_size=5.0, particles=20, box=40, snr=0.3, views=2,
                                         junk=0, ice=0, carbon=False, coloured=0.0)  # fmt: skip
    execute("simulate-micrographs", simulate_micrographs.run, params, Options(output=folder, device="cpu", threads=1, quiet=True))
    return folder


def picked(made: Path, out: Path, star: Path | None = None, resume: bool = False, **changes):
    values = {"micrographs": star or made / "micrographs.star", "angular_step": 15.0, "pictures": False}
    if not {"templates", "reference", "log_diameter", "read_fom"} & set(changes):
        values["templates"] = made / "templates.mrcs"
    params = pick.Params(**(values | changes))
    return execute("pick", pick.run, params, Options(output=out, device="cpu", threads=1, quiet=True, resume=resume))


def evaluated(made: Path, out: Path, **changes):
    params = pick_evaluate.Params(picks=out / "autopick.star", truth=made / "truth.star", **changes)
    return pick_evaluate.evaluate(read_coordinates(params.picks), read_coordinates(params.truth), params)[0]


def log_of(out: Path) -> str:
    return (out / "log.txt").read_text()


def changed_star(made: Path, path: Path, change) -> Path:
    """micrographs.star with its tables changed."""
    star = read_star(made / "micrographs.star")
    change(star)
    write_star(path, star)
    return path


def test_picks_pictures_maps_and_report(made, tmp_path):
    out = tmp_path / "out"
    picked(made, out, pictures=True, write_fom=True, threshold=0.3)
    found = evaluated(made, out)
    assert found.recall[-1] > 0.9 and found.fdr[-1] < 0.15
    assert np.nanmedian(found.distance) < 5.0
    tables = list(read_coordinates(out / "autopick.star").values())
    assert all((t[SCORE] >= 0.3).all() and t[X].between(0, 399).all() and t[Y].between(0, 359).all() for t in tables)
    assert len(list((out / "pictures").rglob("*.png"))) == 2
    page = (out / "report.html").read_text()
    assert 'type="range"' in page and page.count("data:image/jpeg") == 2
    again = tmp_path / "again"
    picked(made, again, read_fom=str(out), threshold=0.6)
    for a, b in zip(tables, read_coordinates(again / "autopick.star").values(), strict=True):
        assert np.allclose(b[[X, Y]], a[a[SCORE] >= 0.6][[X, Y]], atol=0.6)  # angles and maps are kept in half precision, FOM is not
    with pytest.raises(BadInput, match="--write-fom"):
        picked(made, tmp_path / "no", read_fom=str(tmp_path / "nothing"))
    for grid in (out / "fom").rglob("*_grid.json"):
        grid.write_text("[]")
    with pytest.raises(BadInput, match=r"_grid\.json: cannot be read"):
        picked(made, tmp_path / "list", read_fom=str(out))
    for content in (b"", b"no archive"):
        (out / "plan.pt").write_bytes(content)
        with pytest.raises(BadInput, match=r"plan\.pt is missing or not whole"):
            picked(made, tmp_path / "none", read_fom=str(out))


def test_a_resumed_run_keeps_what_is_there_and_does_the_rest(made, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    picked(made, whole)
    real, calls = pick.candidates, []

    def once(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(pick, "candidates", once)
    with pytest.raises(BaseException, match="stopped"):
        picked(made, out)
    monkeypatch.setattr(pick, "candidates", real)
    assert len(list(out.rglob("*_autopick.star"))) == 1
    picked(made, out, resume=True)
    for a, b in zip(read_coordinates(whole / "autopick.star").values(), read_coordinates(out / "autopick.star").values(), strict=True):
        assert np.allclose(a[[X, Y, SCORE]], b[[X, Y, SCORE]], atol=1e-3)


def test_a_finished_run_redoes_what_is_missing_or_cut_off(made, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"pictures": True, "write_fom": True, "threshold": 0.2, "angular_step": 60.0}
    picked(made, out, **options)
    real, done = pick.finish, []
    monkeypatch.setattr(pick, "finish", lambda *args: done.append(args[4]) or real(*args))
    base = next(str(path.relative_to(out)).removesuffix("_autopick.star") for path in sorted(out.rglob("*_autopick.star")))
    page, summary = (out / "report.html").read_text(), (out / "summary.star").read_bytes()
    star, picture = out / f"{base}_autopick.star", out / "pictures" / f"{base}.png"
    maps, grid = out / "fom" / f"{base}_psi.mrc", out / "fom" / f"{base}_grid.json"
    whole = {path: path.read_bytes() for path in (star, picture, maps, grid)}
    rows = whole[star].splitlines(keepends=True)
    cuts = {star: [len(b"".join(rows[:-4])), int(0.8 * len(whole[star])), len(whole[star]) - 3, None],
            picture: [700, None], maps: [3000, None], grid: [10, None]}  # fmt: skip
    for path, lengths in cuts.items():
        for length in lengths:
            path.unlink() if length is None else path.write_bytes(whole[path][:length])
            picked(made, out, resume=True, **options)
            assert done == [base], (path, length)
            assert path == maps or path.read_bytes() == whole[path]
            done.clear()
    (out / "autopick.star").unlink()
    picked(made, out, resume=True, **options)
    assert not done and len(read_coordinates(out / "autopick.star")) == 2 and (out / "summary.star").read_bytes() == summary

    def pictures(text: str) -> list[str]:
        return [part.split('"')[0] for part in text.split("data:image/jpeg;base64,")[1:]]

    assert len(pictures(page)) == 2 and pictures((out / "report.html").read_text()) == pictures(page)  # also of what was kept
    picked(made, tmp_path / "again", read_fom=str(out), threshold=0.6)
    picked(made, tmp_path / "again", read_fom=str(out), threshold=0.6, resume=True)
    assert len(pictures((tmp_path / "again" / "report.html").read_text())) == 2


def test_a_threshold_too_low_is_still_said_of_what_was_kept(made, tmp_path):
    for resume in (False, True):
        picked(made, tmp_path / "out", threshold=-50.0, resume=resume)
        assert "selects nearly everything in 2 micrographs" in (tmp_path / "out" / "report.html").read_text()


def test_a_list_that_grew_is_gone_on_with(made, tmp_path, monkeypatch):
    star = changed_star(made, tmp_path / "mics.star", lambda s: s.update(micrographs=s["micrographs"].iloc[:1]))
    out, options = tmp_path / "out", {"angular_step": 90.0}
    picked(made, out, star, **options)
    real, done = pick.finish, []
    monkeypatch.setattr(pick, "finish", lambda *args: done.append(args[3]) or real(*args))
    changed_star(made, star, lambda s: None)
    picked(made, out, star, resume=True, **options)
    assert done == [1] and len(read_coordinates(out / "autopick.star")) == 2
    assert (out / "report.html").read_text().count("data:image/jpeg") == 2
    changed_star(made, star, lambda s: s["micrographs"].__setitem__("rlnDefocusU", 9000.0))
    with pytest.raises(BadInput, match="row 1, .*: _rlnDefocusU was .* and is 9000.0; rows may only be added"):
        picked(made, out, star, resume=True, **options)


def test_corrupt_micrographs_are_left_out_and_counted(made, tmp_path):
    bad = tmp_path / "bad.mrc"
    bad.write_bytes((made / "micrographs/mic0001.mrc").read_bytes()[:5000])

    def change(star):
        star["micrographs"].loc[0, "rlnMicrographName"] = str(bad)

    picked(made, tmp_path / "out", changed_star(made, tmp_path / "m.star", change))
    assert "1 of 2 micrographs were left out" in log_of(tmp_path / "out") and "truncated" in log_of(tmp_path / "out")
    assert len(read_coordinates(tmp_path / "out/autopick.star")) == 1


def test_without_ctf_it_says_so_and_missing_rows_are_named(made, tmp_path):
    picked(made, tmp_path / "a", changed_star(made, tmp_path / "a.star", lambda s: s.update(
        micrographs=s["micrographs"][["rlnMicrographName", "rlnOpticsGroup"]])))  # fmt: skip
    assert "no CTF is applied" in log_of(tmp_path / "a")

    def change(star):
        star["micrographs"]["rlnDefocusU"] = ["nan", "12000"]

    picked(made, tmp_path / "b", changed_star(made, tmp_path / "b.star", change))
    assert "1 of 2 micrographs have no CTF values" in log_of(tmp_path / "b")


def test_templates_of_another_pixel_size_are_resampled(made, tmp_path):
    from frazil.maths.fourier import fourier_resample

    small = fourier_resample(read_stack(made / "templates.mrcs"), 32, dims=2)
    write_mrc(tmp_path / "t.mrcs", small, 5.0 * 40 / 32, stack=True)
    picked(made, tmp_path / "out", templates=tmp_path / "t.mrcs", threshold=0.3)
    assert "templates are resampled" in log_of(tmp_path / "out") and "grey scale" in log_of(tmp_path / "out")
    assert evaluated(made, tmp_path / "out").recall[-1] > 0.85


def test_thresholds_too_high_and_too_low(made, tmp_path):
    picked(made, tmp_path / "none", threshold=50.0)
    assert "2 micrographs have no picks" in log_of(tmp_path / "none")
    picked(made, tmp_path / "all", threshold=-50.0, max_picks=30)
    assert "raise --threshold" in log_of(tmp_path / "all")
    assert all(len(t) == 30 for t in read_coordinates(tmp_path / "all/autopick.star").values())


def test_a_map_as_reference_and_mixed_pixel_sizes(made, tmp_path):
    def change(star):
        second = star["optics"].copy()
        second["rlnOpticsGroup"], second["rlnMicrographPixelSize"] = 2, 5.5
        star["optics"] = type(second)({c: [*star["optics"][c], *second[c]] for c in second})
        star["micrographs"]["rlnOpticsGroup"] = [1, 2]

    star = changed_star(made, tmp_path / "m.star", change)
    picked(made, tmp_path / "out", star, reference=made / "reference.mrc", view_step=60.0, score="fom")
    assert "2 pixel sizes" in log_of(tmp_path / "out") and "a typical particle has fom 1" in log_of(tmp_path / "out")


@pytest.mark.parametrize("change, message", [
    ({"templates": "flat.mrcs"}, "all 2 templates are empty"), ({"diameter": 5000.0}, "templates' box"),
    ({"templates": "bare.mrcs"}, "no pixel size"), ({"micrographs": "none.star"}, "none of 1 micrographs can be read"),
])  # fmt: skip
def test_bad_input(made, tmp_path, change, message):
    write_mrc(tmp_path / "flat.mrcs", torch.zeros(2, 40, 40), 5.0, stack=True)
    write_mrc(tmp_path / "bare.mrcs", torch.randn(2, 40, 40), 0.0, stack=True)
    (tmp_path / "none.star").write_text("data_micrographs\n\nloop_\n_rlnMicrographName\n_rlnMicrographPixelSize\nnowhere.mrc 5.0\n")
    change = {k: tmp_path / v if isinstance(v, str) else v for k, v in change.items()}
    star = change.pop("micrographs", None)
    if star is not None:
        change["score"] = "ncc"
    with pytest.raises(BadInput, match=message):
        picked(made, tmp_path / "out", star, **change)


def test_the_score_is_z_unless_something_of_fom_is_given(made, tmp_path):
    """With z nothing has to be known: templates of a hundred times the grey scale give the same picks, particles and few others."""
    write_mrc(tmp_path / "strong.mrcs", 100 * read_stack(made / "templates.mrcs"), 5.0, stack=True)
    picked(made, tmp_path / "plain")
    picked(made, tmp_path / "strong", templates=tmp_path / "strong.mrcs")
    found = evaluated(made, tmp_path / "plain")
    assert found.recall[-1] > 0.95 and found.fdr[-1] < 0.1
    both = [read_coordinates(tmp_path / name / "autopick.star").values() for name in ("plain", "strong")]
    for a, b in zip(*both, strict=True):
        assert (a[SCORE] >= 3).all() and np.allclose(a[[X, Y, SCORE]], b[[X, Y, SCORE]], atol=1e-2)
    for name, change in (("threshold", {"threshold": 0.3}), ("scale", {"greyscale": "file"}), ("fom", {"score": "fom"})):
        picked(made, tmp_path / name, **change)
        assert torch.load(tmp_path / name / "plan.pt")["score"] == "fom"
        assert ("score is fom" in log_of(tmp_path / name)) == (name != "fom")


@pytest.mark.parametrize("score", ["z", "ncc", "fom"])
def test_what_the_threshold_was_found_from_is_not_matched_again(made, tmp_path, monkeypatch, score):
    """Both micrographs are looked at for the threshold: the same picks, whether their score maps are kept or not."""
    true, matched = pick.match, []
    monkeypatch.setattr(pick, "match", lambda *given: matched.append(1) or true(*given))
    picked(made, tmp_path / "kept", score=score)
    assert len(matched) == (2 if score == "fom" else 0)
    monkeypatch.setattr("frazil.jobs.pick_plan.MOST_KEPT", 0)
    picked(made, tmp_path / "again", score=score)
    assert len(matched) == (4 if score == "fom" else 2)
    both = [read_coordinates(tmp_path / name / "autopick.star").values() for name in ("kept", "again")]
    assert all(a.equals(b) for a, b in zip(*both, strict=True))


def test_blobs_from_the_command(made, tmp_path):
    picked(made, tmp_path / "plain", log_diameter=(100.0, 180.0), log_rounds=0)
    assert sum(map(len, read_coordinates(tmp_path / "plain/autopick.star").values())) > 0


def test_evaluation_prints_and_writes(made, tmp_path, capsys):
    params = pick_evaluate.Params(picks=made / "truth.star", truth=made / "truth.star", pixel_size=5.0, output=tmp_path / "curve")
    pick_evaluate.run(params, None)
    assert "recall 1.0000, false discovery rate 0.0000" in capsys.readouterr().out
    assert (tmp_path / "curve.png").exists() and (tmp_path / "curve.star").exists()
    with pytest.raises(BadInput, match="--pixel-size"):
        pick_evaluate.run(pick_evaluate.Params(picks=made / "truth.star", truth=made / "truth.star"), None)


@pytest.mark.real
@pytest.mark.slow
def test_apoferritin_blobs(shared_data, tmp_path):
    """EMPIAR-10146: manual centres, nothing given but a range of diameters (bar of the issue: recall 0.85 at FDR 0.25)."""
    files = sorted((shared_data / "apoferritin_10146").glob("*.mrc"))
    (tmp_path / "m.star").write_text("data_micrographs\n\nloop_\n_rlnMicrographName\n" + "\n".join(map(str, files)) + "\n")
    picked(tmp_path, tmp_path / "out", tmp_path / "m.star", log_diameter=(110.0, 150.0))
    params = pick_evaluate.Params(picks=tmp_path / "out/autopick.star", truth=shared_data / "apoferritin_10146")
    found, _ = pick_evaluate.evaluate(read_coordinates(params.picks), read_coordinates(params.truth), params)
    assert found.recall[-1] > 0.88 and found.fdr[-1] < 0.1 and np.nanmedian(found.distance) < 9.0
