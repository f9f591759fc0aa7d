"""How numbers are stored and how the simulated machine computes with them."""
