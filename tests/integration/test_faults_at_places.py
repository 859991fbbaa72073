"""I2, I5 and I6: whatever breaks at whatever place of a large file costs at most one range, and ends in time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.fault_matrix import MATRIX, PLACES, SIZE, Row
from tests.integration.matrix import WHOLE, Course, course


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """What one row breaks for good would be seen in the next."""
    with course(tmp_path_factory.mktemp("course")) as made:
        yield made


@pytest.mark.deep
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place:.0%}")
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.name)
def test_a_fault_at_a_place_of_a_file_costs_one_range_at_most(shared: Course, row: Row, place: float) -> None:
    faults = shared.run(row, {"at_file_byte": int(SIZE * place) + 1, "times": 1}, WHOLE)
    assert [fault.fired for fault in faults] == [1] * len(faults)
