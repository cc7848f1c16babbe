"""A run, or several, as one HTML page that opens offline."""
