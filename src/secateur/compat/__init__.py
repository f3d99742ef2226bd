"""All uses of private parts of torch, Transformers, Lightning and Accelerate.

Each has a test that fails if the library changes that part.
"""
