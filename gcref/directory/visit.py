"""A party for a short while: somebody who asks, or tries, and goes. The hub knows it as long as it is there.

    with Visit(pair, hub) as visit:
        visit.announce()                 # endpoints that trust the hub will let this key in
        party, mailbox = visit.open_mail()

Everything waits for the hub; nothing is for an I/O loop.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from gcref import config, ids
from gcref.errors import ConfigError, GcrefError, HubUnavailableError

if TYPE_CHECKING:
    from gcref.carriers.keys import KeyPair
    from gcref.carriers.mail.post import Mailbox
    from gcref.directory.hub import HubClient

WITHDRAW_S: Final = 2.0
"""How long the last word to the hub may take. What it does not hear, it forgets by itself."""


class Postbox(NamedTuple):
    """A mailbox, and the party whose it is."""

    party: bytes
    mailbox: Mailbox


class Visit:
    """What a visitor has at the hub, and takes away again when it goes. Any thread may call anything.

    Args:
        pair: its owner's keys.
        hub: its line to the hub; None: there is no hub. It is closed with the visit.
        name: for people who look at the hub.
    """

    def __init__(self, pair: KeyPair, hub: HubClient | None, name: str = "visitor") -> None:
        self._pair = pair
        self._hub = hub
        self._name = name
        self._lock = threading.Lock()
        self._boxes: list[Postbox] = []

    @classmethod
    def of_user(cls, name: str = "visitor") -> Visit:
        """The user's own, with the key and the settings of this `GCREF_HOME`.

        Raises:
            ConfigError: the settings or the key are damaged.
            AuthError: there is a hub, and no token for it.
        """
        from gcref.carriers import keys

        return cls(keys.load_or_create(config.home() / "keys" / "user.key"), hub_of_user(), name)

    @property
    def pair(self) -> KeyPair:
        """Its owner's keys."""
        return self._pair

    @property
    def hub(self) -> HubClient | None:
        """Its line to the hub."""
        return self._hub

    def announce(self) -> None:
        """Have the hub know this key, so that endpoints which trust it let it in. Without a hub nothing happens.

        Raises:
            GcrefError: the hub cannot be reached, or refuses.
        """
        if self._hub is not None:
            with self._lock:
                if not self._boxes:
                    self._boxes.append(self._register(self._hub))

    def open_mail(self) -> Postbox:
        """A mailbox at the broker: one for whoever asks, of a party of its own. It is closed with the visit.

        Raises:
            ConfigError: there is no hub.
            GcrefError: the hub cannot be reached, refuses, or has no mailbox to give.
        """
        if self._hub is None:
            raise ConfigError(
                "no hub is named on this side, and mailboxes are the hub's to give",
                key="hub_url",
                remedy="set hub_url and token in config.toml, or GCREF_HUB_URL and GCREF_TOKEN",
            )
        with self._lock:
            box = self._register(self._hub)
            self._boxes.append(box)
        return box

    def _register(self, hub: HubClient) -> Postbox:
        # Here and not above: who has no hub needs no AMQP.
        from gcref.carriers.mail.amqp import AmqpMailbox
        from gcref.directory.hub import Registration

        party = ids.new_id()
        told = hub.register(
            Registration(party, "client", self._name, self._pair.public.decode("ascii"), wants_mailbox=True)
        )
        mailbox = AmqpMailbox(party, self._pair)
        if told.mailbox is None:
            mailbox.unavailable(told.mailbox_reason or "the hub has none to give")
        else:
            mailbox.use(told.mailbox)
        return Postbox(party, mailbox)

    def close(self) -> None:
        """Go, and be forgotten. Idempotent."""
        boxes, self._boxes = self._boxes, []
        hub, self._hub = self._hub, None
        for box in boxes:
            box.mailbox.close()
        if hub is None:
            return
        for box in boxes:
            try:
                hub.withdraw(box.party, timeout_s=WITHDRAW_S)
            except HubUnavailableError:
                break
            except GcrefError:
                continue
        hub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def hub_of_user() -> HubClient | None:
    """The user's line to the hub; None: the settings name no hub.

    Raises:
        ConfigError: the settings are damaged.
        AuthError: there is no token.
    """
    settings = config.client_config()
    if settings.hub_url is None:
        return None
    from gcref.directory.hub import HubClient

    return HubClient(settings.hub_url, settings.token)
