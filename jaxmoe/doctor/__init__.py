"""This machine and installation: facts, and what they mean."""
