"""Measurements, each with the pictures to look at beside the numbers."""
