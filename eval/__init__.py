"""Judging trained models: images of a task, their scores, reports; and the loss curve of a run."""
