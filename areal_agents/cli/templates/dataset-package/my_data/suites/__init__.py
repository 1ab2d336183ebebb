"""The suites of this package: a TOML file each, named as its entry point in pyproject.toml."""
