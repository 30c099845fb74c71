"""Outputs of a run: pictures, videos, metrics, meshes, point clouds, reports, the live viewer."""
