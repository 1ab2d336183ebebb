"""The questions: a file a split, a JSON object a line."""
