"""The bench: it measures every kernel and its peers on the same work, and compares each with fp64 before timing."""
