"""Improved precision and recall (arXiv 1904.06991), k = 3, on squared distances of features.

A picture is inside a set when it is no farther from one of its members than that member's third neighbour. Precision
is the share of our pictures inside the reference, recall the share of the reference inside ours.

`precision_recall` decides as if in float64. Matrix products are in float32, with a bound on their error, and whatever
that could turn around is computed again from differences in float64.

It leaves out what decides nothing. 50,000 pictures of ours have more distances to each other than to 10,000 of the
reference, but these only give the radii of our balls, and a radius matters only where a reference picture that is in no
other ball is near. The third smallest of any distances of a point bounds its radius from above: a ball that does not
reach a reference picture even so is never measured (compared with all of ours). Good bounds come from two places:

- The points nearest to the centre are measured first: in many dimensions they are neighbours of most (hubs; Radovanovic
  et al., JMLR 11, 2010).
- Balls that may have one reference picture in common lie near each other: they bound each other. This finds clusters.

Then rounds measure, for each undecided reference picture, the nearest of the balls that may have it. The answer does
not depend on any of this; at worst all balls are measured.

`precision_recall_fp16` rounds distances to float16 as ADM's evaluator does, which most papers of DiT's kind use; it
comes out higher by up to 0.002.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_NEIGHBOURS = 3
SPARE_NEIGHBOURS = 8  # found beyond the third, so that the third in float64 is surely among them
ROUND_ROWS = 1024
GROUP_ROWS = 32
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
    our_balls, their_balls = _Balls(ours), _Balls(theirs)
    for rows in torch.arange(len(theirs)).split(ROUND_ROWS):
        their_balls.measure(rows)
    from_centre = ours.squares.argsort()
    hubs, others = from_centre[:ROUND_ROWS], from_centre[ROUND_ROWS:]
    our_balls.measure(hubs)
    inside_theirs, inside_ours = torch.zeros(len(ours), dtype=torch.bool), torch.zeros(len(theirs), dtype=torch.bool)
    pairs = []
    for rows in (hubs, *others.split(BLOCK_ROWS)):
        for columns in torch.arange(len(theirs)).split(BLOCK_ROWS):
            distances = ours.distances(rows, theirs, columns)
            their_balls.mark(inside_theirs, ours, rows, columns, distances)
            if rows is hubs:
                our_balls.mark(inside_ours, theirs, columns, rows, distances.T)
            else:
                near = (distances <= our_balls.limits(rows, theirs)[:, None]) & ~inside_ours[columns]
                ball, point = near.nonzero().unbind(dim=1)
                pairs.append(_Pairs(columns[point], rows[ball], distances[ball, point]))
    _decide(inside_ours, theirs, our_balls, pairs)
    return _shares(inside_theirs, inside_ours)


class _Points:
    """Float32 points, shifted so that float32 rounds less, and how far a float32 squared distance can be off.

    |x|^2 + |y|^2 - 2 x.y over D features has at most D + 8 roundings, the shift included, of parts that |x|^2 + |y|^2
    bounds twice (Higham, "Accuracy and stability of numerical algorithms", section 3.1). 8 more are for sums of bounds.
    """

    def __init__(self, points_ND: Tensor, centre_D: Tensor) -> None:
        self._points = points_ND.float()
        self._shifted = self._points - centre_D
        self.squares = self._shifted.double().square().sum(dim=1).float()
        self.slack = self.squares * ((points_ND.shape[1] + 16) * torch.finfo(torch.float32).eps)

    def __len__(self) -> int:
        return len(self._points)

    def distances(self, rows: Tensor, other: "_Points", columns: Tensor) -> Tensor:
        """Squared distances in float32, [rows, columns]."""
        products = self._shifted.index_select(0, rows) @ (other._shifted.index_select(0, columns) * -2).T
        return products.add_(self.squares[rows, None]).add_(other.squares[columns])

    def exact(self, rows: Tensor, other: "_Points", columns: Tensor) -> Tensor:
        """Squared distances of pairs in float64, of the shape that `rows` and `columns` broadcast to."""
        return (self._points[rows].double() - other._points[columns].double()).square().sum(dim=-1)


@dataclass(frozen=True)
class _Pairs:
    """Points that may be in balls, with their float32 squared distances from the centres."""

    points: Tensor
    balls: Tensor
    distances: Tensor

    @staticmethod
    def sorted(parts: "list[_Pairs]") -> "_Pairs":
        """All of them by point, the nearest ball of each first."""
        columns = zip(*((part.points, part.balls, part.distances) for part in parts), strict=True)
        everything = _Pairs(*(torch.cat(column) for column in columns))
        everything = everything[everything.distances.argsort()]
        return everything[everything.points.argsort(stable=True)]

    def by_point(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Balls and distances of each point."""
        counts = self.points.unique_consecutive(return_counts=True)[1].tolist()
        return zip(self.balls.split(counts), self.distances.split(counts), strict=True)

    def __getitem__(self, chosen: Tensor) -> "_Pairs":
        return _Pairs(self.points[chosen], self.balls[chosen], self.distances[chosen])


class _Balls:
    """A ball round each point of a set, to its third neighbour; measured when somebody needs it.

    Points are compared when one of them is measured: a measured one with all others, another one with the measured.
    The nearest of those are kept. `radii` are squared, float64 [N], and only those of the `measured` mean something.
    """

    def __init__(self, centres: _Points) -> None:
        self.centres = centres
        self.radii = torch.zeros(len(centres), dtype=torch.float64)
        self.measured = torch.zeros(len(centres), dtype=torch.bool)
        keep = min(NUM_NEIGHBOURS + SPARE_NEIGHBOURS, len(centres) - 1)
        self._bounds = torch.full((len(centres),), torch.inf)
        self._nearest = torch.full((len(centres), keep), torch.inf)
        self._indices = torch.zeros(len(centres), keep, dtype=torch.long)

    def measure(self, rows: Tensor) -> None:
        """Find the radii of balls that are not measured yet."""
        self._offer(rows, rows, self.centres.distances(rows, self.centres, rows).fill_diagonal_(torch.inf))
        self.measured[rows] = True
        for columns in (~self.measured).nonzero()[:, 0].split(BLOCK_ROWS):
            distances = self.centres.distances(rows, self.centres, columns)
            self._offer(rows, columns, distances)
            self._offer(columns, rows, distances.T.contiguous())
        self.radii[rows] = self._third_in_float64(rows)

    def _offer(self, rows: Tensor, columns: Tensor, distances: Tensor) -> None:
        """Keep of `rows` what is among the nearest so far."""
        keep = self._nearest.shape[1]
        found, places = distances.topk(min(keep, len(columns)), dim=1, largest=False)
        indices = torch.cat([self._indices[rows], columns[places]], dim=1)
        self._nearest[rows], chosen = torch.cat([self._nearest[rows], found], dim=1).topk(keep, dim=1, largest=False)
        self._indices[rows] = indices.gather(1, chosen)

    def _third_in_float64(self, rows: Tensor) -> Tensor:
        """Among the candidates of points that were compared with all; those that may have lost it are done in full.

        Only candidates that float32 cannot tell from the third are computed again.
        """
        nearest, indices = self._nearest[rows], self._indices[rows]
        slack = self.centres.slack[rows, None] + self.centres.slack[indices]
        lower, upper = nearest - slack, nearest + slack
        least, most = (bound.kthvalue(NUM_NEIGHBOURS, dim=1, keepdim=True).values for bound in (lower, upper))
        surely_nearer = upper < least
        values = torch.where(surely_nearer, -torch.inf, torch.inf).double()
        for pairs in (~surely_nearer & (lower <= most)).nonzero().split(BLOCK_ROWS):
            row, place = pairs.unbind(dim=1)
            values[row, place] = self.centres.exact(rows[row], self.centres, indices[row, place])
        radii = values.kthvalue(NUM_NEIGHBOURS, dim=1).values
        if nearest.shape[1] < len(self.centres) - 1:
            least_left_out = nearest[:, -1].double() - self.centres.slack[rows] - self.centres.slack.max()
            for row in ((radii > 0) & (radii >= least_left_out)).nonzero()[:, 0].tolist():  # nothing is nearer than 0
                everything = self.centres.exact(rows[row, None], self.centres, torch.arange(len(self.centres)))
                everything[rows[row]] = torch.inf
                radii[row] = everything.kthvalue(NUM_NEIGHBOURS).values
        return radii

    def mark(self, inside: Tensor, points: _Points, rows: Tensor, columns: Tensor, distances: Tensor) -> None:
        """Note in `inside` which of points[rows] are in a measured ball of `columns`, given float32 distances."""
        radii = self.radii[columns].float()
        slack = points.slack[rows] + (self.centres.slack[columns] + radii * torch.finfo(torch.float32).eps).max()
        margin = (distances - radii).amin(dim=1)
        inside[rows[margin <= -slack]] = True
        undecided = (~inside[rows] & (margin <= slack)).nonzero()[:, 0]
        doubtful = (distances[undecided] - radii <= slack[undecided, None]).nonzero()
        self.mark_pairs(inside, points, rows[undecided[doubtful[:, 0]]], columns[doubtful[:, 1]])

    def mark_pairs(self, inside: Tensor, points: _Points, rows: Tensor, columns: Tensor) -> None:
        """Note in `inside` which points are in a measured ball, pair by pair in float64."""
        for row, column in zip(rows.split(BLOCK_ROWS), columns.split(BLOCK_ROWS), strict=True):
            inside[row[points.exact(row, self.centres, column) <= self.radii[column]]] = True

    def bound(self, rows: Tensor, columns: Tensor) -> None:
        """Bound the radii of `rows` by the distances to some centres, which are three or more besides their own."""
        distances = self.centres.distances(rows, self.centres, columns)
        distances[rows[:, None] == columns] = torch.inf
        third = distances.topk(NUM_NEIGHBOURS, dim=1, largest=False).values[:, -1]
        self._bounds[rows] = torch.minimum(self._bounds[rows], third)

    def limits(self, rows: Tensor, points: _Points) -> Tensor:
        """Float32 squared distances beyond which none of `points` is in the balls, whatever their radii will be."""
        bounds = torch.minimum(self._bounds[rows], self._nearest[rows, NUM_NEIGHBOURS - 1])
        return bounds + 2 * self.centres.slack[rows] + self.centres.slack.max() + points.slack.max()


def _decide(inside: Tensor, points: _Points, balls: _Balls, found: list[_Pairs]) -> None:
    """Note in `inside` which points are in a ball that is not measured; those of `found` are all that may be."""
    pairs = _Pairs.sorted(found)
    for near, distances in pairs.by_point():
        reaching = near[distances <= balls.limits(near, points)]
        if len(near) > NUM_NEIGHBOURS and len(reaching):
            balls.bound(reaching, near[:GROUP_ROWS])
    while True:
        possible = pairs.distances <= balls.limits(pairs.balls, points)
        pairs = pairs[possible & ~inside[pairs.points] & ~balls.measured[pairs.balls]]
        if not len(pairs.points):
            return
        is_nearest = pairs.points.diff(prepend=torch.tensor([-1])) != 0
        wanted, votes = pairs.balls[is_nearest].unique(return_counts=True)
        balls.measure(wanted[votes.topk(min(ROUND_ROWS, len(wanted))).indices])
        measured = pairs[balls.measured[pairs.balls]]
        balls.mark_pairs(inside, points, measured.points, measured.balls)


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


def _blocks(num: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_ROWS, num)) for start in range(0, num, BLOCK_ROWS)]


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
