"""Text to 3D: an object in a cube, its cameras, lighting, and losses on its shape."""
