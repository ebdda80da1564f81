from __future__ import annotations

import sys
import types

import pytest
from conftest import wait_until
from mailbox_server import Mailbox
from scopes import make_scope
from scopes import nothing
from smtp_servers import make_envelope

from flask_apitask.executor.pool import threads_enabled
from flask_apitask.mail.envelope import Server
from flask_apitask.mail.pool import ConnectionPool


def stand_in(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """Put what uWSGI would in its place."""
    server = types.ModuleType("uwsgi")
    vars(server).update(attributes)
    monkeypatch.setitem(sys.modules, "uwsgi", server)


def test_threads_run() -> None:
    """Threads run where there is no uWSGI."""
    assert "uwsgi" not in sys.modules
    assert threads_enabled()


@pytest.mark.parametrize("attributes", [{"has_threads": 1}, {}])
def test_threads_run_in_uwsgi(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, object]
) -> None:
    """And in uWSGI, unless it says that they do not."""
    stand_in(monkeypatch, **attributes)
    assert threads_enabled()


def test_tasks_run_inline_without_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING says what is the matter and what to do."""
    stand_in(monkeypatch, has_threads=0)

    with make_scope() as scope:
        for _ in range(3):
            assert scope.submit(nothing).done()

    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flask_apitask", "WARNING")
    assert "enable-threads = true" in record.getMessage()


@pytest.mark.parametrize("has_threads", [0, 1])
def test_connections(monkeypatch: pytest.MonkeyPatch, has_threads: int) -> None:
    """No connection is kept where no thread could close it in time."""
    stand_in(monkeypatch, has_threads=has_threads)

    with Mailbox() as mailbox:
        pool = ConnectionPool(Server("127.0.0.1", mailbox.port), keepalive=60)

        with pool.connection() as connection:
            connection.send(make_envelope("order"))

        assert len(mailbox.messages) == 1

        if has_threads:
            assert len(mailbox.transports) == 1
        else:
            wait_until(lambda: not mailbox.transports)

        pool.close()
