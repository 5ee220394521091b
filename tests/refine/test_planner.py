"""The planner's table: volumes by hand, and what fits a budget."""

from __future__ import annotations

from frazil.refine.planner import Shape, make_plan, table


def test_volumes_are_what_they_weigh() -> None:
    """400 px padded twice: half volumes of 805 × 805 × 403 voxels, reference and data complex64, weight float32."""
    plan = make_plan(Shape(400, 400, 2.0, 1, 60000, 84, 32, 4, True), 6_000_000_000)
    m = 401
    assert plan.fixed == (2 * m + 1) ** 2 * (m + 1) * 20
    assert plan.fixed + plan.working <= 6_000_000_000


def test_more_memory_means_larger_batches_and_less_is_never_nothing() -> None:
    shape = Shape(256, 256, 2.0, 1, 25000, 84, 32, 4, True)
    small, large = make_plan(shape, 1 << 30), make_plan(shape, 16 << 30)
    assert large.images > small.images >= 1 and large.slices > small.slices
    assert make_plan(shape, 1 << 30, shrink=16).images >= 1


def test_the_table_grows_with_the_box() -> None:
    rows = table(6_000_000_000)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(a[1] < b[1] for a, b in zip(rows, rows[1:], strict=False))
