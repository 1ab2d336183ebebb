"""The ``vllm`` engine: a process of ours around vLLM's AsyncLLM, and vLLM's own server."""
