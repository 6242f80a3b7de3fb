"""Every request and every reply, in one sqlite file that outlives any end of the run that writes it.

A request is marked as sent before it leaves; its reply takes the mark's place in one transaction. What still bears a
mark when the file is opened was under way when the run ended: it may have been paid for, nobody can know. Such requests
go to ``lost`` and count as the most that they can have cost. With write-ahead logging a kill loses nothing that was
committed. One process writes (the folder is locked by ``checkpoint.unfinished.alone``); others may read meanwhile.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis.requests import Reply, Request

FILE = "ledger.sqlite"
_FORM = 1  # of the tables
_TABLES = """
create table if not exists call(
    key text primary key, class text, step text, model text, verdict text, finish text, read int, written int,
    counted int, cost real, served text, seconds real, at real, refusal text, request text, text text, raw text);
create index if not exists totals on call(class, step, verdict, read, written, cost, counted);
create table if not exists sent(key text primary key, class text, step text, tokens int, cost real, at real);
create table if not exists lost(key text, class text, step text, tokens int, cost real, at real, why text);
create table if not exists fact(name text primary key, value text);
create table if not exists batch(name text primary key, id text, model text, state text, at real);
create table if not exists batched(key text primary key, batch text, tokens int, cost real);
"""
_REPLY = "text, raw, finish, read, written, counted, served, seconds, refusal"


@dataclass(frozen=True)
class Total:
    """What the replies of one class, step and verdict took; tokens as counted, or as at most, where nobody counted."""

    of: str
    step: str
    verdict: str
    replies: int
    read: int
    written: int
    cost: float
    uncounted: int


@dataclass(frozen=True)
class Lost:
    """Requests that may have been paid for and were never answered, at most so many tokens and so much money."""

    requests: int
    tokens: int
    cost: float


class Ledger:
    """The file in ``folder``.

    Args:
        folder: of the run.
        read_only: change nothing; others may be writing.

    Attributes:
        found: requests that were under way when the run before ended.

    Raises:
        InputError: here and from any method: the file is none of this kind, or cannot be written.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.path = folder / FILE
        with self._telling():
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            self.found = Lost(0, 0, 0.0)
            (form,) = self._db.execute("pragma user_version").fetchone()
            if form not in (0, _FORM):
                told = f"written by another version of this program (form {form}, this one's is {_FORM})"
                raise InputError(f"{self.path}: {told}; use that version, or another --out")
            if read_only:
                if form == 0:  # its run ended before there were tables
                    self._db = sqlite3.connect(":memory:", isolation_level=None)
                    self._db.executescript(_TABLES)
                return
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=normal")
            self._db.executescript(_TABLES)
            self._db.execute(f"pragma user_version={_FORM}")
            self.found = self._lost_in("sent")
            with self._together():
                self._db.execute("insert into lost select *, 'the run ended' from sent")
                self._db.execute("delete from sent")

    def close(self) -> None:
        """Nothing is written any more."""
        self._db.close()

    def find(self, key: str) -> Reply | None:
        """The reply of this name."""
        return self.find_all([key]).get(key)

    def find_all(self, keys: Sequence[str]) -> dict[str, Reply]:
        """Those of these names, at most some hundreds, that there are."""
        places = ",".join("?" * len(keys))
        with self._telling():
            rows = self._db.execute(f"select key, {_REPLY} from call where key in ({places})", keys).fetchall()
        return {
            key: Reply(text, raw, finish, read, written, bool(counted), served, seconds, refusal)
            for key, text, raw, finish, read, written, counted, served, seconds, refusal in rows
        }

    def sending(self, request: Request, tokens: int, cost: float) -> None:
        """A request is about to leave, which takes at most so much."""
        with self._telling():
            row = (request.key, request.of, request.step, tokens, cost, time.time())
            self._db.execute("insert or replace into sent values(?,?,?,?,?,?)", row)

    def unpaid(self, key: str) -> None:
        """It was turned away, or never arrived."""
        with self._telling():
            self._db.execute("delete from sent where key=?", (key,))

    def lose(self, key: str, why: str) -> None:
        """It arrived, perhaps, and nothing came back."""
        with self._telling(), self._together():
            self._db.execute("insert into lost select *, ? from sent where key=?", (why, key))
            self._db.execute("delete from sent where key=?", (key,))

    def keep(self, request: Request, reply: Reply, cost: float, verdict: str) -> None:
        """Its reply came."""
        key, body = request.key, json.dumps(request.body, ensure_ascii=False)
        asked, took = (key, request.of, request.step, request.model), (reply.read, reply.written, int(reply.counted))
        said = (reply.refusal, body, reply.text, reply.raw)
        call = (*asked, verdict, reply.finish, *took, cost, reply.served, reply.seconds, time.time(), *said)
        with self._telling(), self._together():
            self._db.execute(f"insert or replace into call values({','.join('?' * len(call))})", call)
            self._db.execute("delete from sent where key=?", (key,))
            self._db.execute("delete from batched where key=?", (key,))

    def totals(self) -> list[Total]:
        """Of all replies, by class, step and verdict."""
        with self._telling():
            rows = self._db.execute(
                "select class, step, verdict, count(*), sum(read), sum(written), total(cost), count(*) - sum(counted) "
                "from call group by class, step, verdict order by class, step, verdict"
            )
            return [Total(*row) for row in rows]

    def lost(self) -> Lost:
        """All that may have been paid for in vain."""
        return self._lost_in("lost")

    def fact(self, name: str) -> str | None:
        """Something found out about an endpoint."""
        with self._telling():
            row = self._db.execute("select value from fact where name=?", (name,)).fetchone()
        return None if row is None else row[0]

    def note(self, name: str, value: str) -> None:
        """Keep it."""
        with self._telling():
            self._db.execute("insert or replace into fact values(?,?)", (name, value))

    def plan_batch(self, name: str, model: str, requests: Iterable[tuple[str, int, float]]) -> None:
        """A batch is about to be made, of (key, tokens, cost) at most."""
        with self._telling(), self._together():
            self._db.execute("insert into batch values(?,null,?,'planned',?)", (name, model, time.time()))
            rows = ((key, name, tokens, cost) for key, tokens, cost in requests)
            self._db.executemany("insert or replace into batched values(?,?,?,?)", rows)

    def name_batch(self, name: str, identity: str) -> None:
        """The endpoint calls it so."""
        with self._telling():
            self._db.execute("update batch set id=?, state='open' where name=?", (identity, name))

    def end_batch(self, name: str, state: str) -> None:
        """Nothing more comes of it; requests without a reply are free to be asked again."""
        with self._telling(), self._together():
            self._db.execute("update batch set state=? where name=?", (state, name))
            self._db.execute("delete from batched where batch=?", (name,))

    def open_batches(self, model: str) -> list[tuple[str, str | None]]:
        """(name, the endpoint's id or None where the run ended before it was known), oldest first."""
        wanted = "select name, id from batch where model=? and state in ('planned', 'open') order by rowid"
        with self._telling():
            return list(self._db.execute(wanted, (model,)))

    def batched(self, name: str) -> dict[str, tuple[int, float]]:
        """Key -> most tokens and money, of those in a batch that have no reply yet."""
        with self._telling():
            rows = self._db.execute("select key, tokens, cost from batched where batch=?", (name,)).fetchall()
        return {key: (tokens, cost) for key, tokens, cost in rows}

    def under_way_in_batches(self) -> Lost:
        """What open batches can at most take."""
        return self._lost_in("batched")

    def rows(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Any other question to the tables."""
        with self._telling():
            yield from self._db.execute(query, values)

    def _lost_in(self, table: str) -> Lost:
        query = f"select count(*), coalesce(sum(tokens), 0), total(cost) from {table}"
        with self._telling():
            return Lost(*self._db.execute(query).fetchone())

    @contextmanager
    def _together(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError) or "decode" in str(error):
                told = "is damaged, or no ledger; put back a copy of it, or move it away to begin anew"
                raise InputError(f"{self.path}: {told} ({error})") from None
            raise InputError(
                f"{self.path}: {error}; what was answered before is kept, and the same command goes on once it can be "
                "written"
            ) from None
