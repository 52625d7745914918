"""Operators of ``torch.ops.unirl``: schemas, shapes, gradients, and the dispatch to a backend.

Only tensors, numbers and strings cross an operator's boundary, in named groups.
"""
