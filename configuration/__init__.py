"""The run configuration: typed sections, checked as a whole before any site starts work.

It imports what it names (strategies, datasets, models), so that each list of allowed values stands
where these are implemented.
"""
