"""A short visit to a GPU: ``python -m benchmarks.gpu.report --out FOLDER``, or ``make gpu-report OUT=FOLDER``.

===============  ====================================================================================
``stages``       what is done, in which order, and how long each part may take
``runner``       runs every stage in a process of its own; a failing or hanging one never stops the next
``prepare``      what travelled with the checkout, put to use
``device``       the device that stages measure: the current GPU, or in a rehearsal this machine's CPU
``folder``       the files of a report: rows that are on disk at once, the log, the summary
``compile``      stage: kernels that were not compiled ahead, on all cores
``environment``  stage: what is installed, whether the extension works, ceilings of the device, host cost of a launch
``values``       stage: every kernel against the definition, with errors; the same bits in every run
``timing``       stages: training steps, layers, tile sizes
``kernels``      stage: the time of a layer, kernel by kernel
``tests``        stage: the tests that need a GPU
``simulator``    stage: the same federated run on the device and on the CPU
``sanitizer``    stage: compute-sanitizer over a run of every kernel
``summary``      the table at the end, from the rows alone
===============  ====================================================================================
"""
