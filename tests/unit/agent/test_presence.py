"""Who is away, and until when."""

from __future__ import annotations

from endpoint_worker.agent.presence import CLIENT, ENDPOINT, SEEK_S, Presence

CAROL, POLARIS = b"c" * 16, b"p" * 16


def presence() -> Presence:
    return Presence(lease_s=100.0, endpoint_lost_s=10.0)


def test_nobody_away_is_no_deadline() -> None:
    here = presence()
    assert here.deadline is None
    here.is_back(CAROL)
    assert here.deadline is None


def test_a_client_is_given_up_when_its_lease_is_over_and_not_looked_for() -> None:
    here = presence()
    here.is_away(CAROL, CLIENT, 5.0)
    assert here.deadline == 105.0
    assert here.due(104.9) == ([], [])
    assert here.due(105.0) == ([(CAROL, CLIENT)], [])
    assert here.deadline is None


def test_who_comes_back_is_not_given_up() -> None:
    here = presence()
    here.is_away(CAROL, CLIENT, 5.0)
    here.is_back(CAROL)
    assert here.deadline is None
    assert here.due(1000.0) == ([], [])


def test_to_be_told_again_does_not_lengthen_the_absence() -> None:
    here = presence()
    here.is_away(CAROL, CLIENT, 5.0)
    here.is_away(CAROL, CLIENT, 50.0)
    assert here.deadline == 105.0


def test_an_endpoint_is_looked_for_until_it_is_given_up() -> None:
    here = presence()
    here.is_away(POLARIS, ENDPOINT, 0.0)
    here.is_away(CAROL, CLIENT, 0.0)
    now, sought = 0.0, 0
    while (now := here.deadline or 0.0) < 10.0:
        assert here.due(now) == ([], [POLARIS])
        sought += 1
    assert sought == 10.0 // SEEK_S - 1 or sought == 10.0 // SEEK_S
    assert here.due(now).given_up == [(POLARIS, ENDPOINT)]
    assert here.deadline == 100.0, "and then nobody looks for it any more"
