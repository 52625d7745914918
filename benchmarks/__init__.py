"""The bench: every kernel here and its peers on the same work, side by side, held against fp64 before being timed."""
