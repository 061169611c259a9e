"""Advice on the arguments that people really write, each with its number: the cost, and what to write."""
