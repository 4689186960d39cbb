"""The data of sites.

What a site reads (``sources``), who gets what in a simulation (``partitions``), and one site's
share of it (``site``).

This package hides Hugging Face's of the same name inside the app: never depend on that one.
"""
