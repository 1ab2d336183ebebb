"""The web service of ``areal/Warehouse-v0``, which runs in a container beside the sandbox: python3 and SQLite alone.

    python3 warehouse_inside.py HOST PORT        the key of the environment's own requests is in $KEY

A client reads and changes items and orders, as ``GET /`` describes. The environment alone loads the first state and
reads the last one (``POST /load``, ``POST /state``): it signs what it asks, and is answered with a signature.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import sqlite3
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

PAGE: Final = 5
MOST_ITEMS: Final = 200
MOST_BYTES: Final = 64 << 10
"""Of a client's request."""
MOST_STATE: Final = 256 << 10
"""Of the environment's."""
LARGEST: Final = 10**9
SECONDS: Final = 10.0
"""For a client's request: one that says nothing must not hold a thread for ever."""
ABOUT: Final = """The warehouse. Bodies are JSON.
GET /items?page=1          items in pages of 5; "pages" says how many there are. Filters: name=..., shelf=...
GET /items/ID              one item: id, version, name, price (in cents), shelf, stock
POST /items                a new item: {"name", "price", "shelf", "stock"}
PATCH /items/ID            change it: {"version", and any of "price", "shelf", "stock"}. The version is the one you read
DELETE /items/ID           not while an open order asks for it
GET /orders?page=1         orders in pages of 5. Filters: customer=..., item=NAME, status=open|shipped|cancelled
GET /orders/NUMBER         one order: number, customer, item, count, status
POST /orders/NUMBER/ship   takes its count from the item's stock, which must suffice
POST /orders/NUMBER/cancel
"""
SCHEMA: Final = """
CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, version INTEGER DEFAULT 1, name TEXT UNIQUE NOT NULL,
                    price INTEGER NOT NULL, shelf TEXT NOT NULL, stock INTEGER NOT NULL CHECK (stock >= 0));
CREATE TABLE orders (number INTEGER PRIMARY KEY, customer TEXT, item TEXT, count INTEGER, status TEXT);
"""
FILTERS: Final = {"items": ("name", "shelf"), "orders": ("customer", "item", "status")}
COLUMNS: Final = {
    "items": "id, version, name, price, shelf, stock",
    "orders": "number, customer, item, count, status",
}

Row = dict[str, Any]


class Refused(Exception):
    """What a client is told: a status and a text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Warehouse:
    """The database. Its requests run one after the other, each in a transaction of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded = False
        self._rows = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._rows.row_factory = sqlite3.Row
        self._rows.executescript(SCHEMA)

    def answer(self, method: str, path: str, query: dict[str, str], body: Row) -> Row:
        """Do what a request asks, and return the JSON of the answer. Raises Refused, and then changes nothing."""
        with self._lock:
            self._rows.execute("BEGIN")
            try:
                found = self._routed(method, path, query, body)
                self._rows.execute("COMMIT")
                return found
            except BaseException:
                self._rows.execute("ROLLBACK")
                raise

    def load(self, state: Row) -> Row:
        """Take the first state, once."""
        with self._lock:
            if self._loaded:
                raise Refused(409, "the state is there")
            self._loaded = True
            insert = "INSERT INTO items (name, price, shelf, stock) VALUES (?, ?, ?, ?)"
            self._rows.executemany(insert, state["items"])
            self._rows.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", state["orders"])
            return {"loaded": True}

    def state(self) -> Row:
        """Return all that a grader looks at, in an order of its own. Ids and versions do not count."""
        with self._lock:
            items = self._rows.execute("SELECT name, price, shelf, stock FROM items ORDER BY name").fetchall()
            orders = self._rows.execute(f"SELECT {COLUMNS['orders']} FROM orders ORDER BY number").fetchall()
            return {"items": [list(row) for row in items], "orders": [list(row) for row in orders]}

    def _routed(self, method: str, path: str, query: dict[str, str], body: Row) -> Row:
        parts = [part for part in path.split("/") if part]
        kind = parts[0] if parts else ""
        if kind not in COLUMNS or len(parts) > 3:
            raise Refused(404, "there is no such address: GET / lists them")
        if len(parts) == 1:
            if method == "GET":
                return self._page(kind, query)
            if (method, kind) == ("POST", "items"):
                return self._added(body)
        else:
            row = self._row(kind, parts[1])
            if len(parts) == 2 and method == "GET":
                return dict(row)
            if len(parts) == 2 and kind == "items" and method == "PATCH":
                return self._changed(row, body)
            if len(parts) == 2 and kind == "items" and method == "DELETE":
                return self._deleted(row)
            if len(parts) == 3 and kind == "orders" and method == "POST" and parts[2] in ("ship", "cancel"):
                return self._ended(row, parts[2])
        raise Refused(405, "this is not done here: GET / lists what is")

    def _row(self, kind: str, key: str) -> sqlite3.Row:
        column = "id" if kind == "items" else "number"
        row: sqlite3.Row | None = None
        if re.fullmatch("[0-9]{1,12}", key):
            asked = f"SELECT {COLUMNS[kind]} FROM {kind} WHERE {column} = ?"
            row = self._rows.execute(asked, (int(key),)).fetchone()
        if row is None:
            raise Refused(404, f"there is nothing with this {column}")
        return row

    def _page(self, kind: str, query: dict[str, str]) -> Row:
        unknown = [name for name in query if name != "page" and name not in FILTERS[kind]]
        if unknown:
            raise Refused(400, "unknown filter; there are: page, " + ", ".join(FILTERS[kind]))
        page = query.get("page", "1")
        if not re.fullmatch("[1-9][0-9]{0,5}", page):
            raise Refused(400, "page must be a number from 1")
        names = [name for name in FILTERS[kind] if name in query]
        where = " WHERE " + " AND ".join(f"{name} = ?" for name in names) if names else ""
        values = [query[name] for name in names]
        count = self._rows.execute(f"SELECT count(*) FROM {kind}{where}", values).fetchone()[0]
        asked = f"SELECT {COLUMNS[kind]} FROM {kind}{where} ORDER BY 1 LIMIT ? OFFSET ?"
        rows = self._rows.execute(asked, [*values, PAGE, (int(page) - 1) * PAGE]).fetchall()
        return {kind: [dict(row) for row in rows], "page": int(page), "pages": max(1, -(-count // PAGE))}

    def _added(self, body: Row) -> Row:
        values = [_checked(body, name) for name in ("name", "price", "shelf", "stock")]
        _refuse_others(body, ("name", "price", "shelf", "stock"))
        if self._rows.execute("SELECT count(*) FROM items").fetchone()[0] >= MOST_ITEMS:
            raise Refused(507, "the warehouse is full")
        try:
            made = self._rows.execute("INSERT INTO items (name, price, shelf, stock) VALUES (?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            raise Refused(409, "there is an item of this name") from None
        return dict(self._row("items", str(made.lastrowid)))

    def _changed(self, row: sqlite3.Row, body: Row) -> Row:
        _refuse_others(body, ("version", "price", "shelf", "stock"))
        if _checked(body, "version") != row["version"]:
            raise Refused(409, f"the item's version is {row['version']}: read it again")
        values = {name: _checked(body, name) for name in ("price", "shelf", "stock") if name in body}
        if not values:
            raise Refused(400, "give a price, a shelf or a stock")
        setting = ", ".join(f"{name} = ?" for name in values)
        asked = f"UPDATE items SET version = version + 1, {setting} WHERE id = ?"
        self._rows.execute(asked, [*values.values(), row["id"]])
        return dict(self._row("items", str(row["id"])))

    def _deleted(self, row: sqlite3.Row) -> Row:
        waiting = "SELECT number FROM orders WHERE item = ? AND status = 'open' ORDER BY number"
        order = self._rows.execute(waiting, (row["name"],)).fetchone()
        if order is not None:
            raise Refused(409, f"order {order[0]} asks for it and is open")
        self._rows.execute("DELETE FROM items WHERE id = ?", (row["id"],))
        return {"deleted": row["id"]}

    def _ended(self, row: sqlite3.Row, what: str) -> Row:
        if row["status"] != "open":
            raise Refused(409, f"the order is {row['status']}")
        if what == "ship":
            taken = "UPDATE items SET version = version + 1, stock = stock - ? WHERE name = ? AND stock >= ?"
            if self._rows.execute(taken, (row["count"], row["item"], row["count"])).rowcount != 1:
                raise Refused(409, "the stock does not suffice")
        status = "shipped" if what == "ship" else "cancelled"
        self._rows.execute("UPDATE orders SET status = ? WHERE number = ?", (status, row["number"]))
        return dict(self._row("orders", str(row["number"])))


def _checked(body: Row, name: str) -> str | int:
    """Return a field of a request. Raises Refused for what cannot be stored."""
    value = body.get(name)
    if name in ("name", "shelf"):
        if isinstance(value, str) and re.fullmatch("[A-Za-z0-9 ]{1,40}", value) and value == value.strip():
            return value
        raise Refused(400, f"{name} must be a text of 1 to 40 letters, digits and spaces")
    if type(value) is int and 0 <= value <= LARGEST:
        return value
    raise Refused(400, f"{name} must be a whole number from 0")


def _refuse_others(body: Row, names: tuple[str, ...]) -> None:
    if any(name not in names for name in body):
        raise Refused(400, "unknown field; there are: " + ", ".join(names))


def sign(key: bytes, kind: str, nonce: str, body: str) -> str:
    """Return the signature of a request or an answer of the environment."""
    return hmac.new(key, "\n".join((kind, nonce, body)).encode(), hashlib.sha256).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One connection, which asks one thing."""

    timeout = SECONDS
    warehouse: Warehouse
    key: bytes

    def do_GET(self) -> None:
        self._do("GET")

    def do_POST(self) -> None:
        self._do("POST")

    def do_PATCH(self) -> None:
        self._do("PATCH")

    def do_DELETE(self) -> None:
        self._do("DELETE")

    def do_PUT(self) -> None:
        self._do("PUT")

    def do_HEAD(self) -> None:
        self._do("HEAD")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is printed is kept by the sandbox's host."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request, or of another method, as all else is: without a date."""
        self.close_connection = True
        text = "this is not done here: GET / lists what is" if code == 501 else message or "this is no request"
        self._send(code, json.dumps({"error": text}) + "\n")

    def _do(self, method: str) -> None:
        try:
            url = urllib.parse.urlsplit(self.path)
            if (method, url.path) == ("GET", "/"):
                self._send(200, ABOUT, "text/plain")
                return
            if url.path in ("/load", "/state") and method == "POST" and "X-Sign" in self.headers:
                self._of_environment(url.path[1:])
                return
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True, max_num_fields=20))
            self._send(200, json.dumps(self.warehouse.answer(method, url.path, query, self._body())) + "\n")
        except Refused as refused:
            self._send(refused.status, json.dumps({"error": str(refused)}) + "\n")
        except ValueError:  # a URL or a query that is none
            self._send(400, json.dumps({"error": "this address is none"}) + "\n")
        except OSError:  # the client is gone
            self.close_connection = True

    def _of_environment(self, kind: str) -> None:
        nonce, text = self.headers.get("X-Nonce", ""), self._text(MOST_STATE)
        right, given = sign(self.key, kind, nonce, text), str(self.headers["X-Sign"])
        if not self.key or not hmac.compare_digest(right.encode(), given.encode("utf-8", "replace")):
            raise Refused(403, "this is the owner's")
        found = self.warehouse.load(json.loads(text)) if kind == "load" else self.warehouse.state()
        body = json.dumps(found)
        self._send(200, body, signature=sign(self.key, "answer", nonce, body))

    def _text(self, most: int) -> str:
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > most:
            raise Refused(413, f"a body of at most {most} bytes is read, whose Content-Length is said")
        return self.rfile.read(int(length)).decode("utf-8", "replace")

    def _body(self) -> Row:
        text = self._text(MOST_BYTES)
        try:
            body = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        return body

    def _send(self, status: int, text: str, kind: str = "application/json", signature: str = "") -> None:
        """Answer, without a date: what a model sees of it must not depend on the clock."""
        data = text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if signature:
            self.send_header("X-Sign", signature)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """Says nothing of connections that fail."""

    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave the connection: the client broke it, or there are too many."""


if __name__ == "__main__":
    Handler.warehouse, Handler.key = Warehouse(), os.environ.pop("KEY", "").encode()
    server = Server((sys.argv[1], int(sys.argv[2])), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
