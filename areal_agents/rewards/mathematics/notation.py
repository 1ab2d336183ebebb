"""The commands and letters that the grammar knows, by what they are."""

from __future__ import annotations

FUNCTIONS = frozenset(
    {
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh",
        "coth", "asin", "acos", "atan", "ln", "log", "lg", "exp", "sqrt", "cbrt", "floor", "ceil", "gcd", "lcm", "max",
        "min", "abs", "deg", "det", "dim", "re", "im", "arg", "sgn", "sign", "cis",
    }
)  # fmt: skip
FRACTIONS = {"frac", "dfrac", "tfrac", "cfrac"}
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "lt": "<", "gt": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "approx": "~", "sim": "~", "simeq": "~", "equiv": "==",
    "in": "in", "notin": "notin", "to": "->", "rightarrow": "->", "subset": "subset", "subseteq": "subset",
}  # fmt: skip
SETS = {"cup": "cup", "cap": "cap", "setminus": "setminus", "backslash": "setminus", "bigcup": "cup"}
SEPARATORS = {",", ";", "lor", "vee", "land", "wedge", r"\\"}
TIMES = {"*", "cdot", "times", "ast"}
OVER = {"/", "div"}
INNER = {
    "vec", "hat", "bar", "overline", "overrightarrow", "underline", "tilde", "boldsymbol", "boxed", "fbox", "textstyle",
    "overparen", "widehat", "mathcal", "mathop", "phantom",
}  # fmt: skip
"""Marks over a value that do not change it."""
IGNORED = {"angle", "triangle", "therefore", "displaystyle", "measuredangle", "left", "right", "mathbf"}
GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega", "ell", "hbar",
}  # fmt: skip
FUNCTION_LETTERS = frozenset("fghFGHWPQpq")
"""Letters that name a function where a bracket follows at once. Of others, x(x + 1) is a product."""
NUMBER_SETS = {"R": "reals", "Z": "integers", "N": "naturals", "Q": "rationals", "C": "complexes"}
BIG = {"sum", "prod", "int", "lim"}
STARTS_NOTHING = {
    *RELATIONS, *SETS, *SEPARATORS, *TIMES, *OVER, "pm", "mp", "}", "end", "mid", "rangle", "rfloor", "rceil", "rvert",
    "pmod", "mod", "bmod", "colon", "rbrace", "rbrack", "over", "choose",
}  # fmt: skip
"""Commands that are no factor."""
INEQUALITIES = {"<", ">", "<=", ">=", "!=", "in"}
