"""What muP is for: check that a model is width-invariant, search on small models, move what is found to a large one."""
