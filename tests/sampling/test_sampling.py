"""Sampling: the trajectory against Euler's rule written out, guidance, noise by prompt, the grid."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from megadit.randomness import Purpose, generator
from megadit.recipe import MMDiTModel
from megadit.sampling.flow import generate
from megadit.sampling.grid import draw_grid

CONFIG = MMDiTModel(input_size=4, width=32, depth=1, head_dim=16, text_dim=5, pooled_dim=6)
TEXT = {"text": torch.ones(2, 3, 5), "text_lengths": torch.tensor([3, 2]), "pooled": torch.full((2, 6), 0.5)}
SHAPE = (3, 4, 4)


class Field(nn.Module):
    """A velocity that depends on everything it is given; a dropped caption is one zero token, a zero pooled vector."""

    def forward(self, x: Tensor, t_B: Tensor, *, text: Tensor, text_lengths: Tensor, pooled: Tensor) -> Tensor:
        caption = text.sum((1, 2)) / 10 + pooled.sum(1) + text_lengths
        return 0.3 * x + torch.sin(3 * t_B).view(-1, 1, 1, 1) + 0.1 * caption.view(-1, 1, 1, 1)


def noise(seed: int, index: int) -> Tensor:
    draws = generator(seed, Purpose.SAMPLING_NOISE, index).standard_normal(SHAPE, np.float32)
    return torch.from_numpy(draws)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_samples_follow_euler_with_guidance(scale: float) -> None:
    num_steps = 7
    x = torch.stack([noise(3, 0), noise(3, 1)]).double()
    with_text = (TEXT["text"].sum((1, 2)) / 10 + TEXT["pooled"].sum(1) + TEXT["text_lengths"]).double()
    for step in range(num_steps):
        t = 1 - step / num_steps
        velocities = [
            0.3 * x + np.sin(3 * t) + 0.1 * caption.view(-1, 1, 1, 1)
            for caption in (with_text, torch.ones(2, dtype=torch.float64))
        ]
        x = x - (velocities[1] + scale * (velocities[0] - velocities[1])) / num_steps
    sampled = generate(Field(), CONFIG, TEXT, scale, num_steps, seed=3)
    torch.testing.assert_close(sampled.double(), x.clamp(-1, 1), atol=2e-6, rtol=0)


def test_a_picture_does_not_depend_on_the_others() -> None:
    both = generate(Field(), CONFIG, TEXT, 3.0, 5, seed=1)
    alone = generate(Field(), CONFIG, {key: value[:1] for key, value in TEXT.items()}, 3.0, 5, seed=1)
    assert torch.equal(both[:1], alone)
    assert not torch.equal(generate(Field(), CONFIG, TEXT, 3.0, 5, seed=2), both)


def test_grid_shows_the_pictures(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    draw_grid(colours[:, :, None, None].expand(3, 3, 4, 4), ["red", "blue", "green"], tmp_path / "new" / "grid.png")
    sheet = Image.open(tmp_path / "new" / "grid.png")
    seen = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)} <= seen
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="3 channels, not 4"):
        draw_grid(torch.zeros(1, 4, 4, 4), ["latent"], tmp_path / "latent.png")
