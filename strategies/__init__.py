"""The algorithms, each a small core without Flower, and the strategies that put them to work.

Nothing is imported here: an import would make every core import Flower.
"""
