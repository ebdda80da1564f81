"""The kinds of servers that bring a Python interpreter of their own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import sysconfig
import typing as t

from wsgi_servers import CONFIGURATIONS
from wsgi_servers import Kind
from wsgi_servers import KINDS

if t.TYPE_CHECKING:
    from wsgi_servers import Launch

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# Debian's. What they are built for is told by their names.
MOD_WSGI = pathlib.Path(f"/usr/lib/apache2/modules/mod_wsgi.so-{_VERSION}")
UWSGI_PLUGIN = pathlib.Path(
    f"/usr/lib/uwsgi/plugins/python{_VERSION.replace('.', '')}_plugin.so"
)
_APACHE = "/usr/sbin/apache2"
# An embedded interpreter takes the library of the python3 that it finds, and crashes if
# that is of another build.
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What a distribution's main configuration has, as far as it is needed.
_MAIN = """\
ServerRoot ${SITE}
ServerName 127.0.0.1
Listen 127.0.0.1:${PORT}
PidFile ${SITE}/pid
ErrorLog /dev/stderr
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule wsgi_module ${MODULE}
WSGISocketPrefix ${SITE}/wsgi
Include ${CONFIGURATION}
"""
# As a user who is not root, but can read and write all that root can: the app's files
# may be root's alone.
_UNPRIVILEGED = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    "--bounding-set=-all,+dac_override",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
]


@dataclasses.dataclass(frozen=True)
class BuiltInKind(Kind):
    """A kind of server with an interpreter of Debian's, of which there is one version.

    :param built_in: The module of the server, for the version that runs the tests.
    :param package: The package of Debian's that has it.
    """

    built_in: pathlib.Path = pathlib.Path()
    package: str = ""

    @property
    def missing(self) -> str | None:
        """Return what is not installed, if anything is not."""
        if not self.built_in.exists():
            return f"{self.built_in} (Debian: {self.package})"

        return super().missing


def _packages() -> list[str]:
    """Return where the packages of this interpreter are."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["purelib"], paths["platlib"]]))


def _uwsgi(launch: Launch, program: list[str], config: str) -> list[str]:
    where = ["--http-socket", f"127.0.0.1:{launch.port}", "--module", launch.app]
    ini = ["--ini", str(CONFIGURATIONS / config)]
    return [*program, *ini, *where, *launch.options]


def _uwsgi_threads(launch: Launch) -> list[str]:
    # Without the second, it takes the base interpreter to start again on SIGHUP.
    program = ["uwsgi", "--binary-path", sys.executable]
    return _uwsgi(launch, program, "uwsgi.ini")


def _uwsgi_no_threads(launch: Launch) -> list[str]:
    # Those of PyPI have them, whatever they are told.
    program = ["uwsgi-core", "--plugin", UWSGI_PLUGIN.name.removesuffix("_plugin.so")]
    return _uwsgi(launch, program, "uwsgi_no_threads.ini")


def _uwsgi_environ(launch: Launch) -> dict[str, str]:
    tests = str(pathlib.Path(__file__).parent)
    paths = [tests, os.environ.get("PYTHONPATH"), *_packages()]
    return {"PATH": _PATH, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _mod_wsgi(launch: Launch) -> list[str]:
    module, _, name = launch.app.partition(":")
    script = f"from {module} import {name} as application\n"
    (launch.folder / "app.wsgi").write_text(script)
    main = launch.folder / "main.conf"
    main.write_text(_MAIN)
    as_root = os.geteuid() == 0
    command = [_APACHE, "-D", "FOREGROUND", "-f", str(main), *launch.options]
    return [*_UNPRIVILEGED, *command] if as_root else command


def _mod_wsgi_environ(launch: Launch) -> dict[str, str]:
    return {
        "CONFIGURATION": str(CONFIGURATIONS / "apache.conf"),
        "MODULE": str(MOD_WSGI),
        "PATH": _PATH,
        "PACKAGES": os.pathsep.join(_packages()),
        "PORT": str(launch.port),
        "PROCESSES": "1",
        "SITE": str(launch.folder),
    }


KINDS["uwsgi-threads"] = Kind(
    _uwsgi_threads,
    ("pyuwsgi",),
    forks=True,
    keeps_alive=False,
    ends_empty=False,
    ends_streams=False,
)
KINDS["uwsgi"] = BuiltInKind(
    _uwsgi_no_threads,
    ("uwsgi-core",),
    forks=True,
    environ=_uwsgi_environ,
    inline=True,
    concurrent=False,
    keeps_alive=False,
    ends_empty=False,
    ends_streams=False,
    built_in=UWSGI_PLUGIN,
    package="uwsgi-plugin-python3",
)
KINDS["mod_wsgi"] = BuiltInKind(
    _mod_wsgi,
    (_APACHE,),
    forks=True,
    environ=_mod_wsgi_environ,
    ends_empty=False,
    ends_streams=False,
    graceful=False,
    built_in=MOD_WSGI,
    package="libapache2-mod-wsgi-py3",
)
