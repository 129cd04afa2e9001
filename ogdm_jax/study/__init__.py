"""Configurations compared over seeds: runs trains and measures them, figures says what follows."""
