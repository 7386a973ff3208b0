"""Work in lockstep runs one at a time, is answered together and always ends."""

import contextvars
import threading

import pytest

from finetune_jax.sweeps.populations.lockstep import Lockstep, Request

SET = contextvars.ContextVar("set", default="nothing")


class Case:
    """Some works that ask for doubles, and what has happened."""

    def __init__(self):
        self.lockstep, self.events, self.groups = Lockstep(), [], []

    def double(self, given):
        self.groups.append(tuple(given))
        return [2 * number for number in given]

    def ask(self, number, kind="double", urgency=0):
        request = Request(
            signature=kind, given=number, answer=self.double, urgency=urgency
        )
        return self.lockstep.ask(request)

    def work(self, number, rounds):
        def work():
            try:
                for _ in range(rounds):
                    self.events.append((number, self.ask(number)))
            finally:
                self.events.append((number, "end"))

        return work


def test_what_waits_for_the_same_is_answered_at_once_in_order():
    case = Case()
    case.lockstep.run([case.work(1, 1), case.work(2, 3), case.work(3, 2)])
    assert case.groups == [(1, 2, 3), (2, 3), (2,)]
    assert case.events == [
        *[(1, 2), (1, "end"), (2, 4), (3, 6), (2, 4), (3, 6), (3, "end")],
        *[(2, 4), (2, "end")],
    ]
    assert case.lockstep.rounds == 3


def test_the_most_urgent_come_first_and_of_these_who_has_waited_longest():
    case = Case()

    def work(number, kinds):
        def work():
            for kind in kinds:
                case.ask(number, kind, urgency=kind != "rows")

        return work

    case.lockstep.run(
        [work(1, ("a", "rows")), work(2, ("a", "rows")), work(3, ("b", "b", "rows"))]
    )
    assert case.groups == [(1, 2), (3,), (3,), (1, 2, 3)]


def test_those_that_differ_in_a_request_are_together_in_the_next():
    case = Case()

    def work(number):
        def work():
            for _ in range(2):
                case.ask(number, f"rows of {number}", urgency=0)
                case.ask(number, "update", urgency=1)

        return work

    case.lockstep.run([work(1), work(2), work(3)])
    assert case.groups == 2 * [(1,), (2,), (3,), (1, 2, 3)]


@pytest.mark.parametrize("where", ["work", "before", "answer"])
def test_an_error_is_raised_and_ends_all_others(where):
    case, before = Case(), threading.active_count()

    def fails():
        if where != "before":
            case.ask(0)
        if where != "answer":
            raise KeyError(where)
        case.ask(None)

    with pytest.raises(TypeError if where == "answer" else KeyError):
        case.lockstep.run([case.work(1, 9), fails, case.work(2, 9)])
    assert threading.active_count() == before
    ended = {number for number, event in case.events if event == "end"}
    assert ended == ({1} if where == "before" else {1, 2})


def test_whoever_ends_where_it_waits_may_ask_in_vain_once_more():
    case, seen = Case(), []

    def stubborn():
        try:
            case.ask(1)
        finally:
            try:
                case.ask(1)
            finally:
                seen.append("end")

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        case.lockstep.run([stubborn, fails])
    assert seen == ["end"] and case.groups == []


def test_work_sees_what_is_set_around_it():
    found, token = [], SET.set("something")
    Lockstep().run([lambda: found.append(SET.get())])
    SET.reset(token)
    assert found == ["something"]
