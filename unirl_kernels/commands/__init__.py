"""``python -m unirl_kernels COMMAND``: the command line, on top of everything."""
