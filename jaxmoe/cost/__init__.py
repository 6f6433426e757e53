"""What hardware can do: the figures that speeds are held against."""
