from __future__ import annotations

import functools
import importlib
import sys
import typing as t
from importlib.machinery import ModuleSpec

from ..log import log_once
from .sending import ReroutedMail
from .settings import read_settings

if t.TYPE_CHECKING:
    import collections.abc as cabc

    from flask import Flask

    from ..config import Config


def find_reroute() -> cabc.Callable[[Flask, Config], None]:
    """Return a function that reroutes an app's mail in each installed mail library.

    :raises RuntimeError: No mail library is installed.
    """
    # Importing Flask-Mail changes how the email package encodes any UTF-8 text. That
    # must not happen to an app that uses Flask-Mailman.
    late = bool(sys.modules.get("flask_mailman")) and not sys.modules.get("flask_mail")
    libraries = ["flask_mailman"] if late else ["flask_mail", "flask_mailman"]
    found = [seam for library in libraries if (seam := _find_seam(library))]

    # A stub of a library is no reason to keep a test suite from making its app.
    if not found and not any(map(sys.modules.get, libraries)):
        raise RuntimeError(
            "APITASK_MAIL_BACKGROUND is on, but neither Flask-Mail nor Flask-Mailman is"
            ' installed. Install one of them: pip install "flask-apitask[mail]" or pip'
            ' install "flask-apitask[mailman]"'
        )

    return functools.partial(_reroute, found, late)


def _find_seam(library: str) -> cabc.Callable[[], None] | None:
    """Return the function that reroutes a library.

    ``None`` if the library isn't installed, or tests have put a stub in its place.
    """
    try:
        imported = importlib.import_module(library)
    except ImportError as error:
        if error.name != library:
            raise

        return None

    # A stub was not found by the import system. A mock may pretend that it was.
    if not issubclass(type(getattr(imported, "__spec__", None)), ModuleSpec):
        return None

    module = importlib.import_module(f".{library}", __package__)
    return t.cast("cabc.Callable[[], None]", module.reroute)


def _reroute(
    seams: list[cabc.Callable[[], None]], late: bool, app: Flask, config: Config
) -> None:
    """Send the mail of an app in the background of its requests."""
    # Raise for settings that can't be used now, not when mail is first sent.
    read_settings(app.config, config)

    if config.mail_tls_verify is False:
        log_once(
            app,
            "tls_verify",
            "APITASK_MAIL_TLS_VERIFY is False, so anyone who impersonates the mail"
            " server gets the credentials and the mail. Set it to the path of a CA file"
            " instead.",
        )

    app.extensions["apitask_mail"] = ReroutedMail(config)

    for seam in seams:
        seam()

    if late:
        app.before_request(_reroute_late)


def _reroute_late() -> None:
    """Reroute Flask-Mail too, if something has imported it after all."""
    if sys.modules.get("flask_mail") and (seam := _find_seam("flask_mail")):
        seam()
