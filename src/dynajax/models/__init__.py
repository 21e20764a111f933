"""The learned model: its ensemble, its targets, its rollouts, and what of them is trusted."""
