"""Improved precision and recall (arXiv 1904.06991), k = 3, on squared distances of features.

A picture is inside a set when it is no farther from one of its members than that member's third neighbour. Precision
is the share of our pictures inside the reference, recall the share of the reference inside ours.

`precision_recall` decides as if in float64: matrix products are in float32, and whatever their rounding could turn
around is computed again. `precision_recall_fp16` rounds distances to float16 as ADM's evaluator does, which most papers
of DiT's kind use; it comes out higher by up to 0.002.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_NEIGHBOURS = 3
SPARE_NEIGHBOURS = 8  # found beyond the third, so that the third in float64 is surely among them
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]; the standard errors are those of a share, the other set taken as exact."""

    precision: float
    precision_stderr: float
    recall: float
    recall_stderr: float


def precision_recall(features_ND: Tensor, reference_MD: Tensor) -> PrecisionRecall:
    """Precision and recall of float32 features. Raises ValueError for fewer than 4 images in a set."""
    _check(features_ND, reference_MD)
    centre = reference_MD.mean(dim=0)
    ours, theirs = _Points(features_ND, centre), _Points(reference_MD, centre)
    our_balls, their_balls = _Balls(ours, _radii(ours)), _Balls(theirs, _radii(theirs))
    inside_theirs, inside_ours = torch.zeros(len(ours), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
    for rows in _blocks(len(ours)):
        for columns in _blocks(len(theirs)):
            distances = ours.distances(rows, theirs, columns)
            their_balls.mark(inside_theirs, ours, rows, columns, distances)
            our_balls.mark(inside_ours, theirs, columns, rows, distances.T)
    return _shares(inside_theirs, inside_ours)


class _Points:
    """Float32 points, shifted so that float32 rounds less, and how far a float32 squared distance can be off.

    |x|^2 + |y|^2 - 2 x.y over D features has at most D + 8 roundings, the shift included, of parts that |x|^2 + |y|^2
    bounds twice (Higham, "Accuracy and stability of numerical algorithms", section 3.1).
    """

    def __init__(self, points_ND: Tensor, centre_D: Tensor) -> None:
        self._points = points_ND.float()
        self._shifted = self._points - centre_D
        self._squares = self._shifted.double().square().sum(dim=1).float()
        self.slack = self._squares * ((points_ND.shape[1] + 8) * torch.finfo(torch.float32).eps)

    def __len__(self) -> int:
        return len(self._points)

    def distances(self, rows: slice, other: "_Points", columns: slice) -> Tensor:
        """Squared distances in float32, [rows, columns]."""
        products = self._shifted[rows] @ other._shifted[columns].T
        return products.mul_(-2).add_(self._squares[rows, None]).add_(other._squares[columns])

    def exact(self, rows: Tensor, other: "_Points", columns: Tensor) -> Tensor:
        """Squared distances of pairs in float64, of the shape that `rows` and `columns` broadcast to."""
        return (self._points[rows].double() - other._points[columns].double()).square().sum(dim=-1)


@dataclass(frozen=True)
class _Balls:
    """A ball round each point, with squared radii in float64."""

    centres: _Points
    radii: Tensor

    def mark(self, inside: Tensor, points: _Points, rows: slice, columns: slice, distances: Tensor) -> None:
        """Note in `inside` which of points[rows] are in a ball of `columns`, given their float32 distances."""
        radii = self.radii[columns].float()
        slack = points.slack[rows] + (self.centres.slack[columns] + radii * torch.finfo(torch.float32).eps).max()
        margin = (distances - radii).amin(dim=1)
        inside[rows] |= margin <= -slack
        undecided = (~inside[rows] & (margin <= slack)).nonzero()[:, 0]
        doubtful = (distances[undecided] - radii <= slack[undecided, None]).nonzero()
        for pairs in doubtful.split(BLOCK_ROWS):
            row, column = undecided[pairs[:, 0]] + rows.start, pairs[:, 1] + columns.start
            inside[row[points.exact(row, self.centres, column) <= self.radii[column]]] = True


def _blocks(num: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, num)) for start in range(0, num, BLOCK_ROWS)]


def _radii(points: _Points) -> Tensor:
    """The squared distance of each point to its third neighbour, itself not counted, float64 [N]."""
    num, keep = len(points), min(1 + NUM_NEIGHBOURS + SPARE_NEIGHBOURS, len(points))
    nearest = torch.full((num, keep), torch.inf)
    indices = torch.zeros(num, keep, dtype=torch.long)

    def offer(rows: slice, columns: slice, distances: Tensor) -> None:
        values, places = distances.topk(min(keep, distances.shape[1]), dim=1, largest=False)
        values, places = torch.cat([nearest[rows], values], 1), torch.cat([indices[rows], places + columns.start], 1)
        nearest[rows], chosen = values.topk(keep, dim=1, largest=False)
        indices[rows] = places.gather(1, chosen)

    blocks = _blocks(num)
    for place, rows in enumerate(blocks):
        for columns in blocks[place:]:  # distances are symmetric: each block serves both sides
            distances = points.distances(rows, points, columns)
            offer(rows, columns, distances)
            if columns != rows:
                offer(columns, rows, distances.T.contiguous())
    return _refined(points, nearest, indices)


def _refined(points: _Points, nearest: Tensor, indices: Tensor) -> Tensor:
    """Third neighbours in float64 among the candidates; points whose candidates may not hold it are done in full.

    Only candidates that float32 cannot tell from the third are computed again.
    """
    num, keep = nearest.shape
    rank = NUM_NEIGHBOURS + 1
    slack = points.slack[:, None] + points.slack[indices]
    lower, upper = nearest - slack, nearest + slack
    least, most = (bound.kthvalue(rank, dim=1, keepdim=True).values for bound in (lower, upper))
    surely_nearer = upper < least
    values = torch.where(surely_nearer, -torch.inf, torch.inf).double()
    for pairs in (~surely_nearer & (lower <= most)).nonzero().split(BLOCK_ROWS):
        row, place = pairs.unbind(dim=1)
        values[row, place] = points.exact(row, points, indices[row, place])
    radii = values.kthvalue(rank, dim=1).values
    if keep < num:
        least_left_out = nearest[:, -1].double() - points.slack - points.slack.max()
        for row in (radii >= least_left_out).nonzero()[:, 0].tolist():
            everything = points.exact(torch.tensor([row]), points, torch.arange(num))
            radii[row] = everything.kthvalue(rank).values
    return radii


def precision_recall_fp16(features_ND: Tensor, reference_MD: Tensor) -> PrecisionRecall:
    """Precision and recall with squared distances rounded as in ADM's evaluator. Raises ValueError as the other."""
    _check(features_ND, reference_MD)
    ours, theirs = features_ND.float(), reference_MD.float()
    our_radii, their_radii = _fp16_radii(ours), _fp16_radii(theirs)
    inside_theirs, inside_ours = torch.zeros(len(ours), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
    for rows in _blocks(len(ours)):
        for columns in _blocks(len(theirs)):
            distances = _fp16_distances(ours[rows], theirs[columns])
            inside_theirs[rows] |= (distances <= their_radii[columns]).any(dim=1)
            inside_ours[columns] |= (distances <= our_radii[rows, None]).any(dim=0)
    return _shares(inside_theirs, inside_ours)


def _fp16_radii(points: Tensor) -> Tensor:
    """The squared distance of each point to its third neighbour after rounding, itself counted as the first."""
    radii = []
    for rows in _blocks(len(points)):
        nearest = []
        for columns in _blocks(len(points)):
            distances = _fp16_distances(points[rows], points[columns])
            nearest.append(distances.topk(min(NUM_NEIGHBOURS + 1, distances.shape[1]), dim=1, largest=False).values)
        radii.append(torch.cat(nearest, dim=1).kthvalue(NUM_NEIGHBOURS + 1, dim=1).values)
    return torch.cat(radii)


def _fp16_distances(x_BD: Tensor, y_CD: Tensor) -> Tensor:
    """Squared distances of a block, each operation rounded to float16; in float32 where one of them overflows."""
    x, y = x_BD.half().float(), y_CD.half().float()  # products are summed in float32 and then rounded, as GPUs do
    squares_x, squares_y = x.square().half().float().sum(dim=1).half(), y.square().half().float().sum(dim=1).half()
    rounded = (squares_x[:, None] - 2 * (x @ y.T).half() + squares_y).clamp_min(0)
    if bool(rounded.isfinite().all()):
        return rounded.float()
    return (x_BD.square().sum(dim=1)[:, None] - 2 * (x_BD @ y_CD.T) + y_CD.square().sum(dim=1)).clamp_min(0)


def _check(features_ND: Tensor, reference_MD: Tensor) -> None:
    if features_ND.shape[1] != reference_MD.shape[1]:
        raise ValueError(f"{features_ND.shape[1]} and {reference_MD.shape[1]} features cannot be compared")
    if (fewest := min(len(features_ND), len(reference_MD))) <= NUM_NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NUM_NEIGHBOURS} images in each set, not {fewest}")


def _shares(inside_reference: Tensor, inside_ours: Tensor) -> PrecisionRecall:
    def share(inside: Tensor) -> tuple[float, float]:
        mean = inside.double().mean().item()
        return mean, (mean * (1 - mean) / len(inside)) ** 0.5

    return PrecisionRecall(*share(inside_reference), *share(inside_ours))
