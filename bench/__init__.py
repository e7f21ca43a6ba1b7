"""The benchmark: `python -m tp_overlap_kernels.bench run | tune | plot | explain | one-batch | serving`.

It uses only what users of the package can import, checks every result against float64 before it is timed, and
compares with the ways people compute the same thing without this package.
"""
