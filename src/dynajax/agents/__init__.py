"""Agents: what acts, and learns from minibatches."""
