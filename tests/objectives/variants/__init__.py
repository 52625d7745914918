"""The table of published objectives: how each is written here, and its formula written out naively in plain PyTorch."""
