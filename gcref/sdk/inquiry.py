"""What `gcref explain TASK` does: finds the endpoint that knows a task, and asks it and those that the task waits for.

    all running endpoints here, ─┐
    those that told the hub ─────┴─EXPLAIN──► the task's home ──► which objects are elsewhere? ──EXPLAIN──► their homes ──► …

It is a stranger to the program that submitted the task: it has the user's key and the id, nothing else.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from gcref import config, ids
from gcref.directory import asking, pins, records
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError, GcrefError, NotFoundError
from gcref.sdk import story
from gcref.wire import messages as m

if TYPE_CHECKING:
    from gcref.directory.hub import HubClient

ANSWER_S: Final = 2.0
"""How long an endpoint may take to answer: it need not be known where the task is, so nobody is waited for for long."""
ROUNDS_MAX: Final = 4
"""How often the trail of a task is followed to further endpoints."""
_NOT_THERE: Final = frozenset(("unknown", "released", "expected"))


class Found(NamedTuple):
    """What was found out about a task.

    Attributes:
        root: what its home says of it.
        elsewhere: by id, what other homes say of the objects that it waits for.
        problems: endpoints that could not be asked, and why.
        names: of endpoints that are known, by id.
    """

    root: dict[str, Any]
    elsewhere: dict[bytes, dict[str, Any]]
    problems: list[str]
    names: dict[bytes, str]


class _Directory:
    """Endpoints that have a record here, and those that the hub tells of, where there is one."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._records: dict[bytes, EndpointRecord] = {record.id: record for record in records.list_records()}
        self._unknown: set[bytes] = set()
        self._hub: HubClient | None = None
        settings = config.client_config()
        if settings.hub_url is not None:
            from gcref.directory.hub import HubClient

            try:
                self._hub = HubClient(settings.hub_url, settings.token)
            except GcrefError as error:
                self.problems.append(str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._hub is not None:
            self._hub.close()

    def names(self) -> dict[bytes, str]:
        """The names of all that were met."""
        return {record.id: record.name for record in self._records.values()}

    def resolve(self, endpoint: str) -> EndpointRecord:
        """The record of an endpoint, given its name or id.

        Raises:
            GcrefError: neither this GCREF_HOME nor the hub has one.
        """
        try:
            return records.resolve(endpoint)
        except NotFoundError:
            if self._hub is None:
                raise
        found = _trusted(self._hub.find(endpoint))
        self._records[found.id] = found
        return found

    def of(self, home: bytes) -> EndpointRecord | None:
        """An endpoint that may be asked; None if there is none of that id, or it does not run."""
        record = self._records.get(home)
        if record is None and self._hub is not None and home not in self._unknown:
            try:
                record = self._records[home] = _trusted(self._hub.find(home))
            except GcrefError as error:
                self._unknown.add(home)
                self.problems.append(str(error))
        return None if record is None or record.alive() is False else record

    def that_may_know(self, task: bytes) -> list[EndpointRecord]:
        """All that have a record here, and those that have told the hub of the task."""
        if self._hub is not None:
            try:
                told = {event.endpoint for event in self._hub.where_is(task)}
            except GcrefError as error:
                self.problems.append(str(error))
            else:
                for home in told:
                    self.of(home)
        return list(self._records.values())


def _trusted(record: EndpointRecord) -> EndpointRecord:
    """What the hub says, if the key is the one of the first contact."""
    pins.check(record.id, record.public_key.encode("ascii"), record.name)
    return record


def inquire(task: str, endpoint: str | None = None) -> Found:
    """Find a task and all that it waits for.

    Args:
        task: the text of its id.
        endpoint: name or id of the only endpoint to ask for it; None: all that run.

    Raises:
        ConfigError: the id is none.
        NotFoundError: no endpoint knows it, or may tell.
        GcrefError: the one endpoint cannot be asked.
    """
    try:
        id = ids.parse(task)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{task!r} is no task's id; `future.task_id` gives it: {error}") from error
    with _Directory() as directory:
        return _inquire(task, id, endpoint, directory)


def _inquire(task: str, id: bytes, endpoint: str | None, directory: _Directory) -> Found:
    known = directory.that_may_know(id) if endpoint is None else [directory.resolve(endpoint)]
    asked = [record for record in known if record.alive() is not False]
    answers = _ask({record: [id] for record in asked})
    problems = directory.problems + [
        str(answer) for answer in answers.values() if isinstance(answer, GcrefError)
    ]
    told = [answer[0] for answer in answers.values() if not isinstance(answer, GcrefError) and answer]
    root = _choose(told)
    if root is None:
        raise _not_found(task, known, asked, told, problems)
    elsewhere: dict[bytes, dict[str, Any]] = {}
    for _round in range(ROUNDS_MAX):
        open_ids: dict[bytes, list[bytes]] = {}
        for node in (root, *elsewhere.values()):
            for home, wanted in story.open_elsewhere(node).items():
                open_ids.setdefault(home, []).extend(one for one in wanted if one not in elsewhere)
        at_home = {directory.of(home): wanted for home, wanted in open_ids.items() if wanted}
        questions = {record: wanted for record, wanted in at_home.items() if record is not None}
        if not questions:
            break
        news = 0
        for answer in _ask(questions).values():
            for node in () if isinstance(answer, GcrefError) else answer:
                if node.get("state") != "unknown" and node.get("id") not in elsewhere:
                    elsewhere[node["id"]] = node
                    news += 1
        if not news:
            break
    return Found(root, elsewhere, problems, directory.names())


def _ask(questions: dict[EndpointRecord, list[bytes]]) -> dict[bytes, Any]:
    packed = {record: [m.EXPLAIN, 1, b"".join(wanted)] for record, wanted in questions.items()}
    return asking.ask_all(packed, timeout_s=ANSWER_S)


def _choose(told: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the answers: what the home says, before what others have heard."""
    there = [node for node in told if node.get("state") not in _NOT_THERE]
    for node in there:
        if node.get("home") == node.get("told_by"):
            return node
    if there:
        return there[0]
    return next((node for node in told if node.get("state") in ("released", "expected")), None)


def _not_found(
    task: str,
    known: list[EndpointRecord],
    asked: list[EndpointRecord],
    told: list[dict[str, Any]],
    problems: list[str],
) -> NotFoundError:
    stopped = [record.name for record in known if record not in asked]
    text = f"no endpoint tells anything of task {task}: it was released, it is not yours, or its endpoint is down"
    text += f" (asked: {', '.join(record.name for record in asked) or 'none'}"
    text += f"; not running: {', '.join(stopped)})" if stopped else ")"
    return NotFoundError("; ".join([text, *problems]))


def _name_of(names: dict[bytes, str], party: bytes) -> str:
    name = names.get(party)
    return f"endpoint {ids.text(party)}" if name is None else f"endpoint {name!r}"


def text(found: Found) -> str:
    """The story of the task."""
    return "\n".join(story.tell(found.root, found.elsewhere, lambda party: _name_of(found.names, party)))


def as_json(found: Found) -> str:
    """All that the endpoints said, as JSON; ids as text."""
    whole = {"task": _plain(found.root), "elsewhere": [_plain(node) for node in found.elsewhere.values()]}
    return json.dumps(whole, indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return ids.text(value) if len(value) == 16 else value.hex()
    return value
