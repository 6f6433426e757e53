"""Runs as objects: opened, derived, asked and scored, whoever asks."""
