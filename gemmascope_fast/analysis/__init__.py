"""Jobs over text: evaluation, extraction, dashboards, concepts, comparisons, tables of widths; no argument parsing."""
