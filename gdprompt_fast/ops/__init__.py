"""Twice-differentiable functions: each has a forward, a backward and a double backward of its
own.
"""
