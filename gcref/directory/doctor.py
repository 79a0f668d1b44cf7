"""`gcref doctor A [B]`: which ways lead from here to A, or between A and B; how fast they are; why the others fail.

    doctor A      this client tries every way to A
    doctor A B    A is asked to try B (TRY), and B to try A; what B can do towards A is how A is dialled back

Source of the words: DESIGN 7, "Which carrier".
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from gcref import config
from gcref.directory import asking, pins, records, trial
from gcref.directory.records import EndpointRecord
from gcref.directory.trial import Rung
from gcref.directory.visit import Visit
from gcref.errors import GcrefError, NotFoundError, RemoteProtocolError
from gcref.wire import messages as m
from gcref.words import duration

DIAL_BACK: Final = "dial-back"
"""The way that is no carrier: the other side is asked, through its mailbox, to dial us."""
HERE: Final = "this client"


class Direction(NamedTuple):
    """How one side reaches the other.

    Attributes:
        caller: who tried: an endpoint's name, or `HERE`.
        called: the endpoint that was to be reached.
        rungs: the ways, best first.
        note: what else there is to know; empty: nothing.
        error: why nothing could be tried; empty: it could.
    """

    caller: str
    called: str
    rungs: list[Rung]
    note: str = ""
    error: str = ""

    @property
    def chosen(self) -> Rung | None:
        """The way that is used; None: there is none."""
        return trial.chosen(self.rungs)


def examine(one: str, other: str | None = None) -> list[Direction]:
    """Try the ways. Takes some seconds.

    Args:
        one: an endpoint: name, `owner/name` or id.
        other: another one; None: this client is the other side.

    Returns:
        One direction, or both.

    Raises:
        NotFoundError: there is no such endpoint.
        ConfigError: the settings are damaged.
        GcrefError: the hub is needed to find it, and does not help.
    """
    allowed = config.client_config().carriers
    with Visit.of_user("doctor") as visit:
        a = _resolve(one, visit)
        if other is None:
            return [_from_here(a, visit, allowed)]
        b = _resolve(other, visit)
        visit.announce()
        questions = {a: [m.TRY, 1, b.id, b.as_json()], b: [m.TRY, 1, a.id, a.as_json()]}
        answers = asking.ask_all(questions, timeout_s=trial.ALL_S, visit=visit)
        there, back = _told(a, b, answers[a.id]), _told(b, a, answers[b.id])
        return [_with_dial_back(there, back), _with_dial_back(back, there)]


def _resolve(name: str, visit: Visit) -> EndpointRecord:
    try:
        return records.resolve(name)
    except NotFoundError:
        if visit.hub is None:
            raise
    record = visit.hub.find(name)
    pins.check(record.id, record.public_key.encode("ascii"), record.name)
    return record


def _from_here(record: EndpointRecord, visit: Visit, allowed: frozenset[str]) -> Direction:
    note = ""
    try:
        visit.announce()
    except GcrefError as error:
        note = f"the hub: {error}"
    rungs = trial.try_all(record, visit.pair, allowed, visit.open_mail, visit.hub is not None)
    return Direction(HERE, record.name, rungs, note)


def _told(caller: EndpointRecord, called: EndpointRecord, answer: Any) -> Direction:
    """What an agent has found."""
    if isinstance(answer, GcrefError):
        return Direction(caller.name, called.name, [], error=f"{caller.name} could not be asked: {answer}")
    try:
        error, note = answer.get("error", ""), answer.get("known", "")
        rungs = [Rung.from_map(told) for told in answer.get("rungs", ())]
        if not (isinstance(error, str) and isinstance(note, str)):
            raise ValueError("a text is none")
    except (ValueError, TypeError, AttributeError) as problem:
        error, note, rungs = f"{RemoteProtocolError.__name__}: {problem}", "", []
    note = note if "not known" in note else ""
    return Direction(caller.name, called.name, rungs, note, error)


def _with_dial_back(there: Direction, back: Direction) -> Direction:
    """Add the way by which the other side dials us: before the broker, and after what we dial ourselves."""
    broker = [rung for rung in there.rungs if rung.carrier == "broker"]
    if there.error or not broker:
        return there
    dialled = next((rung for rung in back.rungs if rung.carrier == "direct" and rung.works), None)
    if not broker[0].works:
        rung = Rung(DIAL_BACK, "", problem="nobody can be asked to: that goes through the broker")
    elif dialled is None:
        rung = Rung(DIAL_BACK, "", problem=f"{there.called} cannot dial {there.caller} either")
    else:
        text = f"{there.called} dials {dialled.address}"
        rung = Rung(DIAL_BACK, text, dialled.latency_s, dialled.bytes_per_s)
    others = [rung for rung in there.rungs if rung.carrier != "broker"]
    return there._replace(rungs=[*others, rung, *broker])


# ------------------------------------------------------------------------------------------------------- telling


def text(found: list[Direction]) -> str:
    """Tables for people, and what to do about what fails."""
    parts = []
    for direction in found:
        chosen = direction.chosen
        verdict = "no way" if chosen is None else _named(chosen)
        lines = [f"{direction.caller} → {direction.called}: {verdict}"]
        if direction.error:
            lines.append(f"  {direction.error}")
        else:
            lines += _table(direction.rungs, chosen)
        if direction.note:
            lines.append(f"  note: {direction.note}")
        # What is missing is of interest only where something better could be had.
        better = direction.rungs if chosen is None else direction.rungs[: direction.rungs.index(chosen)]
        lines += [f"  to do: {_named(rung)}: {rung.remedy}" for rung in better if rung.remedy]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _named(rung: Rung) -> str:
    if rung.carrier == "broker" or not rung.address:
        return rung.carrier
    return f"{rung.carrier} ({rung.address})"


def _table(rungs: list[Rung], chosen: Rung | None) -> list[str]:
    rows = [["", "way", "latency", "speed", ""]]
    for rung in rungs:
        mark = "►" if rung is chosen else ""
        if rung.latency_s is None:
            what = (
                f"{rung.address}: {rung.problem}"
                if rung.address and rung.carrier != "broker"
                else rung.problem
            )
            rows.append([mark, rung.carrier, "-", "-", what])
        else:
            speed = "-" if rung.bytes_per_s is None else _speed(rung.bytes_per_s)
            rows.append([mark, rung.carrier, duration(rung.latency_s), speed, rung.address])
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    return [
        "  "
        + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.{1 if bytes_per_s < 1e7 else 0}f} MB/s"


def as_json(found: list[Direction]) -> str:
    """The same for programs."""
    return json.dumps(
        [
            {
                "from": direction.caller,
                "to": direction.called,
                "chosen": None if direction.chosen is None else direction.chosen.carrier,
                "ways": [{**rung._asdict(), "works": rung.works} for rung in direction.rungs],
                "note": direction.note,
                "error": direction.error,
            }
            for direction in found
        ],
        indent=1,
    )
