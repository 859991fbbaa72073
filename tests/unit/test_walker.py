"""What the second process tells is taken ahead of who asks, and no further than memory allows."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from modelcached.store import walker


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> walker._Answers:
    monkeypatch.setattr(walker, "_AHEAD_BYTES", 100)
    return walker._Answers()


def test_what_was_put_is_taken_in_whatever_pieces(answers: walker._Answers) -> None:
    answers.put(b"abc")
    answers.put(b"defgh")
    assert [answers.take(2), answers.take(5), answers.take(1)] == [b"ab", b"cdefg", b"h"]


def test_no_more_is_taken_ahead_than_allowed(answers: walker._Answers) -> None:
    answers.put(bytes(100))
    ahead = in_thread(lambda: answers.put(b"x"))
    ahead.join(0.05)
    assert ahead.is_alive(), "it waits for room"
    answers.take(1)
    ahead.join(5)
    assert not ahead.is_alive()


def test_who_wants_more_than_that_gets_it(answers: walker._Answers) -> None:
    taken: list[bytes] = []
    asking = in_thread(lambda: taken.append(answers.take(350)))
    for _ in range(4):
        answers.put(bytes(90))
    asking.join(5)
    assert len(taken[0]) == 350


def test_the_end_wakes_both_sides(answers: walker._Answers) -> None:
    answers.put(bytes(100))
    ahead = in_thread(lambda: answers.put(b"x"))
    failed: list[type[BaseException]] = []

    def ask() -> None:
        try:
            answers.take(1000)
        except EOFError as error:
            failed.append(type(error))

    asking = in_thread(ask)
    answers.end()
    ahead.join(5)
    asking.join(5)
    assert (ahead.is_alive(), failed) == (False, [EOFError])
