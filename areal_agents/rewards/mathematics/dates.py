"""Dates and times of day, where a task declares that its answers are some."""

from __future__ import annotations

import re
from datetime import date

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?P<month>(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s*(?P<year>\d{4}))?"
_DATE = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})[-/.](?P<number>\d{1,2})[-/.](?P<day>\d{1,2})",
        rf"{_MONTH}\s+{_DAY}{_YEAR}",
        rf"{_DAY}\s+(?:of\s+)?{_MONTH}{_YEAR}",
    )
)
_TIME = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?(?::(?P<second>\d\d))?\s*(?P<half>[ap]\.?\s?m\.?)?")
_NOISE = re.compile(r"\\(?:text|mathrm|textbf)\s*\{|\\[ ,;]|[{}$~]|\b(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s")

When = tuple[int | None, int | None, int | None, int | None]


def when(text: str) -> When | None:
    """Return year, month, day and the second of the day, None for each that is not said. None where it is neither.

    12/1/2024 is not read: nobody can say which of the numbers is the month.
    """
    text = " ".join(_NOISE.sub(" ", text.lower()).split()).rstrip(".")
    if len(text) > 64:
        return None
    day: tuple[int | None, int | None, int | None] = (None, None, None)
    for pattern in _DATE:
        found = pattern.match(text)
        if found is not None:
            parts = found.groupdict()
            month = int(parts["number"]) if "number" in parts else _MONTHS.index(parts["month"][:3]) + 1
            day = (int(parts["year"]) if parts["year"] else None, month, int(parts["day"]))
            try:
                date(day[0] or 2000, month, int(parts["day"]))
            except ValueError:
                return None
            text = text[found.end() :].strip(" ,").removeprefix("at ")
            break
    if not text:
        return (*day, None) if day[1] else None
    clock = _TIME.fullmatch(text)
    if clock is None or not (clock["minute"] or clock["half"]):
        return None
    hour, minute, second = (int(clock[name] or 0) for name in ("hour", "minute", "second"))
    if clock["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if clock["half"][0] == "p" else 0)
    if hour > 24 or minute > 59 or second > 59:
        return None
    return (*day, 3600 * hour + 60 * minute + second)
