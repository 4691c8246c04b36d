"""The report of a plan: one page with every number, chart and proof behind it. Needs Plotly and Jinja."""
