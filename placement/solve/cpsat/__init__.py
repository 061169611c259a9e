"""The CP-SAT program: frames of integers in, a proven placement out. The only package that imports ortools."""
