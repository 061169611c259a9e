"""Turns names, `models/*.toml` descriptions and GGUF files into a `Model`, and a `Model` into either file.

`rows` packs the tensor list into rows and back, `description` is the TOML text, `files` finds, reads, writes.
GGUF → description → header-only GGUF → description gives the same facts, the tensors in the same order.
"""
