"""Selection: ranges, outliers, copies, splits, groups, joined optics."""
from __future__ import annotations

import pytest
import torch

from frazil.steps.select import (
    group_micrographs,
    image_statistics,
    in_range,
    join_optics,
    numbers_of,
    split_rows,
    within_spread,
    without_copies,
)


def test_ranges_hold_their_ends_and_no_missing_values():
    values = torch.tensor([1.0, 2.0, 3.0, torch.nan, torch.inf])
    assert in_range(values, 2.0, 3.0).tolist() == [False, True, True, False, False]
    assert in_range(values, None, 2.0).tolist() == [True, True, False, False, False]


def test_outliers_do_not_widen_their_own_limits(rng):
    values = torch.cat([torch.randn(1000, generator=rng), torch.full((100,), 8.0), torch.tensor([torch.nan])])
    kept = within_spread(values, 4.0)
    assert not kept[1000:].any() and kept[:1000].sum() >= 998  # plain sd would be 2.5 here and keep them all
    assert within_spread(torch.ones(5), 3.0).all()
    assert within_spread(torch.tensor([1.0, 1.0, 1.0, 9.0]), 1.0).tolist() == [True, True, True, False]


def test_the_better_copy_stays_and_micrographs_are_apart():
    place = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 0.0], [100.0, 0.0], [10.0, 5.0]])
    kept = without_copies(place, torch.tensor([1, 1, 0, 1, 1]), torch.tensor([0.1, 0.5, 0.2, 0.3, 0.9]), 30.0)
    assert kept.tolist() == [False, False, True, True, True]
    assert without_copies(place, torch.zeros(5, dtype=torch.int64), torch.zeros(5), 1.0).tolist() == [True, True, False, True, True]


def test_splits_cover_every_row_once():
    parts = split_rows(10, 3, 0, None)
    assert [len(p) for p in parts] == [3, 3, 3, 1] and torch.cat(parts).tolist() == list(range(10))
    parts = split_rows(11, 0, 4, torch.Generator().manual_seed(1))
    assert sorted(map(len, parts)) == [2, 3, 3, 3] and sorted(torch.cat(parts).tolist()) == list(range(11))
    assert torch.cat(parts).tolist() != list(range(11))
    assert [len(p) for p in split_rows(10, 3, 2, None)] == [3, 3]
    for size, count in ((6, 2), (0, 11)):
        with pytest.raises(ValueError, match="10|11"):
            split_rows(10, size, count, None)


def test_groups_hold_like_micrographs_and_about_as_many_particles():
    micrograph = torch.arange(20).repeat_interleave(torch.arange(1, 21))
    key = torch.randperm(20, generator=torch.Generator().manual_seed(3)).double()
    group = group_micrographs(micrograph, key, 4)
    held = torch.bincount(group)
    assert len(held) == 4 and held.min() > 30 and held.max() < 75  # 210 particles, at most 20 of one micrograph
    of = torch.stack([group[micrograph == m].unique() for m in range(20)])[:, 0]
    assert (of[key.argsort()].diff() >= 0).all()


def group(number: str, name: str, pixel: str = "1.0", **more: str) -> dict[str, str]:
    return {"rlnOpticsGroup": number, "rlnOpticsGroupName": name, "rlnImagePixelSize": pixel, **more}


def test_optics_groups_keep_their_numbers_wherever_they_can():
    first = [group("1", "a"), group("5", "b")]
    join = join_optics([first, [group("5", "b", "1.00000"), group("2", "c")]], ["x", "y"])
    assert [r["rlnOpticsGroup"] for r in join.rows] == ["1", "5", "2"] and not join.renamed and not join.differing
    assert join.numbers[1] == {"5": "5", "2": "2"}


def test_a_taken_number_is_changed_and_said():
    join = join_optics([[group("1", "a")], [group("1", "b"), group("2", "a")]], ["x", "y"])
    assert join.numbers[1] == {"1": "3", "2": "1"}  # 2 is used in the file itself: it is not handed out
    assert len(join.renamed) == 2 and "y: optics group 1 (b) is number 3" in join.renamed[0]


def test_groups_of_one_name_and_other_settings_stay_apart():
    join = join_optics([[group("1", "a", "1.0", rlnVoltage="300")], [group("1", "a", "1.2", rlnVoltage="300")]], ["x", "y"])
    assert [r["rlnOpticsGroupName"] for r in join.rows] == ["a", "a_2"] and join.numbers[1] == {"1": "2"}
    assert "y: optics group a has other settings" in join.differing[0]


def test_statistics_of_images(rng):
    images = 3 + 2 * torch.randn(4, 32, 32, generator=rng)
    mean, sd = image_statistics(images)
    assert torch.allclose(mean, images.double().mean((1, 2))) and torch.allclose(sd, images.double().std((1, 2), correction=0))


def test_lists_of_numbers():
    assert numbers_of("1,4-6, 9", 9).tolist() == [1, 4, 5, 6, 9]
    wrong = (("0", "1 to 9"), ("3-12", "1 to 9"), ("a", "not a number"), ("5-3", "1 to 9"), (",", "no number"), ("2-x", "range"))
    for text, expected in wrong:
        with pytest.raises(ValueError, match=expected):
            numbers_of(text, 9)
