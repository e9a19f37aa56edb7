"""Jobs over text: evaluation, extraction, dashboards, concepts, comparisons, tables of widths. No argument parsing."""
