"""Base shapes for muP (.bsh, the format of the mup package)."""
