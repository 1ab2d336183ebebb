"""Several engines as one: supervision, routing, growth and weight updates."""
