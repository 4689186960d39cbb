"""The run configuration: typed sections, checked as a whole before any site starts work.

It lies above what it names (strategies, datasets, models), so that each list of allowed values stands where it is implemented.
"""
