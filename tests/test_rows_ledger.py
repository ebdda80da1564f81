from __future__ import annotations

import random
import secrets
import signal
import time
import typing as t

import ledger
import pytest
import rows_app
import sqlalchemy
from ledger import Load
from ledger import Outcome
from ledger_mail import MailServer
from ledger_mail import reserve_port
from rows_app import Row
from rows_app import Way
from rows_app import way_of
from test_ledger import kill_worker
from wsgi_servers import serve

if t.TYPE_CHECKING:
    import pathlib

    from postgres import Postgres

pytestmark = pytest.mark.servers

CLIENTS: t.Final = 8
# Seconds that the mail server takes for a message.
DELAY: t.Final = 0.02
KILLS: t.Final = 8
# Acknowledged requests between one time that a worker is killed and the next.
INTERVAL: t.Final = 5
WORKERS: t.Final = 2


class Books(t.NamedTuple):
    """What the client, the database and the mail server have written down.

    :param answered: Requests with a complete answer of the app, whatever it says.
    :param rows: Requests whose rows are in the database.
    :param mailed: Requests whose mails were delivered.
    :param errors: Tasks that failed.
    """

    answered: set[int]
    acknowledged: set[int]
    cut: set[int]
    rows: set[int]
    mailed: set[int]
    errors: int


def play(mail: str, database: str, folder: pathlib.Path) -> Books:
    """Put the app under load, and kill workers meanwhile."""
    engine = sqlalchemy.create_engine(database)
    rows_app.Base.metadata.create_all(engine)
    dice, key = random.Random(22), secrets.token_hex()

    try:
        with sqlalchemy.orm.Session(engine) as session:
            session.add(Row(number=-1, name=rows_app.TAKEN))
            session.commit()

        with (
            reserve_port() as port,
            MailServer(port, delay=DELAY) as mail_server,
        ):
            book = folder / "begun"
            env = ledger.app_environ(key=key, begun=book, mail_port=port, mail=mail)
            env["FLASK_SQLALCHEMY_DATABASE_URI"] = database
            options = ["--workers", f"{WORKERS}"]

            with serve(
                "gunicorn-gthread", "rows_app:app", env=env, options=options
            ) as server:
                with Load(port=server.port, key=key, clients=CLIENTS) as load:
                    for _ in range(KILLS):
                        load.wait_for_more(INTERVAL)
                        # Any moment of a request, and not only that of an answer.
                        time.sleep(dice.uniform(0, 2 * DELAY))
                        kill_worker(server, dice)

                server.signal(signal.SIGTERM)
                assert server.wait(ledger.PATIENCE) == 0
                log = server.output()

        with sqlalchemy.orm.Session(engine) as session:
            rows = set(session.scalars(sqlalchemy.select(Row.number)))
    finally:
        rows_app.Base.metadata.drop_all(engine)
        engine.dispose()

    acknowledged = load.of(Outcome.ACKNOWLEDGED)
    ids = {ledger.message_id(number, 0): number for number in range(load.begun)}
    assert len(mail_server.delivered) == len(set(mail_server.delivered))
    return Books(
        acknowledged | load.of(Outcome.WRONG),
        acknowledged,
        load.of(Outcome.CUT),
        rows - {-1},
        {ids[delivered] for delivered in mail_server.delivered},
        log.count(" failed after "),
    )


@pytest.mark.parametrize("mail", ["success", "commit"])
def test_mail_and_rows_agree(
    mail: str, postgres: Postgres, tmp_path: pathlib.Path
) -> None:
    """No row that was rolled back has a mail, and no acknowledged one lacks it."""
    books = play(mail, postgres.url, tmp_path)
    expected = {Way.COMMIT}

    if mail == "commit":
        expected.add(Way.COMMIT_AND_FAIL)

    # What is to come of an answer has come of it.
    assert {way_of(number) for number in books.answered} == set(Way)
    promised = {number for number in books.answered if way_of(number) in expected}
    assert promised <= books.rows
    assert promised - books.mailed == set()
    assert (books.answered & books.mailed) - promised == set()
    # Nor has one that was killed.
    assert books.mailed - books.rows == set()
    assert len(books.cut) > 0
    assert books.errors == 0
