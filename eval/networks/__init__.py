"""The networks that judge pictures: the Inception of FID, EfficientNet-lite0, CLIP and DINOv2 of transformers."""
