from __future__ import annotations

import collections
import math
import secrets
import typing as t

import ledger
import pytest
from conftest import wait_until
from ledger import Load
from ledger_mail import MailServer
from ledger_mail import Mood
from ledger_mail import reserve_port
from ledger_report import Report
from wsgi_servers import serve

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from wsgi_servers import Server

pytestmark = pytest.mark.servers

CLIENTS: t.Final = 8
# APITASK_MAIL_TIMEOUT, in seconds.
TIMEOUT: t.Final = 3.0
# Replies that trickle before the mail server is well again.
TRICKLED: t.Final = 10
# Seconds that the mail server takes for a message when it is not.
DELAY: t.Final = 0.01
# Seconds after which gunicorn kills a worker that is silent.
WORKER_TIMEOUT: t.Final = 20
# Acknowledged requests before the outage, and after it.
ENOUGH: t.Final = 40

# Seconds that docs/mail.md says a mail takes at most, with one recipient and less than
# 16 KiB: from a server that falls silent on a connection that was kept, and from one
# that is just in time with everything; with the wait for a connection each.
SILENT: t.Final = 2 * TIMEOUT + TIMEOUT
HOSTILE: t.Final = (22 + 2 + 2) * TIMEOUT + 1 + TIMEOUT

TROUBLES: t.Final = [mood for mood in Mood if mood is not Mood.HEALTHY]
# Requests that one worker of each serves at once.
KINDS: t.Final = {"gunicorn-gthread": 8, "gunicorn-gevent": 1000, "gunicorn-sync": 1}

REPORT: t.Final = Report(
    "broken-mail",
    labels={"server": "server", "trouble": "the mail server"},
    numbers={
        "requests": "requests",
        "acknowledged": "status 200",
        "delivered": "mails delivered",
        "failed": "failed, one ERROR each",
        "unknown": "unknown, one ERROR each",
        "slowest": "slowest response, s",
        "bound": "bound, s",
    },
)


class Books(t.NamedTuple):
    """What became of the mails of all requests."""

    delivered: int
    failed: int
    unknown: int


def balance(load: Load, mail_server: MailServer, log: str) -> Books:
    """Find each mail in the books of the mail server, or in one record of the log."""
    reports: collections.Counter[str] = collections.Counter()
    unknown: set[str] = set()

    for failure in ledger.read_failures(log):
        reports.update(failure.message_ids)
        unknown |= failure.message_ids if failure.is_unknown else set()

    delivered = mail_server.delivered
    assert reports.keys() | delivered.keys() == mails(range(load.begun)), "one is lost"
    assert set(reports.values()) <= {1}, "a mail was reported twice"
    assert set(delivered.values()) == {1}, "a mail was delivered twice"
    failed = reports.keys() - unknown
    assert not failed & delivered.keys(), "a delivered mail was reported as failed"
    return Books(len(delivered.keys() - unknown), len(failed), len(unknown))


def mails(numbers: cabc.Iterable[int]) -> set[str]:
    """Return the ``Message-ID`` of each mail of requests."""
    copies = range(ledger.COPIES)
    return {ledger.message_id(number, copy) for number in numbers for copy in copies}


class Outage(t.NamedTuple):
    """A load, during which the mail server was broken for a while.

    :param healed: The number of the first request after that.
    :param lives: Whether the worker survived it.
    :param log: What the server has written.
    """

    load: Load
    mail_server: MailServer
    healed: int
    lives: bool
    log: str


def wait_for_outage(trouble: Mood, mail_server: MailServer, server: Server) -> None:
    """Wait until the trouble has made a mail fail, or the replies have trickled."""

    def has_struck() -> bool:
        if trouble is Mood.TRICKLES:
            return mail_server.trickled >= TRICKLED

        failures = ledger.read_failures(server.output())
        return any(not failure.is_unknown for failure in failures)

    wait_until(has_struck, ledger.PATIENCE)


def play(kind: str, trouble: Mood, folder: pathlib.Path) -> Outage:
    """Put one worker under load, and break its mail server."""
    key = secrets.token_hex()
    options = ["--workers", "1", "--timeout", f"{WORKER_TIMEOUT}"]

    with reserve_port() as mail_port:
        begun = folder / "begun"
        env = ledger.app_environ(key=key, begun=begun, mail_port=mail_port)
        env["FLASK_APITASK_MAIL_TIMEOUT"] = f"{TIMEOUT}"

        with (
            MailServer(mail_port, delay=DELAY) as mail_server,
            serve(kind, "ledger_app:app", env=env, options=options) as server,
        ):
            workers = server.workers()

            with Load(port=server.port, key=key, clients=CLIENTS) as load:
                load.wait_for_more(ENOUGH)
                mail_server.set_mood(trouble)
                wait_for_outage(trouble, mail_server, server)
                mail_server.set_mood(Mood.HEALTHY)
                healed = load.begun
                load.wait_for_more(ENOUGH)

            lives = server.workers() == workers
            return Outage(load, mail_server, healed, lives, server.output())


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        *(("gunicorn-gthread", trouble) for trouble in TROUBLES),
        ("gunicorn-gevent", Mood.HANGS),
        ("gunicorn-sync", Mood.HANGS),
    ],
    ids=lambda value: value.name.lower() if isinstance(value, Mood) else value,
)
def test_an_outage(kind: str, trouble: Mood, tmp_path: pathlib.Path) -> None:
    """A broken mail server costs ERRORs and bounded time, and nothing once it works."""
    outage = play(kind, trouble, tmp_path)
    load = outage.load
    books = balance(load, outage.mail_server, outage.log)
    slowest = max(answer.seconds for answer in load.answers.values())
    in_line = math.ceil(CLIENTS / KINDS[kind])
    bound = in_line * (HOSTILE if trouble is Mood.TRICKLES else SILENT)
    REPORT.add(
        {
            "server": kind,
            "trouble": trouble.value,
            "requests": load.requests,
            "acknowledged": load.acknowledged,
            "slowest": round(slowest, 2),
            "bound": bound,
            **books._asdict(),
        }
    )
    assert load.acknowledged == load.requests
    # A server that trickles its replies in time takes all mail, as nobody gives up.
    assert books.failed or trouble is Mood.TRICKLES
    assert slowest < bound
    assert outage.lives
    assert "WORKER TIMEOUT" not in outage.log
    after = mails(range(outage.healed, load.begun))
    assert after <= outage.mail_server.delivered.keys()
