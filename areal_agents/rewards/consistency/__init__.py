"""Rewards without a gold answer: a group's answers that agree, and claims that do not contradict each other.

agreement ─▶ mathematics/pool, where answers are equal as mathematics
claims ─▶ decide ─▶ (statement: the grammar | simplex: exact arithmetic)
"""
