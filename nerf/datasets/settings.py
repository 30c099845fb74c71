"""What is loaded and how: the settings of all loaders, and which loader can use which of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nerf.datasets.scene import Scene

SMALL = 128  # pixels; a longer side below it that comes from --factor's default is named
Warn = Callable[[str], object]


class DataSettings(NamedTuple):
    """Which scene to load and how. Each loader uses the fields that its format has a use for.

    datadir: the scene's folder. dataset_type: a key of DATASETS; "auto" goes by the files in it.
    testskip: keep every n-th validation and test view (0 or 1: all).
    downscale, factor: pictures become this many times smaller. Unless given, ``factor`` counts for
    LLFF and COLMAP only, ``downscale`` for the other formats.
    llffhold: every n-th view is held out, where the files name no splits.
    ndc: normalized device coordinates, for forward-facing LLFF and COLMAP captures.
    spherify: LLFF and COLMAP: the capture goes around an object.
    near, far: where rays begin and end, in scene units; 0: automatic. Refused with NDC.
    background: gray value in [0, 1] behind transparent pixels.
    shape: the object's name in DeepVoxels' folder names.
    data_store: "memory", "mmap" (pictures in a mapped file) or "auto" (mapped if they are large).
    store_dir: folder of the mapped file; None: ``datadir``.
    pixel_center: rays pass through pixel centers, not corners, in every format.
    render_factor: renders will be this many times smaller; checked against the pictures' size.
    given: the names of the flags that the user set; None: unknown, those that differ from their
    defaults.
    """

    datadir: Path
    dataset_type: str
    testskip: int = 8
    downscale: int = 1
    factor: int = 8
    llffhold: int = 8
    ndc: bool = True
    spherify: bool = False
    near: float = 0.0
    far: float = 0.0
    background: float = 0.0
    shape: str = "greek"
    data_store: str = "memory"
    store_dir: Path | None = None
    pixel_center: bool = False
    render_factor: int = 0
    given: frozenset[str] | None = None

    def is_given(self, name: str) -> bool:
        """Whether the user set a flag."""
        if self.given is not None:
            return name in self.given
        if name == "dataset_type":
            return True
        return getattr(self, name) != self._field_defaults[name]

    def default_datadir(self) -> str:
        """Words in brackets if ``datadir`` is only the flag's default, which nobody set; or ""."""
        if self.given is None or "datadir" in self.given:
            return ""
        return (
            " (the default: neither --datadir nor a --config that sets it is given, see configs/)"
        )

    def reduction(self, flag: str) -> int:
        """How many times smaller pictures become; ``flag``: the format's own flag for it."""
        other = "factor" if flag == "downscale" else "downscale"
        own, foreign = getattr(self, flag), getattr(self, other)
        if not self.is_given(other) or foreign <= 1:
            return own
        if self.is_given(flag) and own != foreign:
            raise ValueError(
                f"--{flag} {own} and --{other} {foreign} both reduce the pictures; use --{flag} "
                f"alone: leave out --{other}, or add --{other} 1 (--no-half_res for --half_res) if "
                "a config sets it"
            )
        return foreign


# Flags that only these formats can use; elsewhere they are refused.
ONLY_FOR = {
    "shape": ("deepvoxels",),
    "spherify": ("llff", "colmap", "transforms"),  # a transforms scene is laid out so anyway
    "llffhold": ("llff", "colmap", "transforms"),
    "testskip": ("blender", "demo", "deepvoxels", "LINEMOD", "transforms"),
}


def check_flags(settings: DataSettings, kind: str) -> None:
    """ValueError if a flag was set to a value that the loader ``kind`` cannot use."""
    for name, kinds in ONLY_FOR.items():
        value, default = getattr(settings, name), settings._field_defaults[name]
        if name == "testskip" and value <= 1:  # all views, which is what the others do
            continue
        if kind not in kinds and settings.is_given(name) and value != default:
            shown = f"--{name}" if value is True else f"--{name} {value}"
            raise ValueError(
                f"{settings.datadir}: {shown} is for data in format {' or '.join(kinds)}, and this "
                f"is {kind}; leave it out"
            )


def name_reduction(settings: DataSettings, kind: str, scene: Scene, warn: Warn) -> None:
    """Warn of a reduction that was hardly meant: LLFF's --factor elsewhere, or tiny pictures."""
    foreign = kind not in ("llff", "colmap")
    if settings.factor <= 1 or (foreign and not settings.is_given("factor")):
        return
    if foreign or (not settings.is_given("factor") and max(scene.width, scene.height) < SMALL):
        default = "" if settings.is_given("factor") else ", the default"
        warn(
            f"pictures are reduced {settings.factor} times, to {scene.width}x{scene.height} "
            f"(--factor {settings.factor}{default}); --factor 1 keeps their size"
        )
