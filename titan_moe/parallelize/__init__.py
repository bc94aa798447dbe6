"""Meshes, the order in which parallelism is applied, and gradients over meshes."""
