"""Benchmarks: what is measured, on which shapes, and the pictures of it.

Nothing here is imported by the library.
"""
