"""What tells a picture how to look more like a text."""
