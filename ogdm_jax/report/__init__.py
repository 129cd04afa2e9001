"""A training folder as one HTML page."""
