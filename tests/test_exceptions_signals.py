from __future__ import annotations

import inspect
import smtplib
import subprocess
import sys
import textwrap
import typing as t

import blinker
import pytest

import flask_apitask
from flask_apitask import ApiTaskError
from flask_apitask import DeliveryError
from flask_apitask import DeliveryUnknown
from flask_apitask import exceptions
from flask_apitask import ScopeClosed
from flask_apitask import task_finished
from flask_apitask import task_started

EXCEPTIONS = [
    value
    for _, value in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(value, BaseException)
]


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_exceptions_form_one_tree(exception: type[BaseException]) -> None:
    """One ``except`` catches all the extension's own exceptions."""
    assert issubclass(exception, ApiTaskError)


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_exceptions_say_when(exception: type[BaseException]) -> None:
    """The documentation of an exception begins with when it is raised."""
    if exception is not ApiTaskError:
        assert (exception.__doc__ or "").startswith("Raised when ")


def test_closed_scope_is_a_runtime_error() -> None:
    """Code that knows executors catches a closed scope as it does a closed pool."""
    assert issubclass(ScopeClosed, RuntimeError)


def test_delivery_errors_are_mail_errors() -> None:
    """Code that knows Flask-Mail catches a delivery's failure as it did before."""
    assert issubclass(DeliveryError, smtplib.SMTPException)
    assert issubclass(DeliveryUnknown, DeliveryError)


def test_delivery_error_knows_its_message() -> None:
    """A mail that failed can be found in the log of a server."""
    assert DeliveryError("refused").message_id is None
    assert str(DeliveryError("refused")) == "refused"
    error = DeliveryUnknown("Lost.", message_id="<1@example.org>")
    assert error.message_id == "<1@example.org>"
    assert str(error) == "Lost. Message-ID: <1@example.org>"
    assert error.args == ("Lost.",)


@pytest.mark.parametrize(
    ("signal", "name"),
    [(task_started, "task-started"), (task_finished, "task-finished")],
)
def test_signals_are_their_own(signal: blinker.NamedSignal, name: str) -> None:
    """The signals are not those of another namespace with the same names."""
    assert signal.name == name
    assert blinker.signal(name) is not signal
    assert "Sent " in (signal.__doc__ or "")


def test_package_says_what_it_is_for() -> None:
    """The documentation of the package has an example, and that works."""
    example = textwrap.dedent((flask_apitask.__doc__ or "").split("::\n", 1)[1])
    called: list[str] = []
    names: dict[str, t.Any] = {"__name__": __name__, "notify_crm": called.append}
    exec(textwrap.dedent(example.partition("\n:class:")[0]), names)
    assert names["app"].test_client().post("/signup").status_code == 204
    assert called == ["ada@example.org"]


def test_names_that_are_imported_late() -> None:
    """The exceptions of mail are there without an import of their own."""
    script = """
import flask_apitask
assert issubclass(flask_apitask.DeliveryUnknown, flask_apitask.DeliveryError)
assert flask_apitask.exceptions.DeliveryError is flask_apitask.DeliveryError
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
    assert flask_apitask.__getattr__("exceptions") is exceptions
    assert flask_apitask.DeliveryError is exceptions.DeliveryError

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        flask_apitask.__getattr__("nothing")


def test_public_names() -> None:
    """The package has all the names that it lists."""
    for name in flask_apitask.__all__:
        assert hasattr(flask_apitask, name)
