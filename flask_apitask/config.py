from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import ssl
import threading
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

_FLAGS = {"true": True, "1": True, "yes": True, "on": True} | {
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The ``APITASK_*`` keys of one app, read and validated once.

    :param enabled: A scope for every request.
    :param max_workers: Most tasks of one scope that run at once.
    :param pool_size: Most threads of the app in one process.
    :param timeout: Seconds the end of a scope waits, ``None`` for as long as it takes.
    :param wait: When it is waited for the tasks of a request: in its teardown, or when
        the server closes the response.
    :param copy_g: Names that a task finds in its own ``g``.
    :param mail_background: Flask-Mail is rerouted.
    :param mail_timeout: Seconds of every SMTP socket operation.
    :param mail_connections: Most SMTP connections of the app in one process.
    :param mail_keepalive: Seconds an idle SMTP connection is kept.
    :param mail_tls_verify: Verify the mail server's certificate, or the path of a file
        of CA certificates to verify it with.
    """

    enabled: bool = True
    max_workers: int = 8
    pool_size: int = 32
    timeout: float | None = None
    wait: t.Literal["teardown", "close"] = "teardown"
    copy_g: tuple[str, ...] = ()
    mail_background: bool = False
    mail_timeout: float = 10.0
    mail_connections: int = 4
    mail_keepalive: float = 30.0
    mail_tls_verify: bool | str = True

    @classmethod
    def from_mapping(cls, mapping: cabc.Mapping[str, t.Any]) -> Config:
        """Read the keys from an app's config.

        Text is understood too, as environment variables bring it.

        :param mapping: :attr:`flask.Flask.config`, or any mapping.
        :raises ValueError: A value is not allowed. The text names the key, the value
            and what is allowed.
        """
        values: dict[str, t.Any] = {}

        for field in dataclasses.fields(cls):
            key = f"APITASK_{field.name.upper()}"

            if key in mapping:
                values[field.name] = _READERS[field.name](key, mapping[key])

        return cls(**values)


def find_mistakes(mapping: cabc.Mapping[str, t.Any]) -> list[str]:
    """Say which keys look like ours and are none."""
    names = [field.name for field in dataclasses.fields(Config)]
    mistakes = []

    for key in mapping:
        name = key.removeprefix("APITASK_").lower()

        if key.startswith("APITASK_") and name not in names:
            # Hardly any app needs it.
            import difflib

            meant = difflib.get_close_matches(name, names, 1)
            hint = (
                f"Did you mean APITASK_{meant[0].upper()}?" if meant else "Remove it."
            )
            mistakes.append(f"There is no key {key}. {hint}")

    return mistakes


def read_flag(key: str, value: object) -> bool:
    """Read ``True`` or ``False``, or a word for one of them."""
    if isinstance(value, bool):
        return value

    if isinstance(value, int | str):
        flag = _FLAGS.get(str(value).strip().lower())

        if flag is not None:
            return flag

    raise ValueError(f"{key} is {value!r}, but must be True or False.")


def read_word(key: str, value: object, first: str, second: str) -> str:
    """Read one of two words."""
    word = value.strip().lower() if isinstance(value, str) else None

    if word in {first, second}:
        return word

    raise ValueError(f"{key} is {value!r}, but must be {first!r} or {second!r}.")


def read_count(key: str, value: object) -> int:
    """Read a whole number that is at least 1."""
    number = _number(value)

    if number is None or number < 1 or not number.is_integer():
        raise ValueError(
            f"{key} is {value!r}, but must be a whole number of at least 1."
        )

    return int(number)


def read_timeout(key: str, value: object) -> float | None:
    """Read a positive number of seconds; ``None`` and infinity mean no limit."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return None

    number = _number(value)

    if number is None or not number > 0:
        raise ValueError(
            f"{key} is {value!r}, but must be a number of seconds above 0, or None"
            " to wait for as long as it takes."
        )

    return number if number <= threading.TIMEOUT_MAX else None


def read_seconds(key: str, value: object) -> float:
    """Read a positive number of seconds."""
    number = _number(value)

    if number is None or not 0 < number <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{key} is {value!r}, but must be a number of seconds above 0."
        )

    return number


def read_keepalive(key: str, value: object) -> float:
    """Read a number of seconds, of which 0 means none at all."""
    number = _number(value)

    if number is None or not 0 <= number <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{key} is {value!r}, but must be a number of seconds, or 0 for one"
            " connection per batch."
        )

    return number


def read_names(key: str, value: object) -> tuple[str, ...]:
    """Read names, given as a list or tuple, or as text with commas between them."""
    names = value

    if isinstance(value, str):
        text = value.strip()
        names = [name.strip() for name in text.split(",")] if text else []

        if text.startswith("["):
            with contextlib.suppress(ValueError):
                names = json.loads(text)

    if isinstance(names, list | tuple):
        if all(isinstance(name, str) and name.isidentifier() for name in names):
            return tuple(names)

    raise ValueError(
        f"{key} is {value!r}, but must be names, as in ('request_id', 'lang_code')."
    )


def read_trust(key: str, value: object) -> bool | str:
    """Read ``True``, ``False``, or the path of a readable file of CA certificates."""
    if isinstance(value, str | os.PathLike) and os.path.isfile(value):
        try:
            ssl.create_default_context(cafile=value)
        except OSError as error:
            raise ValueError(
                f"{key} is {value!r}, but no CA certificate can be read from it:"
                f" {error}. Name a file in PEM format, in which each certificate stands"
                " below a line '-----BEGIN CERTIFICATE-----'."
            ) from error

        return os.fspath(value)

    try:
        return read_flag(key, value)
    except ValueError:
        raise ValueError(
            f"{key} is {value!r}, but must be True, False, or the path of a file of CA"
            " certificates."
        ) from None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None

    try:
        return float(value)
    except (OverflowError, ValueError):
        return None


_READERS: dict[str, cabc.Callable[[str, object], t.Any]] = {
    "enabled": read_flag,
    "max_workers": read_count,
    "pool_size": read_count,
    "timeout": read_timeout,
    "wait": functools.partial(read_word, first="teardown", second="close"),
    "copy_g": read_names,
    "mail_background": read_flag,
    "mail_timeout": read_seconds,
    "mail_connections": read_count,
    "mail_keepalive": read_keepalive,
    "mail_tls_verify": read_trust,
}
