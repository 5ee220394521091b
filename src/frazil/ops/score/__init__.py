"""Log-likelihoods of the children of chosen samples: the fine pass (spec/refinement 2.6).

An *entry* is a significant coarse sample: orientation, image, coarse shift. All its children are scored: C orientations × c shifts,

    value[e, j, u] = Re Σ_p conj(S[o_e C + j, p]) Y[i_e, p] E[p, s_e c + u]  −  Σ_p |S[o_e C + j, p]|² Q[i_e, p]  +  log_prior[e]

README.md says why this is not a dense product on a CPU, and is one on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from frazil.ops.dispatch import pick


def score(
    slices: Tensor, orientation: Tensor, image: Tensor, shift: Tensor, log_prior: Tensor, images: Tensor, power: Tensor, phases: Tensor,
    *, children: tuple[int, int], cc: bool = False, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """(n, C, c) real values of n entries, see the module.

    slices S (orientations·C, p) complex, the C children of an orientation consecutive; orientation (n,) int64 non-decreasing; image, shift
    (n,) int64; log_prior (n,); images Y, power Q (b, p); phases E (p, shifts·c) complex; children = (C, c). Entries of the same orientation
    and image should be consecutive (they share the work). cc: cross / sqrt(power) + log_prior. Raises ValueError for what does not fit.
    """
    n_o, p = len(slices) // children[0], slices.shape[1]
    n, b, n_t = len(orientation), len(images), phases.shape[1] // children[1]
    if len(slices) % children[0] or phases.shape != (p, n_t * children[1]) or images.shape != (b, p) or power.shape != (b, p):
        raise ValueError(
            f"score: slices {tuple(slices.shape)}, images {tuple(images.shape)}, phases {tuple(phases.shape)} do not fit {children}"
        )
    if not (len(image) == len(shift) == len(log_prior) == n):
        raise ValueError(
            f"score: {n} orientations, {len(image)} images, {len(shift)} shifts, {len(log_prior)} priors; expected equally many"
        )
    if n == 0:
        return power.new_zeros(0, *children)
    if slices.device.type == "cpu":
        for name, index, size in (("orientation", orientation, n_o), ("image", image, b), ("shift", shift, n_t)):
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise ValueError(f"score: {name} must lie in [0, {size})")
        if bool((orientation[1:] < orientation[:-1]).any()):
            raise ValueError("score: orientation must not decrease")
    args = (slices, orientation, image, shift, log_prior, images, power, phases, children, cc)
    match pick(slices, implementation, op="score"):
        case "cpu":
            from .cpu import score as run
        case "triton":
            from .dense import score as run
        case _:
            from .reference import score as run
    return run(*args)
