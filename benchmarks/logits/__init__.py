"""The level of logits: providers get [B, L, V], and give its gradient."""
