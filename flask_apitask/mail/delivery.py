from __future__ import annotations

import contextlib
import logging
import time
import typing as t

from ..exceptions import DeliveryError
from ..log import log
from .connection import end_all
from .connection import OPENING
from .stream import ConnectionLost

if t.TYPE_CHECKING:
    from .envelope import Envelope
    from .pool import ConnectionPool
    from .smtp import SMTPSession

logger = logging.getLogger(__name__)

# Replies of a server that has enough connections, before it takes a message.
_ENOUGH = {421, 432, 450, 451, 452, 454}
# Exchange says this at any stage, mostly at the end of a message: too many at once.
_AT_ONCE = 432
# Seconds until a server that has enough is asked again: at first, and at most. A server
# that hangs up on a log-in sees some ten of them, too few to lock out an account.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


class PooledConnection(contextlib.AbstractContextManager["PooledConnection"]):
    """The use of one connection of a pool, replaced by another if need be.

    For one thread at a time, until the end of the ``with`` block.
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
        """Deliver a message. Another can be sent afterwards, whatever the outcome.

        It is sent a second time, on a new connection, only if the server can't have
        had all of it the first time: if a kept connection turns out to be dead, or the
        server says 421. If a connection is one too many for the server, it is given up
        for one of the others. If there are no others, a server that refuses for now is
        asked again until the timeout: another process may have the connections.

        :raises DeliveryError: The message was not delivered to all recipients.
        :raises DeliveryUnknown: It may or may not have been delivered.
        """
        attempts = _Attempts(self._pool)

        while True:
            session = self._session = self._session or self._pool.acquire()
            kept = session.usable()

            try:
                if not kept:
                    # The session is new, or its connection is used up.
                    end_all([session])
                    session.open()

                session.deliver(envelope)
            except DeliveryError as error:
                attempts.settle(kept, let_in=error.stage != "MAIL")
                # A kept connection may just be dead, which says nothing about limits.
                kept = kept and error.smtp_code != _AT_ONCE

                if not kept and attempts.find_limit(session, error):
                    end_all([session])
                    self.close()
                elif not attempts.may_repeat(session, error, kept):
                    raise

                text = "%s Trying again: %s"
                log(logger, logging.DEBUG, text, error, envelope.message_id)
            else:
                attempts.settle(kept, let_in=True)
                return


class _Attempts:
    """Decides, after each attempt to deliver one message, whether to make another."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        # The server has taken nothing since then, as far as is known.
        self._began = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._repeated = False
        # A refusal of MAIL on a new connection. It may be about the sender, or about
        # the connection.
        self._doubt: tuple[int | str, str] | None = None

    def settle(self, kept: bool, *, let_in: bool) -> None:
        """Resolve a doubtful refusal, once a kept connection has been tried."""
        if self._doubt is not None and kept:
            if let_in:
                self._pool.tell(*self._doubt)
            else:
                self._pool.widen()

            self._doubt = None

    def find_limit(self, session: SMTPSession, error: DeliveryError) -> bool:
        """Take an error for the server's limit, if other connections work."""
        certain = _is_for_connection(error)
        scarce = certain and _is_passing(error)
        found = _may_be_limit(error) and self._pool.narrow(
            session, certain=certain, scarce=scarce
        )
        cause = error.smtp_code or "a lost connection", str(error.stage)

        if found and certain:
            self._pool.tell(*cause)
        elif found:
            self._doubt = cause

        return found

    def may_repeat(
        self, session: SMTPSession, error: DeliveryError, kept: bool
    ) -> bool:
        """Tell whether another attempt is safe and useful, and wait until it is due."""
        if kept or not _is_for_connection(error):
            lost = isinstance(error, ConnectionLost)
            again = lost and (kept or error.smtp_code == 421) and not self._repeated
            self._repeated = True
            return again

        now = time.monotonic()
        # Other connections worked in the meantime, though they may be closed by now.
        if served := self._pool.taken_at > self._began:
            self._began = now

        early = error.stage in {"connect", "greeting", "TLS"}
        hopeful = served or (early and self._pool.opens_others(session))

        if not (_is_passing(error) or (hopeful and _may_be_limit(error))):
            return False

        if (left := self._began + self._pool.settings.timeout - now) <= 0:
            return False

        time.sleep(min(left, self._pause))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return True


def _is_passing(error: DeliveryError) -> bool:
    """Tell whether a server refuses only for now."""
    hung_up = isinstance(error, ConnectionLost) and error.hung_up
    return hung_up or error.smtp_code in _ENOUGH


def _is_for_connection(error: DeliveryError) -> bool:
    """Tell whether an error is about the connection, whatever the message."""
    lost_early = error.stage == "MAIL" and isinstance(error, ConnectionLost)
    return error.stage in OPENING or lost_early or error.smtp_code == _AT_ONCE


def _may_be_limit(error: DeliveryError) -> bool:
    """Tell whether a server may refuse one connection too many like this."""
    if error.stage == "MAIL" or error.smtp_code == _AT_ONCE:
        return _is_passing(error)

    no_service = error.stage == "greeting" and error.smtp_code == 554
    lost = isinstance(error, ConnectionLost)
    return error.stage in OPENING and (lost or no_service or _is_passing(error))
