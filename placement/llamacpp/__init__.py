"""llama.cpp's own rules, mirrored: arguments, layers, graphs, splits, buffers. A rule names the C++ file it mirrors."""
