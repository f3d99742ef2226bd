"""What every phase costs on large models: counted on paper, simulated, and checked on small ones."""
