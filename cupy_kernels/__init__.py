"""CUDA kernels, called through CuPy, that run the tiled programs of :mod:`simattn` on a GPU.

The package holds no kernels yet: run the programs on the CPU with :func:`simattn.run`.
"""

__all__: list[str] = []
