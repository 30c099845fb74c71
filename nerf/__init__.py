"""Neural radiance fields in plain PyTorch: cameras, rays, fields, volume rendering, data and runs."""
