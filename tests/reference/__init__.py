"""Programs of others, written again, that the package is held against."""
