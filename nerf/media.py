"""Picture and video files, and scalar maps in color."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from nerf.metrics import to_8bit

# Of a labeled grid, in pixels: shortest side of a cell, height of a line of text, and margins
MIN_CELL, LINE, GAP = 96, 14, 3
GIF_SIDE = 480  # most pixels a side of a GIF
VIDEO_SUFFIXES = (".mp4", ".gif")
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


def labeled_grid(
    rows: Sequence[Sequence[np.ndarray]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str = "",
) -> np.ndarray:
    """Pictures in rows and columns on black, with their names in white, uint8 [H, W, 3].

    rows: of pictures [h, w, 3] of one size, in [0, 1] or uint8; small ones are enlarged by whole
    factors, without smoothing, until a name fits over them. A name may have several lines; title:
    a line above all.
    """
    from PIL import Image, ImageDraw, ImageFont

    cells = [[each if each.dtype == np.uint8 else to_8bit(each) for each in row] for row in rows]
    height, width = cells[0][0].shape[:2]
    factor = -(-MIN_CELL // min(width, height))
    height, width = factor * height, factor * width
    font = ImageFont.load_default()
    names = [name.encode("latin-1", "replace").decode("latin-1") for name in row_names]
    longest = max(font.getlength(line) for name in names for line in name.split("\n"))
    left = round(longest) + 2 * GAP
    lines = max((name.count("\n") + 1 for name in column_names), default=0)
    above = LINE * (bool(title) + lines)
    sheet = np.zeros((above + len(cells) * height, left + len(cells[0]) * width, 3), np.uint8)
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in cells])
    sheet[above:, left:] = pixels.repeat(factor, 0).repeat(factor, 1)
    picture = Image.fromarray(sheet)
    draw = ImageDraw.Draw(picture)

    def write(x: int, y: int, text: str) -> None:
        text = text.encode("latin-1", "replace").decode("latin-1")
        draw.multiline_text((x, y), text, fill=(255, 255, 255), font=font, spacing=3)

    write(GAP, 2, title)
    for number, name in enumerate(column_names):
        write(left + number * width + GAP, LINE * bool(title) + 2, name)
    for number, name in enumerate(names):
        write(GAP, above + number * height + 2, name)
    return np.asarray(picture)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write a picture [H, W, 3], in [0, 1] or uint8, as a PNG file; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture if picture.dtype == np.uint8 else to_8bit(picture)
    # Encoded in memory: writing to a full disk, the library would print a traceback later on.
    path.write_bytes(iio.imwrite("<bytes>", pixels, extension=".png"))


@contextmanager
def signals_later() -> Iterator[None]:
    """Programs started inside the block do not get the signals that stop a run; this one does.

    A terminal and torchrun send them to all processes of a run. One that ends ffmpeg while it is
    asked what it can do would look like a "no", and the video would be made by other means.
    """
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping)  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_video(
    path: Path, frames: Iterable[Path], fps: int = 30, warn: Callable[[str], None] = print
) -> Path | None:
    """Write picture files as an H.264 video and return its path.

    A GIF beside ``path`` where ffmpeg is missing; None, with a warning, if neither is possible.
    Frames are read one at a time, and the file gets its name at the end. A frame of odd width or
    height loses its last column or row, because the format stores color at half resolution.
    """
    try:
        import imageio_ffmpeg

        with signals_later():
            imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return write_gif(path.with_suffix(".gif"), frames, fps, warn)
    writer, unfinished = None, path.with_name(f".{path.name}")
    try:
        for file in frames:
            frame = iio.imread(file)
            frame = np.ascontiguousarray(frame[: frame.shape[0] & ~1, : frame.shape[1] & ~1])
            if not frame.size:
                warn(f"{path.name} is not written: its frames are one pixel wide or high")
                return None
            if writer is None:
                writer = imageio_ffmpeg.write_frames(
                    str(unfinished),
                    (frame.shape[1], frame.shape[0]),
                    fps=fps,
                    quality=8,
                    macro_block_size=1,
                    ffmpeg_log_level="error",
                )
                with signals_later():  # tries encoders, starts ffmpeg
                    writer.send(None)
            writer.send(frame)
    except OSError as error:
        warn(f"{path.name} is not written ({error}); its frames are kept")
        return None
    finally:
        if writer is not None:
            try:
                writer.close()
            except OSError as error:  # no space for the last, buffered part
                warn(f"{path.name} is incomplete ({error}); its frames are kept")
    if writer is None:
        warn(f"{path.name} is not written: there are no frames")
        return None
    if not unfinished.exists():
        warn(f"{path.name} is not written (ffmpeg made no file); its frames are kept")
        return None
    unfinished.replace(path)
    return path


def write_gif(
    path: Path, frames: Iterable[Path], fps: int, warn: Callable[[str], None] = print
) -> Path | None:
    """Write picture files, at most GIF_SIDE a side, as a GIF that repeats, and return its path.

    Instead of a video where ffmpeg is missing, which ``warn`` is told. Frames are read one at a
    time. None, with a warning, if it cannot be written.
    """
    from PIL import Image

    def read() -> Iterator[Image.Image]:
        for file in frames:
            with Image.open(file) as picture:
                picture.thumbnail((GIF_SIDE, GIF_SIDE))
                yield picture.convert("RGB")

    pictures, unfinished = read(), path.with_name(f".{path.name}")
    try:
        first = next(pictures, None)
        if first is None:
            warn(f"{path.name} is not written: there are no frames")
            return None
        first.save(
            unfinished, "GIF", save_all=True, append_images=pictures, loop=0, duration=1000 // fps
        )
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        warn(f"{path.name} is not written ({error}); its frames are kept")
        return None
    warn(f"{path.name} instead of {path.stem}.mp4: ffmpeg is missing; pip install imageio-ffmpeg")
    return path


def write_videos(
    folder: Path, names: Iterable[str], num_frames: int, warn: Callable[[str], None] = print
) -> list[Path]:
    """NAME.mp4 (or .gif) in ``folder`` for every name, from numbered pictures; returns those made.

    Frames: 000.png, 001.png, ... in ``folder`` for the name rgb, in ``folder``/NAME for others.
    """
    made = []
    for name in names:
        source = folder if name == "rgb" else folder / name
        frames = (source / f"{number:03d}.png" for number in range(num_frames))
        if (video := write_video(folder / f"{name}.mp4", frames, warn=warn)) is not None:
            made.append(video)
    return made


def has_video(folder: Path, name: str) -> bool:
    """Whether the video NAME of ``write_videos`` is in the folder; it is renamed when complete."""
    return any((folder / f"{name}{suffix}").exists() for suffix in VIDEO_SUFFIXES)


def forget_videos(folder: Path) -> None:
    """Remove a folder's videos: until they are made again, its frames are of two renderings."""
    for path in folder.glob("*"):
        if path.suffix in VIDEO_SUFFIXES:
            path.unlink(missing_ok=True)
