"""One rank of two, of which the second fails where the first does not: both must hear of it."""

from megadit.distributed import process_group


def main() -> str:
    with process_group(needed=True) as topology:

        def fail_on_the_second() -> int:
            if topology.rank == 1:
                raise FileNotFoundError("rank 1: no such file")
            return topology.rank

        assert topology.on_every(lambda: topology.rank) == [0, 1]
        try:
            topology.on_every(fail_on_the_second)
        except FileNotFoundError as error:
            return str(error)
    return "nothing was raised"
