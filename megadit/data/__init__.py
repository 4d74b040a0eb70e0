"""Packed shards, the manifest, streams and encoders."""
