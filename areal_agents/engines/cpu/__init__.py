"""The ``transformers`` engine: a lean decoder of the Llama family on processors."""
