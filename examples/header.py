"""What a model is made of, from its description or the header of a GGUF file; weights are never read.

python examples/header.py [MODEL]
"""

import sys

import placement as pl

model = pl.load_model(sys.argv[1] if len(sys.argv) > 1 else "qwen3-30b-a3b-q4")
experts = sum(tensor.n_bytes for tensor in model.tensors if "_exps" in tensor.name)
print(f"{model.name}: {model.architecture}, {len(model.tensors)} tensors, {model.n_bytes / 2**30:.1f} GiB")
print(f"experts: {experts / model.n_bytes:.0%} of the bytes")
