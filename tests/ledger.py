from __future__ import annotations

import collections
import contextlib
import enum
import hashlib
import hmac
import http.client
import re
import threading
import time
import typing as t

if t.TYPE_CHECKING:
    import pathlib

    import typing_extensions as te
    from ledger_mail import MailServer

# Seconds after which a request without an answer has failed. Fewer than those after
# which pytest ends all of a run.
PATIENCE: t.Final = 45.0


# Mails of one request.
COPIES: t.Final = 2


def sign(key: str, number: int) -> str:
    """Return what only an answer to this request can hold."""
    return hmac.new(key.encode(), str(number).encode(), hashlib.sha256).hexdigest()


def message_id(number: int, copy: int) -> str:
    """Return the ``Message-ID`` of a mail of a request."""
    return f"<{number}.{copy}@ledger.example>"


def app_environ(
    *, key: str, begun: pathlib.Path, mail_port: int, mail: str = "apitask"
) -> dict[str, str]:
    """Return the environment variables for ``ledger_app``.

    :param key: By which it signs its responses.
    :param begun: The app's own book, see :func:`read_begun`.
    :param mail: Who sends its mail.
    """
    begun.touch()
    return {
        "FLASK_SECRET_KEY": key,
        "FLASK_LEDGER_BEGUN": str(begun),
        "FLASK_LEDGER_MAIL": mail,
        "FLASK_MAIL_PORT": str(mail_port),
    }


class Outcome(enum.Enum):
    """How a request ended, as its client saw it."""

    # Status 200, a body of the length that was announced, and the right signature.
    ACKNOWLEDGED = "acknowledged"
    # There was no connection.
    REFUSED = "refused"
    # There was a connection, and no complete response over it.
    CUT = "cut off"
    # A complete response that was none of ours.
    WRONG = "wrong answer"


class Answer(t.NamedTuple):
    """The outcome of a request, and the seconds that it took."""

    outcome: Outcome
    seconds: float


class Load:
    """Clients that send requests, each once, from now to the end of the block.

    A client opens a connection for each of its requests. One that is refused waits for
    the server to be back, which it is when it has another port.

    :param key: By which the requests are signed.
    """

    def __init__(self, *, port: int, key: str, clients: int) -> None:
        self._key = key
        self._threads = [threading.Thread(target=self._work) for _ in range(clients)]
        self._stopped = threading.Event()
        # Guards all of the following.
        self._changed = threading.Condition()
        self._begun = 0
        self._port = port
        self._failures: list[str] = []
        self.answers: dict[int, Answer] = {}
        self.acknowledged = 0

    def __enter__(self) -> te.Self:
        for thread in self._threads:
            thread.start()

        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._stopped.set()

        for thread in self._threads:
            thread.join(2 * PATIENCE)
            assert not thread.is_alive()

        assert exc_type or not self._failures, self._failures

    @property
    def requests(self) -> int:
        """How many have ended, in whatever way."""
        return len(self.answers)

    @property
    def begun(self) -> int:
        """How many were begun, from number 0 on."""
        return self._begun

    def move(self, port: int) -> None:
        """Tell the clients where the server is now."""
        with self._changed:
            self._port = port
            self._changed.notify_all()

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more requests are acknowledged."""
        with self._changed:
            enough = self.acknowledged + count
            assert self._changed.wait_for(
                lambda: self.acknowledged >= enough or self._failures, PATIENCE
            ), f"Only {self.acknowledged} of {enough} requests were acknowledged."
            assert not self._failures, self._failures

    def of(self, outcome: Outcome) -> set[int]:
        """Return the numbers of the requests that ended so."""
        with self._changed:
            return {
                n for n, answer in self.answers.items() if answer.outcome is outcome
            }

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                self._send_next()
        except Exception as failure:
            with self._changed:
                self._failures.append(repr(failure))
                self._changed.notify_all()

    def _send_next(self) -> None:
        with self._changed:
            number, port = self._begun, self._port
            self._begun += 1

        began = time.monotonic()
        outcome = send(port, number, self._key)
        answer = Answer(outcome, time.monotonic() - began)

        with self._changed:
            self.answers[number] = answer
            self.acknowledged += outcome is Outcome.ACKNOWLEDGED
            self._changed.notify_all()

            if outcome is Outcome.REFUSED:
                moved = self._changed.wait_for(lambda: self._port != port, PATIENCE)
                assert moved, "The server refused a connection, and did not come back."


def send(port: int, number: int, key: str) -> Outcome:
    """Send one request over a connection of its own.

    :raises TimeoutError: There was no answer at all.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)

    with contextlib.closing(connection):
        try:
            connection.connect()
        except ConnectionError:
            return Outcome.REFUSED

        try:
            headers = {"Connection": "close", "Content-Length": "0"}
            connection.request("POST", f"/{number}", headers=headers)
            response = connection.getresponse()
            # Otherwise a body that was cut off would look like one that was not.
            assert response.length is not None or response.chunked
            body = response.read()
        except (ConnectionError, http.client.HTTPException):
            return Outcome.CUT

    expected = sign(key, number).encode()
    is_ours = response.status == 200 and hmac.compare_digest(body, expected)
    return Outcome.ACKNOWLEDGED if is_ours else Outcome.WRONG


class Failure(t.NamedTuple):
    """An ERROR of the app's log about mail.

    :param message_ids: What it names.
    :param is_unknown: It says that the mail may be delivered.
    """

    message_ids: frozenset[str]
    is_unknown: bool


def read_failures(log: str) -> list[Failure]:
    """Find the mails that were reported as failed in a server's log."""
    records = re.split(r"^(?=\[\d{4}-\d\d-\d\d )", log, flags=re.MULTILINE)
    return [
        Failure(
            frozenset(re.findall(r"Message-ID: (<[^<>]+>)", record)),
            "DeliveryUnknown" in record,
        )
        for record in records
        if re.match(r"\[[^]]*\] ERROR in ", record)
    ]


class Balance(t.NamedTuple):
    """What the client, the app and the mail server have written down, side by side.

    :param requests: Requests that ended in one of these ways:
    :param acknowledged: Those with a complete and signed response.
    :param refused: Those without a connection.
    :param unheard: Those cut off before the app had them.
    :param cut_off: Those cut off while the app had them.
    :param delivered: Mails that the mail server took.
    :param lost: Mails of acknowledged requests that it did not take.
    :param doubled: Mails that it took more than once.
    :param unasked: Mails that it took of requests that were not acknowledged.
    :param processes: Worker processes that had requests.
    """

    requests: int
    acknowledged: int
    refused: int
    unheard: int
    cut_off: int
    delivered: int
    lost: int
    doubled: int
    unasked: int
    processes: int


def balance(load: Load, begun: dict[int, int], server: MailServer) -> Balance:
    """Compare the books when the load is over.

    :param begun: From :func:`read_begun`.
    """
    delivered = collections.Counter(server.delivered)
    acknowledged = load.of(Outcome.ACKNOWLEDGED)
    cut = load.of(Outcome.CUT)
    promised = {message_id(n, copy) for n in acknowledged for copy in range(COPIES)}
    assert not load.of(Outcome.WRONG), "an answer was none of ours"
    assert acknowledged <= begun.keys(), "the app's own book is not complete"
    return Balance(
        requests=load.requests,
        acknowledged=len(acknowledged),
        refused=len(load.of(Outcome.REFUSED)),
        unheard=len(cut - begun.keys()),
        cut_off=len(cut & begun.keys()),
        delivered=delivered.total(),
        lost=len(promised - delivered.keys()),
        doubled=sum(count > 1 for count in delivered.values()),
        unasked=len(delivered.keys() - promised),
        processes=len(set(begun.values())),
    )


def read_begun(path: pathlib.Path) -> dict[int, int]:
    """Read the app's own book: the requests that it began, and in which process."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {int(number): int(process) for number, process in lines}
