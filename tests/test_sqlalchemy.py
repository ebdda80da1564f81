from __future__ import annotations

import typing as t

import pytest
from conftest import PATIENCE
from late_threads import make_late

from flask_apitask import run
from flask_apitask import wait

if t.TYPE_CHECKING:
    import collections.abc as cabc
    import pathlib

    from conftest import AppFactory
    from flask import Flask

flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
sqlalchemy = pytest.importorskip("sqlalchemy")


class Site:
    """An app with a table of users."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.db: t.Any = flask_sqlalchemy.SQLAlchemy(app)
        self.users = sqlalchemy.Table(
            "users",
            self.db.metadata,
            sqlalchemy.Column("name", sqlalchemy.String, primary_key=True),
        )

        with app.app_context():
            self.db.create_all()

    def add(self, name: str) -> None:
        self.db.session.execute(self.users.insert().values(name=name))

    def names(self) -> list[str]:
        return sorted(self.db.session.scalars(sqlalchemy.select(self.users.c.name)))

    def checked_out(self) -> int:
        return int(self.db.engine.pool.checkedout())


class SiteFactory(t.Protocol):
    """Make an app with a database of its own, with threads or without."""

    def __call__(self) -> Site: ...


@pytest.fixture(params=["threads", "helped"])
def make_site(
    request: pytest.FixtureRequest, make_app: AppFactory, tmp_path: pathlib.Path
) -> cabc.Iterator[SiteFactory]:
    engines: list[t.Any] = []

    def factory() -> Site:
        app = make_app(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'site.db'}")
        site = Site(app if request.param == "threads" else make_late(app))

        with app.app_context():
            engines.append(site.db.engine)

        return site

    yield factory

    for engine in engines:
        engine.dispose()


def test_task_has_a_session_of_its_own(make_site: SiteFactory) -> None:
    """A task's session is not the request's, and gone after it (behaviour 12)."""
    site = make_site()
    sessions: list[t.Any] = []

    def work() -> None:
        sessions.append(site.db.session())
        site.add("task")
        site.db.session.commit()

    @site.app.get("/")
    def index() -> list[str]:
        sessions.append(site.db.session())
        site.add("request")
        site.db.session.rollback()
        run(work)
        wait()
        assert site.db.session() is sessions[0]
        names = site.names()
        site.db.session.rollback()
        return names

    response = site.app.test_client().get("/")

    assert response.json == ["task"]
    assert len({id(found) for found in sessions}) == len(sessions)

    with site.app.app_context():
        assert site.checked_out() == 0


def test_failing_task_leaves_no_transaction(make_site: SiteFactory) -> None:
    """A task that fails halfway keeps no connection and no row (behaviour 12)."""
    site = make_site()

    def work() -> None:
        site.add("halfway")
        raise LookupError

    @site.app.get("/")
    def index() -> list[str]:
        run(work)
        wait()
        # Its connection is back, and nobody finds a transaction to roll back first.
        assert site.checked_out() == 0
        site.add("request")
        site.db.session.commit()
        return site.names()

    client = site.app.test_client()

    assert client.get("/").json == ["request"]

    with site.app.app_context():
        assert site.checked_out() == 0
        assert site.names() == ["request"]


def test_failing_statement_leaves_no_transaction(make_site: SiteFactory) -> None:
    """A statement that fails in a task breaks no session but its own (behaviour 12)."""
    site = make_site()

    def work() -> None:
        site.add("me")

    futures: list[t.Any] = []

    @site.app.get("/")
    def index() -> list[str]:
        site.add("me")
        site.db.session.commit()
        futures.append(run(work))
        wait()
        site.add("you")
        site.db.session.commit()
        return site.names()

    assert site.app.test_client().get("/").json == ["me", "you"]
    assert isinstance(futures[0].exception(PATIENCE), sqlalchemy.exc.IntegrityError)
