"""One object in a box that is optimized from a text."""
