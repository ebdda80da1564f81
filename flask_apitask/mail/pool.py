from __future__ import annotations

import atexit
import contextlib
import logging
import os
import smtplib
import typing as t
import warnings
import weakref

from ..executor.pool import threads_enabled
from .places import Places
from .smtp import Connection
from .wire import ConnectionLost

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from .envelope import Envelope
    from .envelope import Server

logger = logging.getLogger(__name__)

_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


class ConnectionPool:
    """SMTP connections to one server, kept for the next message.

    .. code-block:: python

        with pool.connection() as connection:
            for envelope in batch:
                connection.send(envelope)

    :param size: Most connections that are open at once.
    :param keepalive: Seconds that an idle connection is kept. 0 closes it at the end of
        the ``with`` block.
    :raises ValueError: A number is too small, or the server's CA file can't be read.
    """

    def __init__(
        self, server: Server, *, size: int = 4, keepalive: float = 30.0
    ) -> None:
        # A fork finds the places of its parent here, under another number.
        self._places: dict[int, Places] = {}

        if size < 1:
            raise ValueError(f"A pool of {size!r} connections can't send anything.")

        if keepalive < 0:
            raise ValueError(f"A keepalive of {keepalive!r} s is below 0.")

        self.server = server
        self.size = size
        self.keepalive = keepalive
        self._context = server.tls_context()
        self._local_hostname: str | None = None
        _pools.add(self)

    @contextlib.contextmanager
    def connection(self) -> cabc.Iterator[Lease]:
        """Take a connection for a batch of messages, and wait for one if need be.

        It is opened when the first message is sent, not before.

        :raises DeliveryError: None was free within the server's timeout, or the pool
            is closed.
        """
        places = self._own_places()
        lease = Lease(self, places, places.take(self.server))

        try:
            yield lease
        finally:
            lease.end()

    def close(self) -> None:
        """Close what is idle, refuse what waits, and let batches come to their end.

        To close twice is fine. It happens by itself when the interpreter exits.
        """
        self._own_places().close()

    def open_connection(self, places: Places) -> Connection:
        """Open a connection in a place that was taken.

        :raises DeliveryError: It could not be opened, and there is none.
        """
        # Two threads may look it up at the same time. They find the same.
        if self._local_hostname is None:
            self._local_hostname = smtplib.SMTP().local_hostname

        connection = Connection(
            self.server, context=self._context, local_hostname=self._local_hostname
        )
        places.connections.add(connection)

        try:
            connection.open()
        except BaseException:
            places.connections.discard(connection)
            raise

        return connection

    def _own_places(self) -> Places:
        pid = os.getpid()
        places = self._places.get(pid)

        if places is None:
            places = self._places.setdefault(pid, Places(self.size, self.keepalive))

            for other, inherited in list(self._places.items()):
                if other != pid:
                    inherited.drop()
                    self._places.pop(other, None)

        return places

    def __repr__(self) -> str:
        places = self._places.get(os.getpid(), "unused")
        return (
            f"<ConnectionPool '{self.server.host}:{self.server.port}'"
            f" size={self.size} {places}>"
        )

    def drop(self) -> None:
        """Close all sockets at once, without a ``QUIT``; for destructors."""
        # No lock: this may run between any two lines of any thread.
        for places in list(self._places.values()):
            places.drop()
            places.alarm.put(None)

    def __del__(self) -> None:
        places = self._places.get(os.getpid())
        is_open = places is not None and bool(places.idle) and not places.closed
        unclosed = repr(self) if is_open else None
        self.drop()

        if unclosed:
            text = f"{unclosed} was not closed."
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)


class Lease:
    """The use of one connection of a pool, which replaces it as need be.

    It is for one thread at a time, and until the end of the ``with`` block.
    """

    def __init__(
        self, pool: ConnectionPool, places: Places, connection: Connection | None
    ) -> None:
        self._pool = pool
        self._places = places
        self._connection = connection
        self._ended = False

    def send(self, envelope: Envelope) -> None:
        """Deliver a message. The next one can be sent however this one ended.

        It is sent a second time, on a new connection, only if the server can't have
        had all of it the first time: if a connection that was kept is found dead, or
        the server says 421.

        With T the server's timeout, r recipients and c times 16 KiB of message, it
        takes at most (21 + 2r + 2c) T + 1 s:

        -   1 s for the ``QUIT`` of a connection that has served its time, then twice
        -   7 T to open one: TCP connect, greeting, ``EHLO``, ``STARTTLS``, handshake,
            ``EHLO``, ``AUTH``,
        -   (r + c + 3) T to send: ``MAIL``, each ``RCPT``, ``DATA``, each 16 KiB, the
            reply to it all, and once
        -   T for ``RSET`` after a refusal.

        To look up the host's name comes on top, by the resolver's own limits. A server
        that falls silent costs T, whatever the sum for one that is always just in time.

        :raises DeliveryError: The message was not delivered to all recipients.
        :raises DeliveryUnknown: It may or may not have been delivered.
        """
        if self._ended:
            raise RuntimeError(
                "This connection was given back to its pool at the end of the 'with'"
                " block that it comes from. Send inside of the block."
            )

        kept = self._connection is not None and self._connection.usable()

        try:
            self._deliver(envelope, kept)
        except ConnectionLost as error:
            if not (kept or error.busy):
                raise

            logger.debug("%s It is tried again: %s", error, envelope.message_id)
        else:
            return

        self._deliver(envelope, kept=False)

    @property
    def is_connected(self) -> bool:
        """Whether the last message had a connection, whatever became of it."""
        return self._connection is not None

    def end(self) -> None:
        """Give the connection back. The pool's ``with`` block does it."""
        self._ended = True
        connection, self._connection = self._connection, None
        own = self._places.pid == os.getpid()
        kept = None

        # Whatever happens here, a Ctrl-C say, the place is not to be lost with it.
        try:
            # Without a keepalive it is kept for those only who wait for one, and so it
            # is where no thread could close it in time.
            keeps = self._pool.keepalive and threads_enabled()
            wanted = own and (keeps or self._places.waiting)

            if wanted and connection is not None and connection.usable():
                kept = connection
            elif connection is not None:
                self._places.discard(connection)
        finally:
            if own:
                self._places.give_back(kept)

    def _deliver(self, envelope: Envelope, kept: bool) -> None:
        if not kept:
            self._discard()
            self._connection = self._pool.open_connection(self._places)

        t.cast("Connection", self._connection).deliver(envelope)

    def _discard(self) -> None:
        connection, self._connection = self._connection, None

        if connection is not None:
            self._places.discard(connection)


@atexit.register
def _close_pools() -> None:
    for pool in list(_pools):
        pool.close()
