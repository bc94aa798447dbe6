"""The decoder: attention, Mixture-of-Experts layers, routing and dispatch."""
