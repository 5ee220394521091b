"""From stored images to what is transformed: normalised, moved by whole pixels, masked (spec/refinement 1.4, 1.6, 2.4)."""
from __future__ import annotations

from torch import Tensor

from frazil.ops.dispatch import pick


def prepare(images: Tensor, shift: Tensor, factor: Tensor, circle: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """(plain, masked), each (b, N, N) in the type of `factor`.

        plain[i, y, x]  = factor[i] · images[i, y − shift_y, x − shift_x], 0 where nothing comes in
        masked          = circle · plain + (1 − circle) · fill,   fill[i] = Σ (1 − circle) plain[i] / Σ (1 − circle)

    images (b, N, N) float16, float32 or float64; shift (b, 2) int64, x and y; factor (b,) float32 or float64; circle (N, N) of its type.
    Raises ValueError for shapes or types that do not fit.
    """
    b, n = len(images), images.shape[-1]
    if images.shape != (b, n, n) or shift.shape != (b, 2) or factor.shape != (b,) or circle.shape != (n, n) or circle.dtype != factor.dtype:
        raise ValueError(f"prepare: images {tuple(images.shape)}, shift {tuple(shift.shape)}, factor {tuple(factor.shape)} {factor.dtype}, "
                         f"circle {tuple(circle.shape)} {circle.dtype} do not fit")  # fmt: skip
    if shift.is_floating_point() or not images.is_floating_point() or len({t.device for t in (images, shift, factor, circle)}) > 1:
        raise ValueError("prepare: images must be float and shifts int64, all on one device")
    if pick(images, implementation, op="prepare") == "triton":
        from .triton import prepare as run
    else:
        from .reference import prepare as run
    return run(images, shift, factor, circle)
