"""Every use of what torch, Transformers, Lightning and Accelerate keep private.

Each has a test that fails when the library changes it.
"""
