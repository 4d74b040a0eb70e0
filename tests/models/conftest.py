"""Settings of the model tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models this small only lose by threads, and on a busy machine they lose a factor of ten."""
    torch.set_num_threads(1)
