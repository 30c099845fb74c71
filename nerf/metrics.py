"""Picture quality: PSNR and SSIM of float pictures in [0, 1]."""

import math

import numpy as np


def psnr_from_mse(mse: float) -> float:
    """-10 log10(mse) in dB, at most 100: identical pictures must stay a number in JSON."""
    return -10.0 * math.log10(max(mse, 1e-10))


def psnr(picture: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of [H, W, 3] pictures in [0, 1]."""
    return psnr_from_mse(float(np.mean((picture.astype(np.float64) - target) ** 2)))


def ssim(picture: np.ndarray, target: np.ndarray) -> float | None:
    """Structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5) of [H, W, 3] pictures.

    None where a picture is smaller than the 11-pixel window.
    """
    from skimage.metrics import structural_similarity

    if min(picture.shape[:2]) < 11:
        return None
    return float(
        structural_similarity(
            target.astype(np.float64),
            picture.astype(np.float64),
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def to_8bit(picture: np.ndarray) -> np.ndarray:
    """[0, 1] floats -> uint8, rounded to nearest (nerf-pytorch cuts off, half a level darker)."""
    return np.round(np.clip(picture, 0.0, 1.0) * 255.0).astype(np.uint8)
