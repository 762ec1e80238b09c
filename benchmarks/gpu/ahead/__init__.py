"""Kernels for a GPU that is not here: written down, compiled and packed before a short visit to a machine that has one.

=============  =======================================================================================
``pretend``    launching code runs on a CPU as it would on the GPU, but for the launches
``record``     which kernels a piece of code launches, each with the arguments it is compiled for
``spec``       one such kernel as a line of JSON, and back to what Triton compiles
``work``       the code whose kernels are worth compiling, by name
``compile``    compiles them into a cache in several processes; needs Triton, not PyTorch
``launchers``  Triton's C stubs, which it would build with a C compiler at the first launch
``store``      the cache where it is used: found under other paths, hits and misses counted
``pack``       everything that the other machine needs, in one folder below a size
``unpack``     there: kernels, extension and Python packages from that folder
=============  =======================================================================================

On the machine without a GPU ``python -m benchmarks.gpu.ahead.pack`` does all of it. On the one with a GPU a program
calls :func:`unpack.unpack`, and :func:`store.install` before it launches anything or starts processes that do.
"""
