"""Thumbnails inside a page: data URLs of generated images, and of detections drawn on them."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

THUMBNAIL = 160  # pixels, the longer side
FAILURE = 320
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324")
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """An image of a page; `style` is its CSS class."""

    url: str
    caption: str
    style: str


def thumbnail(path: Path, caption: str) -> Picture:
    """A generated image. One that is smaller than a thumbnail is kept as it is, and the page enlarges its pixels."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    if max(image.size) < THUMBNAIL:
        return Picture(_url(image, "PNG"), caption, "pixels")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return Picture(_url(image, "JPEG"), caption, "smooth")


def with_boxes(path: Path, boxes: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The data URL of an image with detections: boxes (x1, y1, x2, y2, score) in pixels by class."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = FAILURE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for number, (name, found) in enumerate(boxes.items()):
        colour = COLOURS[number % len(COLOURS)]
        for x1, y1, x2, y2, score in found:
            draw.rectangle([x1 * scale, y1 * scale, x2 * scale, y2 * scale], outline=colour, width=2)
            place, text = (x1 * scale + 3, y1 * scale + 2), f"{name} {score:.2f}"
            draw.rectangle(draw.textbbox(place, text, font), fill=colour)
            draw.text(place, text, "white", font)
    return _url(image, "JPEG")


def _url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
