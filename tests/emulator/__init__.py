"""Runs rendered kernels on the CPU: no GPU, no nvcc.

``build`` compiles a rendered source with a host compiler against functional stand-ins for ``ptx.cuh`` and
``launch.cuh`` (``include/``) and the emulated machine (``machine.cpp``); ``harness`` calls the result with tensors.
"""
