from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import ssl
import threading
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

Routes: t.TypeAlias = tuple[tuple[str, str], ...]

_TRUE: t.Final = frozenset({"true", "t", "yes", "y", "on", "1"})
_FALSE: t.Final = frozenset({"false", "f", "no", "n", "off", "0"})
# The keys of Flask-Mail, which people mistake for ours.
_FLASK_MAIL: t.Final = (
    *("MAIL_SERVER", "MAIL_PORT", "MAIL_USE_TLS", "MAIL_USE_SSL", "MAIL_DEBUG"),
    *("MAIL_USERNAME", "MAIL_PASSWORD", "MAIL_DEFAULT_SENDER", "MAIL_MAX_EMAILS"),
    *("MAIL_SUPPRESS_SEND", "MAIL_ASCII_ATTACHMENTS"),
)


def is_true(value: object) -> bool:
    """Tell whether a flag is on, without checking that its value is allowed."""
    return isinstance(value, int | str) and str(value).strip().lower() in _TRUE


def read_flag(key: str, value: object, allowed: str = "True or False") -> bool:
    """Read ``True`` or ``False``, or a word for one of them."""
    word = str(value).strip().lower() if isinstance(value, int | str) else None

    if word not in _TRUE | _FALSE:
        raise refuse(key, value, allowed)

    return word in _TRUE


def read_wait(
    key: str, value: object, words: tuple[str, str] = ("teardown", "close")
) -> t.Any:
    """Read one of two words."""
    word = value.strip().lower() if isinstance(value, str) else None

    if word not in words:
        raise refuse(key, value, " or ".join(map(repr, words)))

    return word


def _read_start(key: str, value: object) -> t.Any:
    return read_wait(key, value, ("send", "success"))


def read_count(key: str, value: object) -> int:
    """Read a whole number of at least 1."""
    return read_whole(key, value, "a whole number of at least 1", 1)


def read_whole(
    key: str, value: object, allowed: str, least: int, most: float = math.inf
) -> int:
    """Read a whole number within limits."""
    number = _number(value)

    if not (least <= number <= most and number.is_integer()):
        raise refuse(key, value, allowed)

    return int(number)


def read_timeout(key: str, value: object) -> float | None:
    """Read a positive number of seconds; ``None`` and infinity mean no limit."""
    is_none = value is None or str(value).strip().lower() == "none"
    number = math.inf if is_none else _number(value)

    if not number > 0:
        allowed = "a number of seconds above 0, or None to wait indefinitely"
        raise refuse(key, value, allowed)

    return number if number <= threading.TIMEOUT_MAX else None


def read_seconds(key: str, value: object) -> float:
    """Read a positive number of seconds."""
    number = _number(value)

    if not 0 < number <= threading.TIMEOUT_MAX:
        raise refuse(key, value, "a number of seconds above 0")

    return number


def read_retries(key: str, value: object) -> int:
    """Read a whole number of at least 0."""
    number = _number(value)

    if not (number >= 0 and number.is_integer()):
        raise refuse(key, value, "a whole number of at least 0")

    return int(number)


def read_keepalive(key: str, value: object) -> float:
    """Read a number of seconds, where 0 keeps no connection."""
    number = _number(value)

    if not 0 <= number <= threading.TIMEOUT_MAX:
        allowed = "a number of seconds, or 0 for one connection per batch"
        raise refuse(key, value, allowed)

    return number


def read_names(key: str, value: object) -> tuple[str, ...]:
    """Read names, given as a list or tuple, or as a comma-separated or JSON string."""
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

    raise refuse(key, value, "names, as in ('request_id', 'lang_code')")


def read_routes(key: str, value: object) -> Routes:
    """Read a dict, or a JSON string, from patterns of task names to where tasks run."""
    routes = value

    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            routes = json.loads(value) if value.strip() else {}

    if not isinstance(routes, dict) or not all(
        isinstance(pattern, str) and pattern and route in ("thread", "celery")
        for pattern, route in routes.items()
    ):
        allowed = "a dict of patterns to 'celery' or 'thread': {'report.*': 'celery'}"
        raise refuse(key, value, allowed)

    return tuple(routes.items())


def read_trust(key: str, value: object) -> bool | str:
    """Read ``True``, ``False``, or the path of a readable file of CA certificates."""
    if not (isinstance(value, str | os.PathLike) and os.path.isfile(value)):
        allowed = "True, False, or the path of a file of CA certificates"
        return read_flag(key, value, allowed)

    try:
        ssl.create_default_context(cafile=value)
    except OSError as error:
        raise ValueError(
            f"{key} is {value!r}, but no CA certificate can be read from it: {error}."
            " Use a file in PEM format, in which each certificate follows a line"
            " '-----BEGIN CERTIFICATE-----'."
        ) from error

    return os.fspath(value)


def refuse(key: str, value: object, allowed: str) -> ValueError:
    """Return the error for a value that is not allowed."""
    return ValueError(f"{key} is {value!r}, but must be {allowed}.")


def _number(value: object) -> float:
    """Return a number, or NaN, which fails every comparison, for anything else."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError, ValueError):
            return float(value)

    return math.nan


def _key(default: object, read: cabc.Callable[[str, object], object]) -> t.Any:
    return dataclasses.field(default=default, metadata={"read": read})


@dataclasses.dataclass(frozen=True)
class Config:
    """The ``APITASK_*`` keys of one app, read and validated once.

    :meth:`.ApiTask.init_app` explains them.
    """

    enabled: bool = _key(True, read_flag)
    max_workers: int = _key(8, read_count)
    pool_size: int = _key(32, read_count)
    timeout: float | None = _key(None, read_timeout)
    wait: t.Literal["teardown", "close"] = _key("teardown", read_wait)
    copy_g: tuple[str, ...] = _key((), read_names)
    propagate: bool = _key(False, read_flag)
    mail_background: bool = _key(False, read_flag)
    mail_start: t.Literal["send", "success"] = _key("send", _read_start)
    mail_timeout: float = _key(10.0, read_seconds)
    mail_connections: int = _key(4, read_count)
    mail_keepalive: float = _key(30.0, read_keepalive)
    mail_tls_verify: bool | str = _key(True, read_trust)
    routes: tuple[tuple[str, str], ...] = _key((), read_routes)
    celery_timeout: float = _key(2.0, read_seconds)
    celery_mail_retries: int = _key(20, read_retries)
    celery_mail_backoff: float = _key(5.0, read_seconds)
    celery_mail_size: int = _key(1_048_576, read_count)

    @property
    def uses_celery(self) -> bool:
        """Whether there is a route to Celery."""
        return any(route == "celery" for _, route in self.routes)

    @classmethod
    def from_mapping(cls, mapping: cabc.Mapping[str, t.Any]) -> Config:
        """Read the keys from an app's config.

        Values may be strings, as environment variables are.

        :param mapping: :attr:`flask.Flask.config`, or any mapping.
        :raises ValueError: A value is not allowed. The message names the key, the value
            and what is allowed.
        """
        keys = {f"APITASK_{field.name.upper()}": field for field in _fields()}
        return cls(
            **{
                field.name: field.metadata["read"](key, mapping[key])
                for key, field in keys.items()
                if key in mapping
            }
        )


def find_mistakes(mapping: cabc.Mapping[str, t.Any]) -> cabc.Iterator[str]:
    """Say which keys look like ours but are not, or need another key to take effect."""
    names = {field.name.upper(): f"APITASK_{field.name.upper()}" for field in _fields()}
    others = {name: name for name in _FLASK_MAIL}

    for key in map(str, mapping):
        name = key.removeprefix("APITASK_")

        if key.startswith("APITASK_") and name not in names:
            # Hardly any app needs this module.
            import difflib

            known = {**names, **others}
            meant = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"Did you mean {known[meant[0]]}?" if meant else "It has no effect."
            yield f"Unknown configuration key {key}. {hint}"

    if "APITASK_MAIL_START" in mapping and "APITASK_MAIL_BACKGROUND" not in mapping:
        needed = "APITASK_MAIL_BACKGROUND = True"
        yield f"APITASK_MAIL_START has no effect without {needed}."


def find_late_keys(
    mapping: cabc.Mapping[str, t.Any], config: Config
) -> cabc.Iterator[str]:
    """Yield the keys whose values have changed since a configuration was read."""
    for field in _fields():
        key, known = f"APITASK_{field.name.upper()}", getattr(config, field.name)
        value = mapping.get(key, field.default)

        try:
            is_late = value != known and field.metadata["read"](key, value) != known
        except ValueError:
            is_late = True

        if is_late:
            yield key


def _fields() -> tuple[dataclasses.Field[t.Any], ...]:
    return dataclasses.fields(Config)
