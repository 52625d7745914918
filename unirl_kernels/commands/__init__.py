"""The command line, ``python -m unirl_kernels COMMAND``; it may import every other module."""
