from __future__ import annotations

import html
import os
import time
import typing as t
import urllib.parse

import pytest
from brokers import find_port
from brokers import Worker
from child_process import PATIENCE
from conftest import wait_until
from example import Example
from example import fetch
from mailbox_server import Mailbox

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from brokers import Broker

# Seconds that the example's mail server takes for a mail, as its page says.
DELAY = 0.3

both_modes = pytest.mark.parametrize("mode", ["", "/off"])


@pytest.fixture(scope="module")
def url() -> cabc.Iterator[str]:
    """Start the example application, and return its address."""
    with Example() as example:
        yield example.address()


def find_mails(url: str, address: str) -> list[tuple[str, ...]]:
    """Return the mails that speak of an address."""
    return [mail for mail in fetch(f"{url}/inbox").mails if address in mail[2]]


@both_modes
def test_signup_is_done_when_it_is_answered(url: str, mode: str) -> None:
    """The mails have arrived and the audit is written when the answer comes."""
    before = fetch(f"{url}/inbox")
    name = f"done{len(before.audit)}@example.org"
    answer = fetch(f"{url}{mode}/signup", {"address": name})
    after = fetch(f"{url}/inbox")
    assert answer.status == 303
    assert len(after.audit) == len(before.audit) + 1
    user, client = after.audit[0]
    assert client == "127.0.0.1"
    assert len(after.mails) == len(before.mails) + 2
    assert set(after.mails[:2]) == {
        ("Welcome", name, f"You are signed up as {name}."),
        ("A new user", "admin@example.org", f"User {user} is {name}."),
    }


@both_modes
def test_signup_leads_to_the_form(url: str, mode: str) -> None:
    """Who has signed up is sent to a page that says so, and may be loaded again."""
    answer = fetch(f"{url}{mode}/signup", {"address": f"led{mode[1:]}@example.org"})
    assert answer.location is not None
    page = fetch(urllib.parse.urljoin(f"{url}/", answer.location))
    assert answer.location == f"{mode}/?done=1"
    assert page.status == 200
    assert '<p role="status">You are signed up.</p>' in page.text


def test_three_mails_overlap(url: str) -> None:
    """Three mails take the time of one with the background on, and else of three.

    The page shows no less than the mail server's part, no more than the client sees.
    """
    taken: dict[str, list[float]] = {"": [], "/off": []}

    for mode, background in [("", "on"), ("/off", "off")] * 3:
        address = f"three-{background}{len(taken[mode])}@example.org"
        start = time.perf_counter()
        fetch(f"{url}{mode}/signup", {"address": address, "newsletter": "on"})
        elapsed = time.perf_counter() - start
        seconds = fetch(f"{url}{mode}/").seconds(background)
        taken[mode].append(seconds)
        assert len(find_mails(url, address)) == 2
        assert seconds < elapsed
        # A timer may be early by a tick of the clock.
        assert seconds > (3 if mode else 1) * DELAY * 0.99

    assert min(taken[""]) < 0.6 * min(taken["/off"])


def test_times_of_both_modes_are_shown(url: str) -> None:
    """The times of the last sign-up with the background on and off are on one page."""
    for mode in ["", "/off"]:
        fetch(f"{url}{mode}/signup", {"address": f"times{mode[1:]}@example.org"})

    plain, routed = fetch(f"{url}/off/"), fetch(f"{url}/")
    assert plain.seconds("on") == routed.seconds("on")
    assert plain.seconds("off") == routed.seconds("off")


@both_modes
def test_address_signs_up_once(url: str, mode: str) -> None:
    """An address that is signed up is refused in any case and mode, without a mail."""
    name = f"twice{mode[1:]}@example.org"
    fetch(f"{url}/signup", {"address": name})
    mails = fetch(f"{url}/inbox").mails
    answer = fetch(f"{url}{mode}/signup", {"address": name.upper()})
    assert answer.status == 409
    assert answer.error == "This address is signed up already."
    assert f'value="{name.upper()}"' in answer.text
    assert fetch(f"{url}/inbox").mails == mails


@pytest.mark.parametrize(
    "address",
    [
        "",
        "name",
        "name@example",
        "name@exam ple.org",
        "first..last@example.org",
        f"name@{'a' * 64}.org",
        f"{'a' * 243}@example.org",
        "name@example.org\nBcc: other@example.org",
        '"><script>alert(1)</script>',
    ],
)
def test_address_is_checked(url: str, address: str) -> None:
    """What is no address is refused, sent nothing, and shown as it was entered."""
    before = fetch(f"{url}/inbox")
    answer = fetch(f"{url}/signup", {"address": address})
    assert answer.status == 422
    assert answer.error == "Enter an address like name@example.org."
    assert f'value="{html.escape(address).replace("&quot;", "&#34;")}"' in answer.text
    assert "<script" not in answer.text
    assert fetch(f"{url}/inbox") == before


def test_form_without_fields(url: str) -> None:
    """A form that lacks the address is refused like an empty one."""
    assert fetch(f"{url}/signup", {}).status == 422


def test_mails_are_text(url: str) -> None:
    """What HTML gives a meaning to is shown in the inbox as the text that it is."""
    address = "mary.o'reilly&lt@example.org"
    fetch(f"{url}/signup", {"address": address})
    assert len(find_mails(url, address)) == 2
    assert "mary.o&#39;reilly&amp;lt@example.org" in fetch(f"{url}/inbox").text


def test_configured_mail_server() -> None:
    """A mail server that the environment names gets the mail, and none is started."""
    with Mailbox() as mailbox:
        with Example(
            FLASK_MAIL_SERVER="127.0.0.1",
            FLASK_MAIL_PORT=str(mailbox.port),
            FLASK_ADMIN="root@example.net",
        ) as example:
            url = example.address()
            fetch(f"{url}/signup", {"address": "configured@example.org"})
            page = fetch(f"{url}/inbox")

        recipients = sorted(mailbox.recipients)

    assert recipients == [["configured@example.org"], ["root@example.net"]]
    assert "embedded" not in example.output
    assert "The mail goes to 127.0.0.1, so look there." in page.text


def test_port_that_is_taken() -> None:
    """A port that is taken ends the application with a message that says so."""
    with Example() as first:
        port = first.address().rpartition(":")[2]

        with Example(FLASK_RUN_PORT=port) as second:
            assert second.wait() == 1

    assert f"Port {port} is in use by another program." in second.output
    assert "Traceback" not in second.output


def test_interrupt_ends_it(tmp_path: pathlib.Path) -> None:
    """Ctrl-C after sign-ups ends it without an error, and nothing is left behind."""
    with Example(TMPDIR=str(tmp_path)) as example:
        url = example.address()

        for mode in ["", "/off"]:
            address = f"ended{mode[1:]}@example.org"
            assert fetch(f"{url}{mode}/signup", {"address": address}).status == 303

        assert len(os.listdir(tmp_path)) == 1
        assert example.interrupt() == 0

    assert "Traceback" not in example.output
    assert "@" not in example.output
    assert os.listdir(tmp_path) == []


def test_worker_of_the_example(broker: Broker, tmp_path: pathlib.Path) -> None:
    """With a broker, a worker sends the mails and writes the audit of the example."""
    pytest.importorskip("celery")
    environ = {
        "FLASK_BROKER": broker.url,
        "FLASK_DATABASE": f"{tmp_path}/signup.sqlite",
        "FLASK_MAIL_PORT": f"{find_port()}",
    }

    with Example(**environ) as example:
        url = example.address()
        answer = fetch(f"{url}/signup", {"address": "worker@example.org"})
        assert answer.status == 303
        # There is no worker yet.
        assert fetch(f"{url}/inbox").audit == []

        with Worker(tmp_path, "example_app:celery", "prefork", environ) as worker:
            wait_until(lambda: len(fetch(f"{url}/inbox").audit) == 1, PATIENCE)
            wait_until(
                lambda: len(find_mails(url, "worker@example.org")) == 2, PATIENCE
            )
            assert "Task signup.audit[" in worker.output()

    assert "WARNING in" not in example.output
