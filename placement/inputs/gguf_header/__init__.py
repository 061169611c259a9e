"""Turns GGUF files into their header facts, and facts into header-only GGUF files; never touches weights.

`read` holds the bounds-checked reader of one file, `split` joins the parts of a set, `write` makes sparse
files that llama.cpp can plan.
"""
