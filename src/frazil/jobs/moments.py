"""The momenta of a gradient run as RELION keeps them: run_itNNN_1moment.mrcs and _2moment.mrcs (spec/refinement 5.2, 8.1, 8.3).

An image holds a centred half plane (2M+1, M+1) of the padded grid, real and imaginary parts side by side: 2M+1 rows of 2(M+1) numbers.
First moments: class k of pseudo-half 1 at k, that of half 2 at k + K. Second moments are real, their imaginary parts 0.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from frazil.data import BadInput
from frazil.io.mrc import write_mrc
from frazil.io.star import read_star
from frazil.jobs.refine_files import read_references
from frazil.refine.gradient import Moments

LABELS = ("rlnGradMoment1", "rlnGradMoment2")  # columns of model_classes


def write_moments(folder: Path, root: str, moments: Moments, pixel_size: float) -> dict[str, list[str]]:
    """Write both stacks; returns the columns of model_classes that name them (of the first moment the image of half 1)."""
    first, second = moments.first.flatten(0, 1), torch.complex(moments.second, torch.zeros_like(moments.second))
    columns = {}
    for label, name, planes in zip(LABELS, ("1moment", "2moment"), (first, second), strict=True):
        path = folder / f"{root}_{name}.mrcs"
        write_mrc(path, torch.view_as_real(planes.cpu()).flatten(-2), pixel_size, stack=True)
        columns[label] = [f"{k + 1:06d}@{path}" for k in range(len(moments.second))]
    return columns


def read_moments(model: Path, folder: Path, m: int, begun: bool) -> Moments | None:
    """The momenta that a model.star names, half planes of radius m; None where it names none. Raises BadInput where they do not fit."""
    classes = read_star(model)["model_classes"]
    if not all(label in classes for label in LABELS):
        return None
    named = [[str(name) for name in classes[label]] for label in LABELS]
    if any("@" not in name for name in sum(named, [])):
        raise BadInput(f"{model}: momenta that are no images of a stack (number@stack) cannot be read; give --method em")
    k = len(named[0])
    other = [f"{int(name.split('@')[0]) + k:06d}@{name.split('@', 1)[1]}" for name in named[0]]
    first, second = (_planes(model, folder, names, m) for names in (named[0] + other, named[1]))
    return Moments(first.unflatten(0, (2, k)), second.real.contiguous(), begun)


def _planes(model: Path, folder: Path, names: list[str], m: int) -> Tensor:
    """(n, 2m+1, m+1) complex half planes of a stack."""
    try:
        images = torch.stack(read_references(model, folder, names))
    except IndexError:
        stack = names[0].split("@", 1)[1]
        raise BadInput(f"{stack}: holds fewer momenta than {model} has classes; both are not of one iteration") from None
    if images.shape[1:] != (2 * m + 1, 2 * m + 2):
        size, stack = f"{images.shape[2]} x {images.shape[1]}", names[0].split("@", 1)[1]
        raise BadInput(f"{stack}: momenta of {size} px, expected {2 * m + 2} x {2 * m + 1}; leave --pad as it was, or give --method em")
    return torch.view_as_complex(images.unflatten(-1, (m + 1, 2)).contiguous())
