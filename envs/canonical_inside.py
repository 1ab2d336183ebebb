"""One text for all Python values that are equal by ``==``, so that values are compared by text, outside the sandbox.

This file runs inside it too, behind a submission, and imports nothing.
"""


def canonical(value: object) -> str:
    """Write a value of numbers, texts, None, lists, tuples, sets and dictionaries, or the type of anything else."""
    if isinstance(value, complex):
        parts = [canonical(part) for part in (value.real, value.imag)]
        return parts[0] if value.imag == 0 else f"({' + '.join(parts)}j)"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float | str | bytes) or value is None:
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(canonical, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(canonical, value)) + ",)"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(canonical, value))) + ",}"
    if isinstance(value, dict):
        pairs = sorted(f"{canonical(key)}: {canonical(inner)}" for key, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    return f"<{type(value).__name__}>"
