"""Hot loops: a folder each with the function and its checks, a reference, a CPU (Numba) and a GPU (Triton) version, and a README."""
