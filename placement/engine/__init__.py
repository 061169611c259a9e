"""The user's own llama.cpp as a function: found, described, asked for plans, served. Nothing else runs it.

Importing this package starts nothing and loads no slow library. What holds afterwards: every process it
started has ended, whatever ended the call; and the engine saw neither configuration files nor LLAMA_*
and GGML_* variables of the environment.
"""
