"""One rank of two, of which the second fails where the first does not: both must hear of it."""

from megadit.training.ranks import on_every_rank, process_group, rank


def main() -> str:
    def fail_on_the_second() -> int:
        if rank() == 1:
            raise FileNotFoundError("rank 1: no such file")
        return rank()

    with process_group(needed=True):
        assert on_every_rank(rank) == [0, 1]
        try:
            on_every_rank(fail_on_the_second)
        except FileNotFoundError as error:
            return str(error)
    return "nothing was raised"
