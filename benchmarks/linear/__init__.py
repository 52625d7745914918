"""The level of linear heads: providers get hidden states, [B, L, D], and the weight, [V, D], and give the gradients of
both."""
