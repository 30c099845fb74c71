"""Who imports whom: down or sideways, never up; flags stay where they are parsed."""

import ast

import pytest
from conftest import REPOSITORY

PACKAGES = {"nerf", "guidance"}
# guidance/tiny is a model with the program that made it, apart from both.
FILES = [
    *sorted((REPOSITORY / "nerf").rglob("*.py")),
    *sorted((REPOSITORY / "guidance").glob("*.py")),
]
SCRIPTS = sorted(REPOSITORY.glob("run_*.py"))
BOTTOM = {"rays", "cameras", "encodings", "field", "volume", "losses", "metrics", "runtime", "ema"}
BOTTOM |= {"lenses", "occupancy", "shading", "schedules", "sds", "prompts"}
MIDDLE = {
    "renderer",
    "grid_renderer",
    "object_renderer",
    "turntable",
    "bounds",
    "datasets",
    "media",
}
BOTTOM |= {"attention", "lora", "memory", "particles"}
MIDDLE |= {"model_files", "stable_diffusion", "gaussian", "vsd"}
SEE_ARGS = {
    "nerf/options.py",
    "nerf/dream_options.py",
    "nerf/guidance_options.py",
    "nerf/datasets/__init__.py",
}


def name_of(path):
    """nerf/datasets/llff.py -> nerf.datasets.llff; a package goes by its folder's name."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def level(module):
    part = module.split(".")[1] if "." in module else None
    return 0 if part in BOTTOM else 1 if part in MIDDLE else 2


def imports_of(path):
    """Every module imported anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def test_layers_hold_the_files_there_are():
    names = {name.split(".")[1] for name in MODULES if "." in name}
    assert names >= BOTTOM | MIDDLE


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_or_stay_on_a_level(module):
    imported = set(imports_of(MODULES[module]))
    for other in imported & set(MODULES) - PACKAGES:
        assert level(other) <= level(module), f"{module} imports {other}"
    for other in imported:
        top = other.split(".")[0]
        assert top not in PACKAGES - {module.split(".")[0]}, f"{module} imports {other}"
        assert not top.startswith("run_"), f"{module} imports {other}"


def test_no_import_goes_in_circles():
    graph = {name: set(imports_of(path)) & set(MODULES) - {name} for name, path in MODULES.items()}
    while graph:
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, f"these import one another: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


def test_scripts_do_not_import_each_other():
    for path in SCRIPTS:
        assert not [name for name in imports_of(path) if name.startswith("run_")], path


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_options_and_loaders_see_args(module):
    path = MODULES[module]
    if str(path.relative_to(REPOSITORY)) in SEE_ARGS:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            where = f"{path.name}:{node.lineno}: plain values, not flags"
            assert "args" not in [parameter.arg for parameter in parameters], where
