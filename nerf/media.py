"""Picture and video files, and scalar maps in color."""

from collections.abc import Callable, Iterable
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from nerf.metrics import to_8bit

MESH_FORMATS = (".glb", ".obj", ".ply")
# Dark violet over red and orange to pale yellow: lightness rises steadily, so it prints in gray.
_RAMP = np.array(
    [
        [0.00, 0.00, 0.02],
        [0.16, 0.06, 0.36],
        [0.42, 0.10, 0.43],
        [0.68, 0.17, 0.36],
        [0.88, 0.33, 0.20],
        [0.98, 0.58, 0.10],
        [0.98, 0.96, 0.64],
    ]
)


def colorize(values: np.ndarray) -> np.ndarray:
    """Values [H, W] in [0, 1] as colors [H, W, 3] in [0, 1], from dark to bright."""
    position = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    return np.stack(
        [np.interp(position, np.arange(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)], -1
    )


def nearness(depth: np.ndarray, near: float, far: float, ndc: bool) -> np.ndarray:
    """Nearness [H, W] of depth [H, W] in t: 1 at ``near``, 0 at ``far`` and where the depth is 0.

    Linear in 1 / t if near > 0. In NDC it is linear in t, which is linear in 1 / depth already.
    """
    hit = depth > 0
    t = np.clip(np.where(hit, depth, far), near, far)
    if ndc or near <= 0:
        return np.where(hit, (far - t) / (far - near), 0.0)
    return np.where(hit, (1 / t - 1 / far) / (1 / near - 1 / far), 0.0)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture [H, W, 3], in [0, 1] or uint8, as a PNG file; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture if picture.dtype == np.uint8 else to_8bit(picture)
    # Encoded in memory: writing to a full disk, the library would print a traceback later on.
    path.write_bytes(iio.imwrite("<bytes>", pixels, extension=".png"))


def write_video(
    path: Path, frames: Iterable[Path], fps: int = 30, warn: Callable[[str], None] = print
) -> bool:
    """Write picture files as an H.264 video; False, with a warning, if that is not possible.

    Frames are read one at a time. A frame of odd width or height loses its last column or row,
    because the format stores color at half resolution.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        warn(f"{path.name} is not written, only its frames: pip install imageio-ffmpeg")
        return False
    writer = None
    try:
        for file in frames:
            frame = iio.imread(file)
            frame = np.ascontiguousarray(frame[: frame.shape[0] & ~1, : frame.shape[1] & ~1])
            if not frame.size:
                warn(f"{path.name} is not written: its frames are one pixel wide or high")
                return False
            if writer is None:
                writer = imageio_ffmpeg.write_frames(
                    str(path),
                    (frame.shape[1], frame.shape[0]),
                    fps=fps,
                    quality=8,
                    macro_block_size=1,
                    ffmpeg_log_level="error",
                )
                writer.send(None)
            writer.send(frame)
    except OSError as error:
        warn(f"{path.name} is not written ({error}); its frames are kept")
        return False
    finally:
        if writer is not None:
            try:
                writer.close()
            except OSError as error:  # no space for the last, buffered part
                warn(f"{path.name} is incomplete ({error}); its frames are kept")
    if writer is None:
        warn(f"{path.name} is not written: there are no frames")
    return writer is not None


def write_videos(
    folder: Path, names: Iterable[str], num_frames: int, warn: Callable[[str], None] = print
) -> list[Path]:
    """NAME.mp4 in ``folder`` for every name, from numbered pictures; returns the videos made.

    Frames: 000.png, 001.png, ... in ``folder`` for the name rgb, in ``folder``/NAME for others.
    """
    made = []
    for name in names:
        source = folder if name == "rgb" else folder / name
        frames = (source / f"{number:03d}.png" for number in range(num_frames))
        if write_video(folder / f"{name}.mp4", frames, warn=warn):
            made.append(folder / f"{name}.mp4")
    return made
