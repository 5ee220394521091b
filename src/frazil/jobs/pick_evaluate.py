"""`frazil pick-evaluate`: recall and false discovery rate of picks, for every threshold, by one-to-one matching."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from frazil.data import BadInput
from frazil.io.coordinates import NAME, SCORE, X, Y, read_coordinates, root
from frazil.io.files import atomic_path
from frazil.io.star import first_table, read_star, write_star
from frazil.jobs.plots import COLOURS, LEVEL, new_figure, styled
from frazil.jobs.run import Run
from frazil.maths.peaks import match_points

POSITIONAL = ("picks",)
HAS_RUN_DIRECTORY = False
SHOWN_FDR = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.34)


class Params(BaseModel):
    """Compare picks with true positions: recall, false discovery rate, precision/recall curve over all thresholds."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    picks: Path = Field(description="autopick.star of a run, a coordinate file (STAR, .box, .cs, .cbox, CSV), or a folder of them")
    truth: Path = Field(description="true positions: the same kinds; files belong together by the name of the micrograph")
    cutoff: float = Field(62.0, gt=0, description="largest distance of a pick to its particle", json_schema_extra={"unit": "Å"})
    pixel_size: float | None = Field(
        None, gt=0, description="of the micrographs; that of the run if not given", json_schema_extra={"unit": "Å"}
    )
    threshold: float | None = Field(None, description="count only picks with at least this score")
    output: Path | None = Field(None, description="write OUTPUT.png (curve) and OUTPUT.star (table)")


@dataclass(frozen=True)
class Evaluation:
    """Picks of all micrographs from the highest score down; after each, how many pairs there are."""

    score: NDArray[np.float64]  # (n,)
    pairs: NDArray[np.int64]  # (n,) largest matching of the picks down to this one
    distance: NDArray[np.float64]  # (n,) Å to the partner in the matching of all, NaN: none
    true: int
    micrographs: int

    @property
    def recall(self) -> NDArray[np.float64]:
        """(n,) pairs / true particles."""
        return self.pairs / max(1, self.true)

    @property
    def fdr(self) -> NDArray[np.float64]:
        """(n,) picks without a partner / picks."""
        return 1 - self.pairs / np.arange(1, len(self.pairs) + 1)


def run(params: Params, run: Run | None) -> None:
    """Print figures and the curve; write plot and table where asked for."""
    found, true = read_coordinates(params.picks), read_coordinates(params.truth)
    result, unmatched = evaluate(found, true, params)
    if unmatched:
        print(f"{len(unmatched)} micrographs with true positions have no picks (counted as missed), first: {unmatched[0]}")
    n = len(result.score)
    print(f"{result.micrographs} micrographs, {n} picks, {result.true} true particles, cut-off {params.cutoff:g} Å")
    if n:
        median = f"{np.nanmedian(result.distance):.2f} Å" if np.isfinite(result.distance).any() else "none"
        print(f"recall {result.recall[-1]:.4f}, false discovery rate {result.fdr[-1]:.4f}, median distance {median}")
        print(f"{'threshold':>10} {'picks':>8} {'recall':>8} {'FDR':>8} {'F1':>8}")
        for i in shown_rows(result):
            print(line(result, i))
        if n >= result.true:
            print(f"as many picks as particles: {line(result, result.true - 1).strip()}")
    else:
        print("recall 0.0000: there are no picks")
    if params.output is not None:
        print("written: " + ", ".join(str(path) for path in write(params.output, result)))


def line(result: Evaluation, i: int) -> str:
    """A row of the table."""
    precision, recall = 1 - result.fdr[i], result.recall[i]
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return f"{result.score[i]:10.4f} {i + 1:8d} {recall:8.4f} {result.fdr[i]:8.4f} {f1:8.4f}"


def shown_rows(result: Evaluation) -> list[int]:
    """The last pick at which the false discovery rate is still at most each of some, and the last pick."""
    rows = {int(np.flatnonzero(result.fdr <= level)[-1]) for level in SHOWN_FDR if (result.fdr <= level).any()}
    return sorted({*rows, len(result.score) - 1})


def evaluate(found: dict[str, pd.DataFrame], true: dict[str, pd.DataFrame], params: Params) -> tuple[Evaluation, list[str]]:
    """Match the picks of every micrograph that has true positions; also the names of those without picks."""
    picked = {root(name): table for name, table in found.items()}
    known = {root(name): table for name, table in true.items()}
    if len(known) == len(picked) == 1:
        picked = {next(iter(known)): next(iter(picked.values()))}  # two files named one by one belong together, whatever they are called
    if not set(picked) & set(known):
        raise BadInput(f"{params.truth}: none of its micrographs ({', '.join(list(known)[:2])} …) is one of {params.picks} "
                       f"({', '.join(list(picked)[:2])} …); names must agree but for folder and ending")  # fmt: skip
    sizes = pixel_sizes(params)
    scores, gains, distances = [], [], []
    for name, truth in known.items():
        table = picked.get(name)
        if table is None:
            continue
        size = sizes.get(name) or sizes.get("")
        if not size:
            raise BadInput(f"{params.picks}: the pixel size of {name} is not known; give --pixel-size")
        values = table[SCORE].to_numpy(float) if SCORE in table else np.zeros(len(table))
        chosen = np.ones(len(table), bool) if params.threshold is None else values >= params.threshold
        matching = match_points(
            table[[X, Y]].to_numpy(float)[chosen] * size, values[chosen], truth[[X, Y]].to_numpy(float) * size, params.cutoff
        )
        scores.append(values[chosen])
        gains.append(matching.gains)
        distances.append(matching.distance)
    score = np.concatenate(scores)
    order = np.argsort(-score, kind="stable")
    pairs, distance = np.cumsum(np.concatenate(gains)[order]), np.concatenate(distances)[order]
    result = Evaluation(score[order], pairs, distance, sum(map(len, known.values())), len(known))
    return result, [name for name in known if name not in picked]


def pixel_sizes(params: Params) -> dict[str, float]:
    """Å by micrograph root; under "" what holds for all."""
    if params.pixel_size:
        return {"": params.pixel_size}
    summary = params.picks.parent / "summary.star" if params.picks.is_file() else params.picks / "summary.star"
    if summary.exists():
        table = first_table(read_star(summary), "rlnMicrographPixelSize")
        if table is not None and NAME in table[1]:
            return {root(str(name)): float(size) for name, size in zip(table[1][NAME], table[1]["rlnMicrographPixelSize"], strict=True)}
    raise BadInput(f"{params.picks}: the pixel size is not known (no summary.star of `frazil pick` beside it); give --pixel-size")


@styled
def plot_curve(result: Evaluation) -> Figure:
    """Precision against recall, and both rates against the threshold."""
    figure, axes = new_figure(9, 3.8, 1, 2)
    left, right = axes[0]
    left.plot(result.recall, 1 - result.fdr, color=COLOURS[0])
    if len(result.score):
        left.plot(result.recall[-1], 1 - result.fdr[-1], "o", color=COLOURS[1], label="all picks")
        left.legend()
    left.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision = 1 − false discovery rate")
    right.plot(result.score, result.recall, color=COLOURS[0], label="recall")
    right.plot(result.score, result.fdr, color=COLOURS[1], label="false discovery rate")
    right.axhline(1, **LEVEL)
    if len(result.score):
        right.set_xlim(float(result.score.min()), float(np.percentile(result.score, 99)) + 1e-6)
    right.set(ylim=(0, 1.02), xlabel="threshold")
    right.legend()
    return figure


def write(output: Path, result: Evaluation) -> list[Path]:
    """OUTPUT.png and OUTPUT.star; returns their paths."""
    base = output.with_suffix("") if output.suffix in (".png", ".star") else output
    star, picture = Path(f"{base}.star"), Path(f"{base}.png")
    write_star(star, {"pick_curve": pd.DataFrame({
        SCORE: result.score, "frazilPicks": np.arange(1, len(result.score) + 1), "frazilRecall": result.recall,
        "frazilFalseDiscoveryRate": result.fdr,
    })})  # fmt: skip
    with atomic_path(picture) as temporary:
        plot_curve(result).savefig(temporary, format="png", dpi=130)
    return [picture, star]
