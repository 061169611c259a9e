"""Exact placement of large language models on unequal GPUs and CPU for llama.cpp."""

__version__ = "0.1.0"
