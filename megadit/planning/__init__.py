"""What a model and a machine allow, without running either."""
