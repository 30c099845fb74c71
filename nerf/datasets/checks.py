"""Checks of a loaded scene for what ends in a wrong result without an error.

Each names what it found, in one line, with the flag or the change that helps. Data that is in order
passes without a word.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nerf.datasets import capture
from nerf.datasets.pictures import FEWEST, some, too_few
from nerf.datasets.scene import Scene

MOST_BLANK = 1 / 3  # of the training views; more are so by intent
PLAIN = 2  # gray levels within which a picture or a border is of one color
PLAIN_VIEWS = 0.8  # part of the views whose border must have that color
STRIDE = 8  # pixels between those that are looked at first
SHORTEST, LONGEST = 0.15, 30.0  # focal lengths of pinholes, of the width; others are named
FAR_OFF = 0.3  # of the width or height: principal points farther from the middle are named
SAME_POSE = 1e-6  # largest difference of the numbers of one pose
USUAL_DISTANCE = 2.0  # of cameras from what they look at, in scene units
Warn = Callable[[str], object]


def check_scene(scene: Scene, warn: Warn, *, by_hand: bool = False) -> Scene:
    """The scene without its blank training views; ``warn`` names whatever is suspicious.

    by_hand: its files may be from anybody's script, and the poses' axes others than expected.
    """
    scene = without_masked_views(scene, warn)
    scene = without_blank_views(scene, warn)
    check_backgrounds(scene, warn)
    if by_hand:
        check_axes(scene, warn)
    check_intrinsics(scene, warn)
    check_splits(scene, warn)
    check_reach(scene, warn)
    return scene


# ------------------------------------------------------------------------------ single pictures


def without_masked_views(scene: Scene, warn: Warn) -> Scene:
    """The scene without views of which no pixel counts, by their mask or lens.

    ValueError where too few training views remain, see ``pictures.too_few``.
    """
    if scene.usable is None:
        return scene
    empty = [view for view in _all_views(scene) if not bool(scene.usable[view].any())]
    if not empty:
        return scene
    names, train = [scene.names[view] for view in empty], scene.splits["train"]
    masked = set(empty)
    lost = len(set(train) & masked)
    too_few(len(train), lost, "", "wholly masked, or behind masks that cannot be read", names)
    warn(f"the mask or the lens leaves no pixel of {len(empty)} pictures, left out: {some(names)}")
    kept = {
        name: [view for view in views if view not in masked] for name, views in scene.splits.items()
    }
    return replace(scene, splits={name: views for name, views in kept.items() if views})


def without_blank_views(scene: Scene, warn: Warn) -> Scene:
    """The scene without training views that are wholly transparent or of one color.

    Where more than MOST_BLANK are, they stay: some scenes are mostly empty. Blank test views stay,
    and are named.
    """
    reasons = {view: reason for view in _all_views(scene) if (reason := _why_blank(scene, view))}
    if not reasons:
        return scene
    train = scene.splits["train"]
    blank = [view for view in train if view in reasons]
    kept = [view for view in train if view not in reasons]
    drop = len(blank) <= MOST_BLANK * len(train) and len(kept) >= FEWEST
    if blank:
        action = "left out of training" if drop else "used nevertheless, since there are so many"
        warn(f"{len(blank)} of {len(train)} training pictures are blank and {action}: "
             + some([f"{scene.names[view]} ({reasons[view]})" for view in blank]))  # fmt: skip
    others = sorted(set(reasons) - set(train))
    if others:
        warn("blank test pictures: " + some([f"{scene.names[v]} ({reasons[v]})" for v in others]))
    return replace(scene, splits={**scene.splits, "train": kept}) if blank and drop else scene


def _all_views(scene: Scene) -> list[int]:
    return sorted({view for views in scene.splits.values() for view in views})


def _why_blank(scene: Scene, view: int) -> str | None:
    """Why a picture shows nothing; None: it shows something."""
    height, width = scene.view_size(view)
    picture = scene.images[view, :height, :width]
    for part in (picture[::STRIDE, ::STRIDE], picture):
        if not _is_plain(part):
            return None
    if picture.shape[-1] == 4 and int(picture[..., 3].max()) == 0:
        return "wholly transparent"
    return f"one color, RGB {tuple(picture[0, 0, :3].tolist())}"


def _is_plain(pixels: Tensor) -> bool:
    """Whether pixels [H, W, 3|4] are all transparent, or all of one color and alpha."""
    if pixels.shape[-1] == 4 and int(pixels[..., 3].max()) == 0:
        return True
    flat = pixels.reshape(-1, pixels.shape[-1])
    return int((flat.amax(0).int() - flat.amin(0).int()).max()) <= PLAIN


# ------------------------------------------------------------------------- colors behind things


def check_backgrounds(scene: Scene, warn: Warn) -> None:
    """Warn where what is behind the object in the pictures is not what is rendered there."""
    views = scene.splits["train"]
    if scene.images.shape[-1] == 4:
        transparent = [view for view in views if int(_border(scene, view)[:, 3].min()) < 128]
        if len(transparent) > PLAIN_VIEWS * len(views) and scene.background == 0:
            warn(
                "the pictures have transparent backgrounds, which are trained and rendered black; "
                "--white_bkgd makes them white"
            )
        opaque = [view for view in set(views) - set(transparent) if _is_opaque(scene, view)]
        if transparent and 0 < len(opaque) <= MOST_BLANK * len(views):
            names = some([scene.names[view] for view in sorted(opaque)])
            warn(
                f"{len(opaque)} of {len(views)} pictures have no transparent pixel, unlike the "
                f"others, and their background is trained as it is: {names}"
            )
        return
    colors = []
    for view in views:
        border = _border(scene, view)
        if int((border.amax(0).int() - border.amin(0).int()).max()) > PLAIN:
            continue
        colors.append(border.float().mean(0))
    if len(colors) < FEWEST or len(colors) < PLAIN_VIEWS * len(views):
        return
    common = torch.stack(colors).median(0).values
    if (torch.stack(colors) - common).abs().max() > PLAIN or scene.ndc:
        return
    if (common - 255 * scene.background).abs().max() <= PLAIN:
        return
    red, green, blue = (round(level) for level in common.tolist())
    rendered = "white" if scene.background else "black"
    if min(red, green, blue) >= 255 - PLAIN:
        cure = "add --white_bkgd"
    elif max(red, green, blue) <= PLAIN:
        cure = "leave --white_bkgd out"
    else:
        cure = "make that color transparent (PNG with alpha), and add --white_bkgd"
    warn(
        f"the pictures have no transparency and a border of one color, RGB ({red}, {green}, "
        f"{blue}), but rays that hit nothing are rendered {rendered}: {cure}, or training may end "
        "in that one color"
    )


def _is_opaque(scene: Scene, view: int) -> bool:
    """Whether all pixels of a picture with alpha are opaque."""
    height, width = scene.view_size(view)
    return int(scene.images[view, :height, :width, 3].min()) == 255


def _border(scene: Scene, view: int) -> Tensor:
    """The outermost pixels [N, C] of a picture."""
    height, width = scene.view_size(view)
    picture = scene.images[view, :height, :width]
    sides = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    return torch.cat(sides)


# -------------------------------------------------------------------------------- what is in reach


def check_reach(scene: Scene, warn: Warn) -> None:
    """Warn where what the cameras look at is not in [near, far], or not in the stated box.

    Cameras that look at no common point, and scenes in NDC, cannot be checked.
    """
    if scene.ndc:
        return
    c2w = scene.c2w[scene.splits["train"]].double().cpu().numpy()
    center, found = capture.focus(c2w)
    if not found:
        return
    depth = -((center - c2w[:, :, 3]) * c2w[:, :, 2]).sum(-1)
    distance = float(np.median(depth))
    outside = float(np.mean((depth <= scene.near) | (depth >= scene.far)))
    if outside > 0.5:
        warn(
            f"the cameras look at something {distance:.3g} units away, but rays run from "
            f"{scene.near:.3g} to {scene.far:.3g}: set --near and --far around {distance:.3g}"
        )
    elif not 0.1 < distance / USUAL_DISTANCE < 10:
        warn(
            f"the cameras stand {distance:.3g} units from what they look at; scenes of about 1 to "
            "4 units are expected, and --dataset_type transforms scales others to that"
        )
    if scene.box is not None:
        low, high = scene.box.double().cpu().numpy()
        half = float((high - low).max()) / 2
        frame = distance * 0.5 * scene.width / float(scene.intrinsics[0, 0])
        if not ((center > low) & (center < high)).all():
            warn(
                "what the cameras look at is outside of the box that the file states (aabb_scale, "
                "scale, offset): correct these keys, or remove them"
            )
        elif half > 10 * max(frame, 1e-9):
            warn(
                f"the scene fills less than a tenth of the box that the file states (half side "
                f"{half:.3g}): lower aabb_scale, or remove it"
            )


# ------------------------------------------------------------------------- cameras that are others


def check_axes(scene: Scene, warn: Warn) -> None:
    """Warn where cameras look at no common point, but would in another convention of poses."""
    if scene.ndc or scene.to_world is None:
        return
    c2w = scene.c2w[scene.splits["train"]].double().cpu().numpy()
    if len(c2w) < FEWEST or capture.focus(c2w)[1]:
        return
    own = c2w.copy()  # in the file's world, where an inverse is one
    own[:, :, 3] = scene.file_world(c2w[:, :, 3])
    own[:, :, :3] = scene.to_world.double().cpu().numpy()[:3, :3] / scene.file_units @ own[:, :, :3]
    turned, inverse, moved = own.copy(), own.copy(), own.copy()
    turned[:, :, :3] = own[:, :, :3].transpose(0, 2, 1)
    inverse[:, :, :3] = turned[:, :, :3]
    inverse[:, :, 3] = -(turned[:, :, :3] @ own[:, :, 3:])[:, :, 0]
    moved[:, :, 3] = -(own[:, :, :3] @ own[:, :, 3:])[:, :, 0]
    flip = np.array([1.0, -1.0, -1.0, 1.0])
    for poses, name in (
        (own * flip, "camera-to-world in OpenCV's axes (y down, z forward)"),
        (inverse, "world-to-camera"),
        (inverse * flip, "world-to-camera in OpenCV's axes (y down, z forward)"),
        (turned, "positions of the cameras beside transposed rotations"),
        (turned * flip, "positions beside transposed rotations in OpenCV's axes"),
        (moved, "camera-to-world rotations beside world-to-camera translations"),
        (moved * flip, "world-to-camera translations beside rotations in OpenCV's axes"),
    ):
        if capture.focus(poses)[1]:
            warn(
                f"the cameras look at no common point, but would if the poses were {name}; "
                "expected camera-to-world with x right, y up, z backward. Unless the cameras look "
                "outward from one place, as in a room, convert the poses"
            )
            return


def check_intrinsics(scene: Scene, warn: Warn) -> None:
    """Warn where angles of view are extreme, or principal points far from pictures' middles."""
    views = scene.splits["train"]
    sizes = np.array([scene.view_size(view)[::-1] for view in views])
    if scene.intrinsics.shape[-1] == 4:  # pinholes
        focal = float(np.median(scene.intrinsics[views, 0].cpu().numpy() / sizes[:, 0]))
        if not SHORTEST < focal < LONGEST:
            warn(
                f"focal lengths of {focal * scene.width:.3g} pixels in pictures {scene.width} wide "
                f"are an angle of view of {2 * np.degrees(np.arctan(0.5 / focal)):.3g} degrees: "
                "are they in pixels, of pictures of this size?"
            )
    center = scene.intrinsics[views, 2:4].double().cpu().numpy()
    if np.median(np.abs(center / sizes - 0.5).max(-1)) > FAR_OFF:
        x, y = np.median(center, axis=0)
        warn(
            f"principal points lie at ({x:.4g}, {y:.4g}), far from the middle of pictures of "
            f"{scene.width}x{scene.height} pixels: are the intrinsics for pictures of another "
            'size? State that size ("w" and "h"), or correct them'
        )


def check_splits(scene: Scene, warn: Warn) -> None:
    """Warn of repeated training views, and of test views that are training views, too."""
    train = scene.splits["train"]
    place: dict[str, int] = {}
    repeated = [view for view in train if place.setdefault(scene.names[view], view) != view]
    if repeated:
        poses = scene.c2w[[place[scene.names[view]] for view in repeated]]
        others = int(((poses - scene.c2w[repeated]).abs().amax((1, 2)) > SAME_POSE).sum())
        warn(
            f"{len(repeated)} of {len(train)} training views repeat another one's picture, "
            f"{others} of them with another pose: "
            + some(sorted({scene.names[view] for view in repeated}))
        )
    for split in ("val", "test"):
        views = scene.splits.get(split, [])
        if split == "test" and views == scene.splits.get("val"):
            continue
        both = _repeats(scene, views, train)
        if both:
            names = some([scene.names[view] for view in both])
            warn(
                f"{len(both)} of {len(views)} {split} views are training views, too ({names}): "
                "their PSNR tells how well training pictures are remembered, not how new views look"
            )


def _repeats(scene: Scene, views: list[int], others: list[int]) -> list[int]:
    """Those of ``views`` that have the camera and the picture of one of the others."""
    numbers = scene.c2w.double().cpu().numpy().reshape(len(scene.c2w), -1)
    # Equal cameras have equal sums, however weighted: of all others only these are compared.
    weights = np.random.default_rng(0).uniform(0.5, 1, numbers.shape[1])
    sums, reach = numbers @ weights, 2 * SAME_POSE * weights.sum()
    order = np.argsort(sums[others])
    sorted_sums = sums[others][order]
    low = np.searchsorted(sorted_sums, sums[views] - reach)
    high = np.searchsorted(sorted_sums, sums[views] + reach)
    return [
        view
        for view, start, end in zip(views, low.tolist(), high.tolist(), strict=True)
        if any(_is_same(scene, view, others[index]) for index in order[start:end].tolist())
    ]


def _is_same(scene: Scene, view: int, other: int) -> bool:
    """Whether two views have the same camera and picture."""
    if float((scene.c2w[view] - scene.c2w[other]).abs().max()) > SAME_POSE:
        return False
    return other == view or torch.equal(scene.images[view], scene.images[other])
