"""A contact sheet: some samples of a data set with their captions."""

import io
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from megadit.data.format.members import DataSet

TILE, MARGIN = 192, 8  # pixels
FONT_SIZE, LINE_HEIGHT, CAPTION_LINES = 12, 16, 4


def preview(url: str, out: Path, num_samples: int = 24, seed: int = 0, columns: int = 6) -> int:
    """Draw samples of the data set at `url`, chosen by `seed`, into the PNG file `out`; how many there are.

    Pictures keep their shape; a caption that is too long ends in dots. Raises ValueError for a data set without
    pictures, ManifestError, StorageError and OSError.
    """
    data = DataSet(url)
    manifest = data.manifest
    if manifest.image is None:
        kinds = ", ".join(manifest.members)
        raise ValueError(f"{url} has no pictures to show, only {kinds}; preview what it was packed from")
    num_samples = min(num_samples, manifest.num_samples)
    chosen = np.sort(np.random.default_rng(seed).choice(manifest.num_samples, num_samples, replace=False))
    columns = min(columns, num_samples)
    cell_width, cell_height = TILE + MARGIN, TILE + CAPTION_LINES * LINE_HEIGHT + 2 * MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, -(-num_samples // columns) * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, sample in enumerate(chosen.tolist()):
        left, top = number % columns * cell_width + MARGIN, number // columns * cell_height + MARGIN
        tile = _tile(data.get(manifest.image.member, sample))
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        caption = data.caption(sample) or data.key(sample)
        lines = textwrap.wrap(caption, width=30, max_lines=CAPTION_LINES, placeholder="...")
        draw.text((left, top + TILE + 4), "\n".join(lines), "black", font)
    sheet.save(out, format="PNG")
    return num_samples


def _tile(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft("RGB", (2 * TILE, 2 * TILE))  # JPEG decodes to a smaller size in a fraction of the time
        return ImageOps.contain(picture.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS)
