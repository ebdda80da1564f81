from __future__ import annotations

import contextlib
import typing as t
from collections import deque

import flask_mail
from flask import current_app

from ..api import run
from ..exceptions import DeliveryError
from ..executor.task import task
from ..runner import notify
from .envelope import Server
from .pool import ConnectionPool

if t.TYPE_CHECKING:
    from flask import Flask

    from ..config import Config
    from .envelope import Envelope
    from .pool import Lease


class Letter(t.NamedTuple):
    """A message as it was when it was sent: what to deliver, and what to tell of it."""

    envelope: Envelope
    message: flask_mail.Message


class Transport:
    """The SMTP connections of one app, opened by the settings that Flask-Mail read."""

    def __init__(self, config: Config) -> None:
        self._config = config
        # By the settings of their time: what was sent under former ones goes by them.
        self._pools: dict[Server, ConnectionPool] = {}

    def pool(self, mail: t.Any) -> ConnectionPool:
        """Return the pool for what ``app.extensions["mail"]`` says by now."""
        config = self._config
        server = Server(
            host=mail.server,
            port=int(mail.port or 0),
            use_tls=bool(mail.use_tls),
            use_ssl=bool(mail.use_ssl),
            # Environment variables bring numbers where they look like some.
            username=None if mail.username is None else str(mail.username),
            password=None if mail.password is None else str(mail.password),
            timeout=config.mail_timeout,
            tls_verify=config.mail_tls_verify,
            max_messages=int(mail.max_emails or 0) or None,
            debug=int(mail.debug),
        )

        pool = self._pools.get(server)

        if pool is None:
            # Without a lock, which a fork could copy locked. Of two threads that come
            # here at once, both get the pool of the first.
            pool = self._pools.setdefault(
                server,
                ConnectionPool(
                    server,
                    size=config.mail_connections,
                    keepalive=config.mail_keepalive,
                ),
            )

        return pool

    def __del__(self) -> None:
        # An app has no end but this, so there is nobody to warn of an open pool.
        for pool in self._pools.values():
            pool.drop()


class Background:
    """Collects letters, and delivers them by one task of the current scope."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._letters: list[Letter] = []

    def send(self, letter: Letter) -> None:
        self._letters.append(letter)

    def close(self) -> None:
        if self._letters:
            run(deliver, self._pool, self._letters)


@task("flask_mail.send")
def deliver(pool: ConnectionPool, letters: list[Letter]) -> None:
    """Deliver letters in order.

    One that is refused does not stop the others. A server that can't be reached does:
    to wait for it once more for each of them would hold the request for minutes.

    :raises DeliveryError: Some were not delivered; the text says which, and why.
    """
    failures: list[DeliveryError] = []
    delivered: list[Letter] = []
    waiting = deque(letters)

    with contextlib.closing(Delivery(pool)) as delivery:
        while waiting and (delivery.is_reachable or not failures):
            letter = waiting.popleft()

            try:
                delivery.deliver(letter)
                delivered.append(letter)
            except DeliveryError as error:
                failures.append(error)

    # A receiver may send mail, and must not wait for the connection used for this.
    for letter in delivered:
        _announce(letter)

    failures.extend(
        DeliveryError("It was not tried.", message_id=letter.envelope.message_id)
        for letter in waiting
    )

    if len(failures) == 1:
        raise failures[0]

    if failures:
        causes = "\n".join(f"- {error}" for error in failures)
        raise DeliveryError(
            f"{len(failures)} of {len(letters)} messages were not delivered:\n{causes}"
        )


class Delivery:
    """A connection, once it is needed, that stays for several letters.

    :param pool: Where it comes from; ``None`` if sending is suppressed.
    """

    def __init__(self, pool: ConnectionPool | None) -> None:
        self._pool = pool
        self._lease: Lease | None = None
        self._resources = contextlib.ExitStack()

    def close(self) -> None:
        """Give the connection back."""
        self._resources.close()

    @property
    def is_reachable(self) -> bool:
        """Whether there was a connection for the letter sent last."""
        return self._lease is not None and self._lease.is_connected

    def send(self, letter: Letter) -> None:
        """Deliver a letter, and tell of it."""
        self.deliver(letter)
        _announce(letter)

    def deliver(self, letter: Letter) -> None:
        """Deliver a letter.

        :raises DeliveryError: It was not delivered to all recipients.
        """
        try:
            self._send(letter.envelope)
        except DeliveryError as error:
            # Whatever failed, down to waiting for a free connection.
            error.message_id = letter.envelope.message_id
            raise

    def _send(self, envelope: Envelope) -> None:
        if self._pool is None:
            return

        if self._lease is None:
            self._lease = self._resources.enter_context(self._pool.connection())

        self._lease.send(envelope)


def _announce(letter: Letter) -> None:
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    # It is delivered: a receiver that fails must not make it a failure.
    notify(flask_mail.email_dispatched, app, {"message": letter.message})
