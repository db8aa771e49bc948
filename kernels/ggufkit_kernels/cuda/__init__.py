"""The backend for NVIDIA GPUs: CUDA C++ kernels, compiled at first use through CuPy, which only `device.py` imports."""
