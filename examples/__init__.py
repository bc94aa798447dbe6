"""Components of one's own, each in a file of its own: see docs/extending.md."""
