"""Figures of one text and the page that shows them."""
