"""Which tests run a second time with `carriers=["broker"]`: no site listens anywhere, and all that is said goes by mail.

Those are all tests of the modules below that have endpoints with a name, but for the ones in `NOT_BY_MAIL`.
"""

from __future__ import annotations

from typing import Final

MODULES: Final = frozenset(
    ("test_resolution", "test_values", "test_errors", "test_waiting", "test_cancel", "test_calm")
)  # BEHAVIOURS R, V, E, W, C; and all of it at once

_WITHIN: Final = "what it shows happens within an endpoint, which has no carrier"
_SERIALIZED: Final = (
    "what it shows is done by pickle on both sides; small blobs go by mail in many other tests"
)
_SILENT: Final = (
    "who dies behind a mailbox is missed after three heartbeats; a frozen agent shows the same sooner"
)
_ITSELF: Final = "it has the broker among its own parameters"
_PRIVATE: Final = "its endpoint is a private one, which is reached by ipc whatever is allowed"

NOT_BY_MAIL: Final = {
    "test_r12_too_many_blocked_tasks_are_a_deadlock_error_with_advice": _WITHIN,
    "test_r13_each_call_uses_the_definition_of_its_moment": _SERIALIZED,
    "test_v1_values_that_look_like_nothing_or_like_a_failure": _SERIALIZED,
    "test_v3_named_tuples_dataclasses_and_types": _SERIALIZED,
    "test_v7_one_upload_and_one_copy_in_memory": _ITSELF,
    "test_v6_a_result_that_cannot_be_pickled": _SERIALIZED,
    "test_e4_odd_exceptions_arrive_with_their_text": _SERIALIZED,
    "test_c1_a_task_that_has_not_been_sent": _PRIVATE,
    "test_c3_an_agent_that_is_away": _SILENT,
}
"""Tests that touch no carrier, or nothing of one that is not touched by the others; with the reason."""
