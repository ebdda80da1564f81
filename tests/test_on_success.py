from __future__ import annotations

import concurrent.futures
import logging
import typing as t

import pytest
from conftest import AppFactory
from conftest import PATIENCE
from flask import abort
from flask import redirect
from flask import Response

from flask_apitask import run_on_success

if t.TYPE_CHECKING:
    from flask.typing import ResponseReturnValue

View = t.Callable[[], "ResponseReturnValue"]


class Calls:
    """What was done, and the futures of what may have been."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.futures: list[concurrent.futures.Future[None]] = []

    def put_off(self, name: str = "task") -> None:
        self.futures.append(run_on_success(self.note, name))

    def note(self, name: str) -> None:
        self.done.append(name)


# An app that waits before the response is sent, or after that.
both_ends = pytest.mark.parametrize("end", ["teardown", "close"])


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return why tasks were dropped. Nothing else must have been logged of them."""
    return [
        record.getMessage().partition(" was dropped: ")[2].removesuffix(".")
        for record in caplog.records
        if " was dropped: " in record.getMessage()
    ]


def fail(error: BaseException) -> t.NoReturn:
    """Raise, where only an expression may stand."""
    raise error


OUTCOMES: dict[str, tuple[View, str | None]] = {
    "200": (lambda: "ok", None),
    "204": (lambda: ("", 204), None),
    "redirect": (lambda: redirect("/"), None),
    "304": (lambda: ("", 304), None),
    "abort with a redirect": (lambda: abort(redirect("/")), None),
    "400": (lambda: ("no", 400), "the response has the status 400"),
    "500": (lambda: ("no", 500), "the response has the status 500"),
    "abort(404)": (lambda: abort(404), "NotFound was raised"),
    "abort(Response)": (
        lambda: abort(Response(status=422)),
        "HTTPException was raised",
    ),
    # Werkzeug knows no exception for it.
    "abort(302)": (lambda: abort(302), "LookupError was raised"),
    "unhandled": (lambda: fail(ValueError("secret")), "ValueError was raised"),
    "handled": (lambda: fail(KeyError("secret")), "KeyError was raised"),
    "handled 410": (lambda: abort(410), "Gone was raised"),
    "not a response": (lambda: t.cast("str", None), "TypeError was raised"),
}


@both_ends
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_outcomes(
    make_app: AppFactory,
    caplog: pytest.LogCaptureFixture,
    end: str,
    outcome: str,
    method: str,
) -> None:
    """A task starts if no exception left the view, and the status is below 400."""
    app, calls = make_app(APITASK_WAIT=end), Calls()
    view, reason = OUTCOMES[outcome]
    caplog.set_level(logging.INFO)

    @app.get("/<token>")
    def page(token: str) -> ResponseReturnValue:
        calls.put_off()
        return view()

    app.register_error_handler(KeyError, lambda _: "all is well")
    app.register_error_handler(410, lambda _: "all is well")
    app.test_client().open("/secret", method=method).close()
    [future] = calls.futures
    assert calls.done == ([] if reason else ["task"])
    assert reasons(caplog) == ([reason] if reason else [])
    assert future.cancelled() == bool(reason)

    if reason:
        [record] = [r for r in caplog.records if " was dropped: " in r.getMessage()]
        name = "test_on_success.Calls.note"
        text = f"Task {name!r} of {method} /<token> was dropped: {reason}."
        assert record.getMessage() == text
        assert record.levelno == logging.INFO
        assert vars(record)["apitask_task"] == name
        assert vars(record)["apitask_endpoint"] == "page"
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(PATIENCE)
