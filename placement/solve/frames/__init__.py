"""A problem as the integers of CP-SAT's program, and what bounds it."""
