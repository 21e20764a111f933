"""What training costs: operations, and times."""
