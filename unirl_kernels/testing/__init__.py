"""What an objective or a kernel is checked with: an oracle, and budgets for errors. Imports torch alone.

oracle      the published equations written out naively, in whatever dtype it is given: in fp64 the truth
budgets     how large an error may be: computed from the error of eager fp32, never chosen
"""
