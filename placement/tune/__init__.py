"""Closes the loop: solve, run the few placements that tell most, refit, solve again, until nothing better is likely.

`start` says what is known before, `proposals` what could be run, `loop` chooses and runs, `lines` is what is said.
"""

from placement.tune.lines import Line, Tuned, what_was_learned
from placement.tune.loop import Tuning, tune

__all__ = ["Line", "Tuned", "Tuning", "tune", "what_was_learned"]
