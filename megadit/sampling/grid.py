"""A labelled contact sheet of images."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megadit.files import writing

CELL, LABEL, MARGIN = 128, 34, 8  # pixels


def draw_grid(images: Tensor, labels: Sequence[str], path: Path) -> None:
    """Write images [B, 3, H, W] with their labels as one PNG, about as wide as high; black is -1, white 1."""
    if images.shape[1] != 3:
        raise ValueError(f"a grid shows pictures of 3 channels, not {images.shape[1]}: decode latents first")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB", (columns * (CELL + MARGIN) + MARGIN, rows * (CELL + LABEL + MARGIN) + MARGIN), (255, 255, 255)
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    pixels = ((images.permute(0, 2, 3, 1).clamp(-1, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
    for index, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        left = MARGIN + index % columns * (CELL + MARGIN)
        top = MARGIN + index // columns * (CELL + LABEL + MARGIN)
        sheet.paste(Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
        lines = textwrap.wrap(label, width=22, max_lines=2, placeholder="...")
        draw.text((left + CELL // 2, top + CELL + 2), "\n".join(lines), (0, 0, 0), font, anchor="ma", align="center")
    with writing(path) as file:
        sheet.save(file, format="PNG")
