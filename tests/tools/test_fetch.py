from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.server
import pickle
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.errors import EnvError
from areal_agents.tool import ToolResult
from areal_agents.tools import fetch as fetch_module
from areal_agents.tools.fetch import fetch_tool
from areal_agents.tools.page_text import decode, text_of_html
from tests.conftest import require
from tests.tools.sessions import call, play

PAGE = b"""<!DOCTYPE html><html><head><title>A &amp; B</title><style>p{}</style></head><body><h1>Head</h1>
<p>One <b>two</b>&nbsp;three.<p>a < b <a href="/next?x=1&amp;y=2">next</a><ul><li>x<li>y</ul>
<script>evil("</p>")</script><table><tr><td>1</td><td>2</td></tr></table><pre>  a
    b</pre><!-- gone --></body></html>"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    asked: ClassVar[list[tuple[str, str, str]]] = []

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"], self.headers.get("Cookie", "")))
        path, _, rest = self.path.partition("?")
        kind, body, status, extra = "text/html; charset=utf-8", PAGE, 200, {"Set-Cookie": "a=b"}
        if path == "/to":
            status, extra = 302, {"Location": rest, "Set-Cookie": "a=b"}
        elif path == "/gzip":
            body, extra = gzip.compress(b"<p>packed"), {"Content-Encoding": "gzip"}
        elif path == "/parts":
            body, extra = gzip.compress(b"<p>one") + gzip.compress(b" two"), {"Content-Encoding": "gzip"}
        elif path == "/half":
            body, extra = gzip.compress(b"<p>packed" * 9)[:-9], {"Content-Encoding": "gzip"}
        elif path == "/bomb":
            body, extra = gzip.compress(b"\0" * (200 << 20), 1), {"Content-Encoding": "gzip"}
        elif path == "/badzip":
            extra = {"Content-Encoding": "deflate"}
        elif path == "/brotli":
            extra = {"Content-Encoding": "br"}
        elif path == "/png":
            kind = "image/png"
        elif path == "/bare":
            kind, body = "", b"\0\1\2"
        elif path == "/plain":
            kind, body = "text/plain; charset=iso-8859-1", b"caf\xe9 <b>"
        elif path == "/json":
            kind, body = "application/json", b'{"a": 1}'
        elif path == "/missing":
            status, body = 404, b"<h1>Not here</h1>"
        elif path == "/empty":
            body = b""
        elif path == "/big":
            kind, body = "text/plain", b"z" * 5000
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        for name, value in extra.items():
            self.send_header(name, value)
        if path != "/cut":
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Content-Length", str(len(body) + 10))
        self.end_headers()
        if path == "/slow":
            self.wfile.flush()
            self.server.stopped.wait(60)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            self.wfile.write(body)


@contextlib.contextmanager
def serve(context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.stopped = threading.Event()  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.stopped.set()  # type: ignore[attr-defined]
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serve() as number:
        yield number


def get(port: int, *paths: str, **options: object) -> list[ToolResult]:
    host = f"127.0.0.1:{port}"
    spec = fetch_tool([host], private=[host], **options)  # type: ignore[arg-type]
    return play((spec,), [call("fetch", url=f"http://{host}{path}") for path in paths])


def test_a_page_is_shown_as_text(port: int) -> None:
    page, linked = get(port, "/")[0], get(port, "/", links=True)[0]
    assert page.text.split("\n") == [
        "A & B", "", "# Head", "", "One two three.", "a < b next", "", "- x", "- y", "", "1 | 2", "", "a", "    b",
    ]  # fmt: skip
    assert f"[next](http://127.0.0.1:{port}/next?x=1&y=2)" in linked.text


def test_what_a_server_may_answer(port: int) -> None:
    packed, badly, brotli, image, binary, plain, json, missing, empty, cut = get(
        port, "/gzip", "/badzip", "/brotli", "/png", "/bare", "/plain", "/json", "/missing", "/empty", "/cut"
    )
    assert packed == ToolResult("packed")
    parts, half = get(port, "/parts", "/half")
    assert parts == ToolResult("one two")
    assert (half.text.splitlines()[-1], half.truncated) == ("[the packed page ends in the middle]", True)
    assert badly.text == "error: the page is packed wrongly"
    assert brotli.text == "error: the page is packed as br, which was not asked for"
    assert image.text == "error: the page is image/png, which is not text"
    assert binary.text == "error: the page is binary"
    assert plain == ToolResult("café <b>")
    assert json == ToolResult('{"a": 1}')
    assert missing == ToolResult("error: HTTP 404\n# Not here", "error")
    assert empty == ToolResult("(an empty page)")
    assert cut.text == "error: 127.0.0.1 stopped in the middle: RemoteProtocolError"


def test_size_and_time_are_bounded(port: int) -> None:
    big, bomb = get(port, "/big", "/bomb", max_bytes=1000)
    note = "[the page is longer than 1000 bytes, and its end was not read]"
    assert big == ToolResult("z" * 1000 + "\n" + note, truncated=True)
    assert bomb.truncated
    assert len(bomb.text) < 1100
    start = time.monotonic()
    (slow,) = get(port, "/slow", seconds=0.5)
    assert slow == ToolResult("error: stopped after 0.5 s", "timeout")
    assert time.monotonic() - start < 30


def test_redirects_are_followed_to_allowed_hosts_only(port: int) -> None:
    host = f"http://127.0.0.1:{port}"
    Handler.asked.clear()
    ok, relative, away, local, scheme, loop, broken, other_port = get(
        port, f"/to?{host}/json", "/to?/json", "/to?http://example.org/", f"/to?http://localhost:{port}/json",
        "/to?file:///etc/passwd", "/to?/to?/to?/to?/to?/to?/to?/to?/to", "/to?http://[", "/to?http://127.0.0.1:1/",
    )  # fmt: skip
    assert ok.text == relative.text == '{"a": 1}'
    assert away.text.startswith("error: the page leads elsewhere: example.org is not allowed; hosts: 127.0.0.1:")
    assert local.text.startswith("error: the page leads elsewhere: localhost:")
    assert scheme.text == "error: this is no address; write https://HOST/PATH"
    assert broken.status == "error"
    assert loop.status == "error"
    assert other_port.text.startswith("error: the page leads elsewhere: 127.0.0.1:1 is not allowed")
    assert not any(cookie for _, _, cookie in Handler.asked)


def test_endless_redirects_end(port: int) -> None:
    host = f"127.0.0.1:{port}"
    around = "/to?" + "/to?" * 20 + "/json"
    (result,) = get(port, around)
    assert result.text == "error: the page redirects more than 5 times"
    assert sum(path.startswith("/to") and at == host for path, at, _ in Handler.asked) >= 6


@pytest.mark.parametrize(
    "url",
    [
        "", "no address", "ftp://127.0.0.1/", "file:///etc/passwd", "http://", "http://[::1", "//127.0.0.1/", "http:///x",
        "http://user:pw@127.0.0.1/", "http://127.0.0.1@example.org/", "http://example.org/", "http://127.0.0.1.example.org",
        "http://\ud800/", "http://a\0b/", "http://127.0.0.1:99999/", "http://xn--/", "javascript:alert(1)", "http://①②⑦.0.0.1/",
        "http://" + "a" * 3000, "http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://[::ffff:127.0.0.1]/",
    ],
)  # fmt: skip
def test_other_addresses_are_refused(port: int, url: str) -> None:
    (result,) = play((fetch_tool(["127.0.0.1:1"], private=["127.0.0.1:1"]),), call("fetch", url=url))
    assert result.status == "error"
    assert len(result.text) < 300


def test_names_at_private_addresses_are_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[str] = []

    async def resolve(name: str, port: int) -> list[str]:
        return at

    monkeypatch.setattr(fetch_module, "resolve", resolve)
    Handler.asked.clear()
    tools = (fetch_tool([f"site.test:{port}", f"*.site.test:{port}"]),)
    for addresses in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["169.254.169.254"]):
        at[:] = addresses
        (result,) = play(tools, call("fetch", url=f"http://site.test:{port}/"))
        assert result.text == "error: site.test is at a private address, which is not allowed"
    (result,) = play(tools, call("fetch", url=f"http://a.b.site.test:{port}/"))
    assert result.text == "error: a.b.site.test is at a private address, which is not allowed"
    assert Handler.asked == []


def test_the_connection_goes_to_the_address_that_was_checked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # No resolver knows the name: a second look-up by the client would fail. The first address does not answer.
    looked: list[str] = []

    async def resolve(name: str, port: int) -> list[str]:
        looked.append(name)
        return ["127.0.0.2", "127.0.0.1"]

    monkeypatch.setattr(fetch_module, "resolve", resolve)
    Handler.asked.clear()
    host = f"pinned.invalid:{port}"
    (result,) = play((fetch_tool([host], private=[host]),), call("fetch", url=f"http://PINNED.invalid.:{port}/json#x"))
    assert result.text == '{"a": 1}'
    assert looked == ["pinned.invalid"]
    assert [(path, name.lower().replace(".:", ":")) for path, name, _ in Handler.asked] == [("/json", host)]


def test_tls_proves_the_name_and_not_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key", "-days", "2",
         "-out", tmp_path / "cert", "-subj", "/CN=pinned.invalid", "-addext", "subjectAltName=DNS:pinned.invalid"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    async def resolve(name: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(fetch_module, "resolve", resolve)
    monkeypatch.setattr(fetch_module, "_trusted", lambda: ssl.create_default_context(cafile=str(tmp_path / "cert")))
    with serve(context) as port:
        hosts = [f"pinned.invalid:{port}", f"other.invalid:{port}"]
        tools = (fetch_tool(hosts, private=hosts),)
        (good,) = play(tools, call("fetch", url=f"https://pinned.invalid:{port}/json"))
        assert good.text == '{"a": 1}'
        with pytest.raises(EnvError, match="CERTIFICATE_VERIFY_FAILED"):
            play(tools, call("fetch", url=f"https://other.invalid:{port}/json"))


def test_a_named_host_that_is_down_is_not_the_models_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as port:
        pass
    host = f"127.0.0.1:{port}"
    with pytest.raises(EnvError, match="does not answer") as caught:
        play((fetch_tool([host], private=[host]),), call("fetch", url=f"http://{host}/"))
    assert caught.value.blame == "outside"

    async def resolve(name: str, port: int) -> list[str]:
        return []

    monkeypatch.setattr(fetch_module, "resolve", resolve)
    (result,) = play((fetch_tool(["*.test"]),), call("fetch", url="https://made-up.test/"))
    assert result.text == "error: made-up.test has no address"  # the model chose the name


@pytest.mark.parametrize("hosts", [[], "example.org", ["http://example.org"], ["a/b"], ["*"], ["*."], ["a b"], [""]])
def test_hosts_must_be_named(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="fetch_tool: "):
        fetch_tool(hosts)


def test_settings_and_pickling() -> None:
    with pytest.raises(ValueError, match="not in `hosts`"):
        fetch_tool(["a.org"], private=["b.org"])
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            fetch_tool(["a.org"], seconds=seconds)
    spec = pickle.loads(pickle.dumps(fetch_tool(["A.org", "*.b.org"], name="web")))
    assert (spec.name, spec.description) == ("web", "Read a page of the web as text. Hosts: A.org, *.b.org.")
    checked = spec.validate({"url": "x", "headers": {}})
    assert "'headers' is not a parameter" in checked


def test_pages_are_read_in_one_pass_however_broken() -> None:
    for bad in (
        "<!--" * 200_000,
        "<" * 500_000,
        "<a href='" * 100_000,
        "<script>" * 100_000,
        "<p" * 300_000,
        "&" * 500_000,
    ):
        start = time.process_time()
        text_of_html(bad, links=True)
        assert time.process_time() - start < 60
    assert text_of_html("a<script>x</SCRIPT >b<style/>c") == "abc"
    links = '<a href="javascript:x">j</a> <a href="HTTP://[">b</a> <a>n</a>'
    assert text_of_html(links, "http://a", links=True) == "j b n"


def test_charsets() -> None:
    assert decode("é".encode("latin-1"), "iso-8859-1") == "é"
    assert decode(b'<meta charset="windows-1251">\xcf', None).endswith("П")
    for odd in ("punycode", "idna", "zlib", "unicode_escape", "rot13", "iso-8859-99", "cp000"):
        assert decode(b"abc", odd) == "abc"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<",
                ">",
                "<p>",
                "</p>",
                "<!--",
                "-->",
                "<pre>",
                "<a href=x>",
                "</a>",
                "&amp;",
                "&#x;",
                "<script",
                "\n",
                " a ",
                "é",
                "<td>",
                '"',
                "<svg/>",
                "/",
            ]
        )
    ).map("".join)
)
def test_any_page_becomes_text(page: str) -> None:
    assert isinstance(text_of_html(page, "http://a/", links=True), str)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            [
                "http://",
                "https:",
                "//",
                "127.0.0.1",
                ":",
                "80",
                "@",
                "/",
                "[",
                "]",
                "?",
                "#",
                "%00",
                "*",
                "..",
                "xn--a",
                "é",
            ]
        )
    ).map("".join)
)
def test_any_address_is_answered(url: str) -> None:
    spec = fetch_tool(["nothing.invalid"])
    result = asyncio.run(spec.invoke({"url": url}))
    assert result.status == "error"


def test_the_wrong_scheme_is_the_models_doing(port: int) -> None:
    """A host that its author named and that answers is no reason to play an episode again."""
    host = f"127.0.0.1:{port}"
    spec = fetch_tool([host, "127.0.0.1"], private=[host, "127.0.0.1"])
    http, no_port = play((spec,), call("fetch", url=f"https://{host}/json"), call("fetch", url="http://127.0.0.1:0/"))
    assert http.status == "error"
    assert "it answers http://" in http.text
    assert "no address" in no_port.text


def test_what_follows_a_packed_page_is_not_read() -> None:
    """Zlib keeps it all, which costs memory, and a copy of all of it with each chunk."""

    class Endless(http.server.BaseHTTPRequestHandler):
        sent = 0

        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(gzip.compress(b"packed"))
                while Endless.sent < 1 << 30:
                    Endless.sent += self.wfile.write(b"A" * (1 << 16))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (result,) = get(server.server_port, "/")
        server.shutdown()
    assert (result.status, result.truncated) == ("ok", True)
    assert result.text == "packed\n[what follows the packed page was not read]"
    assert Endless.sent < 1 << 26
