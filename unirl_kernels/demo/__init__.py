"""The demo: six post-training objectives on a real model's logits, fused against naive, then a few GRPO steps.

options     what the command line takes
model       loads the model; its logits and log-probabilities on sequences
questions   arithmetic with a verifier
sampling    completions of a policy
sequences   prompts and completions as the model reads them
sources     the six data sources of the paradigm's table
compare     fused against naive against the fp64 oracle: value, gradient, time, memory
train       optimisation steps on the fused loss
report      the table, the picture and summary.json
run         all of it in order
"""
