"""What is at hand of a stream: everything once at least, nothing too often, fresh text first; the same after a kill."""

import json

import numpy as np
import pytest

from mmphi.training.replay_buffer import ReplayBuffer


def texts(first, count=4, length=10):
    """Documents whose every id is their own number."""
    return [np.full(length + 1, first + i, np.int64) for i in range(count)]


def source(window, groups):
    """Gives a window one group after the other."""
    left = iter(groups)

    def more():
        found = next(left, None)
        if found is None:
            if window.exhausted:
                raise StopIteration
            return False
        window.add(*found)
        return True

    return more


def seen_by(window, more, count):
    """Numbers of the documents that make up so many predictions, one for each of them."""
    return [int(i) for part in window.take(count, more) for i in part[1:]]


def groups(count=6, documents=4):
    return [(f"g{n}", texts(n * documents, documents)) for n in range(count)]


def test_fresh_text_comes_first_and_in_its_order():
    window = ReplayBuffer(tokens=10_000, passes=4, seed=0)
    numbers = seen_by(window, source(window, groups()), 240)
    assert numbers[::10] == list(range(24))


def test_what_was_seen_comes_again_when_nothing_is_fresh_in_another_order_each_time():
    window = ReplayBuffer(tokens=10_000, passes=3, seed=0)
    more = source(window, groups(2))
    first, second, third = (seen_by(window, more, 80)[::10] for _ in range(3))
    assert first == list(range(8))
    assert sorted(second) == sorted(third) == first
    assert first != second != third != first
    assert window.exhausted
    assert window.counted() == {3: 80}


def test_nothing_is_seen_more_often_than_it_may():
    window = ReplayBuffer(tokens=10_000, passes=2, seed=0)
    with pytest.raises(StopIteration):
        seen_by(window, source(window, groups(2)), 161)


def test_a_small_window_lets_the_oldest_go_and_only_what_was_seen():
    window = ReplayBuffer(tokens=90, passes=4, seed=0)
    more = source(window, groups(6))
    seen_by(window, more, 240)
    assert len(window) <= 120
    assert [group.name for group in window.groups] == ["g4", "g5"]
    assert sum(window.counted().values()) == 240
    assert 0 not in window.counted()


def test_documents_are_cut_where_rows_end_and_go_on_in_the_next_one():
    window = ReplayBuffer(tokens=10_000, passes=1, seed=0)
    more = source(window, [("g0", [np.arange(11), np.arange(100, 111)])])
    rows = [window.take(7, more) for _ in range(2)]
    assert [part.tolist() for part in rows[0]] == [list(range(8))]
    assert [part.tolist() for part in rows[1]] == [[7, 8, 9, 10], [100, 101, 102, 103, 104]]


def test_what_has_nothing_to_predict_is_left_out():
    window = ReplayBuffer(tokens=10_000, passes=1, seed=0)
    more = source(window, [("g0", [np.array([3]), np.arange(5)])])
    assert seen_by(window, more, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("after", [0, 3, 10, 17, 31])
def test_put_back_it_goes_on_as_if_nothing_had_been(after):
    """Whatever was half seen, and whoever has left by then."""

    def begun():
        window = ReplayBuffer(tokens=100, passes=3, seed=5)
        return window, source(window, groups(8))

    straight, more = begun()
    expected = [seen_by(straight, more, 13) for _ in range(35)]
    window, more = begun()
    for _ in range(after):
        seen_by(window, more, 13)
    state = json.loads(json.dumps(window.state()))
    again = ReplayBuffer(tokens=100, passes=3, seed=5)
    known = dict(groups(8))
    again.load(state, lambda name: known[name])
    rest = [each for each in groups(8) if each[0] not in {f"g{n}" for n in range(window._arrived)}]
    further = source(again, rest)
    assert [seen_by(again, further, 13) for _ in range(35 - after)] == expected[after:]
    assert again.counted() == straight.counted()
