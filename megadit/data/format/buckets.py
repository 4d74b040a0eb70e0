"""Aspect-ratio buckets: the few resolutions that pictures of all shapes are brought to.

As in PixArt-alpha (ASPECT_RATIO_256, _512, _1024) and SDXL (arXiv 2307.01952, appendix I): one area, many shapes. A
picture goes to the bucket of the nearest aspect ratio, so that little of it is cropped.
"""

from collections.abc import Sequence

import numpy as np

COARSE_RESOLUTION = 512  # pixels, from which on sides are multiples of 32
LARGEST_RATIO = 4  # of the longer to the shorter side
AREA_TOLERANCE = 0.1  # of the area of the square


def bucket_table(resolution: int) -> list[tuple[int, int]]:
    """The buckets (height, width) of `resolution`, the side of the square one in pixels, by height, then by width.

    Sides are multiples of 16 (of 32 from 512 on), areas within 10 % of the square's, ratios from 1/4 to 4. A bucket's
    mirror image is one, too. Raises ValueError for a resolution that is not such a multiple.
    """
    step = 32 if resolution >= COARSE_RESOLUTION else 16
    if resolution < step or resolution % step:
        raise ValueError(f"the resolution of aspect-ratio buckets must be a multiple of {step}, not {resolution}")
    area, table = resolution**2, set()
    for height in range(step, LARGEST_RATIO * resolution + 1, step):
        width = step * round(area / height / step)
        fits = abs(height * width - area) <= AREA_TOLERANCE * area
        if fits and max(height, width) <= LARGEST_RATIO * min(height, width):
            table |= {(height, width), (width, height)}
    return sorted(table)


def assign(sizes_N2: np.ndarray, table: Sequence[tuple[int, int]]) -> np.ndarray:
    """The place in `table` of each picture's bucket, int64 [N]: that of the nearest log aspect ratio.

    sizes_N2: height and width, any integers. Of two that are equally near it is the taller bucket.
    """
    ratio_T = np.array([np.log(height / width) for height, width in table])
    order_T = np.argsort(-ratio_T, kind="stable")
    middle = -(ratio_T[order_T][1:] + ratio_T[order_T][:-1]) / 2
    ratio_N = np.log(sizes_N2[:, 0].astype(np.float64)) - np.log(sizes_N2[:, 1].astype(np.float64))
    return order_T[np.searchsorted(middle, -ratio_N)]
