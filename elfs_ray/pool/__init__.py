"""Pools of images: folders, Parquet files and WebDataset tars, listed in a stable order and read by uri."""
