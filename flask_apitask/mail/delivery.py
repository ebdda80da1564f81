from __future__ import annotations

import contextlib
import logging
import typing as t

from ..exceptions import DeliveryError
from ..log import log
from .smtp import end_all
from .stream import ConnectionLost

if t.TYPE_CHECKING:
    from .envelope import Envelope
    from .pool import ConnectionPool
    from .smtp import SMTPSession

logger = logging.getLogger(__name__)


class PooledConnection(contextlib.AbstractContextManager["PooledConnection"]):
    """The use of one connection of a pool, which is replaced as need be.

    It is for one thread at a time, and until the end of the ``with`` block.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._session: SMTPSession | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back. The next message takes another one."""
        session, self._session = self._session, None

        if session is not None:
            self._pool.release(session)

    def send(self, envelope: Envelope) -> None:
        """Deliver a message. The next one can be sent however this one ended.

        It is sent a second time, on a new connection, only if the server can't have
        had all of it the first time: if a connection that was kept is found dead, or
        the server says 421. A connection too many for the server is given up for one
        of the others.

        :raises DeliveryError: The message was not delivered to all recipients.
        :raises DeliveryUnknown: It may or may not have been delivered.
        """
        narrowed, retried = 0, False

        while True:
            session = self._session = self._session or self._pool.acquire()
            kept = session.usable()

            try:
                if not kept:
                    # One that has served its time.
                    end_all([session])
                    session.open()

                return session.deliver(envelope)
            except DeliveryError as error:
                if not kept and self._pool.narrow(session, error):
                    self._session = None
                    narrowed += 1
                    again = narrowed <= self._pool.size
                else:
                    lost = isinstance(error, ConnectionLost)
                    again = lost and (kept or error.smtp_code == 421) and not retried
                    retried = True

                if not again:
                    raise

                text = "%s It is tried again: %s"
                log(logger, logging.DEBUG, text, error, envelope.message_id)
