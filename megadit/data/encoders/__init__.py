"""Frozen encoders whose outputs are packed, or made while training: texts to features, pictures to latents."""
