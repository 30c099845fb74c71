"""The embedded text-to-image model: the pictures it learns from, its trainer, its weights."""
