"""What arguments that someone wrote cost: memory on every device, speed, and what to change.

python examples/check.py
"""

import placement as pl

model = pl.load_model("glm-flash")
machine = pl.load_machine("rtx4090-rtx5070ti")
report = pl.check(model, machine, "-ngl 99 -ot exps=CPU -c 32768", is_compared=False)
for name, use in report.devices.items():
    print(f"{name}: {use.used_mib:,.0f} of {use.cap_mib:,.0f} MiB")
print(f"{report.speed.decode_tps:.1f} tokens per second; fits: {report.fits}")
for advice in report.advice:
    print(f"{advice.code}: {advice.message}")
