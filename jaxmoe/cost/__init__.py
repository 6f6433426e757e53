"""The cost of computing, what hardware can do: the figures that speeds are held against."""
