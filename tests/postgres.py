from __future__ import annotations

import os
import pathlib
import pwd
import shutil
import subprocess
import typing as t

if t.TYPE_CHECKING:
    import collections.abc as cabc

# Seconds after which a program of PostgreSQL that has not returned has failed.
_PATIENCE = 60.0
# Debian keeps the programs of each version in a folder of its own, not on the path.
_FOLDERS = sorted(
    pathlib.Path("/usr/lib/postgresql").glob("*/bin"),
    key=lambda folder: int(folder.parent.name),
    reverse=True,
)
_PATH = os.pathsep.join([*map(str, _FOLDERS), os.environ.get("PATH", os.defpath)])
# Nothing here has to survive a crash, and nobody but its tests is to reach it.
_SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "",
    "synchronous_commit": "off",
}


class Postgres:
    """A PostgreSQL of its own: its data, socket and log in one folder.

    It does not run as root, so that it is started as the user ``postgres`` then.

    :param folder: One with a short path, as that of a socket can't be long.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._user = "postgres" if os.geteuid() == 0 else None
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"

    @staticmethod
    def is_installed() -> bool:
        """Tell whether there are the programs to make and to start one."""
        return all(shutil.which(name, path=_PATH) for name in ("initdb", "pg_ctl"))

    def __enter__(self) -> Postgres:
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self._folder, account.pw_uid, account.pw_gid)

        settings = {**_SETTINGS, "unix_socket_directories": self._folder}
        options = " ".join(f"-c {key}={value}" for key, value in settings.items())
        self._run("initdb", ["--username=postgres", "--auth=trust", "--no-sync"])
        self._run("pg_ctl", ["start", "--wait", f"--log={self._log}", "-o", options])
        return self

    def __exit__(self, *_: object) -> None:
        self._run("pg_ctl", ["stop", "--wait", "--mode=immediate"])

    @property
    def _log(self) -> pathlib.Path:
        return self._folder / "log"

    def _run(self, name: str, arguments: cabc.Sequence[str]) -> None:
        # No pipe: the server would keep it open, and its reader would wait for that.
        with (self._folder / "output").open("w+b") as output:
            finished = subprocess.run(
                [name, f"--pgdata={self._folder / 'data'}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
                timeout=_PATIENCE,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )
            output.seek(0)
            log = self._log.read_text() if self._log.exists() else ""
            assert finished.returncode == 0, output.read().decode() + log
