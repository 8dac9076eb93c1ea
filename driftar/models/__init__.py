"""Model families: the multi-step baselines and Drift-AR on top of them."""
