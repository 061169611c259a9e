"""The fastest placement of a model on a machine, and the command that runs it.

python examples/solve.py
"""

import placement as pl

model = pl.load_model("glm-flash")
machine = pl.load_machine("rtx4090-rtx5070ti")
result = pl.solve(model, machine, ctx_tokens=32_768, kv_type="q8_0")
if result.status == "INFEASIBLE":
    print(result.message)
else:
    best = result.best
    print(f"{best.speed.decode_tps:.1f} tokens per second, {best.headroom_mib:,.0f} MiB left")
    print(best.command)
