"""The parts of a run on Ray: engines, rollout workers and the learner.

Import the module that you need. Only those modules import ray.
"""
