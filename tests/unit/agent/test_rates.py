"""How fast counters grow."""

from __future__ import annotations

from endpoint_worker.agent.rates import SAMPLE_S, WINDOW_S, Rates


def test_a_busy_agent() -> None:
    counters = {"done": 0}
    rates = Rates(lambda: counters, 0.0)
    for second in range(1, 31):
        assert rates.due == second * SAMPLE_S
        rates.sample(float(second))
        counters["done"] += 100
        assert len(rates._samples) <= WINDOW_S / SAMPLE_S + 2
    over_s, grown = rates.now(30.5)
    assert WINDOW_S <= over_s <= WINDOW_S + SAMPLE_S
    assert 90 <= grown["done"] <= 110


def test_a_young_agent_is_measured_since_its_start() -> None:
    counters = {"done": 0}
    rates = Rates(lambda: counters, 100.0)
    counters["done"] = 8
    assert rates.now(104.0) == (4.0, {"done": 2.0})


def test_an_idle_agent_takes_no_samples_and_tells_over_what_time_it_did_nothing() -> None:
    counters = {"done": 0}
    rates = Rates(lambda: counters, 0.0)
    for second in range(1, 20):
        rates.sample(float(second))
        counters["done"] += 100
    assert rates.now(3600.0)[1]["done"] < 1
    rates.sample(3600.0)
    counters["done"] += 50
    counters["new"] = 7
    over_s, grown = rates.now(3611.0)
    assert over_s == 11.0
    assert grown == {"done": 50 / 11, "new": 7 / 11}
