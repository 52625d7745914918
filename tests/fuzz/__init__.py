"""A search for wrong values: random cases, each made from its number alone, held against fp64 and against themselves.

case           what a case is: every dimension, drawn from a seed and a number
inputs         its tensors: values, layouts, fields
expressions    random objectives of token scope, as trees of the functions that one-pass kernels support
losses         random sums of terms with their aggregations; objectives that look further than one token
naive          the truth: plain PyTorch in fp64, which shares nothing with the package
yardstick      how large an error may be: eager fp32 PyTorch with another rounding, several times
roundings      another rounding of every operation of an objective
operands       the logits of a head, exactly and by plain PyTorch
calls          how a case calls the package
answers        what is asked of what it returns
checks         a value against the truth, element by element
properties     what needs no truth: the same bits again, in another layout, for a row alone
search         cases one after another in processes, one for each instruction set

``python -m tests.fuzz --seconds 600`` searches, ``python -m tests.fuzz --seed 0 --case 17`` runs one case again.
"""
