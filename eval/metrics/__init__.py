"""Metrics: numbers from features. Functions of tensors, without files, networks or ranks."""
