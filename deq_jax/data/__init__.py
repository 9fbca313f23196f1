"""Data: random-access sources, and the path from a source to training and evaluation batches."""
