"""Conversations as tokens: templates, tool calls, and models that are only talked to."""
