from __future__ import annotations

import sys
import types

import pytest
from scopes import make_scope
from scopes import nothing

from flask_apitask.executor.worker import threads_enabled


def stand_in(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """Put a stand-in for uWSGI's module in its place."""
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
    """One WARNING says what is wrong and what to do."""
    stand_in(monkeypatch, has_threads=0)

    with make_scope() as scope:
        for _ in range(3):
            assert scope.submit(nothing).done()

    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flask_apitask", "WARNING")
    assert "enable-threads = true" in record.getMessage()
