"""How fast a model writes at longer and longer contexts, and where it stops fitting.

python examples/contexts.py
"""

import placement as pl

model = pl.load_model("glm-flash-q4")
machine = pl.load_machine("rtx4090-rtx5070ti")
for ctx_tokens in (16_384, 131_072):
    result = pl.solve(model, machine, ctx_tokens=ctx_tokens, ubatch_tokens=512, time_limit_s=5.0)
    speed = f"{result.best.speed.decode_tps:.1f} t/s" if result.solutions else result.message
    print(f"{ctx_tokens:>9,} tokens: {speed}")
