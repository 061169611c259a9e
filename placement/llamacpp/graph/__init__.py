"""The engine's compute graphs: ggml operations, the blocks models are made of, one row per architecture."""
