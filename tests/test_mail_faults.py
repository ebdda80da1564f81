from __future__ import annotations

import pathlib
import tempfile
import typing as t

import pytest
from mail_time import unhurried
from smtp_servers import Certificates
from smtp_servers import Fault
from smtp_servers import make_envelope
from smtp_servers import ScriptedServer
from smtp_servers import Stage

from flask_apitask.exceptions import DeliveryError
from flask_apitask.exceptions import DeliveryUnknown
from flask_apitask.mail import connection as connection_module
from flask_apitask.mail.pool import ConnectionPool

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "mail-faults.md"

STAGES = [stage for stage in Stage if stage is not Stage.RSET]
FAULTS = [fault for fault in Fault if fault is not Fault.STALL]
# Up to here a connection that was kept has been, and only a new one meets the fault.
OPENING = STAGES[: STAGES.index(Stage.MAIL)]
# Seconds of timeout.
TIMEOUT = 5.0

INTRODUCTION = """\
# When a mail server fails

<!-- Written by `python tests/test_mail_faults.py`, and checked by the tests. -->

The tables show what happens to a message if the server makes one mistake at one stage
of the dialogue, over STARTTLS and AUTH. A scripted server played each of these faults,
with and without PIPELINING, and the outcome was the same.

- **delivered**: the server has accepted the message once, and there is no error.
- **again, delivered**: the same, on a second connection.
- **error**: a `DeliveryError`, and the server has not accepted the message.
- **unknown**: a `DeliveryUnknown`: the server had all of the message and did not say
  what it did with it. It is not sent again.

The next message is delivered in every case.
"""

HEADINGS = {
    False: "## On a new connection\n",
    True: "## On a kept connection\n\n"
    f"For the rows up to {OPENING[-1].value}, the server has closed the kept"
    " connection, and the one\nopened in its place meets the fault.\n",
}


class Case(t.NamedTuple):
    """One cell of the table."""

    kept: bool
    stage: Stage
    fault: Fault


CASES = [
    Case(kept, stage, fault)
    for kept in HEADINGS
    for stage in STAGES
    for fault in FAULTS
]


def play(case: Case, certificates: Certificates, *, pipelining: bool) -> str:
    """Let a server do what the case says, and return what became of the message."""
    with ScriptedServer(
        tls=certificates.context("localhost"),
        user=("me@example.com", "secret"),
        pipelining=pipelining,
    ) as server:
        settings = server.settings(tls_verify=certificates.cafile, timeout=TIMEOUT)
        pool = ConnectionPool(settings)

        if case.kept:
            outcome_of(pool)

            if case.stage in OPENING:
                server.hang_up()

        before = server.connects + (case.kept and case.stage in OPENING)
        server.fail(case.stage, case.fault)

        with unhurried(server) as waits:
            outcome, message_id = outcome_of(pool)

            if case.stage is Stage.QUIT:
                # The reply to QUIT only affects how long this takes.
                pool.close_idle()
                pool = ConnectionPool(settings)

        # The server is silent once, and is waited for once.
        assert len(waits) == (case.fault is Fault.SILENCE)
        quits = case.stage is Stage.QUIT
        most = connection_module._QUIT_TIMEOUT if quits else TIMEOUT
        assert all(wait <= most for wait in waits)
        copies = [taken.message_id for taken in server.taken].count(message_id)
        assert copies == (outcome == "delivered")
        # A second complete one only if the server said that it had not taken the first.
        assert server.complete[message_id] <= 1 + (case.fault is Fault.BUSY)
        assert server.next_fault(case.stage) is None, "the fault was not met"

        if outcome == "delivered" and server.connects - before > (not case.kept):
            outcome = "again, delivered"

        assert outcome_of(pool)[0] == "delivered"
        pool.close_idle()

    return outcome


def outcome_of(pool: ConnectionPool) -> tuple[str, str]:
    """Send a message, and return in a word how that ended, and which it was."""
    envelope = make_envelope()

    try:
        with pool.connection() as connection:
            connection.send(envelope)
    except DeliveryUnknown:
        outcome = "unknown"
    except DeliveryError:
        outcome = "error"
    else:
        outcome = "delivered"

    return outcome, envelope.message_id


def write_table(outcomes: dict[Case, str]) -> str:
    """Write the page for the docs."""
    page = [INTRODUCTION]

    for kept, heading in HEADINGS.items():
        page.append(heading)
        page.append(write_row("", *(fault.value for fault in FAULTS)))
        page.append(write_row("---", *("---" for _ in FAULTS)))

        for stage in STAGES:
            cells = (outcomes[Case(kept, stage, fault)] for fault in FAULTS)
            page.append(write_row(f"**{stage.value}**", *cells))

        page.append("")

    return "\n".join(page)


def write_row(*cells: str) -> str:
    """Write a line of a table."""
    return f"| {' | '.join(cells)} |"


def read_table(page: str) -> dict[Case, str]:
    """Read the outcomes from the page."""
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")[1:]]
    return dict(zip(CASES, cells, strict=True))


def test_the_table_is_as_it_was_written() -> None:
    """The page in the docs is what the script writes, for the outcomes it shows."""
    page = TABLE.read_text()
    assert page == write_table(read_table(page))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make an authority for the tests of this file."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize("kept", HEADINGS, ids=["new", "kept"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.value)
def test_outcomes(kept: bool, stage: Stage, certificates: Certificates) -> None:
    """The docs tell what becomes of a message when a server fails."""
    page = read_table(TABLE.read_text())
    row = [Case(kept, stage, fault) for fault in FAULTS]
    promised = {case.fault: page[case] for case in row}

    for pipelining in {True, stage in OPENING}:
        assert promised == {
            case.fault: play(case, certificates, pipelining=pipelining) for case in row
        }


def main() -> None:
    """Play all cases, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        certificates = Certificates(pathlib.Path(folder))
        outcomes = {case: play(case, certificates, pipelining=True) for case in CASES}

    TABLE.write_text(write_table(outcomes))


if __name__ == "__main__":
    main()
