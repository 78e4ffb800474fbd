"""Pure planning core of Almanac: domain records, graph algorithms, dispatch, simulation, solving.

Importing this package loads nothing else; sub-packages are imported on use.
"""

__version__ = "0.1.0"
