"""Turns run records into a machine's coefficients, with what is known of each and what is not.

`parameters` says which coefficients a machine has and what is believed of them without runs, `features` turns a
timing into what each coefficient costs in it, `fit` solves for them and `outliers` says which runs do not count,
`runs` finds the records that belong together, `models` what they are of and `timings` their times, `memory` learns
what the cards take beside the plan, `report` says what came out, `applied` changes the machine.
"""
