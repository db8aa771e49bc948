"""CPU backend: Numba kernels over packed weights."""
