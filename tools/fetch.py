"""The ``fetch`` tool, which reads a page of a host that the environment's author has allowed. Without hosts it is off.

    address ─▶ allowed host and port? ─▶ resolve once ─▶ all addresses public? ─▶ connect to one of *these* ─▶ text
                     ▲                                                                      │
                     └──────────────────────────── redirect, at most five ──────────────────┘

The name is resolved once for each hop, and the connection goes to an address that was checked, so that a name that
changes its address meanwhile (DNS rebinding) gains nothing. No proxy and no cookie is used.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import httpx

from areal_agents.errors import EnvError
from areal_agents.tool import ToolError, ToolResult, ToolSpec, made_by, tool
from areal_agents.tools.page_packing import PACKED, Unpacker
from areal_agents.tools.page_text import decode, text_of_html

MAX_REDIRECTS: Final = 5
MAX_ADDRESS_CHARS: Final = 2000
MAX_TRIES: Final = 3
"""Addresses of one host that are tried."""
LOOKUPS: Final = 8
"""Names that are looked up at one time in a process."""
LOOKUP_S: Final = 10.0
"""Seconds until an answer of the resolver, with the wait for others; at most half of a call's own."""
_HOST: Final = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?(?::\d{1,5})?|\[[0-9a-f:.]+\](?::\d{1,5})?")
_TEXT: Final = re.compile(r"text/.*|application/(.*\+)?(json|xml|yaml|javascript)|application/x-ndjson")
_HEADERS: Final = {
    "User-Agent": "areal-agents",
    "Accept": "text/html, text/*, */*;q=0.5",
    "Accept-Encoding": "identity",
}
_PUBLIC_V6: Final = ipaddress.ip_network("2000::/3")
_PORTS: Final = {"http": 80, "https": 443}


def fetch_tool(
    hosts: Sequence[str],
    *,
    private: Sequence[str] = (),
    seconds: float = 20.0,
    max_bytes: int = 2 << 20,
    links: bool = False,
    name: str = "fetch",
) -> ToolSpec:
    """Make the tool for some hosts.

    Args:
        hosts: names such as ``docs.python.org``, ``*.wikipedia.org`` (its subdomains) or ``localhost:8000``. Without a
            port, those of http and https.
        private: those of ``hosts`` that may be at private addresses, such as a test server of your own.
        seconds: of one call, with its redirects.
        max_bytes: of one page. What comes after them is not read.
        links: show where links lead to.
        name: what the model calls it.

    Raises:
        ValueError: there is no host, or one that cannot be read, or a limit that is not positive.
    """
    if not hosts or isinstance(hosts, str):
        raise ValueError("fetch_tool: fetch is off until you name the hosts it may read, as a list")
    for host in (*hosts, *private):
        if not _HOST.fullmatch(host.lower()):
            raise ValueError(f"fetch_tool: {host!r} is no host: write NAME, *.NAME or NAME:PORT")
    if missing := [host for host in private if host not in hosts]:
        raise ValueError(f"fetch_tool: {missing[0]!r} is in `private` and not in `hosts`")
    if not 0 < seconds < 1e6 or max_bytes < 1:
        raise ValueError(f"fetch_tool: seconds = {seconds} and max_bytes = {max_bytes} must be positive, and finite")
    lookup = min(LOOKUP_S, seconds / 2)
    rules = Rules(tuple(h.lower() for h in hosts), tuple(h.lower() for h in private), max_bytes, links, lookup)

    @tool(timeout=seconds + 30, parallel=True, max_output_chars=8000, name=name)
    async def fetch(url: str) -> ToolResult:
        try:
            async with asyncio.timeout(seconds):
                return await _follow(url, rules)
        except TimeoutError:
            return ToolResult(f"error: stopped after {seconds:g} s", "timeout")

    described = f"Read a page of the web as text. Hosts: {', '.join(hosts)}."
    mark = made_by(_make, tuple(hosts), tuple(private), seconds, max_bytes, links, name)
    return mark(dataclasses.replace(fetch, description=described))


def _make(
    hosts: Sequence[str], private: Sequence[str], seconds: float, max_bytes: int, links: bool, name: str
) -> ToolSpec:
    return fetch_tool(hosts, private=private, seconds=seconds, max_bytes=max_bytes, links=links, name=name)


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be fetched, and how much."""

    hosts: tuple[str, ...]
    private: tuple[str, ...]
    max_bytes: int
    links: bool
    lookup: float
    """Seconds of one look-up."""

    def allows(self, url: httpx.URL) -> str | None:
        """Return the rule that allows an address, or None."""
        return next((rule for rule in self.hosts if _matches(rule, url)), None)


def _has_port(rule: str) -> bool:
    return not rule.endswith("]") and ":" in rule


def _matches(rule: str, url: httpx.URL) -> bool:
    host, _, port = rule.rpartition(":") if _has_port(rule) else (rule, "", "")
    own = _PORTS[url.scheme]
    if (url.port or own) != (int(port) if port else own):
        return False
    name = _name(url)
    if host.startswith("*."):
        return name.endswith(host[1:]) and len(name) >= len(host)
    return name == host.strip("[]")


def _name(url: httpx.URL) -> str:
    return url.raw_host.decode("ascii").strip("[]").rstrip(".").lower()


def _read(address: str) -> httpx.URL:
    """Read an address that a model or a server wrote. Raises ToolError."""
    if len(address) > MAX_ADDRESS_CHARS:
        raise ToolError(f"error: the address has {len(address)} characters, more than {MAX_ADDRESS_CHARS}")
    try:
        url = httpx.URL(address)
        name = _name(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise ToolError("error: this is no address; write https://HOST/PATH") from None
    if url.scheme not in _PORTS or not name or url.port == 0:
        raise ToolError("error: this is no address; write https://HOST/PATH")
    if url.userinfo:
        raise ToolError("error: an address with a user name is not allowed")
    return url


async def _follow(address: str, rules: Rules) -> ToolResult:
    """Fetch a page, and follow its redirects as long as they are allowed."""
    url, start = _read(address), ""
    for _ in range(MAX_REDIRECTS + 1):
        rule = rules.allows(url)
        if rule is None:
            shown = f"{_name(url)[:100]}{f':{url.port}' if url.port else ''}"
            raise ToolError(f"error: {start}{shown} is not allowed; hosts: {', '.join(rules.hosts)}")
        async with _open(url, rule, rules) as response:
            where = response.headers.get("location")
            if response.status_code not in (301, 302, 303, 307, 308) or not where:
                return await _show(response, url, rules)
            url, start = _read(_joined(url, where)), "the page leads elsewhere: "
    raise ToolError(f"error: the page redirects more than {MAX_REDIRECTS} times")


def _joined(url: httpx.URL, where: str) -> str:
    try:
        return str(url.join(where[: MAX_ADDRESS_CHARS + 1]))
    except (httpx.InvalidURL, ValueError, TypeError):
        raise ToolError("error: the page redirects to what is no address") from None


@asynccontextmanager
async def _open(url: httpx.URL, rule: str, rules: Rules) -> AsyncIterator[httpx.Response]:
    """Ask for a page at one of the host's checked addresses.

    Where a host that the author named does not answer at all, that is not the model's doing.
    """
    name, port = _name(url), url.port or _PORTS[url.scheme]
    problem, found = "has no address", []
    try:
        async with asyncio.timeout(rules.lookup):
            found = await _addresses(name, port, private=rule in rules.private)
    except TimeoutError:
        problem = f"was not looked up within {rules.lookup:g} s"
    for address in found[:MAX_TRIES]:
        # A client a request: no cookie and no connection goes from one host to another.
        async with httpx.AsyncClient(verify=_trusted(), trust_env=False, timeout=10.0) as client:
            headers = {**_HEADERS, "Host": url.netloc.decode("ascii")}
            pinned = url.copy_with(host=address, fragment=None)
            request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": name})
            try:
                response = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem = f"does not answer: {str(error)[:200] or type(error).__name__}"
                continue
            except httpx.HTTPError as error:
                raise ToolError(f"error: {name} gave no answer: {type(error).__name__}") from error
            try:
                yield response
            except httpx.HTTPError as error:
                raise ToolError(f"error: {name} stopped in the middle: {type(error).__name__}") from error
            finally:
                await response.aclose()
            return
    if rule.startswith("*."):
        raise ToolError(f"error: {name} {problem}")
    if found and (other := await _other_scheme(url, rule, found)):
        raise ToolError(f"error: {name} {problem}; it answers {other}://")
    failed = EnvError(f"fetch: {name} {problem}")
    failed.blame = "outside"
    raise failed


async def _other_scheme(url: httpx.URL, rule: str, found: Sequence[str]) -> str:
    """Return the scheme that a host answers, where the one that the model chose is the wrong one, else ""."""
    other = "http" if url.scheme == "https" else "https"
    name, port = _name(url), int(rule.rpartition(":")[2]) if _has_port(rule) else _PORTS[other]
    for address in found[:MAX_TRIES]:
        async with httpx.AsyncClient(verify=_trusted(), trust_env=False, timeout=3.0) as client:
            asked = httpx.URL(scheme=other, host=address, port=port, path="/")
            headers = {**_HEADERS, "Host": url.netloc.decode("ascii")}
            request = client.build_request("HEAD", asked, headers=headers, extensions={"sni_hostname": name})
            try:
                await (await client.send(request, stream=True)).aclose()
            except httpx.HTTPError:
                continue
            return other
    return ""


@functools.cache
def _trusted() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


async def _addresses(name: str, port: int, *, private: bool) -> list[str]:
    """Resolve a host once. Raises ToolError where one of its addresses is not public and must be."""
    found = list(dict.fromkeys(await resolve(name, port)))
    if not private and not all(map(is_public, found)):
        raise ToolError(f"error: {name} is at a private address, which is not allowed")
    return found


@functools.cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Make the threads on which this process looks names up: asyncio's own would be missing elsewhere meanwhile."""
    return ThreadPoolExecutor(LOOKUPS, thread_name_prefix="areal-lookup")


async def resolve(name: str, port: int) -> list[str]:
    """Return the addresses of a host, none where it has none.

    A look-up that nobody waits for any more keeps its thread until the resolver answers.
    """
    look = functools.partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    try:
        rows = await asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), look)
    except (OSError, UnicodeError):
        return []
    return [str(row[4][0]) for row in rows]


def is_public(address: str) -> bool:
    """Say whether an address is one of the public internet, and leads to no other one inside of it."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        # Tunnels (6to4, Teredo) and translated addresses hide a second one.
        if parsed not in _PUBLIC_V6 or parsed.sixtofour is not None or parsed.teredo is not None:
            return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


async def _show(response: httpx.Response, url: httpx.URL, rules: Rules) -> ToolResult:
    """Read a response as text."""
    media, _, options = response.headers.get("content-type", "").partition(";")
    media = media.strip().lower()
    found = re.search(r"charset\s*=\s*\"?([\w-]{1,20})", options)
    if media and not _TEXT.fullmatch(media):
        raise ToolError(f"error: the page is {media[:60]}, which is not text")
    data, missing = await _body(response, rules.max_bytes)
    if not media and b"\0" in data[:1024]:
        raise ToolError("error: the page is binary")
    page = decode(data, found.group(1) if found else None)
    if "html" in media or (not media and page.lstrip()[:1] == "<"):
        page = await asyncio.to_thread(text_of_html, page, str(url), links=rules.links)
    if missing:
        page += f"\n[{missing}]"
    if response.is_success:
        return ToolResult(page or "(an empty page)", truncated=bool(missing))
    return ToolResult(f"error: HTTP {response.status_code}\n{page[:1000]}".rstrip(), "error")


async def _body(response: httpx.Response, limit: int) -> tuple[bytes, str]:
    """Read at most ``limit`` bytes, unpacked, and say why that is not all, or ""."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "", *PACKED):
        raise ToolError(f"error: the page is packed as {coding[:40]}, which was not asked for")
    unpacker = Unpacker(limit) if coding in PACKED else None
    data, longer = bytearray(), f"the page is longer than {limit} bytes, and its end was not read"
    async for chunk in response.aiter_raw(1 << 16):
        if unpacker is None:
            data += chunk
        else:
            data += unpacker.take(chunk)
        if len(data) > limit:
            return bytes(data[:limit]), longer
        if unpacker is not None and unpacker.over:
            return bytes(data), unpacker.over
    if unpacker is not None and not unpacker.whole:
        return bytes(data), "the packed page ends in the middle"
    return bytes(data), ""
