"""Pretraining of diffusion transformers from 40M to 18B parameters, with muP transfer of hyperparameters."""
