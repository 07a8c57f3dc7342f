"""The Triton backend: kernels, the routes between them, and their launchers."""
