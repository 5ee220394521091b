"""The architecture is a test: who may import whom, sizes that keep a file readable, words of documentation."""
from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "frazil"
BELOW = {
    "data": "",
    "io": "data",
    "maths": "data",
    "ops": "data maths",
    "refine": "data maths ops",
    "steps": "data maths ops refine",
    "simulate": "data maths ops",
    "jobs": "data io maths ops refine steps simulate",
    "cli": "jobs",
}
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS = 450, 70, 8


def imports(file: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, inside functions too; parent-relative imports are refused."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{file.name}: write `from frazil…` instead of `from ..`"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not node.level)


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file."""
    yield from (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("layer", BELOW)
def test_layer_imports_only_what_is_below(layer: str) -> None:
    for file in [*(ROOT / layer).rglob("*.py"), *ROOT.glob(f"{layer}.py")]:
        used = {name.split(".")[1] for name in imports(file) if name.startswith("frazil.")}
        allowed = {layer, *BELOW[layer].split(), "__version__", "__file__"}
        assert used <= allowed, f"{file.relative_to(ROOT)} reaches {used - allowed}"


def test_every_file_belongs_to_a_layer() -> None:
    top = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert top - {"__init__", "__main__"} <= set(BELOW), "give the new module a place in BELOW"


@pytest.mark.parametrize("library, home", [("numba", "cpu.py"), ("triton", "triton.py")])
def test_kernel_languages_stay_in_their_files(library: str, home: str) -> None:
    for file in FILES:
        uses = any(name.split(".")[0] == library for name in imports(file))
        assert not uses or (file.parent.parent.name == "ops" and file.name == home), f"{file.relative_to(ROOT)} imports {library}"


def test_steps_and_maths_touch_no_files_and_print_nothing() -> None:
    for layer in ("maths", "ops", "refine", "steps"):
        for file in (ROOT / layer).rglob("*.py"):
            called = {n.func.id for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert not called & {"print", "open"}, f"{file.relative_to(ROOT)} calls {called & {'print', 'open'}}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes_and_docstrings(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_LINES, "split the file"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "the file has no docstring"
    for f in functions(file):
        arguments = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        assert f.end_lineno is not None and f.end_lineno - f.lineno < MAX_FUNCTION, f"{f.name} is longer than {MAX_FUNCTION} lines"
        # An op takes every array of its formula by name, a kernel every pointer: only there may the arguments be many.
        kernel = file.parent.parent.name == "ops"
        assert kernel or len(arguments) <= MAX_ARGUMENTS, f"{f.name} has {len(arguments)} arguments"
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("code", ["import frazil", "import sys; from frazil.cli import main; sys.argv[1:] = ['--help']; main()"])
def test_help_imports_no_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {{'torch', 'numba', 'scipy', 'pandas', 'matplotlib'}} & set(sys.modules), 'slow to start'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    import frazil

    for name in frazil.__all__:
        assert getattr(frazil, name) is not None
    with pytest.raises(AttributeError):
        frazil.no_such_name  # noqa: B018


def test_every_job_is_in_the_table_and_documented() -> None:
    from frazil.jobs import ACTIONS, JOBS, load

    defines = {p.stem for p in (ROOT / "jobs").glob("*.py") if "\nPOSITIONAL" in p.read_text() or "\nACTIONS:" in p.read_text()}
    assert {name.replace("-", "_") for name in JOBS} == defines - {"__init__"}
    for job in JOBS:
        for action in ACTIONS.get(job, [None]):
            offered = load(job, action)
            fields = offered.params.model_fields
            assert offered.params.model_config.get("extra") == "forbid"
            assert set(offered.positional) <= set(fields)
            for name, field in fields.items():
                assert field.description, f"{job}: {name} has no description"


def test_every_step_is_documented() -> None:
    docs = ROOT.parents[1] / "docs" / "steps"
    for step in (ROOT / "steps").glob("[!_]*.py"):
        assert (docs / step.name).with_suffix(".md").exists(), f"docs/steps/{step.stem}.md is missing"


def test_parameters_and_files_of_the_map_of_the_maths_exist() -> None:
    """docs/map.md names files: each must be there."""
    text = (ROOT.parents[1] / "docs" / "map.md").read_text()
    named = set(re.findall(r"`([a-z_0-9/]+\.py)`", text))
    assert named, "map.md names no file"
    for name in named:
        assert (ROOT / name).exists(), f"docs/map.md names {name}, which does not exist"
