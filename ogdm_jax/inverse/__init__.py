"""Measurements of images and what restores them."""
