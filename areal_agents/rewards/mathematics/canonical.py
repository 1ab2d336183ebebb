"""One spelling for each tree, in which the order of sums and products does not count."""

from __future__ import annotations

from areal_agents.rewards.mathematics import tree as t


def written(node: t.Node) -> str:
    """Spell a tree. Two answers with one spelling are written alike but for order and typesetting."""
    match node:
        case t.Number(value):
            return f"{value.numerator:x}/{value.denominator:x}"  # decimal digits would take quadratic time
        case t.Symbol(name) | t.Constant(name):
            return name
        case t.Words(text):
            return f'"{words(text)}"'
        case t.Sum(terms):
            return f"({'+'.join(sorted(map(written, _flat(node))))})" if terms else "0"
        case t.Product():
            return f"({'*'.join(sorted(map(written, _flat(node))))})"
        case t.Apply(name, args):
            return f"{name}({','.join(map(written, args))})"
        case t.Measure(value, unit):
            return f"[{written(value)} {unit.factor} {unit.dimension}]"
        case t.Row(opened, items, closed):
            spelt = [written(x) for x in items]
            return f"{opened or '<'}{','.join(sorted(spelt) if opened == '{' else spelt)}{closed or '>'}"
        case t.Matrix(rows):
            return f"[{';'.join(','.join(map(written, row)) for row in rows)}]"
        case t.Relation(operands, operators):
            parts = [written(operands[0])]
            for operator, operand in zip(operators, operands[1:], strict=True):
                parts += [operator, written(operand)]
            return " ".join(parts)
    name = type(node).__name__ + getattr(node, "operator", "") + str(getattr(node, "flip", ""))
    return f"{name}({','.join(map(written, t.children(node)))})"


def words(text: str) -> str:
    """Spell plain text: lower case, one space between words, no marks around it."""
    return " ".join(text.lower().replace("~", " ").split()).strip(" .,;:!?()[]{}\"'$*")


def _flat(node: t.Sum | t.Product) -> list[t.Node]:
    out: list[t.Node] = []
    for x in t.children(node):
        if type(x) is type(node):
            out += _flat(x)
        else:
            out.append(x)
    return out
