"""What doctor makes of what was found: the way that is chosen, dialling back, the tables, and answers that are none."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from gcref import ids
from gcref.carriers import keys
from gcref.directory import doctor, trial
from gcref.directory.doctor import DIAL_BACK, Direction
from gcref.directory.records import EndpointRecord
from gcref.directory.trial import Rung
from gcref.directory.visit import Postbox
from gcref.errors import ConfigError, EndpointLostError

ALL = frozenset(("ipc", "direct", "broker"))
NO_DIRECT = Rung("direct", "tcp://10.0.0.1:4", problem="no answer", remedy="open the port")
DIRECT = Rung("direct", "tcp://10.0.0.2:5", 0.001, 5e7)
BROKER = Rung("broker", "mailbox://00", 0.004, 2e7)
NO_IPC = Rung("ipc", "", problem="not on the same machine")


def record(name: str, *control: str, mailbox: bool = False, **more: Any) -> EndpointRecord:
    key = keys.generate().public.decode("ascii")
    return EndpointRecord(ids.new_id(), name, key, control, running=True, mailbox=mailbox, **more)


A, B = record("polaris"), record("midway")


def told(*rungs: Rung, **more: Any) -> dict[str, Any]:
    return {"rungs": [rung._asdict() for rung in rungs], **more}


def both(there: Any, back: Any) -> tuple[Direction, Direction]:
    one, other = doctor._told(A, B, there), doctor._told(B, A, back)
    return doctor._with_dial_back(one, other), doctor._with_dial_back(other, one)


def carrier(direction: Direction) -> str | None:
    return None if direction.chosen is None else direction.chosen.carrier


def test_who_cannot_dial_is_dialled_back() -> None:
    there, back = both(told(NO_IPC, NO_DIRECT, BROKER), told(NO_IPC, DIRECT, BROKER))
    assert (carrier(there), carrier(back)) == (DIAL_BACK, "direct")
    assert there.chosen is not None
    assert (there.chosen.latency_s, there.chosen.bytes_per_s) == (0.001, 5e7)
    assert there.chosen.address == "midway dials tcp://10.0.0.2:5"


def test_without_mail_nobody_can_be_asked_to_dial_back() -> None:
    no_mail = Rung("broker", "", problem="it has no mailbox")
    there, _back = both(told(NO_DIRECT, no_mail), told(DIRECT, BROKER))
    assert there.chosen is None
    assert "nobody can be asked" in doctor.text([there])


def test_where_nobody_can_dial_the_broker_is_chosen_and_what_to_do_is_told() -> None:
    there, back = both(told(NO_DIRECT, BROKER), told(NO_DIRECT, BROKER))
    assert (carrier(there), carrier(back)) == ("broker", "broker")
    shown = doctor.text([there, back])
    assert shown.startswith("polaris → midway: broker\n")
    assert "►  broker     4.0 ms   20 MB/s" in shown
    assert "tcp://10.0.0.1:4: no answer" in shown
    assert "midway cannot dial polaris either" in shown
    assert shown.count("to do: direct (tcp://10.0.0.1:4): open the port") == 2


def test_what_could_be_better_is_told_and_no_more() -> None:
    shown = doctor.text(
        [Direction(doctor.HERE, "midway", [DIRECT, Rung("broker", "", problem="no", remedy="hub")])]
    )
    assert "to do" not in shown


def test_json_has_all_of_it() -> None:
    there, _back = both(told(NO_DIRECT, BROKER), EndpointLostError("away"))
    (found,) = json.loads(doctor.as_json([there]))
    assert (found["from"], found["to"], found["chosen"]) == ("polaris", "midway", "broker")
    assert [way["works"] for way in found["ways"]] == [False, False, True]
    assert found["ways"][0]["remedy"] == "open the port"


@pytest.mark.parametrize(
    "answer",
    [
        EndpointLostError("it does not answer"),
        {"error": "AuthError: as a peer"},
        {"rungs": 5},
        {"rungs": [5]},
        {"rungs": [{"carrier": 5}]},
        {"rungs": [{**BROKER._asdict(), "latency_s": "fast"}]},
        {"rungs": [], "error": 7},
        [],
        None,
    ],
)
def test_an_agent_that_cannot_be_asked_or_talks_nonsense_is_an_error_of_its_direction(answer: Any) -> None:
    there, back = both(answer, told(DIRECT, BROKER))
    assert there.error
    assert there.chosen is None
    assert there.error in doctor.text([there])
    assert carrier(back) == "direct"


def test_a_rung_survives_its_journey_and_is_bounded() -> None:
    for rung in (NO_DIRECT, DIRECT):
        assert Rung.from_map({**rung._asdict(), "of the future": 1}) == rung
    assert len(Rung.from_map(NO_DIRECT._replace(problem="x" * 10_000)._asdict()).problem) == 2000


def no_mail() -> Postbox:
    raise ConfigError("no hub is named on this side")


def tried(of: EndpointRecord, allowed: frozenset[str] = ALL) -> dict[str, Rung]:
    return {rung.carrier: rung for rung in trial.try_all(of, keys.generate(), allowed, no_mail)}


def test_what_is_not_offered_is_said() -> None:
    ways = tried(record("polaris"))
    assert "same machine" in ways["ipc"].problem
    assert "no TCP port" in ways["direct"].problem
    assert "no mailbox" in ways["broker"].problem
    assert "GCREF_HUB_URL" in ways["broker"].remedy


def test_what_the_settings_leave_out_is_not_tried() -> None:
    ways = tried(record("polaris", "tcp://127.0.0.1:9", mailbox=True), frozenset(("ipc",)))
    assert "settings on this side" in ways["direct"].problem
    assert "settings on this side" in ways["broker"].problem


def test_a_port_where_nobody_listens_and_a_name_that_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ways = tried(record("polaris", f"tcp://127.0.0.1:{port}", mailbox=True))
    assert ways["direct"].problem.startswith("refused")
    assert "advertise" in ways["direct"].remedy
    assert "no hub is named" in ways["broker"].problem
    ways = tried(record("polaris", "tcp://no-such-host.invalid:4000"))
    assert "cannot be resolved" in ways["direct"].problem
