"""Conversations as tokens: templates, control tokens and tool calls."""
