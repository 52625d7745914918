"""What users of trainers and kernels reported against a fused loss, each report as a small case of this package.

Every test says what went wrong elsewhere and where that was reported. Numbers are worked by hand or by plain PyTorch.

test_values         rounding and extreme values
test_layouts        shapes, strides, sizes
test_masks          padding, prompts, whatever stands at ignored positions
test_normalisation  what losses are divided by
test_objectives     gradients of objectives
test_readouts       temperature, softcap, scale
test_heads          the weight of a head: tied, frozen, adapted, sharded, in chunks
test_autograd       second backward, memory, checkpointing, compilation, wrappers
test_misuse         what has to be an error
"""
