"""The learner: packed forward passes, gradient steps and their checkpoints."""
