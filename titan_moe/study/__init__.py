"""Studies: a grid of training runs from one file, and the tables and figures that they make."""
