"""Measurements of codecs, models and tasks, with contact sheets beside the numbers."""
