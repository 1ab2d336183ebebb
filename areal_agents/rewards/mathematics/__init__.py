r"""A verifier of mathematical answers: is ``\frac{\sqrt{3}}{3}`` the number 1/√3, and is 5 cm 0.05 m?

extract ─▶ lexer ─▶ parser ─▶ tree ─▶ compare ─▶ (canonical | sets | value ─▶ numeric) ─▶ verdict
                                        pool ─▶ worker: all of it in a process that a deadline ends
"""
