"""Export models for other programs: ONNX, PyTorch's ``.pt2``, a Hugging Face folder with a model card."""
