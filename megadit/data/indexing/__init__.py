"""Tars that lie elsewhere, read once, become a data set: see dataset.py."""
