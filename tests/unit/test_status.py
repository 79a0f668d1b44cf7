"""What `endpoint-worker status` shows, from what an agent answers."""

from __future__ import annotations

import dataclasses
from typing import Any

from endpoint_worker import status
from gcref import ids
from gcref.directory.records import EndpointRecord

RECORD = EndpointRecord(id=b"P" * 16, name="polaris", public_key="x" * 40, control=("ipc:///c", "tcp://h:1"))


def worker(number: int, **more: Any) -> dict[str, Any]:
    return {
        "worker": f"polaris/{number}", "pid": 4000 + number, "state": "idle", "held": 0, "running": None, "for_s": 3.0,
    } | more  # fmt: skip


def link(**more: Any) -> dict[str, Any]:
    return {
        "up": True, "carrier": "direct", "kind": "endpoint", "since_s": 130.0, "rtt_s": 0.0003, "pending": 0,
        "unacked_bytes": 0, "queued_bytes": 0, "links": [], "moved": {},
    } | more  # fmt: skip


def facts(workers: list[dict[str, Any]], links: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    counts = {"submitted": 1300, "done": 1200, "failed": 10, "cancelled": 3, "lost": 0}
    return {
        "started_unix_s": 0.0,
        "tasks": counts,
        "rates": {
            "over_s": 10.0,
            "submitted": 0.05,
            "done": 1234.0,
            "failed": 0.0,
            "cancelled": 0.0,
            "lost": 0.0,
        },
        "dispatch": {"workers": workers, "queued": 40, "blocked": 0, "starting": 1, "retiring": 0},
        "store": {
            "used_bytes": 1 << 30,
            "limit_bytes": 8 << 30,
            "pooled_bytes": 0,
            "disk_bytes": 0,
            "objects": 1,
        },
        "links": links,
        "journal_bytes": 2048,
        "refused_messages": 0,
        "dropped_packets": {"damaged": 0},
    } | more


def shown(told: dict[str, Any] | None) -> str:
    return "\n".join(status.lines(RECORD, "running", told))


def test_a_page() -> None:
    task = b"T" * 16
    busy = worker(1, state="busy", held=3, running=task, function="simulate", attempt=2, for_s=12.0)
    far = link(moved={"direct": [1 << 30, 80 << 20, 0, 0]})
    text = shown(facts([busy, worker(2)], {ids.text(b"M" * 16): far}))
    for words in (
        "tasks now   1 running, 2 sent ahead, 40 queued, 44 waiting for arguments",
        "tasks ever  1,300 submitted, 1,200 done, 10 failed, 3 cancelled, 0 lost",
        "rates       3/min submitted, 1,234/s ended (over the last 10 s)",
        "store       1.0 GiB of 8.0 GiB used by 1 object",
        "journal     2.0 KiB",
        f"polaris/1  4001  busy   12 s   simulate  {ids.text(task)}  attempt 2  and 2 more to run next",
        "polaris/2  4002  idle   3.0 s  -",
        "1 starting",
        "endpoint  direct  2 min 10 s  0.3 ms      1.0 GiB, 80.0 MiB/s  -",
    ):
        assert words in text, text
    assert "refused" not in text


def test_trouble_is_shown() -> None:
    ways = [{"carrier": "direct", "address": "tcp://m:7", "error": "connection refused"}]
    away = link(up=False, carrier=None, since_s=None, rtt_s=None, pending=3, links=ways, given_up_in_s=90.0)
    gone = link(up=False, kind="client", given_up_in_s=3600.0)
    text = shown(
        facts(
            [], {"midway": away, "c": gone, "d": gone}, refused_messages=1, journal_troubles=["log 3 was cut"]
        )
    )
    for words in (
        "refused     1 message",
        "log 3 was cut",
        "away",
        "3 messages to go (0 B); given up in 1 min 30 s; direct tcp://m:7: connection refused",
        "2 clients away; what they wait for is kept for 1 h at most",
    ):
        assert words in text, text


def test_the_hub_and_the_mailbox_are_shown() -> None:
    mailbox: dict[str, Any] = {
        "up": True,
        "error": None,
        "waiting_bytes": 0,
        "dropped": {"forged": 0, "replayed": 2},
    }
    hub = {
        "url": "https://hub.example.org", "registered_unix_s": 0.0, "owner": "ada", "error": None, "trusted": True,
        "mailbox": mailbox,
    }  # fmt: skip
    record = dataclasses.replace(RECORD, mailbox=True)
    text = "\n".join(status.lines(record, "running", facts([], {}, hub=hub)))
    assert "https://hub.example.org, registered by ada" in text
    assert "; lets in whom it names" in text
    assert "mailbox     up; dropped: 2 replayed" in text
    assert "its mailbox at the broker" in text
    hub |= {"registered_unix_s": None, "error": "it does not answer", "trusted": False}
    mailbox |= {"up": False, "error": "no mailbox yet", "waiting_bytes": 2048, "dropped": {}}
    text = shown(facts([], {}, hub=hub))
    for words in (
        "https://hub.example.org, not registered", "it does not answer",
        "mailbox     down: no mailbox yet, 2.0 KiB waiting to leave",
    ):  # fmt: skip
        assert words in text, text
    assert "mailbox" not in shown(facts([], {}, hub=hub | {"mailbox": None}))


def test_long_lists_are_cut() -> None:
    text = shown(facts([worker(n) for n in range(500)], {str(n): link() for n in range(100)}))
    assert "… and 436 more" in text
    assert "… and 80 more" in text
    assert len(text.splitlines()) < 110


def test_an_endpoint_that_does_not_run() -> None:
    assert shown(None).splitlines() == ["polaris: running", f"  id          {ids.text(RECORD.id)}"]
