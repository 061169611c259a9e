"""The search over ways to run a model: which of them deserve CP-SAT, and what CP-SAT then proves.

A way fixes device order, ubatch, load mode and whether the host is used. Its outlook bounds it before its frame is
built, the frame's relaxation then; ways that cannot beat the best answer are dropped by either. What is left is
settled by the frame's segments and by CP-SAT below a cutoff.
"""
