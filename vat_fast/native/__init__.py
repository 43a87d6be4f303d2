"""Operators compiled for the processor at hand: float32, training and frozen policies on CPUs."""
