"""Compare models on one page."""
