from __future__ import annotations

import pytest
from conftest import AppFactory

from flask_apitask import open_scope
from flask_apitask import run_on_commit

sqlalchemy = pytest.importorskip("sqlalchemy")


def test_x(make_app: AppFactory) -> None:
    """X."""
    import sqlalchemy.orm as orm

    engine = sqlalchemy.create_engine("sqlite://")
    session = orm.Session(engine)
    done: list[int] = []
    with make_app().app_context(), open_scope() as scope:
        a = run_on_commit(session, done.append, 1)
        session.execute(sqlalchemy.text("select 1"))
        with session.begin_nested():
            b = run_on_commit(session, done.append, 2)
        with session.begin_nested() as n:
            with session.begin_nested():
                c = run_on_commit(session, done.append, 3)
            n.rollback()
        assert c.cancelled() and not a.done() and not b.done()
        session.commit()
        a.result(), b.result()
        d = run_on_commit(session, done.append, 4)
        session.commit()
        d.result()
        e = run_on_commit(session, done.append, 5)
    assert e.cancelled()
    run_on_commit(session, done.append, 6)
    f = run_on_commit(session, lambda: 1 / 0)
    session.commit()
    assert f.exception()
    assert sorted(done) == [1, 2, 4, 6]
    session.close()
