"""What other programs load: ONNX, PyTorch's own archive, a Hugging Face folder and its model card."""
