r"""What a written answer may be, kind by kind: one pair that is equal and one that is not, in both directions."""

from __future__ import annotations

from typing import Any

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

COMMA: dict[str, Any] = {"decimal_comma": True}
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "integers of any size": ("9" * 60, "9" * 60 + ".0", "9" * 59 + "8", {}),
    "separators 1,234": ("1234567", "1,234,567", "1,234,568", {}),
    "separators 1 234": ("1234567", "1 234 567", "1 234 568", {}),
    "separators 1.234,5": ("1234.5", "1.234,5", "1.234,6", COMMA),
    "scientific notation": ("602000", r"6.02\times10^{5}", "6.02e6", {}),
    "mixed fractions": ("7/3", r"2\frac13", "21/3", {}),
    "percent": ("50%", "0.5", "50", {}),
    "degrees": (r"180^\circ", r"\pi", r"2\pi", {}),
    "currency": (r"\$1.50", "150 cents", "150 EUR", {}),
    "units with conversion": ("36 km/h", "10 m/s", "10 km/s", {"units": True}),
    "fractions": ("2/4", r"\frac12", r"\frac21", {}),
    "radicals": (r"\sqrt{12}", r"2\sqrt3", r"3\sqrt2", {}),
    "logarithms": (r"\log_2 8", "3", "4", {}),
    "trigonometric values": (r"\cos 60^\circ", "1/2", "-1/2", {}),
    "complex": ("(1+i)^2", "2i", "-2i", {}),
    "sets": (r"\{1,2\}", r"\{2,1\}", r"\{1,2,3\}", {}),
    "unions": (r"[1,2]\cup[2,3]", "[1,3]", "[1,3)", {}),
    "intervals": ("(1,2)", "1<x<2", "[1,2)", {}),
    "inequalities": ("2x<6", "3>x", "x>3", {}),
    "tuples": ("(1,2,3)", "(1, 2, 6/2)", "(1,3,2)", {}),
    "lists": ("1, 2, 3", "3, 2 and 1", "1, 2", {}),
    "matrices": (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{bmatrix}1&2\\3&8/2\end{bmatrix}",
        r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
        {},
    ),
    "equations": ("2x-y+1=0", "y=2x+1", "y=2x-1", {}),
    "systems": ("x+y=3, x-y=1", "x-y=1, x+y=3", "x+y=3, x-y=2", {}),
    "plus or minus": (r"\pm2", "2, -2", "2", {}),
    "repeating decimals": (r"0.\overline{142857}", "1/7", "0.142857", {}),
    "other bases": ("FF_{16}", "255", "FF_{17}", {}),
    "several variables": ("(x+y)^2-z", "x^2+2xy+y^2-z", "x^2+xy+y^2-z", {}),
    "text": (r"\text{no solution}", "No solution.", "solution", {}),
    "multiple choice": ("B", r"\text{(B) } 12 cm", "(B) 13 cm", {"choices": ["10 cm", "12 cm"]}),
    "dates": ("2024-03-05", "5 March 2024", "3 May 2024", {"dates": True}),
    "times": ("15:05", "3:05 pm", "3:05", {"dates": True}),
    "tolerances": ("100", "101", "103", {"relative": 0.02}),
    "5 or 6 is not 5": ("5", "x = 5", "5 or 6", {}),
    "an echo of the question": ("x^2-1", "(x-1)(x+1)", "Simplify (x-1)(x+1)", {}),
    "an echo of a sum": ("7", "3 + 4", "What is 3 + 4?", {}),
}


@pytest.mark.parametrize(("gold", "right", "wrong", "options"), KINDS.values(), ids=KINDS)
def test_each_kind_of_answer(gold: str, right: str, wrong: str, options: dict[str, Any]) -> None:
    o = Options.of(options)
    assert verify(gold, right, options=o).status == "ok"
    assert verify(right, gold, options=o).status == "ok"
    assert verify(gold, wrong, options=o).status in ("wrong", "parse_error")
    assert verify(wrong, gold, options=o).status != "ok"
    assert verify(["0", gold], right, options=o).status == "ok" or options.get("dates")  # of several gold answers one
