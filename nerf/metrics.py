"""Quality of float pictures in [0, 1]: PSNR, SSIM and, where installed, LPIPS; depth errors."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def psnr_from_mse(mse: float) -> float:
    """-10 log10(mse) in dB, at most 100: JSON has no infinity for identical pictures."""
    return -10.0 * math.log10(max(mse, 1e-10))


def psnr(picture: np.ndarray, target: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of [H, W, 3] pictures in [0, 1].

    mask: bool [H, W], pixels to compare; None: all.
    """
    error = (picture.astype(np.float64) - target) ** 2
    return psnr_from_mse(float(np.mean(error if mask is None else error[mask])))


def ssim(picture: np.ndarray, target: np.ndarray, mask: np.ndarray | None = None) -> float | None:
    """Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5) of [H, W, 3] pictures.

    mask: bool [H, W], centers of the windows to compare; None: all. Pixels outside the mask are set
    to the target's. Returns None for pictures smaller than the 11-pixel window, and if the mask
    leaves no window.
    """
    from skimage.metrics import structural_similarity

    if min(picture.shape[:2]) < 11:
        return None
    if mask is not None:
        picture = np.where(mask[..., None], picture, target)
    mean, local = structural_similarity(
        target.astype(np.float64),
        picture.astype(np.float64),
        channel_axis=-1,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    if mask is None:
        return float(mean)
    whole = (slice(5, -5), slice(5, -5))  # only windows inside the picture, as in ``mean``
    counted = local[whole][mask[whole]]
    return float(counted.mean()) if len(counted) else None


def load_lpips(
    device: torch.device | str,
) -> tuple[Callable[[np.ndarray, np.ndarray], float] | None, str]:
    """(LPIPS of two pictures [H, W, 3], "") or (None, what is missing); VGG, Zhang et al. 2018.

    Smaller is better. Nothing is downloaded: VGG's weights must be in torch's checkpoints folder.
    """

    try:
        import lpips
        import torchvision  # noqa: F401, lpips builds VGG with it
    except ImportError as error:
        return None, f"pip install lpips==0.1.4 torchvision ({error})"
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(weights.glob("vgg16-*.pth")):
        return (
            None,
            f"no VGG weights in {weights}; python -c \"import lpips; lpips.LPIPS(net='vgg')\" "
            "downloads them",
        )
    model = lpips.LPIPS(net="vgg", verbose=False).to(device).eval()

    def distance(picture: np.ndarray, target: np.ndarray) -> float:
        pair = [
            torch.from_numpy(np.ascontiguousarray(each)).float().permute(2, 0, 1)[None].to(device)
            for each in (picture, target)
        ]
        with torch.no_grad():
            return float(model(*pair, normalize=True))  # pictures in [0, 1]

    return distance, ""


def depth_error(depth: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean and median of |depth - truth| [H, W] in their unit, over pixels where truth is finite.

    Empty if it is finite nowhere.
    """
    known = np.isfinite(truth)
    error = np.abs(depth[known] - truth[known])
    if not error.size:
        return {}
    return {"depth_error": float(error.mean()), "depth_error_median": float(np.median(error))}


def to_8bit(picture: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as uint8, rounded (nerf-pytorch truncates, which is half a level darker).

    ValueError for NaN, which would become black.
    """
    if bad := int(np.isnan(picture).sum()):
        raise ValueError(
            f"a picture holds NaN in {bad} of {picture.size} numbers: the weights are broken; go "
            "on from an earlier checkpoint (--ft_path) with a lower --lrate, or --grad_clip 1; if "
            "there is none, start anew: --no_reload"
        )
    return np.round(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)
