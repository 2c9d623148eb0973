"""Implementations of the operators, one module each. They never import one another."""
