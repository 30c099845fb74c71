"""Neural radiance fields in plain PyTorch: rays, fields, volume rendering, data and runs."""

__version__ = "0.2.0"
