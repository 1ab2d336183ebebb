"""Units that an answer may have, with their size in the unit of their dimension.

5 cm is 0.05 m, and neither is 5 s. A number without a unit fits any (``Options.units`` asks for it).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit, as powers of base dimensions and a factor."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)

    def times(self, other: Unit, power: int = 1) -> Unit:
        """Return this unit times a power of another one."""
        powers = dict(self.dimension)
        for name, n in other.dimension:
            powers[name] = powers.get(name, 0) + n * power
        kept = tuple(sorted((name, n) for name, n in powers.items() if n))
        return Unit(kept, self.factor * other.factor**power)


def _of(dimension: str, **names: object) -> dict[str, Unit]:
    found: dict[str, Unit] = {}
    for joined, factor in names.items():
        size = Fraction(str(factor))
        for name in joined.split("__"):
            found[name] = Unit(((dimension, 1),), size)
    return found


_BASE = {
    **_of(
        "length", m__meter__metre=1, cm__centimeter__centimetre="0.01", mm__millimeter__millimetre="0.001",
        km__kilometer__kilometre=1000, dm="0.1", inch__inches__in="0.0254", ft__foot__feet="0.3048", yd__yard="0.9144",
        mile__mi="1609.344",
    ),
    **_of("time", s__sec__second=1, min__minute=60, h__hr__hour=3600, day=86400, week=604800, month=2629746,
          year__yr=31557600, ms="0.001"),
    **_of("mass", g__gram=1, kg__kilogram=1000, mg="0.001", lb__pound="453.59237", oz__ounce="28.349523125",
          ton=1000000),
    **_of("money", dollar__USD=1, cent="0.01"),
    **_of("euro", euro__EUR=1), **_of("sterling", GBP=1), **_of("rupee", rupee__Rs=1), **_of("yen", yen=1),
    **_of("temperature", K__kelvin=1), **_of("celsius", celsius=1), **_of("fahrenheit", fahrenheit=1),
    **_of("current", A__amp__ampere=1), **_of("substance", mol__mole=1),
    **_of("angle", degree__deg=1), **_of("radian", rad__radian=1),
    **_of("count", unit__item__people__person__way__student__point__digit__coin__piece=1),
}  # fmt: skip
_BASE["mph"] = _BASE["mile"].times(_BASE["hour"], -1)
_BASE["kmh"] = _BASE["kmph"] = _BASE["km"].times(_BASE["hour"], -1)


def _derived(names: str, factor: str, *parts: tuple[str, int]) -> None:
    """Define a unit as a product of powers of others."""
    unit = Unit((), Fraction(factor))
    for name, power in parts:
        unit = unit.times(_BASE[name], power)
    _BASE.update(dict.fromkeys(names.split(), unit))


_derived("cc ml mL milliliter millilitre", "1", ("cm", 3))
_derived("L l liter litre", "0.001", ("m", 3))
_derived("gal gallon", "3.785411784", ("L", 1))
_derived("N newton", "1", ("kg", 1), ("m", 1), ("s", -2))
_derived("J joule", "1", ("N", 1), ("m", 1))
_derived("W watt", "1", ("J", 1), ("s", -1))
_derived("Pa pascal", "1", ("N", 1), ("m", -2))
_derived("V volt", "1", ("W", 1), ("A", -1))
_derived("ohm", "1", ("V", 1), ("A", -1))
_derived("Hz hertz", "1", ("s", -1))
_derived("kWh", "3600000", ("J", 1))
for _unit, _prefixes in {"J": "kMG", "W": "kMG", "N": "k", "Pa": "kMh", "V": "k", "Hz": "kMG"}.items():
    for _prefix in _prefixes:
        _derived(_prefix + _unit, {"h": "100", "k": "1000", "M": "1000000", "G": "1000000000"}[_prefix], (_unit, 1))
RADIAN, DEGREE = _BASE["rad"], _BASE["degree"]
_SIGNS = {"$": "dollar", "€": "EUR", "£": "GBP", "¥": "yen"}
_PREFIX = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


NAMES = "|".join(sorted((f"{re.escape(n)}(?:e?s)?" for n in _BASE if n.isalpha()), key=len, reverse=True))
"""A pattern of all names, singular or plural."""


def find(name: str) -> Unit | None:
    """Find a unit by its name: singular or plural, ``square meters``, ``cm^2``, ``km/h``. None where it is unknown."""
    text = _SIGNS.get(name.strip(), name.strip(" ."))
    if len(text) > 64:
        return None
    whole: Unit | None = None
    for i, part in enumerate(re.split(r"\s*/\s*|\s+per\s+", text)):
        one = _factor(part)
        if one is None:
            return None
        whole = one if whole is None else whole.times(one, -1 if i else 1)
    return whole


def _factor(part: str) -> Unit | None:
    words = part.split()
    power = 1
    if len(words) == 2 and words[0].lower().rstrip(".") in _PREFIX:
        power, words = _PREFIX[words[0].lower().rstrip(".")], words[1:]
    if len(words) != 1:
        return None
    match = re.fullmatch(r"([A-Za-z]+)(?:\^?\{?([123])\}?)?", words[0])
    if match is None:
        return None
    word = match[1]
    power *= int(match[2] or 1)
    found = _BASE.get(word) or _BASE.get(word.lower())
    if found is None and len(word) > 3 and word.endswith("s"):
        found = _BASE.get(word[:-1].lower()) or (_BASE.get(word[:-2].lower()) if word.endswith("es") else None)
    return None if found is None else Unit(()).times(found, power)


def known(name: str) -> bool:
    """Say whether ``name`` is a unit."""
    return find(name) is not None
