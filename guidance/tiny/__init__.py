"""The embedded text-to-image model: its training images, its trainer and its weights."""
