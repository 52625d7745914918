"""The demo: six post-training objectives on a real model's logits and hidden states, fused against naive, then a few
GRPO steps.

options       what the command line takes
head          the model's last layer as a matmul, and how it reads its logits out
model         loads the model; its hidden states, logits, log-probabilities and losses on sequences
questions     arithmetic with a verifier
sampling      completions of a policy
sequences     prompts and completions as the model reads them
sources       the six data sources of the paradigm's table
computations  fused, naive, fp32 and fp64: a loss and its gradients, from logits and from hidden states
compare       fused against naive against the fp64 oracle: value, gradients, time, memory
train         optimisation steps on the fused loss
report        the tables and summary.json
picture       the same as a picture
run           all of it in order
"""
