"""Who imports whom: down or sideways, never up, never in circles; who sees flags."""

import ast

import pytest
from helpers import REPOSITORY

# The lowest level that a file, or a folder, may import from is its own. docs/architecture.md
# draws them. A name is matched from the longest: "nerf.text3d" covers the files inside.
LEVELS = {
    "nerf.rays": 0, "nerf.lenses": 0, "nerf.cameras": 0, "nerf.encodings": 0, "nerf.field": 0,
    "nerf.column_order": 0,
    "nerf.volume": 0, "nerf.metrics": 0, "nerf.media": 0,
    "nerf.training": 1, "nerf.renderer": 1, "nerf.occupancy": 1, "nerf.losses": 1,
    "nerf.coarse_to_fine": 1,
    "nerf.flags": 2, "nerf.datasets": 2, "nerf.text3d": 2, "nerf.occupancy_renderer": 2,
    "nerf.scene_bounds": 2,
    "nerf.build": 3, "nerf.build_optimizer": 3, "nerf.build_schedules": 3, "nerf.build_shapes": 3,
    "nerf.build_run": 3, "nerf.build_start": 3, "nerf.build_outputs": 3, "nerf.outputs": 3,
    "nerf.report": 4, "nerf.compare": 4,
    "guidance.schedule": 0, "guidance.sds": 0, "guidance.lora": 0, "guidance.attention": 0,
    "guidance.memory": 0,
    "guidance.model_files": 0, "guidance.model_kinds": 0, "guidance.model_limits": 0,
    "guidance.lora_files": 0,
    "guidance.stable_diffusion": 1, "guidance.vsd": 1, "guidance.prompts": 1,
    "guidance.gaussian": 1,
    "guidance.prompt_to_prompt": 2, "guidance.samplers": 1,
    "guidance.captioned": 1, "guidance.lora_training": 2, "guidance.finetune_flags": 3,
    "guidance.finetune": 4,
    "guidance.sheets": 2,
    "guidance.build": 3, "guidance.build_pictures": 3,
    "guidance.sample": 4,
}  # fmt: skip
# Besides the scripts, only these see the parsed flags; the last two are programs.
SEE_ARGS = ("nerf.flags", "nerf.build", "nerf.build_run", "guidance.build", "guidance.sample",
            "guidance.finetune")  # fmt: skip
PACKAGES = ("nerf", "guidance")
# guidance/tiny is a model with the program that made it, apart from both.
FILES = [
    *sorted((REPOSITORY / "nerf").rglob("*.py")),
    *sorted((REPOSITORY / "guidance").glob("*.py")),
]
SCRIPTS = sorted(REPOSITORY.glob("run_*.py"))


def name_of(path):
    """nerf/datasets/llff.py -> nerf.datasets.llff; a package goes by its folder's name."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
IN_LEVELS = sorted(set(MODULES) - set(PACKAGES))


def level(module):
    """The level of a module: its own entry, or that of a folder it lies in."""
    while module not in LEVELS:
        module, _, _ = module.rpartition(".")
        assert module, "every module has a level"
    return LEVELS[module]


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


def test_every_level_is_of_a_file_or_folder():
    for name in LEVELS:
        assert any(module == name or module.startswith(name + ".") for module in MODULES), name


def test_imports_go_down_or_stay_on_a_level():
    wrong = [
        f"{module} (level {level(module)}) imports {other} (level {level(other)})"
        for module in IN_LEVELS
        for other in set(imports_of(MODULES[module])) & set(IN_LEVELS)
        if level(other) > level(module)
    ]
    assert not wrong


def test_the_packages_and_the_scripts_do_not_know_each_other():
    for module, path in MODULES.items():
        names = set(imports_of(path))
        if module not in PACKAGES and level(module) == 4:  # a program, which may be a run
            names = {name for name in names if not name.startswith("nerf.training.")}
        tops = {name.split(".")[0] for name in names}
        assert not tops & (set(PACKAGES) - {module.split(".")[0]}), module
        assert not any(top.startswith("run_") for top in tops), module
    for path in SCRIPTS:
        assert not [name for name in imports_of(path) if name.startswith("run_")], path


def test_no_import_goes_in_circles():
    graph = {name: set(imports_of(path)) & set(MODULES) - {name} for name, path in MODULES.items()}
    while graph:
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, f"these import one another: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


def test_the_root_of_nerf_holds_the_algorithm_and_nothing_else():
    """Torch, numpy and each other; media.py alone writes files, pictures and videos."""
    allowed = {"collections", "functools", "math", "typing", "numpy", "torch", "nerf", "skimage"}
    root = [name for name in MODULES if name.count(".") == 1 and (
        MODULES[name].name != "__init__.py")]  # fmt: skip
    for name in sorted(
        set(root)
        - {"nerf.media", "nerf.build", "nerf.build_optimizer", "nerf.build_run", "nerf.build_start"}
        - {"nerf.build_schedules", "nerf.build_shapes", "nerf.build_outputs"}
        - {"nerf.report", "nerf.compare"}
    ):
        if name.startswith("nerf."):
            tops = {module.split(".")[0] for module in imports_of(MODULES[name])}
            assert tops <= allowed | {"dataclasses", "pathlib", "lpips", "torchvision"}, (
                name,
                tops - allowed,
            )
            assert not any("training" in module for module in imports_of(MODULES[name])), name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_flags_and_build_see_args(module):
    if module.startswith(SEE_ARGS):
        return
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            where = f"{path.name}:{node.lineno}: plain values, not flags"
            assert "args" not in [parameter.arg for parameter in parameters], where


def test_every_file_is_explained():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path for path in FILES if path.name != "__init__.py"]
    files += [*(REPOSITORY / "data").glob("*.py"), *(REPOSITORY / "guidance/tiny").glob("*.py")]
    missing = [f.name for f in files if f"{f.name}`" not in page and f.name != "__init__.py"]
    assert not missing, "docs/architecture.md"
