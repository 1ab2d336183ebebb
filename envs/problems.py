"""Problems of number theory and algebra that are made up: a question, its answer as LaTeX, and a program that finds it.

The answers come from how a problem is built or from a formula, the programs search and count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Final

Problem = tuple[str, str, str]
"""Question, answer and program, which prints the answer."""
_PRIMES: Final = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def latex(value: Fraction) -> str:
    """Write a fraction as LaTeX."""
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def equation(factors: tuple[int, ...], right: int) -> str:
    """Write a linear equation in x, y and z as LaTeX."""
    said = (("+" if a > 0 else "-", "" if abs(a) == 1 else abs(a), x) for a, x in zip(factors, "xyz", strict=False))
    (sign, size, x), *rest = said
    first = f"{sign.removeprefix('+')}{size}{x}"
    return " ".join([first, *(f"{sign} {size}{x}" for sign, size, x in rest), "=", str(right)])


def common_divisor(rng: Random) -> Problem:
    g = rng.randint(12, 400)
    a, b = g * rng.randint(20, 900), g * rng.randint(20, 900)
    code = f"print(max(d for d in range(1, {min(a, b)} + 1) if {a} % d == {b} % d == 0))"
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b)), code


def remainder(rng: Random) -> Problem:
    a, b, m = rng.randint(10**4, 10**7), rng.randint(10**4, 10**7), rng.randint(101, 9999)
    return (
        f"What is the remainder of ${a} \\cdot {b}$ divided by {m}?",
        str(a % m * (b % m) % m),
        f"print({a} * {b} % {m})",
    )


def linear(rng: Random) -> Problem:
    a, c = rng.sample(range(2, 60), 2)
    b, d = rng.randint(1, 500), rng.randint(1, 500)
    code = f"from fractions import Fraction\nprint(Fraction({d} - {b}, {a} - {c}))"
    return f"Solve ${a}x + {b} = {c}x + {d}$ for $x$.", latex(Fraction(d - b, a - c)), code


def digit_sum(rng: Random) -> Problem:
    a, n = rng.randint(2, 19), rng.randint(20, 90)
    total, value = 0, a**n
    while value:
        value, digit = divmod(value, 10)
        total += digit
    return f"What is the sum of the digits of ${a}^{{{n}}}$?", str(total), f"print(sum(map(int, str({a} ** {n}))))"


def power(rng: Random) -> Problem:
    a, n, m = rng.randint(3, 99), rng.randint(200, 20_000), rng.randint(101, 5000)
    code = f"value = 1\nfor _ in range({n}):\n    value = value * {a} % {m}\nprint(value)"
    return f"What is the remainder of ${a}^{{{n}}}$ divided by {m}?", str(pow(a, n, m)), code


def pair(rng: Random) -> Problem:
    x, y = (Fraction(rng.randint(-20, 20), rng.randint(1, 4)) for _ in range(2))
    while True:
        a, b, c, d = (rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(4))
        scale = math.lcm(x.denominator, y.denominator)
        if a * d != b * c:
            break
    a, b, c, d = a * scale, b * scale, c * scale, d * scale
    e, f = int(a * x + b * y), int(c * x + d * y)
    code = (
        f"from fractions import Fraction\nD = {a} * {d} - {b} * {c}\n"
        f"print(f'({{Fraction({e} * {d} - {b} * {f}, D)}}, {{Fraction({a} * {f} - {e} * {c}, D)}})')"
    )
    question = f"Find $(x, y)$ with ${equation((a, b), e)}$ and ${equation((c, d), f)}$."
    return question, f"({latex(x)}, {latex(y)})", code


def sequence(rng: Random) -> Problem:
    first, r, s, n = rng.randint(1, 20), rng.randint(2, 7), rng.randint(1, 30), rng.randint(6, 14)
    question = f"A sequence begins with $a_1 = {first}$, and $a_{{n+1}} = {r} a_n + {s}$. What is $a_{{{n}}}$?"
    power = r ** (n - 1)
    answer = power * first + s * (power - 1) // (r - 1)
    return question, str(answer), f"a = {first}\nfor _ in range({n - 1}):\n    a = {r} * a + {s}\nprint(a)"


def quadratic(rng: Random) -> Problem:
    p, q = rng.randint(2, 40), rng.randint(2, 400)
    b, c = 2 * p, p * p - q
    signed = f"+ {c}" if c > 0 else f"- {-c}"
    question = f"Solve $x^2 - {b}x {signed} = 0$ for $x$. Give both solutions." if c else ""
    if not c:
        return quadratic(rng)
    code = f"print(r'{p} \\pm \\sqrt{{%d}}' % ({b} ** 2 // 4 - ({c})))"
    return question, rf"{p} \pm \sqrt{{{q}}}", code


def congruences(rng: Random) -> Problem:
    moduli = rng.sample(_PRIMES, 3)
    product = math.prod(moduli)
    number = rng.randint(product // 10, product - 1)
    rests = [number % m for m in moduli]
    said = ", ".join(f"{r} modulo {m}" for r, m in zip(rests, moduli, strict=True))
    tests = " and ".join(f"n % {m} == {r}" for r, m in zip(rests, moduli, strict=True))
    question = f"What is the smallest positive whole number whose remainders are {said}?"
    return question, str(number), f"print(next(n for n in range(1, {product + 1}) if {tests}))"


def divisible(rng: Random) -> Problem:
    a, b, c = rng.sample(range(3, 30), 3)
    n = rng.randint(5_000, 200_000)
    either = n // a + n // b - n // math.lcm(a, b)
    both = n // math.lcm(a, c) + n // math.lcm(b, c) - n // math.lcm(a, b, c)
    question = f"How many whole numbers from 1 to {n} are divisible by {a} or by {b}, but not by {c}?"
    code = f"print(sum((n % {a} == 0 or n % {b} == 0) and n % {c} != 0 for n in range(1, {n} + 1)))"
    return question, str(either - both), code


def triple(rng: Random) -> Problem:
    x = [rng.randint(-30, 30) for _ in range(3)]
    while True:
        rows = [tuple(rng.choice((-1, 1)) * rng.randint(1, 12) for _ in range(3)) for _ in range(3)]
        if _determinant(rows):
            break
    right = [sum(a * value for a, value in zip(row, x, strict=True)) for row in rows]
    said = ", ".join(f"${equation(row, r)}$" for row, r in zip(rows, right, strict=True))
    code = (
        f"A, r = {[list(row) for row in rows]}, {right}\n"
        "def det(m):\n    (a, b, c), (d, e, f), (g, h, i) = m\n"
        "    return a*(e*i - f*h) - b*(d*i - f*g) + c*(d*h - e*g)\n"
        "put = lambda k: [[r[i] if j == k else A[i][j] for j in range(3)] for i in range(3)]\n"
        "print('(' + ', '.join(str(det(put(k)) // det(A)) for k in range(3)) + ')')"
    )
    return f"Find $(x, y, z)$ with {said}.", f"({x[0]}, {x[1]}, {x[2]})", code


def recurrence(rng: Random) -> Problem:
    p, q, r, s = (rng.randint(2, 9) for _ in range(4))
    n, m = rng.randint(500, 20_000), rng.randint(101, 2000)
    question = (
        f"A sequence begins with $a_1 = {p}$ and $a_2 = {q}$, and $a_{{n+2}} = {r} a_{{n+1}} + {s} a_n$. What is the "
        f"remainder of $a_{{{n}}}$ divided by {m}?"
    )
    code = f"a, b = {p}, {q}\nfor _ in range({n} - 1):\n    a, b = b, ({r} * b + {s} * a) % {m}\nprint(a % {m})"
    return question, str(_term(p, q, r, s, n, m)), code


def divisor_sum(rng: Random) -> Problem:
    factors = {prime: rng.randint(1, 3) for prime in rng.sample((2, 3, 5, *_PRIMES[:4]), 4)}
    n = math.prod(prime**k for prime, k in factors.items())
    if n > 2_000_000:
        return divisor_sum(rng)
    answer = math.prod((prime ** (k + 1) - 1) // (prime - 1) for prime, k in factors.items())
    code = f"print(sum(d for d in range(1, {n} + 1) if {n} % d == 0))"
    return f"What is the sum of all positive divisors of {n}, with 1 and {n} among them?", str(answer), code


def _determinant(rows: list[tuple[int, ...]]) -> int:
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * e * i + b * f * g + c * d * h - c * e * g - b * d * i - a * f * h


def _term(p: int, q: int, r: int, s: int, n: int, m: int) -> int:
    """Return a_n modulo m by powers of the matrix ((r, s), (1, 0))."""
    (a, b, c, d), (w, x, y, z), k = (1, 0, 0, 1), (r, s, 1, 0), n - 1
    while k:
        if k % 2:
            a, b, c, d = (a * w + b * y) % m, (a * x + b * z) % m, (c * w + d * y) % m, (c * x + d * z) % m
        w, x, y, z, k = (w * w + x * y) % m, (w * x + x * z) % m, (y * w + z * y) % m, (y * x + z * z) % m, k // 2
    return (c * q + d * p) % m


LEVELS: Final[tuple[tuple[Callable[[Random], Problem], ...], ...]] = (
    (common_divisor, remainder, linear, digit_sum),
    (power, pair, sequence, quadratic),
    (congruences, divisible, triple, recurrence, divisor_sum),
)
