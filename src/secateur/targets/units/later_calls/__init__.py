"""Checks of the later calls of a pruned module: does it still do what was proven?

One hook, `callcheck.CallCheck`, sees each call. `watchedvalues` knows the values that the code reads
(`reachable` finds that code), and `switched` the arguments that a trace has had. Where a value or an argument
is new, `operators` compares the call with one without it: which operators run where units are missing
(`axes`). Some functions count as one operator (`whole_calls`). `flagged` works in advance: while a plan is
applied, it tries the values that the code names for its flags.
"""
