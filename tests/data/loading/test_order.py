import numpy as np
import pytest
from hypothesis import given, strategies as st

from megadit.data.loading.order import Order

orders = st.builds(
    lambda K, C, G, groups, rest, seed: Order(K * C * G * groups + rest, seed, K, C, G),
    K=st.integers(1, 4),
    C=st.integers(1, 5),
    G=st.integers(1, 3),
    groups=st.integers(1, 4),
    rest=st.integers(0, 30),
    seed=st.integers(0, 2**63 - 1),
)


@given(orders, st.integers(0, 5))
def test_an_epoch_uses_each_sample_at_most_once(order: Order, epoch: int) -> None:
    per_stream = order.epoch_samples // order.num_streams
    pairs = np.concatenate([order.stream_samples(k, epoch * per_stream, per_stream) for k in range(order.num_streams)])
    assert (pairs[:, 0] == epoch).all()
    samples = pairs[:, 1]
    assert len(np.unique(samples)) == len(samples) == order.epoch_samples
    assert samples.min() >= 0
    assert samples.max() < order.num_samples
    # What sits out is less than one more round of groups, and less than one chunk.
    left = order.num_samples - order.epoch_samples
    assert left < order.num_streams * order.group_samples + order.chunk_samples


@given(orders, st.integers(1, 4), st.integers(0, 40))
def test_a_step_takes_the_next_share_of_every_stream(order: Order, share: int, step: int) -> None:
    batch = order.step(step, share * order.num_streams).reshape(order.num_streams, share, 2)
    for stream in range(order.num_streams):
        whole = order.stream_samples(stream, 0, (step + 1) * share)
        np.testing.assert_array_equal(batch[stream], whole[step * share :])


@given(orders, st.integers(0, 60))
def test_groups_are_whole_chunks_of_neighbours(order: Order, number: int) -> None:
    _, samples = order.group(0, number)
    chunk = order.chunk_samples
    assert len(samples) == order.group_samples
    # Laid out in a circle, the samples fall into runs of neighbours that are each a multiple of C long.
    inside = np.zeros(order.num_samples, dtype=bool)
    inside[samples] = True
    if not inside.all():
        ring = np.roll(inside, -int(np.flatnonzero(~inside)[0]))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ring.astype(int), [0]])))
        assert ((edges[1::2] - edges[::2]) % chunk == 0).all()


def test_what_sits_out_changes_with_the_epoch() -> None:
    order = Order(num_samples=50, seed=1, num_streams=2, chunk_samples=4, chunks_per_group=2)
    unused = [set(range(50)) - set(order.step(epoch, order.epoch_samples)[:, 1].tolist()) for epoch in range(8)]
    assert all(len(left) == 2 for left in unused)
    assert len(set().union(*unused)) > 4


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    first, other = (Order(240, seed, 2, 3, 2) for seed in (0, 1))
    assert not np.array_equal(first.step(0, 24), other.step(0, 24))
    assert not np.array_equal(first.step(0, 240)[:, 1], first.step(1, 240)[:, 1])


def test_the_order_is_what_it_was() -> None:
    """Changing these numbers breaks the continuation of every run there is."""
    assert Order(100, 7, 2, 3, 2).step(5, 8).tolist() == [
        [0, 78],
        [0, 56],
        [0, 77],
        [0, 55],
        [0, 58],
        [0, 60],
        [0, 9],
        [0, 59],
    ]


def test_eleven_million_samples() -> None:
    order = Order(11_000_000, 0, 64, 16, 8)
    pairs = order.step(200_000, 256)
    assert pairs.shape == (256, 2)
    assert set(pairs[:, 0]) == {200_000 * 256 // order.epoch_samples}


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"23 samples are too few .* = 24; lower one of the three"):
        Order(23, 0, 2, 3, 4)
    with pytest.raises(ValueError, match=r"num_streams 2 must divide training.batch_size 9"):
        Order(24, 0, 2, 3, 4).step(0, 9)
