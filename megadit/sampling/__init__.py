"""From a model and prompts to images."""
