"""The same choice for whatever starts the server: a module per consumer, which quotes by that one's rules.

A format that cannot say an argument, or a program that lacks its meaning, refuses it by name.
"""
