from __future__ import annotations

import sys
import types
import typing as t

import pytest

from flask_apitask.uwsgi import threads_go_on

if t.TYPE_CHECKING:
    import collections.abc as cabc


@pytest.fixture(autouse=True)
def other_process() -> cabc.Iterator[None]:
    """Have the test look for itself, and leave nothing of what it found."""
    threads_go_on.cache_clear()
    yield
    threads_go_on.cache_clear()


def stand_in(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    """Put what uWSGI would in its place."""
    server = types.ModuleType("uwsgi")
    vars(server).update(attributes)
    monkeypatch.setitem(sys.modules, "uwsgi", server)


def test_other_servers(caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no uWSGI, threads go on."""
    assert "uwsgi" not in sys.modules
    assert threads_go_on()
    assert not caplog.records


@pytest.mark.parametrize("attributes", [{"has_threads": 1}, {}])
def test_threads(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    attributes: dict[str, object],
) -> None:
    """Threads go on, unless uWSGI says that they do not."""
    stand_in(monkeypatch, **attributes)
    assert threads_go_on()
    assert not caplog.records


def test_no_threads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING says what is the matter and what to do, however often it is asked."""
    stand_in(monkeypatch, has_threads=0)
    assert not threads_go_on()
    assert not threads_go_on()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flask_apitask.uwsgi", "WARNING")
    assert "enable-threads = true" in record.getMessage()
