"""A learned reward model as a reward: a transformers folder of sequence classification, in a process of its own.

reward ─▶ server (a thread that batches what waits) ─▶ worker: template, forward pass, one logit ─▶ score
"""
