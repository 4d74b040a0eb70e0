"""Files that are there whole or not at all, and journals of finished work."""

from pathlib import Path

import numpy as np
import pytest

from megadit import files, journal


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_else(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    files.write_text(path, "old")

    def write_half() -> None:
        with files.writing(path, shared) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_writers_that_share_a_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.writing(path, shared=True) as first, files.writing(path, shared=True) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # whose body ended last
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_record_of_an_array_is_none_and_spoils_none(tmp_path: Path) -> None:
    dtype = np.dtype([("number", "<i8")])
    records = np.arange(4).view(dtype)
    for rank in (0, 0, 1):  # rank 0 twice: killed in its second record
        with journal.appending(tmp_path, rank, 2, dtype) as append:
            append(records[2 * rank : 2 * rank + 2].tobytes())
        if rank == 0:
            with (tmp_path / "rank-0-of-2.bin").open("ab") as file:
                file.write(b"half")
    found = [array["number"].tolist() for array in journal.read_arrays(tmp_path, dtype)]
    assert found == [[0, 1, 0, 1], [2, 3]]
