"""Comparing callables that do the same work, fairly and on the machine at hand: what benchmarks/ and ``fastgan bench``
share. Import from the modules themselves.

`timing` runs them in turns, `comparison` makes the record of it, `facts` says what the numbers depend on; `textbook` is
the plain PyTorch that fastgan is compared with, and `workloads` are the command's four kinds of work.
"""
