"""What only uWSGI and mod_wsgi do; test_servers has what they share with the others."""

from __future__ import annotations

import functools
import http.client
import signal
import typing as t

import pytest
import test_servers
import wsgi_servers_native  # noqa: F401  it adds its kinds
from conftest import wait_until
from test_servers import ask
from test_servers import is_silent
from test_servers import PATIENCE
from test_servers import read
from test_servers import Site

if t.TYPE_CHECKING:
    import pathlib

pytestmark = pytest.mark.servers

WARNING = "Add 'enable-threads = true'"
UWSGI: t.Final = ["uwsgi-threads", "uwsgi"]
# Of one worker, and of both in a test that has them recycled.
LIMIT: t.Final = 3
REQUESTS: t.Final = 7
# The signals by which requests come to their end before the server stops, or its
# workers are replaced.
STOP: t.Final = {"mod_wsgi": signal.SIGWINCH}
RELOAD: t.Final = {"mod_wsgi": signal.SIGUSR1}


start = functools.partial(test_servers.start, app="native_app:app")


def recycle(kind: str) -> list[str]:
    """Return the options that have a worker replaced after some requests."""
    if kind != "mod_wsgi":
        # Otherwise a worker lives for a while at least (10 s by default).
        lifetime = ["--max-requests", f"{LIMIT}", "--min-worker-lifetime", "0"]
        return ["--processes", "2", *lifetime]

    group = "WSGIDaemonProcess recycled processes=2 threads=2 home=${SITE}"
    limits = f"maximum-requests={LIMIT} graceful-timeout=30 shutdown-timeout=30"
    packages = "python-path=${PACKAGES}"
    return ["-c", f"{group} {packages} {limits}", "-c", "WSGIProcessGroup recycled"]


def stop(site: Site) -> None:
    """Stop the server gracefully, and check its output."""
    site.server.signal(STOP.get(site.server.kind, signal.SIGTERM))
    assert site.server.wait(PATIENCE) == 0
    check_output(site)


def end(site: Site) -> None:
    """End a server whose workers are being replaced, and check its output.

    If a SIGTERM comes while one starts, uWSGI waits for that one for ever.
    """
    site.server.end()
    check_output(site)


def check_output(site: Site) -> None:
    """Check that nothing was wrong with the server's end."""
    output = site.server.output()
    assert "Fatal Python error" not in output
    assert "Segmentation" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("kind", UWSGI)
def test_threads_of_uwsgi(kind: str, tmp_path: pathlib.Path) -> None:
    """Without threads each task runs on the spot, and one WARNING says why."""
    frozen = kind == "uwsgi"

    with start(kind, tmp_path) as site:
        for _ in range(3):
            assert site.get("/inline") == (200, str(frozen))

        with site.client() as client:
            assert ask(client, "POST", "/mail/order") == (200, "order")

        assert len(site.mailbox.messages) == 2
        # Nobody could close a connection that is kept between requests. The mail server
        # may notice a moment later that it was closed.
        wait_until(lambda: bool(site.mailbox.transports) != frozen)
        assert site.server.output().count(WARNING) == frozen


@pytest.mark.parametrize("kind", UWSGI)
def test_fork_of_uwsgi_after_use(kind: str, tmp_path: pathlib.Path) -> None:
    """A worker has threads and connections of its own, not those of the master."""
    with start(kind, tmp_path, NATIVE_WARM="1") as site:
        before = set(map(id, site.mailbox.sessions))
        assert len(before) > 0

        with site.client() as client:
            assert ask(client, "POST", "/mail/fork") == (200, "fork")

        assert site.get("/inline") == (200, str(kind == "uwsgi"))
        after = [id(session) for session in site.mailbox.sessions[2:]]
        assert len(after) == 2
        assert before.isdisjoint(after)
        stop(site)


@pytest.mark.parametrize("kind", [*UWSGI, "mod_wsgi"])
def test_reload_in_the_middle_of_a_request(kind: str, tmp_path: pathlib.Path) -> None:
    """A graceful reload waits for the task, and the new worker has tasks as well."""
    with start(kind, tmp_path) as site, site.client() as client:
        old = site.get("/process").text
        client.request("GET", "/work-and-mail/reload")

        with site.gate.hold("reload"):
            site.server.signal(RELOAD.get(kind, signal.SIGHUP))
            assert is_silent(client.sock)

        assert read(client) == (200, "reload")
        assert site.mailbox.subjects == ["reload"]
        wait_until(lambda: site.get("/process").text != old)
        assert site.get("/note/after") == (200, "after")
        assert [line for line in site.done() if line != "exit"] == ["reload", "after"]
        stop(site)


@pytest.mark.parametrize("kind", [*UWSGI, "mod_wsgi"])
def test_workers_that_are_recycled(kind: str, tmp_path: pathlib.Path) -> None:
    """Each request of a worker that is to be replaced has its mails delivered, once."""
    with start(kind, tmp_path, *recycle(kind)) as site:
        processes = set()

        for number in range(REQUESTS):
            processes.add(site.get("/process").text)

            with site.client() as client:
                assert ask(client, "POST", f"/mail/{number}") == (200, f"{number}")

        expected = [f"{number} {copy}" for number in range(REQUESTS) for copy in (1, 2)]
        assert sorted(site.mailbox.subjects) == sorted(expected)
        assert len(processes) > 2
        end(site)


@pytest.mark.parametrize("kind", ["uwsgi-threads", "mod_wsgi"])
def test_recycled_in_the_middle_of_a_request(kind: str, tmp_path: pathlib.Path) -> None:
    """A worker that has served its number waits for the task that it runs."""
    with start(kind, tmp_path, *recycle(kind)) as site:
        with site.client() as client:
            client.request("GET", "/work-and-mail/recycled")

            with site.gate.hold("recycled"):
                for number in range(REQUESTS):
                    assert site.get(f"/note/{number}") == (200, f"{number}")

                assert is_silent(client.sock)

            assert read(client) == (200, "recycled")

        assert site.mailbox.subjects == ["recycled"]
        end(site)


@pytest.mark.parametrize("answer", ["close", "teardown"])
def test_graceful_stop_of_apache(answer: str, tmp_path: pathlib.Path) -> None:
    """On SIGWINCH Apache waits for the task, whether its request is answered or not."""
    with (
        start("mod_wsgi", tmp_path, APITASK_WAIT=answer) as site,
        site.client() as client,
    ):
        client.request("GET", "/work-and-mail/stop")

        with site.gate.hold("stop"):
            site.server.signal(signal.SIGWINCH)
            waits = answer == "teardown"
            assert is_silent(client.sock, waits) == waits

        assert read(client) == (200, "stop")
        assert site.server.wait(PATIENCE) == 0
        assert site.mailbox.subjects == ["stop"]


def test_abrupt_stop_of_apache(tmp_path: pathlib.Path) -> None:
    """On SIGTERM the client is cut off, but the mail of the task is sent still."""
    with start("mod_wsgi", tmp_path) as site, site.client() as client:
        client.request("GET", "/work-and-mail/stop")

        with site.gate.hold("stop"):
            site.server.signal(signal.SIGTERM)

            with pytest.raises((ConnectionError, http.client.HTTPException)):
                read(client)

        assert site.server.wait(PATIENCE) == 0
        assert site.mailbox.subjects == ["stop"]


@pytest.mark.parametrize("kind", ["uwsgi-threads", "mod_wsgi"])
def test_end_with_idle_threads(kind: str, tmp_path: pathlib.Path) -> None:
    """Threads that sleep and a connection that is kept let an interpreter end."""
    with start(kind, tmp_path) as site, site.client() as client:
        assert ask(client, "POST", "/mail/order") == (200, "order")
        assert site.get("/inline") == (200, "False")
        assert site.mailbox.transports
        assert site.done() == []
        stop(site)
        assert site.done() == ["exit"]


def test_subinterpreter(tmp_path: pathlib.Path) -> None:
    """Tasks run, and their requests end, in an interpreter beside the main one."""
    group = ["-c", "WSGIApplicationGroup shop"]

    with start("mod_wsgi", tmp_path, *group) as site, site.client() as client:
        assert site.get("/inline") == (200, "False")
        client.request("GET", "/work-and-mail/stop")

        with site.gate.hold("stop"):
            site.server.signal(signal.SIGWINCH)
            assert is_silent(client.sock)

        assert read(client) == (200, "stop")
        assert site.mailbox.subjects == ["stop"]
        # mod_wsgi 4.9 never comes to the end of such an interpreter, whatever is in it,
        # and is killed. What an app registers for its exit is not called there.
        assert site.server.wait(PATIENCE) == 0
