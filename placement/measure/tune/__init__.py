"""Closes the loop: solve, run the few placements that tell most, refit, solve again, until nothing better is likely.

`start` says what is known before, `proposals` what could be run, `loop` chooses and runs, `lines` is what is said.
"""
