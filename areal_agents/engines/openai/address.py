"""Where a chat server is: its URL, and the key that it wants."""

from __future__ import annotations

import ipaddress
import os

import httpx

from areal_agents.errors import ConfigError


def endpoint(base_url: str) -> httpx.URL:
    """Return where chat completions are asked for. Raises ConfigError for a URL that is none, or holds a password."""
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(
            "the server's URL is no URL: write http://HOST:PORT/v1 or https://HOST/v1"
        ) from error  # it may hold a password
    if url.userinfo:
        raise ConfigError(
            f"the server's URL, of host {url.host!r}, holds a password: give the key by an environment variable"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"the server's URL is {base_url[:80]!r}: write http://HOST:PORT/v1 or https://HOST/v1")
    return url.copy_with(path=url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")


def key_of(variable: str | None) -> str:
    """Read the server's key, which is empty without a variable. Raises ConfigError where it is not set, or no key."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} is not set: put the server's key into it")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {variable} holds no key: it has spaces or unprintable characters")
    return key


def loopback(host: str) -> bool:
    """Say whether ``host`` is this machine by its loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
