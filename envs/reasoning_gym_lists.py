"""What is known of reasoning-gym's generators: which are left out and why, and which need care.

Written for version 0.1.25, whose scorers were read one by one. A generator that is not named here is refused: nobody
has looked at its scorer. ``tests/envs/test_reasoning_gym.py`` finds again what can be found by trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_EVALUATES = "its scorer gives the answer to SymPy's parse_expr, which runs Python code that stands in it"
EXCLUDED: Final[Mapping[str, str]] = MappingProxyType({
    "coin_flip": "it pays for a common beginning over the shorter text, so '0' earns 1 for every probability",
    "composite": "it is a mixture of the others: name those",
    "game_of_life_halting": "it compares the truth of two texts, so any answer that is not empty earns 1",
    "intermediate_integration": _EVALUATES,
    "polynomial_multiplication": _EVALUATES,
    "propositional_logic": "a conclusion may be a premise, so a premise said again earns 1 in most of its puzzles",
    "simple_integration": _EVALUATES,
})  # fmt: skip
"""Generators that are never played, each with the reason."""

EXACT: Final[Mapping[str, str]] = MappingProxyType({
    "binary_matrix": "",
    "n_queens": "valid_answers",
    "spiral_matrix": "",
    "string_insertion": "",
})  # fmt: skip
"""Generators whose scorers call ``eval`` on an answer that is not right as it stands, for a part of the reward.

Their answers are compared here as those scorers do first, and never given to them: with the entry's answer, or with
the list of right ones that its metadata has under this name.
"""

SUMS: Final[Mapping[str, str | int]] = MappingProxyType({"countdown": "target", "puzzle24": 24})
"""Generators whose answers are sums, which their scorers give to SymPy's ``parse_expr``. They are read here instead.

The value is what a sum must have: a number, or the name of one in the metadata. It must use each of the puzzle's
numbers once; the scorer of ``puzzle24`` takes any four small numbers.
"""

NOT_A_NUMBER: Final = frozenset({"complex_arithmetic"})
"""Generators whose scorers give the full score to ``nan``: no distance is greater than the least one."""

GOLDS: Final[Mapping[str, str]] = MappingProxyType({
    "graph_color": "possible_answer",
    "rubiks_cube": "example_correct_answer",
})  # fmt: skip
"""Generators whose entries have no answer, but a right one in their metadata under this name.

``boxnet`` and ``rush_hour`` have none at all.
"""

_REFUSED, _SLOW = "some of its levels are refused by its own settings", "a task of some levels takes many seconds"
LEVELLESS: Final[Mapping[str, str]] = MappingProxyType({
    "bf": _SLOW,
    "caesar_cipher": _REFUSED,
    "jugs": _SLOW,
    "knight_swap": _REFUSED,
    "rubiks_cube": _REFUSED,
    "sokoban": _SLOW,
    "survo": _REFUSED,
    "zebra_puzzles": _SLOW,
})  # fmt: skip
"""Generators whose own curricula are not used, each with the reason: a difficulty leaves them as they are."""

COUNTED: Final = frozenset({"ab", "acre", "gsm_symbolic", "list_functions", "word_ladder"})
"""Generators whose datasets choose for each of their entries when they are made, or have a limited number of them."""

INCLUDED: Final = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "boxnet", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "circuit_logic", "codeio", "color_cube_rotation", "complex_arithmetic", "count_bits", "count_primes",
    "countdown", "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum", "dice", "emoji_mystery",
    "family_relationships", "figlet_font", "fraction_simplification", "futoshiki", "game_of_life", "gcd", "graph_color",
    "group_anagrams", "gsm_symbolic", "isomorphic_strings", "jugs", "kakurasu", "knight_swap", "knights_knaves",
    "largest_island", "lcm", "leg_counting", "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle",
    "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "n_queens", "needle_haystack", "number_filtering",
    "number_format", "number_sequence", "number_sorting", "palindrome_generation", "palindrome_partitioning",
    "path_star", "polynomial_equations", "pool_matrix", "power_function", "prime_factorization", "products",
    "puzzle24", "quantum_lock", "ransom_note", "rearc", "rectangle_count", "rotate_matrix", "rotten_oranges",
    "rubiks_cube", "rush_hour", "self_reference", "sentence_reordering", "shortest_path", "simple_equations",
    "simple_geometry", "sokoban", "spell_backward", "spiral_matrix", "string_insertion", "string_manipulation",
    "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism", "time_intervals", "tower_of_hanoi",
    "tsumego", "word_ladder", "word_sequence_reversal", "word_sorting", "zebra_puzzles",
)  # fmt: skip
"""Generators that are played."""
