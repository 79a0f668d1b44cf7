"""What `gcref explain TASK` does: finds the endpoint that knows a task, and asks it and those that the task waits for.

    all running endpoints ──EXPLAIN──► the task's home ──► which objects are elsewhere? ──EXPLAIN──► their homes ──► …

It is a stranger to the program that submitted the task: it has the user's key and the id, nothing else.
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from gcref import ids
from gcref.directory import asking, records
from gcref.directory.records import EndpointRecord
from gcref.errors import ConfigError, GcrefError, NotFoundError
from gcref.sdk import story
from gcref.wire import messages as m

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
    """

    root: dict[str, Any]
    elsewhere: dict[bytes, dict[str, Any]]
    problems: list[str]


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
    known = [records.resolve(endpoint)] if endpoint is not None else records.list_records()
    asked = [record for record in known if record.alive() is not False]
    answers = _ask({record: [id] for record in asked})
    problems = [str(answer) for answer in answers.values() if isinstance(answer, GcrefError)]
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
        by_id = {record.id: record for record in records.list_records() if record.alive() is not False}
        questions = {by_id[home]: wanted for home, wanted in open_ids.items() if wanted and home in by_id}
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
    return Found(root, elsewhere, problems)


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
    names = {record.id: record.name for record in records.list_records()}
    return "\n".join(story.tell(found.root, found.elsewhere, lambda party: _name_of(names, party)))


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
