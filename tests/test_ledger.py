from __future__ import annotations

import contextlib
import enum
import itertools
import os
import pathlib
import random
import secrets
import signal
import tempfile
import time
import typing as t

import ledger
import pytest
import wsgi_servers_native  # noqa: F401
from conftest import wait_until
from ledger import Load
from ledger_mail import MailServer
from ledger_mail import reserve_port
from ledger_report import Report
from wsgi_servers import serve

if t.TYPE_CHECKING:
    from wsgi_servers import Server

pytestmark = pytest.mark.servers

KINDS: t.Final = [
    "gunicorn-gthread",
    "gunicorn-sync",
    "gunicorn-gevent",
    "uwsgi-threads",
]
# Who sends the mail, by the names that the app knows them by.
OURS: t.Final = "apitask"
PEERS: t.Final = ["thread", "executor"]
LABELS: t.Final = {
    OURS: "Flask-ApiTask",
    "thread": "a thread per mail, not waited for",
    "executor": "Flask-Executor, not waited for",
}
CLIENTS: t.Final = 8
# Seconds that the mail server takes for a message.
DELAY: t.Final = 0.04
WORKERS: t.Final = 2
SEED: t.Final = 20
# Times that a thing happens in a run, at least.
LEAST_EVENTS: t.Final = 2


class Event(enum.Enum):
    """What happens to the server again and again while it is under load."""

    RESTART = "SIGTERM, and a new start"
    RELOAD = "SIGHUP"
    RECYCLE = "--max-requests 5"
    KILL = "SIGKILL of a worker"


# Acknowledged requests between one time that it happens and the next.
INTERVALS: t.Final = {
    Event.RESTART: 20,
    Event.RELOAD: 20,
    Event.RECYCLE: 5,
    Event.KILL: 5,
}
# Of one kind of server, shared out among the events.
REQUESTS: t.Final = int(os.environ.get("APITASK_LEDGER_REQUESTS", "200"))
REPORT: t.Final = Report(
    "ledger",
    labels={"mail": "mail", "server": "server", "event": "event"},
    numbers={
        "events": "times",
        "requests": "requests",
        "acknowledged": "acknowledged",
        "refused": "refused",
        "unheard": "cut off before the app",
        "cut_off": "cut off in the app",
        "delivered": "mails delivered",
        "unasked": "of them not acknowledged",
        "lost": "**acknowledged, not delivered**",
        "doubled": "**delivered twice**",
        "errors": "errors",
    },
)


class Row(t.NamedTuple):
    """What came of a run.

    :param events: How often the event happened.
    :param errors: ERROR records about mail.
    """

    books: ledger.Balance
    events: int
    errors: int


class Run:
    """One kind of server under load, while an event happens again and again."""

    def __init__(
        self, kind: str, event: Event, mail: str, folder: pathlib.Path
    ) -> None:
        self._kind = kind
        self._is_uwsgi = "uwsgi" in kind
        self._event = event
        self._dice = random.Random(SEED)
        self._begun = folder / "begun"
        self._key = secrets.token_hex()
        self._mail = mail
        self._env: dict[str, str] = {}
        self._events = 0
        self._logs: list[str] = []

    def play(self, total: int) -> Row:
        """Send so many requests at least, and return what came of them."""
        with (
            reserve_port() as mail_port,
            MailServer(mail_port, delay=DELAY) as mail_server,
            contextlib.ExitStack() as servers,
        ):
            self._env = ledger.app_environ(
                key=self._key, begun=self._begun, mail_port=mail_port, mail=self._mail
            )
            server = self._start(servers)

            with Load(port=server.port, key=self._key, clients=CLIENTS) as load:
                while load.requests < total or self._events < LEAST_EVENTS:
                    load.wait_for_more(INTERVALS[self._event])
                    server = self._disturb(load, server, servers)

                if self._event is Event.RESTART:
                    self._settle(server)

            self._stop(server)
            begun = ledger.read_begun(self._begun)
            books = ledger.balance(load, begun, mail_server)

        errors = len(ledger.read_failures("".join(self._logs)))
        return Row(books, self._events, errors)

    def _start(self, servers: contextlib.ExitStack) -> Server:
        options = ["--processes" if self._is_uwsgi else "--workers", f"{WORKERS}"]

        if self._event is Event.RECYCLE:
            options += ["--max-requests", "5"]
            # Of itself uWSGI lets a worker live for a while, whatever it has served.
            options += ["--min-worker-lifetime", "1"] if self._is_uwsgi else []

        return servers.enter_context(
            serve(self._kind, "ledger_app:app", env=self._env, options=options)
        )

    def _serving(self) -> set[int]:
        """Return the processes that have had requests."""
        return set(ledger.read_begun(self._begun).values())

    def _settle(self, server: Server) -> None:
        """Wait until all workers of a new server serve.

        If a SIGTERM comes while one starts, uWSGI waits for that one for ever.
        """
        wait_until(
            lambda: len(self._serving().intersection(server.workers())) == WORKERS,
            ledger.PATIENCE,
        )

    def _stop(self, server: Server) -> None:
        if self._is_uwsgi and self._event is not Event.RESTART:
            # It goes on for ever if a worker has died just before the SIGTERM.
            server.end()
        else:
            server.signal(signal.SIGTERM)
            assert server.wait(ledger.PATIENCE) == 0

        self._logs.append(server.output())

    def _disturb(
        self, load: Load, server: Server, servers: contextlib.ExitStack
    ) -> Server:
        """Do to a server what is to be done, and return the one that serves then."""
        if self._event is Event.RECYCLE:
            self._events = max(0, len(self._serving()) - WORKERS)
            return server

        self._events += 1

        if self._event is Event.KILL:
            # Any moment of a request, and not only that of an answer.
            time.sleep(self._dice.uniform(0, 2 * DELAY))
            kill_worker(server, self._dice)
        elif self._event is Event.RELOAD:
            reload(server)
        else:
            self._settle(server)
            self._stop(server)
            server = self._start(servers)
            load.move(server.port)

        return server


def kill_worker(server: Server, dice: random.Random) -> None:
    """Kill a worker, once there is one."""
    wait_until(lambda: bool(server.workers()), ledger.PATIENCE)

    # It may have come to its own end, or the last one killed may be in the list yet.
    with contextlib.suppress(ProcessLookupError, IndexError):
        os.kill(dice.choice(server.workers()), signal.SIGKILL)


def reload(server: Server) -> None:
    """Replace the workers, and wait until the old ones are gone."""
    former = set(server.workers())
    server.signal(signal.SIGHUP)
    wait_until(lambda: former.isdisjoint(server.workers()), ledger.PATIENCE)


def play(kind: str, event: Event, folder: pathlib.Path, *, mail: str = OURS) -> Row:
    """Let it happen, and put what came of it into the report."""
    row = Run(kind, event, mail, folder).play(REQUESTS // len(Event))
    what = {"server": kind, "mail": LABELS[mail], "event": event.value}
    counts = {"events": row.events, "errors": row.errors, **row.books._asdict()}
    REPORT.add({**what, **counts})
    return row


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name.lower())
@pytest.mark.parametrize("kind", KINDS)
def test_acknowledged_is_delivered(
    kind: str, event: Event, tmp_path: pathlib.Path
) -> None:
    """A client with a response has its mails, once, whatever happens to the worker."""
    books, _, errors = play(kind, event, tmp_path)
    assert books.lost == books.doubled == errors == 0
    assert books.processes > WORKERS

    if event is not Event.KILL:
        assert books.cut_off == books.unasked == 0

    if event in (Event.RELOAD, Event.RECYCLE):
        assert books.acknowledged == books.requests


@pytest.mark.parametrize("mail", PEERS)
def test_what_is_not_waited_for_is_lost(mail: str, tmp_path: pathlib.Path) -> None:
    """Without waiting, a killed worker loses mails, and the ledger shows it."""
    books, _, _ = play("gunicorn-gthread", Event.KILL, tmp_path, mail=mail)
    assert books.lost > 0


def main() -> None:
    """Complete a report with the runs of those that are not waited for."""
    for mail, kind, event in itertools.product(PEERS, KINDS, Event):
        with tempfile.TemporaryDirectory() as folder:
            play(kind, event, pathlib.Path(folder), mail=mail)


if __name__ == "__main__":
    main()
