"""A function a command, made from the job's parameters when cyclopts asks for it by name (`frazil.cli.commands:refine3d`)."""
from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from cyclopts import Group, Parameter
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from frazil.jobs import Action, load
from frazil.jobs.record import option_name
from frazil.jobs.run import BadInput, Options, execute

GROUPS = {  # "basic" is cyclopts' own group "Parameters"
    "expert": Group("Expert parameters", sort_key=1),
    "run": Group("Run", sort_key=2),
}


def __getattr__(name: str) -> Callable[..., None]:
    """The function of a command: `fsc`, or `map__lowpass` for an action of a job."""
    if name.startswith("_"):
        raise AttributeError(name)
    job, _, action = name.partition("__")
    return command(job, load(job, action or None))


def command(job: str, action: Action) -> Callable[..., None]:
    """A function with the signature that cyclopts turns into options, which validates them and runs the job."""
    fields = action.params.model_fields
    named = [name for name in fields if name not in action.positional]
    listed = [argument(name, fields[name], inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in action.positional]
    listed += [argument(name, fields[name], inspect.Parameter.KEYWORD_ONLY) for name in named]
    if action.has_run_directory:
        listed += [argument(name, field, inspect.Parameter.KEYWORD_ONLY, "run") for name, field in Options.model_fields.items()]

    def call(*values: Any, **options: Any) -> None:
        _collect_garbage()
        given = {**dict(zip(action.positional, values, strict=False)), **options}
        params = validated(action.params, {name: value for name, value in given.items() if name in fields})
        if action.has_run_directory:
            rest = {name: value for name, value in given.items() if name not in fields}
            execute(job, action.run, params, validated(Options, rest))
        else:
            action.run(params, None)

    call.__doc__ = inspect.getdoc(action.params)
    call.__signature__ = inspect.Signature(listed)  # pyright: ignore[reportFunctionMemberAccess]
    call.__annotations__ = {p.name: p.annotation for p in listed}
    return call


def _collect_garbage() -> None:
    """Have cycles collected from now on, but for what the modules loaded so far are made of, if the collector was off (cli.entry)."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def argument(name: str, field: FieldInfo, kind: Any, level: str = "") -> inspect.Parameter:
    """One parameter of the signature: type, default, help with the unit, group by level."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, Mapping) else {}
    text = field.description or ""
    if unit := extra.get("unit"):
        text = f"{text} [{unit}]"
    default = field.get_default(call_default_factory=True)
    several = isinstance(default, (tuple, list)) or "tuple" in str(field.annotation) or "list" in str(field.annotation)
    positional = kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = not field.is_required() and default is not False and default not in ((), None, "")
    describe = partial(Parameter, help=text, show_default=shown, negative=None if default is True else "", consume_multiple=several or None)
    group = GROUPS.get(level or str(extra.get("level", "basic")))
    made = describe() if positional or group is None else describe(group=group)
    annotation = Annotated[field.annotation, made]
    return inspect.Parameter(name, kind, default=inspect.Parameter.empty if field.is_required() else default, annotation=annotation)


def validated(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """`model(**values)`; raises BadInput with one line that names the options and says what is wrong with them."""
    try:
        return model(**values)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            where = option_name(str(fault["loc"][0])) + ": " if fault["loc"] else ""
            got = f" (got {fault['input']})" if fault["loc"] and not isinstance(fault["input"], dict) else ""
            faults.append(where + fault["msg"].removeprefix("Value error, ").replace("Input should", "should") + got)
        raise BadInput("; ".join(faults)) from None
