"""Neural radiance fields in plain PyTorch: rays, fields, volume rendering, data and runs."""
