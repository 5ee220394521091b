"""`frazil select`: some rows of particles or micrographs, by class, score, value, image, distance; joined, grouped, split."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from torch import Tensor

from frazil.data import BadInput
from frazil.io.coordinates import NAME
from frazil.io.images import StackImages, find_stack
from frazil.io.micrographs import read_micrograph
from frazil.io.star import read_star, write_star
from frazil.jobs.run import Run
from frazil.jobs.select_classes import Classification, Ranked, class_numbers, find_classification, rank_classes, write_averages, write_ranks
from frazil.jobs.select_report import write_report
from frazil.jobs.select_tables import IMAGE, PIXELS, Table, join_tables, pixel_label, places, read_table, write_table
from frazil.steps.rank import chosen
from frazil.steps.select import group_micrographs, image_statistics, in_range, numbers_of, split_rows, within_spread, without_copies

POSITIONAL = ("files",)
HAS_RUN_DIRECTORY = True
EXPERT: JsonDict = {"level": "expert"}
ANGSTROM: JsonDict = {"unit": "Å"}
CLASS = "rlnClassNumber"
AT_ONCE = 512  # images read at a time


class Params(BaseModel):
    """Choose rows of particles or micrographs. Filters given together are applied in the order listed here."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    files: tuple[Path, ...] = Field(description="STAR files of particles or micrographs, several are joined; or one classification: its "
                                    "directory, or its optimiser, model or data file", min_length=1)  # fmt: skip
    classes: str | None = Field(None, description="classes that stay, such as 1,4-7,12")
    drop_classes: str | None = Field(None, description="classes that go")
    min_score: float | None = Field(None, ge=0, le=1, description="least score of a 2D class that stays; 0.5 is a fair limit")
    rank: bool = Field(False, description="score the classes of a 2D classification, whether or not --min-score chooses by it")
    min_particles: int = Field(0, ge=0, description="with --min-score: take worse classes too until there are so many particles",
                               json_schema_extra=EXPERT)  # fmt: skip
    min_classes: int = Field(0, ge=0, description="the same for the number of classes", json_schema_extra=EXPERT)
    diameter: float | None = Field(None, gt=0, description="of the particle, for scores; from optimiser.star if not given",
                                   json_schema_extra={**EXPERT, **ANGSTROM})  # fmt: skip
    range: tuple[str, ...] = Field((), description="label and limits, either of which may be left out: rlnCtfMaxResolution::5, "
                                   "rlnDefocusU:5000:20000")  # fmt: skip
    image_sigma: float | None = Field(None, gt=0, description="discard images whose mean or standard deviation is farther than so many "
                                      "standard deviations from the usual; 4 is a fair limit")  # fmt: skip
    min_distance: float | None = Field(None, gt=0, description="of particles of a micrograph nearer than this only the best stays; 30 is "
                                       "a fair distance", json_schema_extra=ANGSTROM)  # fmt: skip
    regroup: int = Field(0, ge=0, description="join micrographs into so many groups of like scale (or defocus), as rlnGroupName")
    split_size: int = Field(0, ge=0, description="write parts of so many rows")
    splits: int = Field(0, ge=0, description="write so many parts")
    random_order: bool = Field(False, description="split at random, not in the order of the rows")

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        """Something to do, and nothing that contradicts it."""
        given = (self.classes, self.drop_classes, self.min_score, self.image_sigma, self.min_distance)
        work = any(g is not None for g in given) or self.rank or self.range or self.regroup or self.split_size or self.splits
        if not work and len(self.files) == 1:
            raise ValueError("nothing to select by; give --classes, --min-score, --range, --image-sigma, --min-distance, --splits, …")
        if (self.min_particles or self.min_classes) and self.min_score is None:
            raise ValueError("--min-particles and --min-classes need --min-score")
        if self.classes is not None and self.min_score is not None:
            raise ValueError("give one of --classes and --min-score")
        if (self.classes or self.drop_classes or self.min_score is not None or self.rank) and len(self.files) > 1:
            raise ValueError("classes are of one classification: select from each file, then join")
        for item in self.range:
            parse_range(item)
        return self


def run(params: Params, run: Run) -> None:
    """Filter, join, split and write."""
    of_classes = params.rank or params.min_score is not None or params.classes is not None or params.drop_classes is not None
    alone = of_classes or (len(params.files) == 1 and params.files[0].is_dir())
    files = find_classification(params.files[0]) if alone else None
    table = joined(params, files, run)
    start, steps = len(table), []
    scored = params.rank or params.min_score is not None
    ranked = rank_classes(files or missing(params.files[0]), params.files[0], params.diameter) if scored else None
    kept_classes = None
    if of_classes:
        table, kept_classes = by_class(params, table, files, ranked, run)
        note(run, steps, "by class", start, table)
    for item in params.range:
        label, low, high = parse_range(item)
        before, values = len(table), table.numbers(label)
        table = table.keep(in_range(values, low, high))
        note(run, steps, f"{label} from {'any' if low is None else f'{low:g}'} to {'any' if high is None else f'{high:g}'}", before, table)
    if params.image_sigma is not None:
        before = len(table)
        table = by_image(table, params.image_sigma, run)
        note(run, steps, f"mean and sd of the image within {params.image_sigma:g} sd", before, table)
    if params.min_distance is not None:
        before = len(table)
        if (label := pixel_label(table)) != PIXELS[0]:
            run.note(f"{table.path} has no _{PIXELS[0]}: coordinates are taken as px of _{label}")
        table = table.keep(without_copies(*places(table), params.min_distance))
        note(run, steps, f"no copies within {params.min_distance:g} Å", before, table)
    if not len(table):
        raise BadInput(f"{params.files[0]}: nothing is left of {start} {table.kind} after: {'; '.join(steps)}")
    if params.regroup:
        table = regrouped(table, params.regroup, files, run)
    split = parts_of(params, table, run.seed)
    path = run.path / f"{table.kind}.star"
    write_table(path, table)
    parts = write_parts(split, table, run)
    if files and files.model and kept_classes is not None:
        write_averages(run.path, read_star(files.model), files.model, kept_classes, ranked)
    if ranked and files:
        write_ranks(run.path, ranked, files)
    write_report(run, start, len(table), table.kind, steps, ranked, kept_classes)
    run.event("selected", rows=len(table), of=start, parts=len(parts))
    run.summary(f"{len(table)} of {start} {table.kind}: {path}", *parts)


def data_of(path: Path) -> Path:
    """The file itself, or the data of the classification in a directory."""
    found = find_classification(path) if path.is_dir() else None
    return path if found is None else found.data


def missing(path: Path) -> Classification:
    """Raises BadInput: no classification belongs to a file."""
    raise BadInput(f"{path}: scores need a classification; give its directory, or its optimiser, model or data file")


def note(run: Run, steps: list[str], what: str, before: int, table: Table) -> None:
    """Remember and tell what a filter left."""
    steps.append(f"{what}: {len(table)} of {before}")
    run.note(steps[-1])


def parse_range(item: str) -> tuple[str, float | None, float | None]:
    """(label, low, high) of LABEL:LOW:HIGH. Raises ValueError otherwise."""
    parts = item.split(":")
    try:
        label, low, high = parts[0].removeprefix("_"), *(float(p) if p.strip() else None for p in parts[1:])
    except ValueError:
        raise ValueError(f"--range {item}: expected LABEL:LOW:HIGH, like rlnCtfMaxResolution::5") from None
    if not label or (low is None and high is None) or (low is not None and high is not None and low > high):
        raise ValueError(f"--range {item}: expected LABEL:LOW:HIGH with at least one limit, the lower first")
    return label, low, high


def joined(params: Params, files: Classification | None, run: Run) -> Table:
    """The table to select from."""
    paths = [files.data] if files else [data_of(path) for path in params.files]
    tables = [read_table(path) for path in paths]
    if len(tables) == 1:
        return tables[0]
    found = join_tables(tables)
    for line in found.notes:
        run.note(line)
    for line in found.warnings:
        run.warn(line)
    if found.renumbered is not None:
        labels = {"file": "frazilFile", "old": "frazilOldOpticsGroup", "new": "rlnOpticsGroup"}
        write_star(run.path / "optics_groups.star", {"optics_groups": found.renumbered.rename(columns=labels)})
        run.warn("optics groups were renumbered, as they had to be: optics_groups.star lists old and new numbers of every file")
    return found.table


def by_class(
    params: Params, table: Table, files: Classification | None, ranked: Ranked | None, run: Run
) -> tuple[Table, np.ndarray]:  # fmt: skip
    """The rows whose class stays, and (K,) bool which do."""
    if CLASS not in table.rows:
        raise BadInput(f"{table.path}: has no label _{CLASS}; expected the data of a classification")
    klass = torch.nan_to_num(table.numbers(CLASS)).long()
    if files and files.model:
        count = len(class_numbers(read_star(files.model), files.model))
    else:
        count = int(klass.max())
    if int(klass.max()) > count:
        held = f"{files.model if files else 'the model'} has {count}"
        raise BadInput(f"{table.path}: class {int(klass.max())}, but {held}; are they of one run?")
    held = torch.bincount(klass.clamp(min=0), minlength=count + 1)[1:]
    try:
        if params.classes is not None:
            kept = torch.zeros(count, dtype=torch.bool)
            kept[torch.from_numpy(numbers_of(params.classes, count)) - 1] = True
        elif params.min_score is not None and ranked is not None:
            kept = chosen(ranked.score, held, params.min_score, params.min_particles, params.min_classes)
            lowered = kept & (ranked.score < params.min_score)
            if bool(lowered.any()):
                run.note(f"{int(lowered.sum())} classes below --min-score are taken for --min-particles or --min-classes")
        else:
            kept = torch.ones(count, dtype=torch.bool)
        if params.drop_classes is not None:
            kept[torch.from_numpy(numbers_of(params.drop_classes, count)) - 1] = False
    except ValueError as error:
        raise BadInput(f"--classes: {error}" if params.classes else f"--drop-classes: {error}") from None
    if params.rank and params.classes is None and params.min_score is None and params.drop_classes is None:
        return table, kept.numpy()
    if not bool(kept.any()):
        best = "" if ranked is None else f"; the best score is {float(ranked.score.max()):.2f}"
        raise BadInput(f"{table.path}: no class is left{best}")
    inside = (klass > 0) & kept[(klass - 1).clamp(min=0)]
    return table.keep(inside), kept.numpy()


def by_image(table: Table, sigma: float, run: Run) -> Table:
    """The rows whose image has a usual mean and standard deviation; optics groups are judged apart. Unreadable micrographs go."""
    n = len(table)
    mean, sd = (torch.full((n,), torch.nan, dtype=torch.float64) for _ in range(2))
    if table.kind == "particles":
        images = StackImages(table.rows[IMAGE].tolist(), table.path, threads=min(4, run.threads))
        images.check()
        boxes = images.boxes
        for side in boxes.unique().tolist():
            for part in torch.nonzero(boxes == side)[:, 0].split(AT_ONCE):
                mean[part], sd[part] = image_statistics(images[part])
                run.progress(int(part[-1]) + 1, n, "image statistics")
                run.check_stop()
    elif table.kind == "micrographs":
        for i, name in enumerate(table.rows[NAME]):
            found = Path(name) if Path(name).is_file() else find_stack(name, table.path)
            try:
                if found is None:
                    raise BadInput(f"{name}: no such file")
                mean[i : i + 1], sd[i : i + 1] = image_statistics(read_micrograph(found).float()[None])
            except BadInput as error:
                run.warn(f"left out: {error}")
            run.progress(i + 1, n, "image statistics")
            run.check_stop()
    else:
        raise BadInput(f"{table.path}: --image-sigma is for particles and micrographs, not for {table.kind}")
    kept = torch.zeros(n, dtype=torch.bool)
    group = pd.factorize(table.rows["rlnOpticsGroup"])[0] if "rlnOpticsGroup" in table.rows else np.zeros(n, np.int64)
    for g in np.unique(group):
        rows = torch.from_numpy(np.flatnonzero(group == g))
        kept[rows] = within_spread(mean[rows], sigma) & within_spread(sd[rows], sigma)
    return table.keep(kept)


def regrouped(table: Table, groups: int, files: Classification | None, run: Run) -> Table:
    """The table with rlnGroupName (and no rlnGroupNumber): micrographs of like scale, or defocus, together."""
    if NAME not in table.rows:
        raise BadInput(f"{table.path}: label _{NAME} is missing: --regroup joins micrographs")
    micrograph, names = pd.factorize(table.rows[NAME])
    index = torch.from_numpy(micrograph.astype(np.int64))
    scales: dict[str, float] = {}
    if files and files.model:
        found = read_star(files.model).get("model_groups")
        if isinstance(found, pd.DataFrame) and "rlnGroupScaleCorrection" in found:
            scales = dict(zip(found["rlnGroupName"].astype(str), found["rlnGroupScaleCorrection"].astype(float), strict=True))
    if all(name in scales for name in names):
        key, what = torch.tensor([scales[name] for name in names], dtype=torch.float64), "scale"
    else:
        values = table.numbers("rlnDefocusU")
        total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, torch.nan_to_num(values))
        key, what = total / torch.bincount(index, minlength=len(names)), "defocus"
    group = group_micrographs(index, key, min(groups, len(names)))
    count = int(group.max()) + 1
    run.note(f"{len(names)} micrographs in {count} groups of like {what}, {int(torch.bincount(group).min())} particles in the smallest")
    rows = table.rows.drop(columns=["rlnGroupNumber"], errors="ignore")
    return Table(table.path, table.kind, rows.assign(rlnGroupName=pd.Series([f"group_{g + 1:03d}" for g in group.tolist()], dtype="str")),
                 table.optics, table.blocks)  # fmt: skip


def parts_of(params: Params, table: Table, seed: int) -> list[Tensor]:
    """Indices of the rows of each part of a split, none where no split is asked for."""
    if not (params.split_size or params.splits):
        return []
    generator = torch.Generator().manual_seed(seed) if params.random_order else None
    try:
        return split_rows(len(table), params.split_size, params.splits, generator)
    except ValueError as error:
        raise BadInput(f"{table.path}: {error}; give fewer or smaller parts") from None


def write_parts(parts: list[Tensor], table: Table, run: Run) -> list[str]:
    """A file for each part of a split; what to tell of them."""
    for k, part in enumerate(parts, 1):
        write_table(run.path / f"{table.kind}_split{k}.star", table.keep(part))
    if not parts:
        return []
    left = len(table) - sum(map(len, parts))
    rest = [f"{left} {table.kind} are in no part"] if left else []
    return [f"{len(parts)} parts of {len(parts[0])} {table.kind}: {run.path / f'{table.kind}_split1.star'} …", *rest]
