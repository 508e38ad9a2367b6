"""Readers: one file a format, each gives samples with masks as RLE. Torch-free."""
