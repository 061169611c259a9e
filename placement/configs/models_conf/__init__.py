"""A user's models.conf in and out.

`models_conf` reads and writes the file without losing a byte, `find_model` maps a section to a model,
`review` says what each profile costs and what `place` would do, `apply` writes a choice into a section.
"""
