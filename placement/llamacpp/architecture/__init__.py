"""Turns a model's header into what placement needs: layers, caches, states, and where each tensor belongs.

`rules` holds what differs between architectures as data, `header` reads a header by a rule, `tensors` sorts
the file's tensors, and `records` are the facts that come out.
"""
