"""Vectors as the files that other search engines load: one file an engine, and `export.py`, which drives them."""
