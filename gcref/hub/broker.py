"""RabbitMQ's management API: users of the broker, their permissions, and queues.

Each call waits for RabbitMQ, but not for long: callers of the hub wait behind it. When it does not answer, others are told
so at once for a moment, while one tries again.

Source: https://www.rabbitmq.com/docs/http-api-reference and https://www.rabbitmq.com/docs/access-control
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final
from urllib.parse import quote

from gcref.directory.http import Answer, Http, password
from gcref.errors import AuthError, HubUnavailableError
from gcref.hub.config import BrokerConfig

# All the calls that make a mailbox stay below what the hub's own callers wait for.
CALL_S: Final = 2.5
# How long nobody else tries after a failure.
REST_S: Final = 2.0


class Broker:
    """The broker, as its administrator. Any thread may call anything.

    Every call may raise:
        HubUnavailableError: the broker does not answer, or refuses what it should not.

    Args:
        config: where it is, and who we are there.
    """

    def __init__(self, config: BrokerConfig) -> None:
        self.config = config
        self._http = Http(
            config.management_url, "RabbitMQ's management", password(config.user, config.password), attempts=1
        )
        self._lock = threading.Lock()
        self._rest_until = 0.0
        self._problem: str | None = None

    def put_user(self, user: str, secret: str) -> None:
        """Make a user without any rights of administration, or change their password."""
        self._call("PUT", f"/api/users/{_part(user)}", {"password": secret, "tags": ""})

    def delete_user(self, user: str) -> None:
        """Remove a user; their connections are closed. Idempotent."""
        self._call("DELETE", f"/api/users/{_part(user)}")
        self.close_connections(user, "it has no mailbox any more")

    def close_connections(self, user: str, reason: str) -> None:
        """Close what a user has open. Idempotent."""
        self._call("DELETE", f"/api/connections/username/{_part(user)}", reason=reason)

    def permit(self, user: str, configure: str, write: str, read: str) -> None:
        """Say what a user may do: a pattern of names for each kind of operation."""
        path = f"/api/permissions/{self._vhost}/{_part(user)}"
        self._call("PUT", path, {"configure": configure, "write": write, "read": read})

    def put_queue(self, queue: str, arguments: dict[str, Any]) -> None:
        """Make a durable queue. One that is there stays as it is, even if its arguments are others."""
        body = {"durable": True, "auto_delete": False, "arguments": arguments}
        self._call("PUT", f"/api/queues/{self._vhost}/{_part(queue)}", body, fine=(400,))
        if not self.has_queue(queue):
            raise HubUnavailableError(f"the broker did not make the queue {queue}")

    def delete_queue(self, queue: str) -> None:
        """Remove a queue with all that is in it. Idempotent."""
        self._call("DELETE", f"/api/queues/{self._vhost}/{_part(queue)}")

    def has_queue(self, queue: str) -> bool:
        """Whether there is such a queue."""
        return (
            self._call(
                "GET", f"/api/queues/{self._vhost}/{_part(queue)}?disable_stats=true&columns=name"
            ).status
            == 200
        )

    def has_user(self, user: str) -> bool:
        """Whether there is such a user."""
        return self._call("GET", f"/api/users/{_part(user)}").status == 200

    def names(self, prefix_of_users: str, prefix_of_queues: str) -> tuple[set[str], set[str]]:
        """The users and the queues whose names begin so."""
        users = self._names("/api/users?columns=name", prefix_of_users)
        queues = self._names(f"/api/queues/{self._vhost}?disable_stats=true&columns=name", prefix_of_queues)
        return users, queues

    def problem(self) -> str | None:
        """Why the last call failed; None: it did not."""
        return self._problem

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    @property
    def _vhost(self) -> str:
        return _part(self.config.vhost)

    def _names(self, path: str, prefix: str) -> set[str]:
        rows = self._call("GET", path).json()
        if not isinstance(rows, list):
            raise HubUnavailableError("RabbitMQ's management answers no list")
        return {
            row["name"] for row in rows if isinstance(row, dict) and str(row.get("name")).startswith(prefix)
        }

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        fine: tuple[int, ...] = (),
        reason: str | None = None,
    ) -> Answer:
        with self._lock:
            now = time.monotonic()
            if self._problem is not None and now < self._rest_until:
                raise HubUnavailableError(self._problem)
            if self._problem is not None:
                # This one tries; the others need not wait for what it finds.
                self._rest_until = now + CALL_S
        try:
            answer = self._http.call(
                method, path, json=body, timeout_s=CALL_S, headers={"X-Reason": reason} if reason else None
            )
        except (HubUnavailableError, AuthError) as error:
            self._failed(str(error))
            raise HubUnavailableError(str(error)) from None
        if answer.status in (401, 403):
            self._failed(
                f"RabbitMQ refuses its user {self.config.user!r}: it must be an administrator, with the password in hub.toml"
            )
            raise HubUnavailableError(self._problem or "")
        if answer.status >= 300 and answer.status not in fine and (answer.status != 404 or method == "PUT"):
            # Not the body: it may repeat what was asked.
            raise HubUnavailableError(
                f"RabbitMQ refuses {method} {path.partition('?')[0]} with status {answer.status}"
            )
        with self._lock:
            self._problem = None
        return answer

    def _failed(self, problem: str) -> None:
        with self._lock:
            self._problem, self._rest_until = problem, time.monotonic() + REST_S


def _part(name: str) -> str:
    return quote(name, safe="")
