"""Inference engines behind the ``Engine`` contract; import the module you need."""
