"""What threshold layers cost on one GPU, beside their rivals and the roofline: ``python -m benchmarks.gpu --help``.

=============  =======================================================================================
``shapes``     the layers: those of the four models, and of ImageNet ResNet-50
``roofline``   floors, ceilings and machine constants: arithmetic only
``layers``     one layer at one batch and density, and what every provider does with it
``steps``      whole training steps of a model, and of a cohort of clients: rivals, gates, rows
``cohort``     cohorts: one after the other by the masked trainer, and all at once by the packed kernels
``captured``   compact steps under a fixed plan, of one client and of a cohort, for CUDA graphs
``schedule``   which cells are measured, the most telling first
``clock``      CUDA events and graphs
``results``    the rows: columns, environment, appending to the CSV
``plots``      pictures, from the CSV alone
``targets``    what was aimed at, against the CSV
``host``       what the host does for one layer, without a GPU (``python -m benchmarks.gpu.host``)
``pretended``  the GPU that is not there for that
``choices``    the tables by which ``auto`` picks a backend, from the CSV alone
=============  =======================================================================================
"""
