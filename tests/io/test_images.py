"""The lazy reader of particle stacks."""

from __future__ import annotations

import os
import re

import mrcfile
import numpy as np
import pytest
import torch

from frazil.data import BadInput
from frazil.io.images import StackImages, find_bad, find_stack, write_stack


def make_set(folder, dtypes=("float32", "float32", "float32"), side=6, seed=0):
    """Stacks s0.mrcs (5 images), s1.mrcs (6), …; names of all images in shuffled order, and their pixels."""
    rng = np.random.default_rng(seed)
    names, pixels = [], []
    for k, dtype in enumerate(dtypes):
        data = (rng.standard_normal((5 + k, side, side)) * 20).astype(dtype)
        with mrcfile.new(folder / f"s{k}.mrcs", overwrite=True) as file:
            file.set_data(data)  # keeps the byte order
            file.set_image_stack()
        names += [f"{i + 1:06d}@s{k}.mrcs" for i in range(len(data))]
        pixels += list(data.astype(np.float32))
    order = rng.permutation(len(names))
    return [names[i] for i in order], torch.from_numpy(np.stack(pixels)[order])


@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["from disk", "cached"])
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 3, ("float16",) * 3, ("float32", "float16", "int8"), ("uint16", ">f4", "int16")], ids=lambda d: "-".join(d)
)
def test_images_come_in_the_order_asked_for(tmp_path, dtypes, budget):
    names, truth = make_set(tmp_path, dtypes)
    images = StackImages(names, star=tmp_path / "p.star", boxes=6, memory_budget=budget, threads=3)
    rng = np.random.default_rng(1)
    for _ in range(4):
        index = torch.from_numpy(rng.integers(0, len(names), 11))  # with repetitions
        got = images[index]
        assert got.dtype == torch.float32 and torch.equal(got, truth[index])
    assert torch.equal(images[torch.arange(len(names))], truth)
    assert torch.equal(images[torch.arange(len(names)) % 2 == 0], truth[::2])
    assert images[torch.zeros(0, dtype=torch.int64)].shape[0] == 0
    assert images.cached == (budget > 0) and len(images) == len(truth)


def test_a_batch_is_a_copy(tmp_path):
    names, truth = make_set(tmp_path)
    images = StackImages(names, star=tmp_path / "p.star", memory_budget=1 << 20)
    images[torch.arange(3)].zero_()
    assert torch.equal(images[torch.arange(3)], truth[:3])


def test_long_runs_need_several_reads(tmp_path):
    data = torch.arange(1500 * 4, dtype=torch.float32).reshape(1500, 2, 2)
    write_stack(tmp_path / "long.mrcs", data, 1.0)
    images = StackImages([f"{i + 1}@long.mrcs" for i in range(1500)], star=tmp_path / "p.star")
    assert torch.equal(images[torch.arange(1500)], data)


def test_a_read_that_stops_early_goes_on(tmp_path, monkeypatch):
    names, truth = make_set(tmp_path)
    real = os.preadv

    def stingy(handle, buffers, offset):
        return real(handle, [memoryview(buffers[0])[:37]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    assert torch.equal(StackImages(names, star=tmp_path / "p.star")[torch.arange(len(names))], truth)


def test_memory_is_counted_before_it_is_taken(tmp_path):
    names, _ = make_set(tmp_path, ("float16",) * 3)
    n = len(names)
    images = StackImages(names, star=tmp_path / "p.star", memory_budget=n * 36 * 2 - 1)
    assert images.half_precision and images.bytes_in_memory == n * 36 * 2 and not images.cached
    assert StackImages(names, star=tmp_path / "p.star", memory_budget=n * 36 * 2).cached
    names, _ = make_set(tmp_path, ("float16", "float32"))
    assert not StackImages(names, star=tmp_path / "p.star").half_precision


def test_two_boxes_live_in_one_set(tmp_path):
    write_stack(tmp_path / "a.mrcs", torch.ones(3, 4, 4), 1.0)
    write_stack(tmp_path / "b.mrcs", torch.full((3, 8, 8), 2.0), 1.0)
    names = ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs", "3@b.mrcs"]
    images = StackImages(names, star=tmp_path / "p.star", boxes=[4, 8, 4, 8], memory_budget=1 << 20)
    assert torch.equal(images[torch.tensor([2, 0])], torch.ones(2, 4, 4)) and images[torch.tensor([3])].shape == (1, 8, 8)
    assert images.boxes.tolist() == [4, 8, 4, 8]
    with pytest.raises(ValueError, match="one box"):
        images[torch.tensor([0, 1])]


def test_stacks_are_found_beside_the_star_in_the_project_and_above(tmp_path, monkeypatch):
    job = tmp_path / "project" / "Extract" / "job009"
    job.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    star, stack = job / "particles.star", "Extract/job009/s.mrcs"
    assert find_stack(stack, star) is None
    write_stack(job / "s.mrcs", torch.ones(1, 4, 4), 1.0)
    assert find_stack(stack, star).samefile(job / "s.mrcs")  # a folder above the STAR file
    assert find_stack(stack) is None and find_stack(stack, None, tmp_path / "project").samefile(job / "s.mrcs")
    (job / "Extract" / "job009").mkdir(parents=True)
    write_stack(job / stack, torch.ones(1, 4, 4), 1.0)
    assert find_stack(stack, star).samefile(job / stack)  # beside it goes first


def check_fails(tmp_path, names, pattern, **options):
    with pytest.raises(BadInput, match=pattern) as caught:
        StackImages(names, star=tmp_path / "p.star", **options).check()
    assert "\n" not in str(caught.value)


def test_check_names_the_first_problem_and_counts_them(tmp_path):
    names, _ = make_set(tmp_path)
    StackImages(names, star=tmp_path / "p.star", boxes=6).check()
    star = re.escape(str(tmp_path / "p.star"))
    check_fails(tmp_path, [*names, "000006@s0.mrcs"], rf"^{star}: row 19: 000006@s0.mrcs: image 6 is out of range: .* 1 to 5$")
    check_fails(tmp_path, ["000000@s0.mrcs"], "image 0 is out of range")
    check_fails(tmp_path, ["x@s0.mrcs"], "row 1: x@s0.mrcs: expected rlnImageName as index@stack")
    check_fails(tmp_path, names, r"images are 6 px, .* rlnImageSize 8 \(18 rows in 3 stacks", boxes=8)
    check_fails(tmp_path, [names[0], "1@gone.mrcs", "2@gone.mrcs"], r"row 2: 1@gone.mrcs: stack gone.mrcs not found .*\(2 rows in 1 stacks")
    whole = (tmp_path / "s1.mrcs").read_bytes()
    (tmp_path / "s1.mrcs").write_bytes(whole[:-100])
    check_fails(tmp_path, names, r"s1.mrcs: truncated: .* 6 sections, the file holds 5.3.*\(6 rows in 1 stacks")
    (tmp_path / "s1.mrcs").write_bytes(b"not an mrc file" * 100)
    check_fails(tmp_path, names, r"s1.mrcs: is not an MRC file")
    with mrcfile.new(tmp_path / "s1.mrcs", overwrite=True) as file:
        file.set_data(np.zeros((6, 6, 8), np.float32))
    check_fails(tmp_path, names, r"8 x 6 px; expected square")


def test_the_first_access_checks_too(tmp_path):
    with pytest.raises(BadInput, match="row 1: 1@gone.mrcs"):
        StackImages(["1@gone.mrcs"], star=tmp_path / "p.star")[torch.tensor([0])]


def test_a_stack_cut_short_meanwhile_is_named(tmp_path):
    names, _ = make_set(tmp_path)
    images = StackImages(names, star=tmp_path / "p.star")
    images.check()
    os.truncate(tmp_path / "s2.mrcs", 1024)
    with pytest.raises(BadInput, match="s2.mrcs: ends before image"):
        images[torch.arange(len(names))]
    os.remove(tmp_path / "s2.mrcs")
    with pytest.raises(BadInput, match="s2.mrcs: cannot be read"):
        images[torch.arange(len(names))]


@pytest.mark.filterwarnings("ignore:Data array contains")  # mrcfile says so too
def test_bad_images_are_found(tmp_path):
    data = torch.randn(40, 4, 4, generator=torch.Generator().manual_seed(0))
    data[3, 1, 2] = float("nan")
    data[17, 0, 0] = float("inf")
    data[20] = 0.25
    write_stack(tmp_path / "s.mrcs", data, 1.0)
    images = StackImages([f"{i + 1}@s.mrcs" for i in range(40)], star=tmp_path / "p.star")
    not_finite, constant = find_bad(images, torch.arange(40), chunk=7)
    assert not_finite.tolist() == [3, 17] and constant.tolist() == [20]
    not_finite, constant = find_bad(images, torch.arange(18, 40), group=torch.arange(22) % 2, chunk=4)
    assert not_finite.tolist() == [] and constant.tolist() == [20]


def test_real_stacks(shared_data):
    star = shared_data / "betagal_10204" / "particles.star"
    names = [f"{i + 1:06d}@stacks/20170629_00028_frameImage.mrcs" for i in range(259)]
    images = StackImages(names, star=star, boxes=64, memory_budget=1 << 30)
    with mrcfile.open(star.parent / "stacks" / "20170629_00028_frameImage.mrcs") as file:
        assert torch.equal(images[torch.tensor([258, 0])], torch.from_numpy(file.data[[258, 0]].astype(np.float32)))
    assert images.half_precision and images.bytes_in_memory == 259 * 64 * 64 * 2
