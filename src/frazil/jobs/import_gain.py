"""Gain reference and defects of imported movies: orientation and form found from the movies, gain.mrc written."""
from __future__ import annotations

import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.gain import Form, fit_gain, gain_form, marked_form, oriented, read_defects, read_gain, write_gain
from frazil.io.movies import EER, TIFF, open_movie
from frazil.jobs.import_optics import Found
from frazil.jobs.import_params import Params
from frazil.jobs.run import Run
from frazil.maths.bad_pixels import ORIENTATIONS, gain_match

GAIN_MOVIES = 20  # looked at
SURE = 5.0  # standard deviations above none, and above the second best, from which an orientation is believed

Scores = dict[tuple[int, int], float]


def check_defects(params: Params, found: Found) -> None:
    """Raise BadInput where the list of defects cannot be used with the movies."""
    if params.defects is not None and found.shapes:
        shape = (found.shapes[0][-2], found.shapes[0][-1])
        read_defects(params.defects, shape, found.paths[0].suffix.lower() in TIFF)


def import_gain(params: Params, run: Run, found: Found) -> list[int]:
    """gain.mrc in the orientation that fits the movies; returns the places of the movies that could not be decoded for that (--skip-bad).

    Without --skip-bad such a movie raises BadInput, as does a gain that has no orientation of the frames' size.
    """
    assert params.gain is not None
    eer = found.paths[0].suffix.lower() in EER
    total, bad = _mean(params, run, found)
    if total is None:
        raise BadInput(f"--gain: none of the first {len(bad)} movies can be decoded")
    form = gain_form(params.gain, eer)
    fixed = marked_form(params.gain) is not None or params.gain.suffix.lower() == ".gain"
    plain = read_gain(params.gain, eer, form=form)
    scores = _scores(plain, total, params, eer)
    if not _is_sure(scores) and not fixed:
        other: Form = "factors" if form == "counts" else "counts"
        tried = read_gain(params.gain, eer, form=other)
        if _is_sure(found_scores := _scores(tried, total, params, eer)):
            plain, scores, form = tried, found_scores, other
            run.warn(f"{params.gain}: holds {form}, which is not usual for these movies; taken so, since it fits them so")
    (turn, flip), best = max(scores.items(), key=lambda item: item[1])
    run.event("gain", rotation=turn, flip=flip, form=form, scores={f"{t} {f}": v for (t, f), v in scores.items()})
    output = run.path / "gain.mrc"
    how = f"{'factors' if form == 'factors' else 'counts, inverted'}; written as {'mean counts' if eer else 'factors'}"
    if _is_sure(scores):
        write_gain(output, oriented(plain, turn, flip), eer)
        sure = f"{best:.0f} standard deviations; next best {_second(scores):.0f}"
        run.summary(f"gain fits with rotation {turn}, flip {flip} ({sure}), {how}: {output}")
    else:
        write_gain(output, plain, eer)
        run.warn(f"{params.gain}: resembles the movies in no orientation (best {best:.1f} standard deviations): is it their gain?")
        run.summary(f"gain fits in NO orientation and is not turned ({how}): {output}")
    return bad


def _mean(params: Params, run: Run, found: Found) -> tuple[Tensor | None, list[int]]:
    """(H, W) float32 sum of all frames of the first movies, None if none can be decoded; the places of those that cannot."""
    total: Tensor | None = None
    bad: list[int] = []
    for place, path in enumerate(found.paths):
        if place - len(bad) >= GAIN_MOVIES:
            break
        run.progress(place, min(GAIN_MOVIES, len(found.paths)), "gain")
        run.check_stop()
        try:
            movie = open_movie(path, threads=run.threads, grouping=params.eer_grouping)
            frames = (movie.load(f, f + 1)[0].float() for f in range(movie.shape[0]))
            mean = sum(frames, torch.zeros(movie.shape[1:]))
        except BadInput as error:
            if not params.skip_bad:
                raise BadInput(f"{error} (--skip-bad leaves it out)") from error
            run.warn(f"left out: {error}")
            bad.append(place)
            continue
        total = mean if total is None or total.shape != mean.shape else total + mean
    return total, bad


def _scores(plain: Tensor, total: Tensor, params: Params, eer: bool) -> Scores:
    """How well each orientation agrees, in standard deviations. Raises BadInput where none has the frames' size."""
    assert params.gain is not None
    shape, scores = (total.shape[0], total.shape[1]), {}
    for turn, flip in ORIENTATIONS:
        try:
            scores[turn, flip] = gain_match(total, fit_gain(oriented(plain, turn, flip), shape, params.gain, eer))
        except BadInput:
            continue
    if not scores:
        fit_gain(plain, shape, params.gain, eer)  # says what does not fit
    return scores


def _second(scores: Scores) -> float:
    """The best but one."""
    return sorted(scores.values())[-2] if len(scores) > 1 else 0.0


def _is_sure(scores: Scores) -> bool:
    """Whether one orientation is clearly the right one."""
    best = max(scores.values())
    return best >= SURE and best >= _second(scores) + SURE
