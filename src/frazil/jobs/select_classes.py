"""Classes of `frazil select`: the run they are of, their averages, scores with reasons, and the files about those that stay."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from frazil.data import BadInput
from frazil.io.files import below_here
from frazil.io.images import find_stack, split_image_name
from frazil.io.mrc import read_header, read_mrc
from frazil.io.star import Star, read_star, write_star
from frazil.jobs.plots import Array, new_figure, styled
from frazil.maths.class_features import NAMES, ClassFacts, class_features
from frazil.steps.rank import rank, reasons

REFERENCE, SHARE = "rlnReferenceImage", "rlnClassDistribution"
COLUMNS, CELL, MOST = 10, 1.15, 200  # of the sheet


@dataclass(frozen=True)
class Classification:
    """Files of one iteration of a classification."""

    data: Path
    model: Path | None
    optimiser: Path | None


@dataclass(frozen=True)
class Ranked:
    """Classes and what they score; everything has length K."""

    model: Path
    star: Star
    averages: Tensor  # (K, N, N)
    pixel_size: float  # Å
    diameter: float  # Å
    score: Tensor
    features: Tensor  # (K, features)
    terms: Tensor  # (K, features)


def find_classification(path: Path) -> Classification | None:
    """The data, model and optimiser files that belong to a run directory, optimiser.star, model.star or data.star; None for other files."""
    if path.is_dir():
        models = [p for p in path.glob("run*_model.star") if re.fullmatch(r"run(_it\d+)?_model\.star", p.name)]
        if not models:
            raise BadInput(f"{path}: holds no run_itNNN_model.star; expected the directory of a classification, or a STAR file")
        path = max(models, key=lambda p: int((re.search(r"it(\d+)", p.name) or ["", "999999"])[1]))
    found = re.fullmatch(r"(.*?)_(optimiser|model|data)\.star", path.name)
    if not found:
        return None
    files = {kind: path.with_name(f"{found[1]}_{kind}.star") for kind in ("data", "model", "optimiser")}
    if not files["model"].exists() and found[1] == "run":  # run_data.star is that of the last iteration
        last = sorted(path.parent.glob("run_it*_model.star"), key=lambda p: int((re.search(r"it(\d+)", p.name) or ["", "0"])[1]))
        if last:
            stem = last[-1].name.removesuffix("_model.star")
            files |= {kind: path.with_name(f"{stem}_{kind}.star") for kind in ("model", "optimiser")}
    there = {kind: file if file.exists() else None for kind, file in files.items()}
    if there["data"] is None:
        raise BadInput(f"{files['data']}: no such file; it lists the particles of {path.name}")
    return Classification(there["data"], there["model"], there["optimiser"])


def class_numbers(star: Star, model: Path) -> pd.DataFrame:
    """data_model_classes of a model file."""
    table = star.get("model_classes")
    if not isinstance(table, pd.DataFrame) or REFERENCE not in table:
        raise BadInput(f"{model}: has no data_model_classes with _{REFERENCE}; expected the model.star of a classification")
    return table


def rank_classes(files: Classification, source: Path, diameter: float | None) -> Ranked:
    """Scores of the classes of a 2D classification. Raises BadInput where the model, the averages or the diameter are missing."""
    if files.model is None:
        raise BadInput(f"{source}: no run_itNNN_model.star beside it; scores need the averages: give the directory of the class2d run")
    star = read_star(files.model)
    table = class_numbers(star, files.model)
    if diameter is None:
        general = read_star(files.optimiser).get("optimiser_general") if files.optimiser else None
        found = general.get("rlnParticleDiameter") if isinstance(general, dict) else None
        if found is None or float(found) <= 0:
            raise BadInput(f"{files.model}: no rlnParticleDiameter in an optimiser.star beside it; give --diameter")
        diameter = float(found)
    averages, size = read_averages(table, files.model)
    general = star.get("model_general")
    size = size or float(general["rlnPixelSize"] if isinstance(general, dict) else 0)
    if size <= 0:
        raise BadInput(f"{files.model}: neither it nor its averages give a pixel size")
    number = lambda label, default: torch.tensor(  # noqa: E731
        np.asarray(table[label], dtype=float) if label in table else np.full(len(table), default))  # fmt: skip
    resolution, share = number("rlnEstimatedResolution", 10 * diameter), number(SHARE, 1 / len(table))
    facts = ClassFacts(resolution, share, number("rlnAccuracyRotations", 999.0))
    features = class_features(averages, size, diameter, facts)
    score, terms = rank(features)
    return Ranked(files.model, star, averages, size, diameter, score, features, terms)


def read_averages(table: pd.DataFrame, model: Path) -> tuple[Tensor, float]:
    """((K, N, N) averages in the order of the table, pixel size or 0)."""
    names = [str(name) for name in table[REFERENCE]]
    stacks: dict[str, tuple[Tensor, float]] = {}
    out = []
    for name in names:
        slot, stack = split_image_name(name)
        if stack not in stacks:
            found = find_stack(stack, model) or find_stack(Path(stack).name, model)
            if found is None:
                raise BadInput(f"{model}: its averages {stack} are nowhere; give the folder of the project as current folder")
            if stack == name and read_header(found).shape[0] > 1:
                raise BadInput(f"{model}: its classes are maps ({stack}); scores are for averages of a 2D classification")
            volume = read_mrc(found)
            stacks[stack] = (volume.data, volume.pixel_size)
        images, _ = stacks[stack]
        if not 1 <= slot <= len(images):
            raise BadInput(f"{model}: {name}: the stack holds images 1 to {len(images)}")
        out.append(images[slot - 1])
    return torch.stack(out), next(iter(stacks.values()))[1]


def write_averages(folder: Path, star: Star, model: Path, kept: Array, ranked: Ranked | None) -> None:
    """class_averages.star: the classes that stay, numbered as they were, their images as references (templates) where they lie."""
    table = class_numbers(star, model).copy()
    table.insert(0, "rlnClassNumber", np.arange(1, len(table) + 1))
    if ranked is not None:
        table["rlnClassScore"] = ranked.score.numpy().round(6)
    table[REFERENCE] = [in_full(str(name), model) for name in table[REFERENCE]]
    write_star(folder / "class_averages.star", {"": table.iloc[np.flatnonzero(kept)].reset_index(drop=True)})


def in_full(name: str, model: Path) -> str:
    """The name of an average so that it is found from the current folder."""
    number, mark, stack = name.rpartition("@")
    found = Path(stack) if Path(stack).is_file() else find_stack(stack, model) or find_stack(Path(stack).name, model)
    return f"{number}{mark}{stack if found is None else below_here(found)}"


def write_ranks(folder: Path, ranked: Ranked, files: Classification) -> None:
    """rank_model.star (the model with rlnClassScore, and the features behind it) and rank_optimiser.star that points to it."""
    classes = class_numbers(ranked.star, ranked.model).copy()
    classes["rlnClassScore"] = ranked.score.numpy().round(6)
    features = pd.DataFrame({"rlnClassNumber": np.arange(1, len(classes) + 1), "rlnClassScore": ranked.score.numpy().round(6)})
    for j, name in enumerate(NAMES):
        features[f"frazil{name.capitalize()}"] = np.nan_to_num(ranked.features[:, j].numpy()).round(4)
        features[f"frazil{name.capitalize()}Term"] = ranked.terms[:, j].numpy().round(4)
    features["frazilReasons"] = [reasons(t) or "nothing stands out" for t in ranked.terms]
    write_star(folder / "rank_model.star", {**ranked.star, "model_classes": classes})
    write_star(folder / "rank_features.star", {"class_features": features})
    if files.optimiser:
        optimiser = read_star(files.optimiser)
        general = optimiser.get("optimiser_general")
        if isinstance(general, dict):
            pointed = {**general, "rlnModelStarFile": str(below_here(folder / "rank_model.star"))}
            write_star(folder / "rank_optimiser.star", {**optimiser, "optimiser_general": pointed})


@styled
def plot_ranked(averages: Array, titles: Sequence[str], kept: Array, order: Sequence[int]) -> Figure:
    """A sheet of averages in an order, those that stay framed."""
    order = list(order)[:MOST]
    columns = min(COLUMNS, len(order))
    rows = -(-len(order) // columns)
    figure, axes = new_figure(columns * CELL, rows * (CELL + 0.28), rows, columns)
    for place, ax in enumerate(axes.flat):
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        if place >= len(order):
            ax.set_axis_off()
            continue
        k = order[place]
        low, high = np.percentile(averages[k], [1, 99.8])
        ax.imshow(averages[k], cmap="gray", vmin=low, vmax=max(high, low + 1e-12), origin="lower", interpolation="bicubic")
        ax.set_title(titles[k], fontsize=6.5, loc="center", weight="normal", pad=2)
        for spine in ax.spines.values():
            spine.set_visible(True)
            spine.set_color("#2a9d55" if kept[k] else "#b0b7c0")
            spine.set_linewidth(2.5 if kept[k] else 0.6)
    return figure
