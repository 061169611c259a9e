"""Runs the best solutions as their owner would, beside llama.cpp's own `--fit`, and decides by measurement.

`candidates` says what is run, `prompts` what is asked, `phases` runs one candidate once, `watch` samples the
memory meanwhile, `outcomes` names what went wrong, `records` keeps every finished phase in `runs.jsonl`,
`lock` keeps the machine to one verify, `decide` is the rules, `run` puts rounds together.
"""
