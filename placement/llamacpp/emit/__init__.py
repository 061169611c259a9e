"""Assignments to engine arguments and back: `parse(emit_arguments(a))` resolves to `a`."""
