"""Measures the engine: ``python -m benchmarks.gpu``, ``python -m benchmarks.compare`` and others.

``harness/`` has what all of them share, ``ops/`` measures passes, ``step/`` whole steps,
``studies/`` single questions; ``report/`` makes tables and figures of the rows in ``results/``.
"""
