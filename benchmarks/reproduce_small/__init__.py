"""``python -m benchmarks.reproduce_small``: does REFINE help a small model more than further SFT does?

From the tiny pretrained DeltaNet of this package, which finds needles: SFT and REFINE at equal updates, SFT once
more for as long as REFINE takes, then REFINE with other settings and the pair on text without needles. Arms of one
seed read the same documents in the same order. The learning rate of each side is chosen first, on other documents,
needles and another seed (``--select`` does that alone). Measured are needles at the training length and at two and
four times that, the nats of their answers, recall of several tokens over distance, and held-out loss. Differences
are taken item by item (the same item, the same seed); their 95 % intervals are percentiles of 4,000 resamplings of
items and of seeds.

``plan`` says what is run, ``runs`` trains, ``measures`` measures, ``table`` sums up; ``statement`` says what counts
as support and was written before the runs it is about; ``page`` writes ``docs/reproduce_small.md`` from the results
files.

Runs go on where they were stopped: each writes its measures when it is done, and finished ones are not repeated.
Within ``--minutes`` arms are run in the order of their worth; what was not run is said. Another ``--first_seed``
makes a run that shares nothing with the first but the model and the text that documents are drawn from.
"""
