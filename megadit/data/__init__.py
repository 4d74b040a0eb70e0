"""Data sets, from pictures and captions to batches. Here is what looks at one, and what makes one to try."""
