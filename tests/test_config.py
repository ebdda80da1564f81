from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import threading
import typing as t

import pytest
import trustme
from flask import Flask

from flask_apitask import ApiTask
from flask_apitask.config import Config

FLAG = "must be True or False."
COUNT = "must be a whole number of at least 1."
TIMEOUT = "must be a number of seconds above 0, or None to wait indefinitely."
SECONDS = "must be a number of seconds above 0."
KEEPALIVE = "must be a number of seconds, or 0 for one connection per batch."
WAIT = "must be 'teardown' or 'close'."
START = "must be 'send' or 'success'."
NAMES = "must be names, as in ('request_id', 'lang_code')."
RETRIES = "must be a whole number of at least 0."
ROUTES = "must be a dict of patterns to 'celery' or 'thread': {'report.*': 'celery'}."
TRUST = "must be True, False, or the path of a file of CA certificates."

ALLOWED = {
    "enabled": FLAG,
    "max_workers": COUNT,
    "pool_size": COUNT,
    "timeout": TIMEOUT,
    "wait": WAIT,
    "copy_g": NAMES,
    "propagate": FLAG,
    "mail_background": FLAG,
    "mail_start": START,
    "mail_timeout": SECONDS,
    "mail_connections": COUNT,
    "mail_keepalive": KEEPALIVE,
    "mail_tls_verify": TRUST,
    "routes": ROUTES,
    "celery_timeout": SECONDS,
    "celery_mail_retries": RETRIES,
    "celery_mail_backoff": SECONDS,
    "celery_mail_size": COUNT,
}

GOOD_FLAGS = [
    (True, True),
    (False, False),
    (1, True),
    (0, False),
    ("true", True),
    ("False", False),
    (" YES ", True),
    ("no", False),
    ("on", True),
    ("off", False),
    ("T", True),
    ("f", False),
    ("y", True),
    ("n", False),
    ("1", True),
    ("0", False),
]
GOOD_COUNTS = [(1, 1), (200, 200), (2.0, 2), ("3", 3), (" 4 ", 4), ("5.0", 5)]
GOOD_SECONDS = [(1, 1.0), (0.25, 0.25), ("2.5", 2.5), (" 3 ", 3.0)]
GOOD: dict[str, list[tuple[object, object]]] = {
    FLAG: [*GOOD_FLAGS],
    COUNT: [*GOOD_COUNTS],
    TIMEOUT: [
        *GOOD_SECONDS,
        (None, None),
        ("None", None),
        (" none ", None),
        (math.inf, None),
        ("inf", None),
        (threading.TIMEOUT_MAX * 2, None),
        (threading.TIMEOUT_MAX, threading.TIMEOUT_MAX),
    ],
    WAIT: [("teardown", "teardown"), ("close", "close"), (" Close ", "close")],
    START: [("send", "send"), ("success", "success"), (" Success ", "success")],
    NAMES: [
        ((), ()),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        (" a, b ", ("a", "b")),
        ('["a", "b"]', ("a", "b")),
        ("", ()),
    ],
    SECONDS: [*GOOD_SECONDS],
    KEEPALIVE: [*GOOD_SECONDS, (0, 0.0), ("0", 0.0)],
    RETRIES: [*GOOD_COUNTS, (0, 0), ("0", 0)],
    ROUTES: [
        ({}, ()),
        ("", ()),
        ({"a.*": "thread", "*": "celery"}, (("a.*", "thread"), ("*", "celery"))),
        (' {"a.*": "thread", "*": "celery"}', (("a.*", "thread"), ("*", "celery"))),
    ],
    TRUST: [*GOOD_FLAGS],
}

NO_NUMBERS = ["", "many", "1,5", [1], b"1", True, False, math.nan, "nan", -1, "-1"]
TOO_BIG = 10**400
BAD: dict[str, list[object]] = {
    FLAG: [None, 2, -1, 1.0, "", "maybe", "2", [], b"true"],
    COUNT: [*NO_NUMBERS, None, 0, 0.5, 1.5, "0", "2.5", math.inf, "inf", TOO_BIG],
    TIMEOUT: [*NO_NUMBERS, 0, 0.0, "0", -0.5, -math.inf],
    WAIT: [None, True, 0, "", "return", "response", ["close"], b"close"],
    START: [None, True, "", "commit", ["success"]],
    NAMES: [None, 1, "a b", "a,,b", "[a", ["a-b"], [1], {"a": 1}],
    SECONDS: [*NO_NUMBERS, None, "none", 0, "0", math.inf, "inf", TOO_BIG],
    KEEPALIVE: [*NO_NUMBERS, None, "none", -0.1, math.inf, TOO_BIG],
    RETRIES: [*NO_NUMBERS, None, 0.5, math.inf, TOO_BIG],
    ROUTES: [
        None,
        1,
        ["a"],
        "celery",
        "[]",
        '{"a": 1}',
        {"": "celery"},
        {1: "celery"},
        {"a": "rq"},
        {"a": None},
        {"a": ["celery"]},
    ],
    TRUST: [None, 2, "", "maybe", "/no/such/file.pem", pathlib.Path("/"), []],
}


def test_every_key_is_tested() -> None:
    """Every key has values in this module that are allowed, and that are not."""
    assert [field.name for field in dataclasses.fields(Config)] == list(ALLOWED)


def test_defaults() -> None:
    """An app that configures nothing has the documented defaults."""
    assert Config.from_mapping({"APITASK": 1, "OTHER": 2}) == Config(
        enabled=True,
        max_workers=8,
        pool_size=32,
        timeout=None,
        wait="teardown",
        copy_g=(),
        propagate=False,
        mail_background=False,
        mail_start="send",
        mail_timeout=10.0,
        mail_connections=4,
        mail_keepalive=30.0,
        mail_tls_verify=True,
        routes=(),
        celery_timeout=2.0,
        celery_mail_retries=20,
        celery_mail_backoff=5.0,
        celery_mail_size=1_048_576,
    )


@pytest.mark.parametrize("name", ALLOWED)
def test_good_values(name: str) -> None:
    """Every key takes its own type, and text for it."""
    for value, expected in GOOD[ALLOWED[name]]:
        config = Config.from_mapping({f"APITASK_{name.upper()}": value})
        read = getattr(config, name)
        assert (type(read), read) == (type(expected), expected), value
        assert config == dataclasses.replace(Config(), **{name: read})


@pytest.mark.parametrize("name", ALLOWED)
def test_bad_values(name: str) -> None:
    """The error of a bad value names the key, the value and what is allowed."""
    key = f"APITASK_{name.upper()}"

    for value in BAD[ALLOWED[name]]:
        with pytest.raises(ValueError, match=key) as caught:
            Config.from_mapping({key: value})

        assert str(caught.value) == f"{key} is {value!r}, but {ALLOWED[name]}"


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_certificates_from_a_file(
    kind: t.Callable[[pathlib.Path], object], tmp_path: pathlib.Path
) -> None:
    """Mail servers are verified with the file of certificates that is named."""
    path = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    config = Config.from_mapping({"APITASK_MAIL_TLS_VERIFY": kind(path)})
    assert config.mail_tls_verify == str(path)


@pytest.mark.parametrize("content", [b"", b"no PEM\n", b"\x30\x82\x01\x0a\x00"])
def test_file_without_certificates(content: bytes, tmp_path: pathlib.Path) -> None:
    """A file without certificates fails at set-up, not when the first mail is sent."""
    path = tmp_path / "ca.pem"
    path.write_bytes(content)

    with pytest.raises(ValueError, match="no CA certificate can be read") as caught:
        Config.from_mapping({"APITASK_MAIL_TLS_VERIFY": path})

    assert f"{caught.value}".startswith(f"APITASK_MAIL_TLS_VERIFY is {path!r}, but ")
    assert "Use a file in PEM format" in f"{caught.value}"


def test_config_is_frozen() -> None:
    """A configuration can't be changed by accident once it was read."""
    config: t.Any = Config()

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_workers = 1


@pytest.mark.parametrize("loads", [json.loads, str], ids=["json", "text"])
def test_values_from_the_environment(
    loads: t.Callable[[str], t.Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment variables work, both as Flask parses them and as plain text."""
    for name, text in {
        "ENABLED": "false",
        "MAX_WORKERS": "2",
        "POOL_SIZE": "6",
        "TIMEOUT": "2.5",
        "WAIT": "close",
        "MAIL_START": "success",
        "MAIL_TIMEOUT": "3",
        "MAIL_CONNECTIONS": "1",
        "MAIL_KEEPALIVE": "0",
        "MAIL_TLS_VERIFY": "True",
    }.items():
        monkeypatch.setenv(f"SHOP_APITASK_{name}", text)

    app = Flask(__name__)
    app.config.from_prefixed_env("SHOP", loads=loads)
    ApiTask(app)
    assert app.extensions["apitask"].config == Config(
        enabled=False,
        max_workers=2,
        pool_size=6,
        timeout=2.5,
        wait="close",
        mail_start="success",
        mail_timeout=3.0,
        mail_connections=1,
        mail_keepalive=0.0,
        mail_tls_verify=True,
    )


def test_bad_value_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad environment variable stops the set-up of the app, and is named."""
    monkeypatch.setenv("FLASK_APITASK_MAX_WORKERS", "0")
    app = Flask(__name__)
    app.config.from_prefixed_env()
    expected = f"APITASK_MAX_WORKERS is 0, but {COUNT}"

    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ApiTask(app)

    assert "apitask" not in app.extensions
