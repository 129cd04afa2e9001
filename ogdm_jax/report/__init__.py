"""The report of a training folder: findings collects what is measured, html renders the page."""
