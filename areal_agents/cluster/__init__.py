"""Engines, rollout workers and the learner on Ray; import the module you need. Only those modules import ray."""
