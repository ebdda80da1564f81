"""Other extensions, which keep what they know on g and in the session."""

from __future__ import annotations

import typing as t

import pytest
from conftest import PATIENCE
from flask import g
from flask import session

from flask_apitask import run

if t.TYPE_CHECKING:
    from conftest import AppFactory


def find_identity() -> str | None:
    """Return the id of the identity that Flask-Principal has put on g."""
    identity = g.get("identity")
    return None if identity is None else str(identity.id)


@pytest.mark.parametrize(("names", "found"), [((), None), (("identity",), "ada")])
def test_identity_of_flask_principal(
    make_app: AppFactory, names: tuple[str, ...], found: str | None
) -> None:
    """A task has the caller's identity if APITASK_COPY_G names it."""
    flask_principal = pytest.importorskip("flask_principal")
    app = make_app(APITASK_COPY_G=names)
    principal = flask_principal.Principal(app, use_sessions=False)
    principal.identity_loader(lambda: flask_principal.Identity("ada"))

    @app.get("/")
    def index() -> str:
        assert find_identity() == "ada"
        return str(run(find_identity).result(PATIENCE))

    assert app.test_client().get("/").text == str(found)


@pytest.mark.parametrize("view_asks_first", [True, False])
def test_token_of_flask_wtf(
    make_app: AppFactory, caplog: pytest.LogCaptureFixture, view_asks_first: bool
) -> None:
    """A token made in a task is valid if the session has one, else warned about."""
    csrf = pytest.importorskip("flask_wtf.csrf")
    app = make_app(SECRET_KEY="only here")

    @app.get("/")
    def index() -> str:
        if view_asks_first:
            csrf.generate_csrf()

        return t.cast("str", run(csrf.generate_csrf).result(PATIENCE))

    @app.get("/<token>")
    def check(token: str) -> str:
        if view_asks_first:
            csrf.validate_csrf(token)
        else:
            with pytest.raises(csrf.ValidationError):
                csrf.validate_csrf(token)

        return f"{'csrf_token' in session}"

    client = app.test_client()
    token = client.get("/").text
    assert client.get(f"/{token}").text == str(view_asks_first)
    assert len(caplog.messages) == (0 if view_asks_first else 1)
    assert all("changed the session (csrf_token)" in m for m in caplog.messages)
