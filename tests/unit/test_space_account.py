"""The account of bytes: what du sees once an inode, what is promised, and what is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from modelcached.ledger.space import Amount, Limits, Space

ROOMY = 10_000


def space(budget: int = 1000, min_free: int = 100, set_aside: int = 0) -> Space:
    return Space(Limits(budget, min_free, set_aside))


def test_an_inode_counts_once_however_many_areas_have_it() -> None:
    account = space()
    account.set_area("partial", {1: 100, 2: 50})
    account.set_area("models--a", {1: 100, 3: 7})
    assert account.used_bytes == 157
    assert (account.area_bytes("partial"), account.area_bytes("models--a")) == (150, 107)


def test_a_file_that_moves_is_never_counted_twice_nor_lost() -> None:
    account = space()
    account.set_area("partial", {1: 100})
    account.add("models--a", 1, 100)
    assert account.used_bytes == 100
    account.set_area("partial", {})
    assert account.used_bytes == 100
    account.set_area("models--a", {})
    assert (account.used_bytes, account.areas()) == (0, [])


def test_measuring_again_replaces_what_was_believed() -> None:
    account = space()
    account.set_area("a", {1: 100, 2: 50})
    account.set_area("a", {2: 60, 3: 1})
    assert account.used_bytes == 61
    account.set_area("b", {2: 80})  # it grew since the last look at a
    assert account.used_bytes == 81
    account.set_area("b", {})
    assert account.used_bytes == 81


def test_adding_what_is_there_already_only_changes_its_size() -> None:
    account = space()
    account.add("a", 1, 10)
    account.add("a", 1, 30)
    assert (account.used_bytes, account.area_bytes("a")) == (30, 30)
    account.set_area("a", {})
    assert account.used_bytes == 0


def test_what_is_added_during_a_look_is_not_lost_to_it() -> None:
    account = space()
    account.begin_look("a")
    account.add("a", 1, 10)  # published after the look had passed its directory
    account.set_area("a", {2: 5})
    assert account.used_bytes == 15
    account.begin_look("a")
    account.set_area("a", {2: 5})  # the next look says what is so
    assert account.used_bytes == 5


def test_a_reservation_is_spent_and_its_rest_given_back() -> None:
    account = space()
    reservation = account.reserve(Amount(300), "model")
    assert (account.reserved_bytes, account.reservations()) == (300, [reservation])
    reservation.spend(120)
    assert (reservation.remaining_bytes, account.reserved_bytes) == (180, 180)
    reservation.spend(1000)
    assert account.reserved_bytes == 0, "more than was promised cannot be spent"
    reservation.release()
    reservation.release()
    assert (account.reserved_bytes, account.reservations()) == (0, [])


def test_releasing_one_reservation_leaves_the_others() -> None:
    account = space()
    first, second = account.reserve(Amount(300), "first"), account.reserve(Amount(200), "second")
    first.release()
    assert (account.reserved_bytes, account.reservations()) == (200, [second])


def test_room_is_what_the_budget_leaves() -> None:
    account = space(budget=1000, set_aside=50)
    account.set_area("a", {1: 400})
    account.reserve(Amount(300), "model")
    assert account.room_bytes(ROOMY) == 1000 - 50 - 400 - 300


def test_room_is_what_the_disk_leaves_above_min_free() -> None:
    account = space(budget=ROOMY, min_free=100)
    account.set_area("a", {1: 400})
    account.reserve(Amount(300), "model")
    assert account.room_bytes(500) == 500 - 100 - 300, "what is promised has not left the disk yet"


def test_room_is_negative_when_over() -> None:
    account = space(budget=1000)
    account.set_area("a", {1: 1200})
    assert account.room_bytes(ROOMY) == -200
    assert space(min_free=100).room_bytes(40) == -60


def test_spending_moves_bytes_from_promised_to_used_and_leaves_the_room_as_it_was() -> None:
    account = space()
    reservation = account.reserve(Amount(300), "model")
    room = account.room_bytes(ROOMY)
    account.add("partial", 1, 300)
    reservation.spend(300)
    assert account.room_bytes(ROOMY - 300) == room


def test_a_part_of_a_reservation_outlives_the_whole() -> None:
    space = Space(Limits(1000, 0))
    whole = space.reserve(Amount(600), "org/a")
    part = whole.split(Amount(400))
    whole.release()
    assert space.reserved_bytes == 400
    part.spend(100)
    part.release()
    assert space.reserved_bytes == 0
    assert space.reservations() == []


def test_what_could_not_be_seen_counts_as_before() -> None:
    account = space()
    account.set_area("a", {1: 100, 2: 50})
    account.set_area("a", {2: 60, 3: 1}, keep=True)
    assert account.used_bytes == 161
    account.set_area("a", {3: 1})
    assert account.used_bytes == 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.dictionaries(st.integers(1, 4), st.integers(0, 9)), st.booleans()))
)
def test_used_is_the_last_known_size_of_each_inode_that_any_area_has(
    steps: list[tuple[str, dict[int, int], bool]],
) -> None:
    account, areas, sizes = space(), dict[str, set[int]](), dict[int, int]()
    for name, found, measured in steps:
        if measured:
            account.set_area(name, found)
            areas[name] = set(found)
        else:
            for inode, size in found.items():
                account.add(name, inode, size)
            areas.setdefault(name, set()).update(found)
        sizes |= found
        assert account.used_bytes == sum(sizes[inode] for inode in set().union(*areas.values()))


def test_inodes_are_promised_like_bytes() -> None:
    account = Space(Limits(1000, 0, min_free_inodes=16))
    whole = account.reserve(Amount(600, 50), "org/a")
    part = whole.split(Amount(400, 2))
    assert account.room_inodes(100) == 100 - 16 - 50
    part.spend_inodes()
    assert account.room_inodes(98) == 98 - 16 - 48, "they have left the disk"
    whole.release()
    part.release()
    assert (account.reserved_inodes, account.room_inodes(98)) == (0, 82)
    assert account.room_inodes(None) > 10**9, "a filesystem that makes them as they are wanted"
