"""What a pruned module looks into when it is called: whether it does what was proven.

One hook, `held.Held`, sees each call. `holders` says which values the code reads (found in the code by
`reachable`), and `switched` which arguments no trace has had. Where one is new, `operators` compares the call
with one as before: which operators run where units are missing (`axes`). Some functions count as one operator
(`whole_calls`). What is known in advance comes from `flagged`: it tries the values that code names for its
flags while a plan is applied.
"""
