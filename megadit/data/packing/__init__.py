"""Packing: captioned pictures become WebDataset shards with a manifest, once, before any training. See pack.py."""
