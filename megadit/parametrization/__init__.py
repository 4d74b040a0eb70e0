"""muP as data: base shapes, the parameter table, initialisation and optimizer groups."""
