"""Pages, plots and tables from a benchmark's stored results."""
