"""Ratios of calls that take turns, on a clock that the test winds."""

from __future__ import annotations

import pytest

from benchmarks import timing


class Clock:
    """Time passes only inside the functions it makes; ``load`` is what the machine's other jobs cost."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def function(self, name, cost, load=lambda calls: 1.0):
        def call():
            self.calls.append(name)
            self.now += cost * load(len(self.calls))

        return call


def test_a_steady_ratio_takes_the_least_rounds_in_turning_order(monkeypatch):
    clock = Clock(monkeypatch)
    found = timing.paired_ratio(clock.function("a", 0.3), clock.function("b", 0.2), least=3, budget=100)
    assert found.ratio == found.low == found.high == pytest.approx(1.5)
    assert (found.seconds_a, found.seconds_b, found.rounds) == pytest.approx((0.3, 0.2, 3))
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab"


def test_a_load_that_comes_and_goes_does_not_change_the_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    slow = lambda calls: 3.0 if calls // 8 % 2 else 1.0  # noqa: E731
    found = timing.paired_ratio(clock.function("a", 2, slow), clock.function("b", 1, slow), budget=200)
    assert found.ratio == pytest.approx(2)


def test_noise_takes_more_rounds_up_to_the_budget(monkeypatch):
    clock = Clock(monkeypatch)
    noise = lambda calls: 1 + 0.5 * (calls * 0.618 % 1)  # noqa: E731
    found = timing.paired_ratio(clock.function("a", 1, noise), clock.function("b", 1, noise), budget=30)
    assert found.rounds > 5 and 30 < clock.now < 40
    few = timing.paired_ratio(clock.function("a", 1, noise), clock.function("b", 1, noise), most=6)
    assert few.rounds <= 6


def test_one_pair_alone():
    found = timing.compare({"a": [3.0], "b": [2.0]}, "a", "b")
    assert (found.ratio, found.low, found.high, found.error) == (1.5, 1.5, 1.5, 0)
