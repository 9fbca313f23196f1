"""Models built on the DEQ layer."""
