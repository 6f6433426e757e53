"""The core that every other package stands on: recipes, layouts, names, weights, metrics, keys.

Imports nothing of jaxmoe outside this folder.
"""
