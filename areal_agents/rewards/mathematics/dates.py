"""Dates and times, where the option ``dates`` says that answers are some: 2024-03-05, March 5, 2024, 3:05 pm."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from datetime import date, datetime, timedelta

_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TIME = re.compile(
    r"(?:(?P<h>\d{1,2}):(?P<m>\d{2})(?::(?P<s>\d{2}(?:\.\d{1,6})?))?|(?P<hour>\d{1,2})(?=\s*[ap]\.?m))"
    r"\s*(?P<half>[ap]\.?m\.?)?\s*(?P<zone>z|utc|gmt|[+-]\d{2}:?\d{2})?(?![\w:])"
)
_ISO = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})t?")
_NUMERIC = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})")
_NAMED = re.compile(r"(?:(\d{1,2})\s+)?([a-z]{3,9})\.?(?:\s+(\d{1,2}))?(?:\s+(\d{4}))?")
_MAX = 80


@dataclass(frozen=True, slots=True)
class Moment:
    """A date, a time of day, or both. A year may be missing, or a day."""

    year: int | None = None
    month: int | None = None
    day: int | None = None
    seconds: float | None = None
    """Since midnight."""
    offset: int | None = None
    """Minutes of the time zone to the east of UTC."""

    def same(self, other: Moment) -> bool:
        """Say whether two moments are one. A time zone that one of them leaves out fits."""
        if None in (self.offset, other.offset):
            other = Moment(other.year, other.month, other.day, other.seconds, self.offset)
        return self._utc() == other._utc()

    def _utc(self) -> object:
        if self.offset is None or self.seconds is None:
            return self
        if None in (self.year, self.month, self.day):
            return (self.year, self.month, self.day, (self.seconds - 60 * self.offset) % 86400)
        start = datetime(self.year or 1, self.month or 1, self.day or 1)
        return start + timedelta(seconds=self.seconds) - timedelta(minutes=self.offset)


def moment(text: str, order: str) -> Moment | None:
    """Read a date, a time or both. None where the text is anything else, or no day of the calendar.

    ``order`` says what 3/5/2024 is: ``day`` or ``month`` first. Without it such a date is not read.
    """
    if len(text) > 4 * _MAX:
        return None
    rest = _plain(text)
    if len(rest) > _MAX:
        return None
    rest, clock = _clock(rest)
    if clock is not None and clock[0] is None:
        return None
    seconds, offset = clock or (None, None)
    rest, weekday = _weekday(rest)
    rest = " ".join(rest.split())
    if not rest:
        return Moment(seconds=seconds, offset=offset) if seconds is not None and weekday is None else None
    found = _day(rest, order)
    if found is None:
        return None
    year, month, day = found
    try:
        known = date(year or 2000, month, day or 1)
    except ValueError:
        return None
    if weekday is not None and (year is None or day is None or known.weekday() != weekday):
        return None
    return Moment(year, month, day, seconds, offset)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"\\(?:text|textbf|textrm|mathrm|mbox)(?![a-z])|\\[ ,;:!]|\\q?quad\b|[{}$~]", " ", text)
    text = re.sub(r"(?<=\d)\s*\^?\s*(?:st|nd|rd|th)\b", " ", text)
    text = re.sub(r"\b(?:on|at|the|of|o'clock)\b|,", " ", text)
    text = re.sub(r"\b(?:12\s*)?noon\b", "12:00", text)
    text = re.sub(r"\b(?:12\s*)?midnight\b", "00:00", text)
    return " ".join(text.split())


def _clock(text: str) -> tuple[str, tuple[float | None, int | None] | None]:
    """Take a time out of a text: seconds since midnight (None where there is no such time) and zone."""
    match = _TIME.search(text)
    if match is None:
        return text, None
    rest = text[: match.start()] + " " + text[match.end() :]
    hour, minute, second = int(match["h"] or match["hour"]), int(match["m"] or 0), float(match["s"] or 0)
    half = (match["half"] or "")[:1]
    if half:
        if not 1 <= hour <= 12:
            return rest, (None, None)
        hour = hour % 12 + (12 if half == "p" else 0)
    if hour > 23 or minute > 59 or second >= 60:
        return rest, (None, None)
    zone, offset = match["zone"], None
    if zone is not None:
        digits = zone.replace(":", "")
        offset = 0
        if digits[0] in "+-":
            offset = (1 if digits[0] == "+" else -1) * (60 * int(digits[1:3]) + int(digits[3:5]))
    return rest, (3600.0 * hour + 60 * minute + second, offset)


def _weekday(text: str) -> tuple[str, int | None]:
    for i, name in enumerate(_DAYS):
        rest, n = re.subn(rf"\b{name}\b|\b{name[:3]}\b\.?", " ", text)
        if n:
            return rest, i if n == 1 else -1
    return text, None


def _day(text: str, order: str) -> tuple[int | None, int, int | None] | None:
    """Return year, month and day of a text that is a date and nothing else."""
    if match := _ISO.fullmatch(text):
        return int(match[1]), int(match[2]), int(match[3])
    if match := _NUMERIC.fullmatch(text):
        first, second = int(match[1]), int(match[3])
        days = {"day": (second, first), "month": (first, second)}.get(order)
        return None if days is None else (int(match[4]), *days)
    match = _NAMED.fullmatch(text)
    if match is None or (match[1] and match[3]):
        return None
    spelt = "september" if match[2] == "sept" else match[2]
    month = next((i for i, name in enumerate(_MONTHS, 1) if spelt in (name, name[:3])), 0)
    day = match[1] or match[3]
    if not month or not (day or match[4]):
        return None
    return int(match[4]) if match[4] else None, month, int(day) if day else None
