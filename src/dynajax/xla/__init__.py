"""What the learner needs of XLA: the bottom layer."""
