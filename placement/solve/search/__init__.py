"""The search over configurations: which of them deserve CP-SAT, and what CP-SAT then proves.

A configuration fixes device order, ubatch, load mode and whether the host is used. A lower bound is known before
its frame is built, a better one from the frame's relaxation; configurations that cannot beat the best answer are
dropped by either. What is left is solved by the frame's segments and by CP-SAT below a cutoff.
"""
