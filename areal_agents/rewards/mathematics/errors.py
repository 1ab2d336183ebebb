"""The reasons why an answer cannot be read or compared."""

from __future__ import annotations


class ParseError(Exception):
    """The text is no answer that this grammar reads."""


class TooLarge(ParseError):
    """The value is too large to be computed, so it is compared as it is written."""
