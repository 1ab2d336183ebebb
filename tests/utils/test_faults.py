"""Errors that come from outside of the code that raised them, as the clients that people use raise them."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from typing import Any

import pytest

from areal_agents.utils.faults import from_outside
from tests.conftest import require

URL = "http://127.0.0.1/"


def by_urllib(status: int) -> BaseException:
    return urllib.error.HTTPError(URL, status, "said", Message(), None)


def by_httpx(status: int) -> BaseException:
    import httpx

    request = httpx.Request("GET", URL)
    error: BaseException = httpx.HTTPStatusError("said", request=request, response=httpx.Response(status))
    return error


def by_requests(status: int) -> BaseException:
    require("module:requests")
    import requests

    response = requests.Response()
    response.status_code = status
    error: BaseException = requests.HTTPError("said", response=response)
    return error


def by_aiohttp(status: int) -> BaseException:
    require("module:aiohttp")
    import aiohttp

    error: BaseException = aiohttp.ClientResponseError(None, (), status=status)
    return error


@pytest.mark.parametrize("client", [by_urllib, by_httpx, by_requests, by_aiohttp])
def test_a_server_that_is_away_is_outside_and_one_that_refuses_the_request_is_not(
    client: Callable[[int], BaseException],
) -> None:
    assert all(from_outside(client(status)) for status in (408, 429, 502, 503, 504))
    assert not any(from_outside(client(status)) for status in (400, 401, 404, 422, 500))
    wrapped = RuntimeError("the judge failed")
    wrapped.__cause__ = client(503)
    assert from_outside(wrapped)


class ConnectionClosedError(Exception):
    """As a client of websockets has it."""


class ServiceUnavailable(Exception):
    """As a client of a data base has it."""


class Odd(Exception):
    @property
    def response(self) -> Any:
        raise RuntimeError("no response")


@pytest.mark.parametrize(
    ("error", "outside"),
    [
        (ConnectionClosedError(), True),
        (ServiceUnavailable(), True),
        (subprocess.TimeoutExpired("judge", 3), True),
        (OSError(28, "no space"), True),
        (MemoryError(), True),
        (FileNotFoundError(2, "none"), False),
        (KeyError("answer"), False),
        (ValueError(503), False),
        (Odd(), False),
    ],
)
def test_what_else_is_outside(error: BaseException, outside: bool) -> None:
    assert from_outside(error) is outside
