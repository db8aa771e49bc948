"""Speed: the operations a network needs, and quantization, on CPU and GPU."""
