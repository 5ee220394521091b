"""A job for the tests: adds up seeded random numbers, an item a time, with a checkpoint after each. Also a script."""
from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from frazil.data import BadInput
from frazil.jobs.run import Options, Run, execute


class Params(BaseModel):
    """Add up numbers."""

    model_config = ConfigDict(extra="forbid")
    table: Path = Field(description="an input file")
    items: int = Field(5, gt=0, description="how many numbers", json_schema_extra={"unit": "numbers", "may_change": False})
    pause: float = Field(0.0, ge=0, description="time an item takes", json_schema_extra={"unit": "s", "level": "expert"})
    extra: int = Field(0, ge=0, description="how many more numbers", json_schema_extra={"may_change": True, "level": "expert"})
    trouble: str = Field("", description="how to fail")


POSITIONAL = ("table",)
HAS_RUN_DIRECTORY = True


def run(params: Params, run: Run) -> None:
    """Sum `items` numbers; the state is the sum so far."""
    if params.trouble == "bad input":
        raise BadInput(f"{params.table}: row 3 has no image")
    state = run.load_checkpoint() or {"done": 0, "sum": torch.zeros((), dtype=torch.float64)}
    for item in range(state["done"], params.items + params.extra):
        number = torch.rand((), generator=torch.Generator().manual_seed(run.seed + item), dtype=torch.float64)
        time.sleep(params.pause)
        state = {"done": item + 1, "sum": state["sum"] + number}
        run.save_checkpoint(state)
        run.event("item", item=item, sum=state["sum"], bad=float("nan"))
        run.progress(item + 1, params.items, "adding")
        run.check_stop()
        if params.trouble == "crash":
            raise ZeroDivisionError("a defect")
    (run.path / "sum.txt").write_text(repr(float(state["sum"])))
    run.summary(f"sum {float(state['sum']):.6f}")


if __name__ == "__main__":
    execute("counting", run, Params.model_validate_json(sys.argv[1]), Options.model_validate_json(sys.argv[2]))
