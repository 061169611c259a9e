"""Everything that runs a model and learns from it; records of runs are only ever appended to."""
