"""Inference engines behind the ``Engine`` contract. Import the module that you need."""
