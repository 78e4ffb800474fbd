"""Predictors learned from traces, and their snapshot into the table the runtime reads.

Traces and public datasets are read by `models.importers`, turned into features by
`models.features` (the same function for training and serving), fitted and judged by
`models.training`, and frozen by `models.snapshot`. Importing this package loads none of them.
"""
