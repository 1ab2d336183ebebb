"""A verifier of programs: they run in a sandbox, test by test, and what they must print never enters it.

submission ─▶ language: source file, compiler ─▶ one session ─▶ one process a test ─▶ output ─▶ compared on the host
"""
